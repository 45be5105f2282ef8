"""What an index knows of the features that a study chose: cards for its report, and their pages."""

from pathlib import Path

import pandas as pd

from qsae_kit.features.index import FeatureIndex
from qsae_kit.figures.pages import visible
from qsae_kit.sae.suites import Feature, Place
from qsae_kit.steer.report import Card
from qsae_kit.steer.study import StudyResult
from qsae_kit.widgets import FeatureExplorer
from qsae_kit.widgets.explorer import OFFLINE_PAGES

PAGES = "features.html"
"""The explorer of a study's site as a page of its own, in the study's folder."""
SHOWN_EXAMPLES, SHOWN_TOKENS = 3, 6


def place_of(study: StudyResult) -> Place:
    """The SAE whose features were chosen."""
    return Place(study.headline["variant"], study.headline["site"])


def feature_cards(study: StudyResult, index: FeatureIndex, pages: str = PAGES) -> list[Card]:
    """A card a chosen feature, in the study's order; none where the index lacks the SAE.

    pages: address of the page that `write_pages` wrote, "" without one.
    """
    place = place_of(study)
    if place not in index.places():
        return []
    own = index.at(place)
    cards = []
    for number, weight in zip(study.headline["features"], study.headline["weights"], strict=True):
        page = own.page(number)
        largest = max(float(page.figures["max"]), 1e-12)
        cards.append(
            Card(
                number,
                visible(index.name_of(Feature(place, number))),
                weight,
                float(page.figures["density"]),
                [visible(token) for token, _ in page.promoted[:SHOWN_TOKENS]],
                [example.shares(largest) for example in page.top[:SHOWN_EXAMPLES]],
                f"{pages}#{number}" if pages else "",
            )
        )
    return cards


def write_pages(study: StudyResult, index: FeatureIndex, folder: Path) -> Path:
    """Writes the explorer of the study's SAE as a page of its own: the chosen features, and those
    that are worth a look beside them.
    """
    place, chosen = place_of(study), list(study.headline["features"])
    own = index.at(place)
    explorer = FeatureExplorer(index, place.hook_name, place.variant, chosen[0])
    others = [int(i) for i in own.by_interest if i not in chosen]
    kept = [*chosen, *others[: OFFLINE_PAGES - len(chosen)]]
    explorer.show(pd.DataFrame(index=kept), "of this page: the chosen ones and the strongest")
    explorer.to_html(folder / PAGES)
    explorer.close()
    return folder / PAGES
