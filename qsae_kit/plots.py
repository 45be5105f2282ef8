"""DataFrame -> plotly figure; no model in sight. Colours are Okabe and Ito's, distinct to colour-blind eyes."""

import html
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from qsae_kit.sites import parse_hook_name

KIND_COLORS = {"resid": "#0072B2", "mlp": "#D55E00", "attn": "#009E73"}
KIND_NAMES = {"resid": "residual stream", "mlp": "MLP output", "attn": "attention output"}
KIND_SYMBOLS = {"resid": "circle", "mlp": "square", "attn": "diamond"}
DASHES = ("solid", "dot", "dash", "dashdot")
# Drawn in this order; the wider one first, so that lines that coincide are both seen.
ARM_STYLE = {
    "difference_of_means": ("#E69F00", "difference of means", "square", 4),
    "features": ("#0072B2", "SAE features", "circle", 2),
}


def plot_text(text: str) -> str:
    """Text from a model, a file or a user, made safe to show in a plotly label: it reads as it was written."""
    escaped = html.escape(text, quote=False)
    return escaped.replace("$", "&#36;").replace("%{", "%&#123;").replace("\n", "\u21b5")


def style(figure: go.Figure, title: str, height: int = 420) -> go.Figure:
    figure.update_layout(
        title={"text": title, "x": 0.01, "y": 0.97, "yanchor": "top"}, template="plotly_white", height=height,
        margin={"l": 70, "r": 20, "t": 90, "b": 60}, legend={"orientation": "v"}, font={"size": 13},
    )  # fmt: skip
    return figure


def reconstruction_figure(evaluation: pd.DataFrame, model_name: str = "", category: str = "all") -> go.Figure:
    """Reconstruction loss per layer and site: FVU at the left, what splicing costs the model at the right.

    evaluation: the table of `evaluate.evaluate_suite`. The two panels need not agree: a site with a low FVU can cost the
    model much, and the other way round.
    """
    figure = make_subplots(1, 2, subplot_titles=("reconstruction", "spliced into the model"), horizontal_spacing=0.12)
    evaluation = evaluation[evaluation["category"] == category]
    variants = list(dict.fromkeys(evaluation["variant"]))
    for v, variant in enumerate(variants):
        for kind in KIND_COLORS:
            rows = evaluation[(evaluation["variant"] == variant) & (evaluation["kind"] == kind)].sort_values("layer")
            if rows.empty:
                continue
            for column, metric in ((1, "fvu"), (2, "delta_ce")):
                figure.add_trace(
                    go.Scatter(
                        x=rows["layer"].tolist(), y=rows[metric].tolist(), mode="lines+markers",
                        name=plot_text(f"{KIND_NAMES[kind]}, {variant}"), legendgroup=f"{variant}/{kind}",
                        showlegend=column == 1, line={"color": KIND_COLORS[kind], "dash": DASHES[v % len(DASHES)]},
                        marker={"symbol": KIND_SYMBOLS[kind], "size": 8}, customdata=rows["l0"].tolist(),
                        hovertemplate="layer %{x}: %{y:.4f}, L0 %{customdata:.1f}<extra></extra>",
                    ),
                    row=1, col=column,
                )  # fmt: skip
    figure.update_xaxes(title="layer", dtick=1 if evaluation["layer"].nunique() < 15 else None)
    figure.update_yaxes(title="fraction of variance unexplained", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="rise of cross-entropy (nats a token)", row=1, col=2)
    where = f" of {plot_text(model_name)}" if model_name else ""
    tokens = f"{int(evaluation['tokens'].max()):,} and {int(evaluation['spliced_tokens'].max()):,} held-out tokens"
    style(figure, f"Reconstruction loss per layer and site{where} ({tokens})", height=460)
    figure.update_layout(legend={"orientation": "h", "y": -0.2, "yanchor": "top"})
    return figure


