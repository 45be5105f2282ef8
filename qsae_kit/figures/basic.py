"""DataFrame -> plotly figure; no model in sight. Colours are Okabe and Ito's, distinct to
colour-blind eyes; those of the sites are in `sites`.
"""

import html
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from qsae_kit.sites import in_order, kind_named, look_of

DASHES = ("solid", "dot", "dash", "dashdot")
INK, GRID = "#767676", "rgba(127,127,127,0.3)"
"""Letters and lines that read on a white page and on a dark one."""
_AXIS = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID}
TEMPLATE = go.layout.Template(
    layout={
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": INK},
        "xaxis": {**_AXIS, "automargin": True},
        "yaxis": {**_AXIS, "automargin": True},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": INK, "activecolor": "#0072B2"},
    }
)
"""Of every figure: without a ground of its own, so that the page's is seen."""
KIND_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
KIND_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star")
# Drawn in this order; the wider one first, so that lines that coincide are both seen.
ARM_STYLE = {
    "difference_of_means": ("#E69F00", "difference of means", "square", 4),
    "difference_of_means_best": ("#009E73", "difference of means, its own best", "diamond", 3),
    "features": ("#0072B2", "SAE features", "circle", 2),
}


def capital(text: str) -> str:
    """The text with its first letter as a capital, the others as they are."""
    return f"{text[:1].upper()}{text[1:]}"


def plot_text(text: str) -> str:
    """Text from a model, a file or a user, made safe to show in a plotly label: it reads as it was
    written.
    """
    escaped = html.escape(text, quote=False)
    return escaped.replace("$", "&#36;").replace("%{", "%&#123;").replace("\n", "\u21b5")


def style(figure: go.Figure, title: str, height: int = 420) -> go.Figure:
    figure.update_layout(
        title={"text": title, "x": 0.01, "y": 0.97, "yanchor": "top"},
        template=TEMPLATE,
        height=height,
        margin={"l": 70, "r": 20, "t": 90, "b": 60},
        legend={"orientation": "v"},
        font={"size": 13},
    )
    return figure


def reconstruction_figure(
    evaluation: pd.DataFrame, model_name: str = "", category: str = "all"
) -> go.Figure:
    """Reconstruction loss per layer and site: FVU at the left, what splicing costs the model at the
    right.

    evaluation: the table of `evaluate.evaluation.evaluate_suite`. The two panels need not agree: a
    site with a low FVU can cost the model much, and the other way round.
    """
    figure = make_subplots(
        1, 2, subplot_titles=("reconstruction", "spliced into the model"), horizontal_spacing=0.12
    )
    evaluation = evaluation[evaluation["category"] == category]
    variants = list(dict.fromkeys(evaluation["variant"]))
    for v, variant in enumerate(variants):
        for kind in in_order(evaluation["kind"]):
            look = look_of(kind)
            rows = evaluation[
                (evaluation["variant"] == variant) & (evaluation["kind"] == kind)
            ].sort_values("layer")
            if rows.empty:
                continue
            for column, metric in ((1, "fvu"), (2, "delta_ce")):
                figure.add_trace(
                    go.Scatter(
                        x=rows["layer"].tolist(),
                        y=rows[metric].tolist(),
                        mode="lines+markers",
                        name=plot_text(f"{look.label}, {variant}"),
                        legendgroup=f"{variant}/{kind}",
                        showlegend=column == 1,
                        line={"color": look.color, "dash": DASHES[v % len(DASHES)]},
                        marker={"symbol": look.symbol, "size": 8},
                        customdata=rows["l0"].tolist(),
                        hovertemplate="layer %{x}: %{y:.4f}, L0 %{customdata:.1f}<extra></extra>",
                    ),
                    row=1,
                    col=column,
                )
    figure.update_xaxes(title="layer", dtick=1 if evaluation["layer"].nunique() < 15 else None)
    figure.update_yaxes(title="fraction of variance unexplained", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="rise of cross-entropy (nats a token)", row=1, col=2)
    where = f" of {plot_text(model_name)}" if model_name else ""
    tokens = (
        f"{int(evaluation['tokens'].max()):,} and {int(evaluation['spliced_tokens'].max()):,}"
        " held-out tokens"
    )
    style(figure, f"Reconstruction loss per layer and site{where} ({tokens})", height=460)
    figure.update_layout(legend={"orientation": "h", "y": -0.2, "yanchor": "top"})
    return figure


