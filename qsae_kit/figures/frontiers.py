"""Figures of evaluations: sparsity against fidelity, baselines, concepts, what a level needs,
scaling. DataFrame -> plotly.
"""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from qsae_kit.figures.basic import DASHES, plot_text, style
from qsae_kit.metrics.reconstruction import wilson
from qsae_kit.metrics.scaling import ScalingFit
from qsae_kit.sites import in_order, look_of

FINDER_COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999999",
)
FINDER_SYMBOLS = tuple(("circle square diamond triangle-up x cross star triangle-down").split())


def frontier_figure(table: pd.DataFrame, model_name: str = "", category: str = "all") -> go.Figure:
    """Sparsity against fidelity: FVU at the left and the rise of cross-entropy at the right against
    L0, a line a site and width.

    table: the table of `pipelines.sweep.sweep`. Sites of a later layer are drawn darker.
    """
    table = table[table["category"] == category]
    figure = make_subplots(
        1, 2, subplot_titles=("reconstruction", "spliced into the model"), horizontal_spacing=0.12
    )
    widths = list(dict.fromkeys(table["expansion"]))
    n_layers, named = int(table["layer"].max()) + 1, set()
    for (site, expansion), rows in table.groupby(["site", "expansion"], sort=False):
        rows = rows.sort_values("l0")
        kind, layer = rows["kind"].iloc[0], int(rows["layer"].iloc[0])
        look = look_of(kind)
        for column, metric in ((1, "fvu"), (2, "delta_ce")):
            figure.add_trace(
                go.Scatter(
                    x=rows["l0"].tolist(),
                    y=rows[metric].tolist(),
                    mode="lines+markers",
                    name=plot_text(f"{look.label}, x{expansion:g}"),
                    legendgroup=f"{kind}/{expansion}",
                    showlegend=column == 1 and (kind, expansion) not in named,
                    opacity=0.35 + 0.65 * (layer + 1) / n_layers,
                    line={
                        "color": look.color,
                        "dash": DASHES[widths.index(expansion) % len(DASHES)],
                    },
                    marker={"symbol": look.symbol, "size": 7},
                    hovertemplate=plot_text(str(site)) + ": L0 %{x:.1f}, %{y:.4f}<extra></extra>",
                ),
                row=1,
                col=column,
            )
        named.add((kind, expansion))
    figure.update_xaxes(title="L0 (features a token)", type="log", dtick="D2", tickformat="~g")
    figure.update_yaxes(
        title="fraction of variance unexplained",
        type="log",
        dtick="D2",
        tickformat="~g",
        row=1,
        col=1,
    )
    figure.update_yaxes(title="rise of cross-entropy (nats a token)", row=1, col=2)
    where = f" of {plot_text(model_name)}" if model_name else ""
    tokens = (
        f"{int(table['tokens'].max()):,} and {int(table['spliced_tokens'].max()):,} held-out tokens"
    )
    style(figure, f"Sparsity against fidelity{where}, later layers darker ({tokens})", height=480)
    figure.update_layout(legend={"orientation": "h", "y": -0.2, "yanchor": "top"})
    return figure