def training_figure(log: pd.DataFrame, targets: Mapping[str, float] | None = None) -> go.Figure:
    """Loss, L0 and share of dead latents against rows trained on, a line a site.

    log: rows, variant, hook_name, loss, l0, dead (`watch.read_log`). targets: the L0 that each variant aims at.
    """
    figure = make_subplots(1, 3, subplot_titles=("loss", "L0", "dead latents"), horizontal_spacing=0.08)
    variants = list(dict.fromkeys(log["variant"]))
    named: set[tuple[str, str]] = set()
    for key, rows in log.groupby(["variant", "hook_name"], sort=False):
        variant, hook_name = map(str, key)  # type: ignore[call-overload]
        kind = parse_hook_name(hook_name).kind
        thin = rows.iloc[:: -max(1, len(rows) // 200)][::-1]  # the last one stays
        color = KIND_COLORS[kind]
        for column, metric in enumerate(("loss", "l0", "dead"), 1):
            figure.add_trace(
                go.Scatter(
                    x=thin["rows"].tolist(), y=thin[metric].tolist(), mode="lines", legendgroup=f"{variant}/{kind}",
                    name=plot_text(f"{KIND_NAMES[kind]}, {variant}"), showlegend=column == 1 and (variant, kind) not in named,
                    line={"color": color, "dash": DASHES[variants.index(variant) % len(DASHES)], "width": 1.5},
                    hovertemplate=plot_text(hook_name) + ": %{y:.4g} at %{x:,} rows<extra></extra>",
                ),
                row=1, col=column,
            )  # fmt: skip
        named.add((variant, kind))
    for target in sorted(set((targets or {}).values())):
        figure.add_hline(
            y=target, line={"dash": "dash", "color": "#777777", "width": 1}, annotation_text=f"target {target:g}", row=1, col=2
        )
    figure.update_xaxes(title="rows trained on")
    figure.update_yaxes(title="loss (shares of variance)", type="log", row=1, col=1)
    figure.update_yaxes(title="features a token", rangemode="tozero", row=1, col=2)
    figure.update_yaxes(title="share", rangemode="tozero", row=1, col=3)
    n_sites = log["hook_name"].nunique()
    style(figure, f"Training at {n_sites} site{'s' if n_sites > 1 else ''}", height=400)
    figure.update_layout(legend={"orientation": "h", "y": -0.32, "yanchor": "top"})
    return figure


def steering_figure(table: pd.DataFrame, model_name: str = "") -> go.Figure:
    """Refusal against strength for both goals, with 95 % intervals, broken answers and random controls.

    table: the table of `study.measure`.
    """
    kinds = table[table["target"]].groupby("goal")["prompt_kind"].first()
    goals = ("suppress", "induce")
    titles = [f"{goal}, on {plot_text(kinds[goal])} prompts" for goal in goals]
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.1, shared_yaxes=True)
    for column, goal in enumerate(goals, 1):
        base = table[(table["goal"] == "none") & (table["prompt_kind"] == kinds[goal])].iloc[0]
        arms = table[(table["goal"] == goal) & table["target"]]
        for arm, (color, label, symbol, width) in ARM_STYLE.items():
            own = arms[arms["intervention"] == arm].sort_values("strength")
            strengths = [0.0, *own["strength"]]
            rates = [base["refusal_rate"], *own["refusal_rate"]]
            above = [base["ci_high"] - rates[0], *(own["ci_high"] - own["refusal_rate"])]
            below = [rates[0] - base["ci_low"], *(own["refusal_rate"] - own["ci_low"])]
            figure.add_trace(
                go.Scatter(
                    x=strengths, y=rates, mode="lines+markers", name=f"refused: {label}", legendgroup=arm,
                    showlegend=column == 1, line={"color": color, "width": width},
                    marker={"symbol": symbol, "size": 5 + 2 * width},
                    error_y={"type": "data", "array": above, "arrayminus": below, "thickness": 1},
                ),
                row=1, col=column,
            )  # fmt: skip
            figure.add_trace(
                go.Scatter(
                    x=strengths, y=[base["broken_rate"], *own["broken_rate"]], mode="lines", name=f"broken: {label}",
                    legendgroup=f"{arm}-broken", showlegend=column == 1, line={"color": color, "dash": "dot", "width": width},
                ),
                row=1, col=column,
            )  # fmt: skip
        random = arms[arms["intervention"] == "random"]
        figure.add_trace(
            go.Scatter(
                x=random["strength"].tolist(), y=random["refusal_rate"].tolist(), mode="markers",
                name=f"refused: {len(random)} random draws", legendgroup="random", showlegend=column == 1,
                marker={"color": "#CC79A7", "symbol": "x", "size": 8},
            ),
            row=1, col=column,
        )  # fmt: skip
        chosen = arms.loc[arms["chosen"], "strength"]
        if not chosen.empty:
            figure.add_vline(x=float(chosen.iloc[0]), line={"dash": "dash", "color": "#777777", "width": 1}, row=1, col=column)
    figure.update_xaxes(title="strength (median norms; dashed: frozen)", rangemode="tozero")
    figure.update_yaxes(title="share of prompts (bars: 95 % interval)", range=[-0.04, 1.06], row=1, col=1)
    where = f" of {plot_text(model_name)}" if model_name else ""
    style(figure, f"Refusal steered both ways{where} (n = {int(table['n'].max())} a kind)", height=460)
    figure.update_layout(legend={"orientation": "h", "y": -0.2, "yanchor": "top"})
    return figure
