"""One self-contained HTML page from the tables of a run; every text is escaped, plots work without a network."""

from pathlib import Path

import pandas as pd
from jinja2 import Environment, StrictUndefined

from qsae_kit.evaluate import headline
from qsae_kit.plots import reconstruction_figure, steering_figure
from qsae_kit.study import GOALS, StudyResult, verdict

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The unsteered rows and those at the frozen strength; of the random draws the one farthest from unsteered."""
    kept = [table[table["goal"] == "none"]]
    for goal in GOALS:
        frozen = table[(table["goal"] == goal) & table["chosen"]]
        kept.append(frozen[frozen["intervention"] != "random"])
        random = frozen[frozen["intervention"] == "random"]
        if not random.empty:
            base = table[(table["goal"] == "none") & (table["prompt_kind"] == random["prompt_kind"].iloc[0])][
                "refusal_rate"
            ].iloc[0]
            worst = random.loc[[(random["refusal_rate"] - base).abs().idxmax()]]
            kept.append(worst.assign(intervention=f"random (worst of {len(random)})"))
    return pd.concat(kept).drop(columns=["chosen", "draw"]).reset_index(drop=True)


def render_report(model_name: str, evaluation: pd.DataFrame, study: StudyResult) -> str:
    """The page as a string."""
    frozen = study.frozen
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return page.render(
        model=model_name,
        quantised=model_name == "smollm2",
        reconstruction=reconstruction_figure(evaluation, model_name).to_html(full_html=False, include_plotlyjs=True),
        evaluation=headline(evaluation).round(4).to_html(index=False, border=0, escape=True),
        verdicts=[verdict(study.table, goal) for goal in GOALS],
        site=frozen.candidate.hook_name,
        features=", ".join(map(str, frozen.candidate.chosen.features)),
        strength=f"{frozen.strength:g}",
        steering=steering_figure(study.table, model_name).to_html(full_html=False, include_plotlyjs=False),
        table=summary(study.table).round(3).to_html(index=False, border=0, escape=True),
        example_columns=list(study.examples.columns),
        examples=study.examples.to_numpy().tolist(),
    )
