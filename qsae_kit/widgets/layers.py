"""LayerLoss: reconstruction loss and what splicing costs the model, per layer and site; a click
opens the site.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import traitlets as T
from plotly.subplots import make_subplots

from qsae_kit.figures.basic import INK, plot_text, reconstruction_figure, style
from qsae_kit.sae.suites import Place
from qsae_kit.sites import look_of
from qsae_kit.widgets.explorer import FeatureExplorer
from qsae_kit.widgets.plots import PlotView
from qsae_kit.widgets.widget import source


def site_frontier(
    evaluation: pd.DataFrame, hook_name: str, variant: str, category: str = "all"
) -> go.Figure:
    """Sparsity against fidelity at one site: FVU and the rise of cross-entropy against L0, a mark a
    variant, one of them larger.

    evaluation: the table of `evaluate.evaluation.evaluate_suite`.
    """
    rows = evaluation[
        (evaluation["category"] == category) & (evaluation["site"] == hook_name)
    ].sort_values("l0")
    look = look_of(rows["kind"].iloc[0])
    figure = make_subplots(
        1, 2, subplot_titles=("reconstruction", "spliced into the model"), horizontal_spacing=0.12
    )
    sizes = [16 if name == variant else 9 for name in rows["variant"]]
    for column, metric in ((1, "fvu"), (2, "delta_ce")):
        figure.add_trace(
            go.Scatter(
                x=rows["l0"].tolist(),
                y=rows[metric].tolist(),
                mode="markers",
                showlegend=False,
                marker={"color": look.color, "symbol": look.symbol, "size": sizes},
                text=[plot_text(name) for name in rows["variant"]],
                hovertemplate="%{text}: %{y:.4f} at L0 %{x:.1f}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    figure.update_xaxes(title="L0 (features a token)", rangemode="tozero")
    figure.update_yaxes(title="fraction of variance unexplained", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="rise of cross-entropy (nats a token)", row=1, col=2)
    layer = int(rows["layer"].iloc[0])
    return style(
        figure,
        f"Sparsity against fidelity, {plot_text(look.label)} of layer {layer} (large:"
        f" {plot_text(variant)})",
        height=340,
    )


def marked(figure: go.Figure, table: pd.DataFrame, place: Place) -> go.Figure:
    """A `reconstruction_figure` with a ring around the marks of one SAE."""
    chosen = table[(table["variant"] == place.variant) & (table["site"] == place.hook_name)]
    group = f"{place.variant}/{chosen['kind'].iloc[0]}"
    for column, metric in ((1, "fvu"), (2, "delta_ce")):
        figure.add_trace(
            go.Scatter(
                x=chosen["layer"].tolist(),
                y=chosen[metric].tolist(),
                mode="markers",
                name="chosen",
                legendgroup=group,
                showlegend=False,
                marker={"symbol": "circle-open", "size": 18, "color": INK, "line": {"width": 2}},
                hoverinfo="skip",
            ),
            row=1,
            col=column,
        )
    return figure


class LayerLoss(PlotView):
    """Reconstruction per layer and site over an evaluation, with the chosen site's sparsity and
    fidelity below.

    evaluation: the table of `evaluate.evaluation.evaluate_suite`. explorer: a `FeatureExplorer`
    that goes along to the chosen site. `selected` ("variant/hook name") is a trait to observe; a
    click on a mark sets it, and so does the menu.
    """

    _esm = source("layers.js", "plots.js")
    sites = T.List(T.Unicode()).tag(sync=True)
    selected = T.Unicode("").tag(sync=True)

    def __init__(
        self,
        evaluation: pd.DataFrame,
        model_name: str = "",
        explorer: FeatureExplorer | None = None,
        category: str = "all",
    ) -> None:
        table = evaluation[evaluation["category"] == category]
        if table.empty:
            raise ValueError(
                f"The evaluation has no rows of category {category!r}; it has"
                f" {', '.join(evaluation['category'].unique())}."
            )
        self.table, self.model_name, self.explorer, self.category = (
            table,
            model_name,
            explorer,
            category,
        )
        sites = [str(Place(*row)) for row in zip(table["variant"], table["site"], strict=True)]
        super().__init__(sites=sites)
        shown = explorer.sites[explorer.site] if explorer is not None else ""
        self.selected = shown if shown in sites else sites[0]

    @T.observe("selected")
    def _choose(self, _change: Any) -> None:
        if self.selected not in self.sites:
            self.status = f"There is no site {self.selected!r} in this evaluation."
            return
        place = Place.parse(self.selected)
        whole = reconstruction_figure(self.table, self.model_name, self.category)
        self.show(
            marked(whole, self.table, place),
            site_frontier(self.table, place.hook_name, place.variant, self.category),
        )
        if self.explorer is not None and self.selected in self.explorer.sites:
            self.explorer.site = self.explorer.sites.index(self.selected)

    def handle(self, message: Mapping[str, Any]) -> None:
        super().handle(message)
        if message.get("op") == "click":
            trace = self._figures[int(message["figure"])].data[int(message["trace"])]
            point = int(message["point"])
            if int(message["figure"]) == 0:
                variant, _, kind = trace.legendgroup.rpartition("/")
                rows = self.table[
                    (self.table["variant"] == variant)
                    & (self.table["kind"] == kind)
                    & (self.table["layer"] == trace.x[point])
                ]
            else:
                own = Place.parse(self.selected).hook_name
                rows = self.table[self.table["site"] == own].sort_values("l0").iloc[[point]]
            self.selected = str(Place(rows["variant"].iloc[0], rows["site"].iloc[0]))

    def to_frame(self) -> pd.DataFrame:
        """The evaluation's rows that are shown."""
        return self.table

    def __repr__(self) -> str:
        return f"LayerLoss({len(self.sites)} SAEs, selected {self.selected})"
