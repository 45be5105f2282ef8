"""What carried an answer, and what a mend changed and what not, as figures."""

import pandas as pd
import plotly.graph_objects as go

from qsae_kit.figures.basic import INK, interval_bars, plot_text, style

ROLE_COLORS = {
    "target": "#D55E00",
    "control": "#009E73",
    "neighbour": "#0072B2",
    "unrelated": "#56B4E9",
}
BEFORE_SIZE, AFTER_SIZE = 13, 9
"""Of marks, in pixels: both are seen where they coincide."""


def proof_figure(table: pd.DataFrame, model_name: str = "") -> go.Figure:
    """Shares of right answers before and after, a line a group, with 95 % intervals.

    table: of `audit.proof.Proof`.
    """
    names = [plot_text(f"{row.group} (n = {row.n})") for row in table.itertuples()]
    figure = go.Figure()
    for name, before, after in zip(names, table["before"], table["after"], strict=True):
        figure.add_trace(
            go.Scatter(
                x=[before, after],
                y=[name, name],
                mode="lines",
                line={"color": INK, "width": 1},
                hoverinfo="skip",
                showlegend=False,
            )
        )
    figure.add_trace(
        go.Scatter(
            x=table["before"].tolist(),
            y=names,
            mode="markers",
            name="before",
            marker={"color": INK, "symbol": "circle-open", "size": BEFORE_SIZE},
            error_x=interval_bars(table, "before", "before_low", "before_high"),
            hovertemplate="before: %{x:.1%}<extra></extra>",
        )
    )
    for role, color in ROLE_COLORS.items():
        own = table["role"] == role
        if own.any():
            figure.add_trace(
                go.Scatter(
                    x=table.loc[own, "after"].tolist(),
                    y=[name for name, mine in zip(names, own, strict=True) if mine],
                    mode="markers",
                    name=f"after, {role}",
                    marker={"color": color, "size": AFTER_SIZE},
                    error_x=interval_bars(table[own], "after", "after_low", "after_high"),
                    hovertemplate="after: %{x:.1%}<extra></extra>",
                )
            )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(title="share of right answers (bars: 95 % interval)", range=[-0.03, 1.03])
    figure.update_xaxes(tickformat=".0%")
    of = f" of {plot_text(model_name)}" if model_name else ""
    style(figure, f"Before and after the mend{of}", height=190 + 34 * max(2, len(table)))
    figure.update_layout(legend={"orientation": "h", "y": -0.35, "yanchor": "top"})
    return figure


MORE, LESS = "#0072B2", "#D55E00"
WIDEST, THINNEST = 6.0, 0.5
"""Of lines, in pixels."""
ASIDE = 0.17
"""Of the distance of two sites: between features of one token."""
DRAWN = 24
"""Edges, the strongest ones."""


def edges_figure(nodes: pd.DataFrame, edges: pd.DataFrame) -> go.Figure:
    """Features where they contribute most, a row a site, and the edges between them: blue ones
    make the later feature more, red ones less active; wider is stronger.

    nodes, edges: of `audit.edges.Edges`.
    """
    sites = [str(site) for site in nodes["site"]]
    levels = {site: n for n, site in enumerate(sorted(set(sites)))}
    beside = nodes.groupby(["site", "position"]).cumcount().tolist()
    x = [float(at) for at in nodes["position"]]
    y = [levels[site] + ASIDE * n for site, n in zip(sites, beside, strict=True)]
    figure = go.Figure()
    lines = edges[["source", "target", "weight"]].head(DRAWN).to_numpy().tolist()
    most = max((abs(weight) for _, _, weight in lines), default=1.0)
    for source, target, weight in lines:
        ends = (int(source), int(target))
        figure.add_trace(
            go.Scatter(
                x=[x[end] for end in ends],
                y=[y[end] for end in ends],
                mode="lines",
                line={
                    "color": MORE if weight > 0 else LESS,
                    "width": max(THINNEST, WIDEST * abs(weight) / most),
                },
                opacity=0.6,
                hovertext=f"{weight:+.2f}",
                hoverinfo="text",
                showlegend=False,
            )
        )
    figure.add_trace(
        go.Scatter(
            x=x,
            y=y,
            mode="markers+text",
            marker={"size": 10, "color": INK},
            text=[str(feature) for feature in nodes["feature"]],
            textposition="middle right",
            customdata=[plot_text(repr(token)) for token in nodes["token"]],
            hovertemplate="feature %{text} at %{customdata}<extra></extra>",
            showlegend=False,
        )
    )
    tokens = dict(zip(nodes["position"], nodes["token"], strict=True))
    figure.update_xaxes(
        tickvals=list(tokens), ticktext=[plot_text(repr(token)) for token in tokens.values()]
    )
    figure.update_yaxes(tickvals=list(levels.values()), ticktext=list(map(plot_text, levels)))
    style(figure, "Which features made which", height=180 + 130 * len(levels))
    figure.update_layout(margin={"l": 170})
    return figure