def training_figure(log: pd.DataFrame, targets: Mapping[str, float] | None = None) -> go.Figure:
    """Loss, L0 and share of dead latents against rows trained on, a line a site.

    log: rows, variant, hook_name, loss, l0, dead (`train.watch.read_log`). targets: the L0 that
        each variant aims at.
    """
    figure = make_subplots(
        1, 3, subplot_titles=("loss", "L0", "dead latents"), horizontal_spacing=0.08
    )
    variants = list(dict.fromkeys(log["variant"]))
    named: set[tuple[str, str]] = set()
    for key, rows in log.groupby(["variant", "hook_name"], sort=False):
        variant, hook_name = map(str, key)  # type: ignore[call-overload]
        kind = kind_named(hook_name)
        look = look_of(kind)
        thin = rows.iloc[:: -max(1, len(rows) // 200)][::-1]  # the last one stays
        for column, metric in enumerate(("loss", "l0", "dead"), 1):
            figure.add_trace(
                go.Scatter(
                    x=thin["rows"].tolist(),
                    y=thin[metric].tolist(),
                    mode="lines",
                    legendgroup=f"{variant}/{kind}",
                    name=plot_text(f"{look.label}, {variant}"),
                    showlegend=column == 1 and (variant, kind) not in named,
                    line={
                        "color": look.color,
                        "dash": DASHES[variants.index(variant) % len(DASHES)],
                        "width": 1.5,
                    },
                    hovertemplate=plot_text(hook_name) + ": %{y:.4g} at %{x:,} rows<extra></extra>",
                ),
                row=1,
                col=column,
            )
        named.add((variant, kind))
    for target in sorted(set((targets or {}).values())):
        figure.add_hline(
            y=target,
            line={"dash": "dash", "color": "#777777", "width": 1},
            annotation_text=f"target {target:g}",
            row=1,
            col=2,
        )
    figure.update_xaxes(title="rows trained on")
    figure.update_yaxes(title="loss (shares of variance)", type="log", row=1, col=1)
    figure.update_yaxes(title="features a token", rangemode="tozero", row=1, col=2)
    figure.update_yaxes(title="share", rangemode="tozero", row=1, col=3)
    n_sites = log["hook_name"].nunique()
    style(figure, f"Training at {n_sites} site{'s' if n_sites > 1 else ''}", height=400)
    figure.update_layout(legend={"orientation": "h", "y": -0.32, "yanchor": "top"})
    return figure


ARM_NAMES = {
    "none": "unsteered",
    "features": "SAE features",
    "difference_of_means": "difference of means",
    "difference_of_means_best": "difference of means, its own best",
    "wrong_sign": "features, wrong sign",
    "random": "random features, searched",
    "random_single": "random features",
    "noise": "random direction",
    "system_prompt": "system prompt",
    "frozen_decoder_sae": "frozen decoder",
    "soft_frozen_sae": "soft-frozen decoder",
}


def dose_figure(table: pd.DataFrame, target: str, model_name: str = "") -> go.Figure:
    """Log-odds of the behaviour's beginning against strength of both signs, for the target's
    prompts and the others.

    table: `StudyResult.table`. Bars: 95 % bootstrap interval over prompts.
    """
    rows = table[
        table["log_odds"].notna()
        & table["intervention"].isin(ARM_STYLE)
        & table["refusal_rate"].isna()
    ]
    clean = table[table["intervention"] == "none"]
    figure = go.Figure()
    kinds = [target, *(kind for kind in dict.fromkeys(rows["prompt_kind"]) if kind != target)]
    for arm, (color, label, symbol, width) in ARM_STYLE.items():
        for kind, dash in zip(kinds, DASHES, strict=False):
            points = pd.concat([rows[rows["intervention"] == arm], clean])
            points = points[points["prompt_kind"] == kind].sort_values("strength")
            figure.add_trace(
                go.Scatter(
                    x=points["strength"].tolist(),
                    y=points["log_odds"].tolist(),
                    mode="lines+markers",
                    name=plot_text(f"{label}, {kind}"),
                    line={"color": color, "dash": dash, "width": width},
                    marker={"symbol": symbol, "size": 4 + width},
                    error_y=interval_bars(points, "log_odds", "log_odds_low", "log_odds_high"),
                )
            )
    frozen = table.loc[(table["intervention"] == "features") & table["chosen"], "strength"]
    if not frozen.empty:
        figure.add_vline(
            x=float(frozen.iloc[0]),
            line={"dash": "dash", "color": "#777777", "width": 1},
            annotation_text="frozen",
        )
    figure.add_hline(y=0, line={"color": "#bbbbbb", "width": 1})
    figure.update_xaxes(title="strength (median norms towards the behaviour, or share taken away)")
    figure.update_yaxes(title="log-odds of its first tokens (nats)")
    n = int(rows["n"].max()) if len(rows) else 0
    style(
        figure,
        f"Dose and response{_of(model_name)} (n = {n} prompts a kind, one pass each; bars: 95 %"
        " interval)",
        height=460,
    )
    figure.update_layout(legend={"orientation": "h", "y": -0.2, "yanchor": "top"})
    return figure


def price_figure(table: pd.DataFrame, target: str, priced: str, model_name: str = "") -> go.Figure:
    """The rate of the behaviour on the target's prompts against the first-token KL on the priced
    ones, the field's unit: features, difference of means and random controls under the same
    intervention.

    table: `StudyResult.table`. Bars: 95 % intervals. The frozen points are drawn large.
    """
    keys = ["intervention", "strength"]
    dosed = table[table["refusal_rate"].isna() & (table["prompt_kind"] == priced)]
    costs = dosed.set_index(keys)[["kl_first", "kl_first_low", "kl_first_high"]]
    answered = table[table["refusal_rate"].notna() & (table["prompt_kind"] == target)]
    figure = go.Figure()
    clean = answered[answered["intervention"] == "none"]
    for arm, (color, label, symbol, width) in ARM_STYLE.items():
        own = answered[answered["intervention"] == arm].drop(columns=list(costs.columns))
        own = own.join(costs, on=keys, how="inner").sort_values("kl_first")
        figure.add_trace(
            go.Scatter(
                x=own["kl_first"].tolist(),
                y=own["refusal_rate"].tolist(),
                mode="lines+markers",
                name=label,
                line={"color": color, "width": width, "dash": "solid"},
                marker={
                    "symbol": symbol,
                    "size": [FROZEN_SIZE if frozen else PLAIN_SIZE for frozen in own["chosen"]],
                },
                error_y=interval_bars(own, "refusal_rate", "ci_low", "ci_high"),
                error_x=interval_bars(own, "kl_first", "kl_first_low", "kl_first_high"),
                customdata=own["strength"].tolist(),
                hovertemplate="%{y:.3f} at %{x:.3f} nats (%{customdata:.3g})<extra></extra>",
            )
        )
    for arm, color in (("random", "#777777"), ("noise", "#CC79A7")):
        drawn = answered[(answered["intervention"] == arm) & answered["chosen"]]
        if not drawn.empty:
            figure.add_trace(
                go.Box(
                    y=drawn["refusal_rate"].tolist(),
                    name=ARM_NAMES[arm],
                    marker={"color": color},
                    boxpoints="all",
                    xaxis="x2",
                )
            )
    if not clean.empty:
        figure.add_hline(
            y=float(clean["refusal_rate"].iloc[0]),
            line={"dash": "dash", "color": "#777777", "width": 1},
            annotation_text="unsteered",
        )
    figure.update_layout(
        xaxis={"title": f"KL at the first answer token of {plot_text(priced)} prompts (nats)"},
        xaxis2={"domain": [0.8, 1.0], "anchor": "y", "showticklabels": False},  # the legend's
    )
    figure.layout.xaxis.domain = [0.0, 0.76]
    figure.update_xaxes(rangemode="tozero", selector={"anchor": "y"})
    figure.update_yaxes(title=f"share of {plot_text(target)} prompts", range=[-0.03, 1.03])
    style(
        figure,
        f"Rate and price{_of(model_name)} (large: frozen; right: controls; bars: 95 % interval)",
        height=460,
    )
    figure.update_layout(legend={"orientation": "h", "y": -0.2, "yanchor": "top"})
    return figure


FROZEN_SIZE, PLAIN_SIZE = 14, 7
"""Of marks, in pixels."""


def interval_bars(rows: pd.DataFrame, value: str, low: str, high: str) -> dict[str, object]:
    """Plotly's error bars from the ends of intervals."""
    return {
        "type": "data",
        "array": (rows[high] - rows[value]).tolist(),
        "arrayminus": (rows[value] - rows[low]).tolist(),
        "thickness": 1,
        "width": 3,
    }


def outcome_figure(rows: pd.DataFrame, target: str, shown: str = "refused") -> go.Figure:
    """Three bars: the rate of the behaviour on the target's prompts, unsteered, with the features
    and with the strongest control, and 95 % intervals.

    rows: told, intervention, refusal_rate, ci_low, ci_high and n, a row a bar from the top
        (`steer.report.outcomes`).
    """
    colors = [
        {"none": "#999999", "features": "#0072B2"}.get(arm, "#E69F00")
        for arm in rows["intervention"]
    ]
    figure = go.Figure(
        go.Bar(
            x=rows["refusal_rate"].tolist(),
            y=[plot_text(told) for told in rows["told"]],
            orientation="h",
            marker={"color": colors},
            error_x=interval_bars(rows, "refusal_rate", "ci_low", "ci_high") | {"color": INK},
            text=[f"{100 * rate:.0f} %" for rate in rows["refusal_rate"]],
            textposition="none",
            customdata=rows["n"].tolist(),
            hovertemplate="%{text} of %{customdata} prompts<extra></extra>",
        )
    )
    for told, rate, high in zip(rows["told"], rows["refusal_rate"], rows["ci_high"], strict=True):
        figure.add_annotation(
            x=float(high),
            y=plot_text(told),
            text=f"<b>{100 * rate:.0f} %</b>",
            showarrow=False,
            xanchor="left",
            xshift=6,
        )
    figure.update_yaxes(autorange="reversed", title=None, showgrid=False)
    figure.update_xaxes(
        title=f"share of {plot_text(target)} prompts {plot_text(shown)} (lines: 95 % interval)",
        range=[0, 1.12],
        tickformat=".0%",
    )
    style(figure, capital(f"{plot_text(target)} prompts {plot_text(shown)}"), height=240)
    figure.update_layout(margin={"t": 50, "b": 50}, bargap=0.35, showlegend=False)
    return figure


def controls_figure(table: pd.DataFrame, target: str, model_name: str = "") -> go.Figure:
    """Rates at the frozen strength with 95 % intervals: the features and every control, on the
    target's prompts and others.
    """
    frozen = table[
        ((table["intervention"] == "none") | table["chosen"]) & table["refusal_rate"].notna()
    ]
    kinds = [target, *(kind for kind in dict.fromkeys(frozen["prompt_kind"]) if kind != target)]
    figure = go.Figure()
    looks = dict(
        zip(
            dict.fromkeys(table["prompt_kind"]),
            zip(KIND_COLORS, KIND_SYMBOLS, strict=True),
            strict=False,
        )
    )
    for i, (kind, (color, symbol)) in enumerate((kind, looks[kind]) for kind in kinds):
        own = frozen[frozen["prompt_kind"] == kind]
        names = [ARM_NAMES[arm] for arm in own["intervention"]]
        figure.add_trace(
            go.Scatter(
                x=own["refusal_rate"].tolist(),
                y=names,
                mode="markers",
                name=plot_text(f"shown, {kind}"),
                offsetgroup=str(i),
                marker={"color": color, "symbol": symbol, "size": 9},
                error_x={
                    "type": "data",
                    "array": (own["ci_high"] - own["refusal_rate"]).tolist(),
                    "arrayminus": (own["refusal_rate"] - own["ci_low"]).tolist(),
                    "thickness": 1,
                },
            )
        )
        if kind == target:
            figure.add_trace(
                go.Scatter(
                    x=own["broken_rate"].tolist(),
                    y=names,
                    mode="markers",
                    name=plot_text(f"broken, {kind}"),
                    marker={"color": "#D55E00", "symbol": "x-thin-open", "size": 9},
                )
            )
    order = [name for arm, name in ARM_NAMES.items() if arm in set(frozen["intervention"])]
    figure.update_yaxes(categoryorder="array", categoryarray=order[::-1])
    figure.update_xaxes(title="share of prompts (bars: 95 % Wilson interval)", range=[-0.03, 1.03])
    n = int(frozen["n"].max()) if len(frozen) else 0
    style(
        figure,
        f"At the frozen strength{_of(model_name)} (n up to {n} a kind)",
        height=120 + 42 * max(4, len(order)),
    )
    figure.update_layout(
        legend={"orientation": "h", "y": -0.22, "yanchor": "top"}, margin={"l": 150}
    )
    return figure


def detector_figure(curve: pd.DataFrame, model_name: str = "", log: bool = False) -> go.Figure:
    """True against false rate of a detector at every threshold, with the one in use marked and its
    95 % Wilson intervals.

    curve: `metrics.detection.detector_curve`. log: the false rate on a logarithmic axis, on which
    no false alarm at all stands at half a prompt.
    """
    n_true, n_false = int(curve["n_true"].iloc[0]), int(curve["n_false"].iloc[0])
    least = 0.5 / n_false if log else 0.0
    even = [least, *(share / 100 for share in range(1, 101) if share / 100 > least)]
    figure = go.Figure(
        [
            go.Scatter(
                x=even,
                y=even,
                mode="lines",
                name="chance",
                line={"color": "#777777", "dash": "dash", "width": 1},
                hoverinfo="skip",
            ),
            go.Scatter(
                x=curve["false_rate"].clip(lower=least).tolist(),
                y=curve["true_rate"].tolist(),
                mode="lines+markers",
                name="every threshold",
                line={"color": "#0072B2", "width": 2, "shape": "linear"},
                marker={"size": 4},
                customdata=curve["threshold"].tolist(),
                hovertemplate="above %{customdata:.4g}: %{y:.3f} at %{x:.3f}<extra></extra>",
            ),
        ]
    )
    for row in curve[curve["chosen"]].to_dict("records"):
        at = max(row["false_rate"], least)
        figure.add_trace(
            go.Scatter(
                x=[at],
                y=[row["true_rate"]],
                mode="markers",
                name=f"in use, above {row['threshold']:.3g}",
                marker={"color": "#D55E00", "symbol": "diamond", "size": 11},
                error_x={
                    "type": "data",
                    "array": [row["false_high"] - at],
                    "arrayminus": [at - max(row["false_low"], least)],
                    "thickness": 1,
                },
                error_y={
                    "type": "data",
                    "array": [row["true_high"] - row["true_rate"]],
                    "arrayminus": [row["true_rate"] - row["true_low"]],
                    "thickness": 1,
                },
                hovertemplate="%{y:.3f} at %{x:.3f}<extra></extra>",
            )
        )
    figure.update_xaxes(
        title=f"false rate (share of {n_false} other prompts)",
        type="log" if log else "linear",
        range=None if log else [-0.03, 1.03],
    )
    figure.update_yaxes(
        title=f"true rate (share of {n_true} prompts of the target)", range=[-0.03, 1.03]
    )
    style(
        figure,
        f"Detector{_of(model_name)}: area under the curve {curve['auc'].iloc[0]:.3f} (bars: 95 %"
        " Wilson interval)",
        height=460,
    )
    figure.update_layout(legend={"orientation": "h", "y": -0.2, "yanchor": "top"})
    return figure


def _of(model_name: str) -> str:
    return f" of {plot_text(model_name)}" if model_name else ""