def baseline_figure(
    evaluation: pd.DataFrame, model_name: str = "", category: str = "all"
) -> go.Figure:
    """Every variant and baseline, a mark a site: FVU at the left, the rise of cross-entropy at the
    right; bars are medians.

    evaluation: the table of `evaluate.score.score_suite` with baselines. Variants are in order of
        their median FVU.
    """
    table = evaluation[evaluation["category"] == category]
    order = table.groupby("variant")["fvu"].median().sort_values(ascending=False).index.tolist()
    figure = make_subplots(
        1,
        2,
        subplot_titles=("reconstruction", "spliced into the model"),
        shared_yaxes=True,
        horizontal_spacing=0.06,
    )
    labels = {variant: plot_text(variant) for variant in order}
    for column, metric in ((1, "fvu"), (2, "delta_ce")):
        for kind in in_order(table["kind"]):
            rows, look = table[table["kind"] == kind], look_of(kind)
            figure.add_trace(
                go.Scatter(
                    x=rows[metric].tolist(),
                    y=[labels[v] for v in rows["variant"]],
                    mode="markers",
                    name=plot_text(look.label),
                    legendgroup=kind,
                    showlegend=column == 1,
                    customdata=rows["site"].map(plot_text).tolist(),
                    marker={
                        "color": look.color,
                        "symbol": look.symbol,
                        "size": 8,
                        "opacity": 0.75,
                    },
                    hovertemplate="%{customdata}, %{y}: %{x:.4f}<extra></extra>",
                ),
                row=1,
                col=column,
            )
        medians = table.groupby("variant")[metric].median()
        figure.add_trace(
            go.Scatter(
                x=medians[order].tolist(),
                y=[labels[v] for v in order],
                mode="markers",
                name="median",
                legendgroup="median",
                showlegend=column == 1,
                marker={"symbol": "line-ns", "size": 18, "line": {"width": 3, "color": "#777777"}},
                hovertemplate="median of sites, %{y}: %{x:.4f}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    figure.update_yaxes(categoryorder="array", categoryarray=[labels[v] for v in order])
    figure.update_xaxes(
        title="fraction of variance unexplained",
        type="log",
        dtick="D2",
        tickformat="~g",
        row=1,
        col=1,
    )
    figure.update_xaxes(title="rise of cross-entropy (nats a token)", row=1, col=2)
    where = f" of {plot_text(model_name)}" if model_name else ""
    tokens = (
        f"{int(table['tokens'].max()):,} and {int(table['spliced_tokens'].max()):,} held-out tokens"
    )
    style(
        figure,
        f"SAEs beside what they have to beat, sites{where} ({tokens})",
        height=200 + 42 * len(order),
    )
    figure.update_layout(
        margin={"l": 170},
        legend={"orientation": "h", "y": -70 / (42 * len(order)), "yanchor": "top"},
    )
    return figure


def concept_figure(own: pd.DataFrame, tiers: str = "cdef") -> go.Figure:
    """Share of concepts recovered by a single feature, per tier and finder, with 95 % intervals.

    own: the table of `tiny.recovery.judge`; concepts that an n-gram gets are left out.
    """
    own = own[~own["easy"] & own["tier"].isin(list(tiers))]
    names = list(dict.fromkeys(own["finder"]))
    counts = own.groupby("tier")["concept"].nunique()
    figure = go.Figure()
    for i, finder in enumerate(names):
        rates = {
            t: wilson(int(some.sum()), len(some))
            for t, some in own[own["finder"] == finder].groupby("tier")["recovered"]
        }
        figure.add_trace(
            go.Bar(
                x=[f"({t}) n = {counts[t]}" for t in rates],
                y=[r.rate for r in rates.values()],
                name=plot_text(finder),
                marker={
                    "color": FINDER_COLORS[i % len(FINDER_COLORS)],
                    "pattern": {"shape": ("", "/", "\\", "x", ".", "-", "|", "+")[i % 8]},
                },
                error_y={
                    "type": "data",
                    "array": [r.high - r.rate for r in rates.values()],
                    "arrayminus": [r.rate - r.low for r in rates.values()],
                    "thickness": 1,
                },
                hovertemplate="%{x}: %{y:.2f}<extra>" + plot_text(finder) + "</extra>",
            )
        )
    figure.update_xaxes(
        title=(
            "tier of concepts: (c) sense, (d) unstated attribute, (e) computed value, (f) control"
            " state"
        )
    )
    figure.update_yaxes(title="share recovered (bars: 95 % interval)", range=[0, 1.05])
    return style(
        figure,
        "Concepts told by one feature: 80 % of the linear probe's F1, above permuted labels",
        height=440,
    )


def needed_l0_figure(
    needed: pd.DataFrame,
    metrics: tuple[str, str],
    levels: tuple[float, float],
    model_name: str = "",
) -> go.Figure:
    """The L0 that each site needs for a level of FVU and of delta CE, and the effective rank of its
    activations.

    needed: columns layer, kind, effective_rank and l0_at_<metric>_<level> for both
        (`evaluate.score.needed_l0`, merged).
    """
    panels = [
        (f"l0_at_{m}_{level:g}", f"L0 for {label} {level:g}")
        for m, level, label in zip(metrics, levels, ("FVU", "delta CE"), strict=True)
    ]
    panels.append(("effective_rank", "effective rank"))
    figure = make_subplots(
        1, 3, subplot_titles=[title for _, title in panels], horizontal_spacing=0.08
    )
    for column, (name, _) in enumerate(panels, 1):
        for kind in in_order(needed["kind"]):
            rows, look = needed[needed["kind"] == kind].sort_values("layer"), look_of(kind)
            figure.add_trace(
                go.Scatter(
                    x=rows["layer"].tolist(),
                    y=[None if pd.isna(v) else float(v) for v in rows[name]],
                    mode="lines+markers",
                    name=plot_text(look.label),
                    legendgroup=kind,
                    showlegend=column == 1,
                    line={"color": look.color},
                    marker={"symbol": look.symbol, "size": 8},
                    hovertemplate="layer %{x}: %{y:.1f}<extra></extra>",
                ),
                row=1,
                col=column,
            )
    figure.update_xaxes(title="layer", dtick=1 if needed["layer"].nunique() < 15 else None)
    for column, title in ((1, "features a token"), (2, "features a token"), (3, "directions")):
        figure.update_yaxes(title=title, rangemode="tozero", row=1, col=column)
    where = f" of {plot_text(model_name)}" if model_name else ""
    style(
        figure,
        f"What each site{where} needs for the same loss (gaps: outside what was trained)",
        height=420,
    )
    figure.update_layout(legend={"orientation": "h", "y": -0.22, "yanchor": "top"})
    return figure


def scaling_figure(table: pd.DataFrame, fit: ScalingFit, site: str, beyond: float = 8) -> go.Figure:
    """FVU against width for every number of tokens, with the fit, its 95 % interval and, dashed,
    its extrapolation.

    table: the rows that were fitted; beyond: how many times the largest width is drawn.
    """
    figure = go.Figure()
    for i, tokens in enumerate(sorted(set(table["trained_tokens"].astype(int)))):
        color = FINDER_COLORS[i % len(FINDER_COLORS)]
        rows = table[table["trained_tokens"] == tokens].sort_values("d_sae")
        figure.add_trace(
            go.Scatter(
                x=rows["d_sae"].tolist(),
                y=rows["fvu"].tolist(),
                mode="markers",
                name=f"{tokens:,} tokens",
                marker={
                    "color": color,
                    "symbol": FINDER_SYMBOLS[i % len(FINDER_SYMBOLS)],
                    "size": 9,
                },
            )
        )
        for dash, begin, end in (
            ("solid", *fit.widths),
            ("dash", fit.widths[1], fit.widths[1] * beyond),
        ):
            x = np.geomspace(begin, end, 25).tolist()
            curves = np.array([fit.fvu(width, tokens) for width in x])
            figure.add_trace(
                go.Scatter(
                    x=x + x[::-1],
                    y=[*curves[:, 2].tolist(), *curves[::-1, 1].tolist()],
                    fill="toself",
                    fillcolor=color,
                    opacity=0.15,
                    line={"width": 0},
                    hoverinfo="skip",
                    showlegend=False,
                )
            )
            figure.add_trace(
                go.Scatter(
                    x=x,
                    y=curves[:, 0].tolist(),
                    mode="lines",
                    line={"color": color, "dash": dash},
                    name="extrapolated",
                    showlegend=dash == "dash" and i == 0,
                    hovertemplate="d_sae %{x:.0f}: %{y:.4f}<extra></extra>",
                )
            )
    figure.update_xaxes(title="d_sae (features)", type="log", dtick="D2", tickformat="~g")
    figure.update_yaxes(
        title="fraction of variance unexplained", type="log", dtick="D2", tickformat="~g"
    )
    return style(
        figure,
        f"FVU against width at {plot_text(site)} (bands: 95 %, residuals resampled; dashed:"
        " extrapolation)",
        height=440,
    )


def recovery_by_frequency_figure(features: pd.DataFrame) -> go.Figure:
    """How well each known feature was found, against how often it fires.

    features: the table of `evaluate.synthetic.score`.
    """
    figure = make_subplots(1, 2, subplot_titles=("direction", "firing"), horizontal_spacing=0.1)
    for column, name, color in ((1, "cosine", FINDER_COLORS[0]), (2, "f1", FINDER_COLORS[1])):
        figure.add_trace(
            go.Scatter(
                x=features["frequency"].tolist(),
                y=features[name].tolist(),
                mode="markers",
                showlegend=False,
                marker={"color": color, "size": 6, "opacity": 0.6},
                customdata=features["feature"].tolist(),
                hovertemplate="feature %{customdata}: %{y:.3f} at %{x:.4f}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    figure.update_xaxes(
        title="share of rows that it fires on", type="log", dtick="D2", tickformat="~g"
    )
    figure.update_yaxes(title="|cosine| with its latent", range=[0, 1.05], row=1, col=1)
    figure.update_yaxes(title="F1 of firing", range=[0, 1.05], row=1, col=2)
    return style(
        figure, f"{len(features):,} known features, each with the latent matched to it", height=400
    )
