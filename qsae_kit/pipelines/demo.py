"""`qsae demo`: SAEs at the sites of a chat model, their evaluation, and refusal steered both ways,
in one go.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from qsae_kit.data.companions import companion_of
from qsae_kit.data.documents import (
    TokenStream,
    held_out_batches,
    repeat,
    split_documents,
)
from qsae_kit.data.readers import parse_source
from qsae_kit.data.records import Document, parse_record
from qsae_kit.data.rows import LiveRows, held_rows
from qsae_kit.data.streams import documents_of, read_by, stream_of
from qsae_kit.data.written import ANSWER_TOKENS, mixed_prompts, own_dialogues, self_asked
from qsae_kit.evaluate.evaluation import evaluate_suite
from qsae_kit.features.index import FeatureIndex, load_index
from qsae_kit.features.indexing import MANIFEST, IndexConfig, build_index
from qsae_kit.io.files import write_table, write_text
from qsae_kit.io.jsonfiles import lines_of, parse_json, read_text
from qsae_kit.io.progress import say
from qsae_kit.io.runs import Run, check_free, plain
from qsae_kit.io.writers import only_writer
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.pipelines.cards import PAGES, feature_cards, place_of, write_pages
from qsae_kit.sae.store import load_suite, save_suite
from qsae_kit.sae.suites import Suite
from qsae_kit.sites import expand_sites, parse_kinds, parse_layers
from qsae_kit.steer.behaviours import GOALS, Goal, refusal_prompts
from qsae_kit.steer.report import Card, render_report, write_study
from qsae_kit.steer.study import (
    JOURNAL,
    STUDY_FILES,
    StudyConfig,
    StudyResult,
    Unsteered,
    steering_study,
)
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.train.run import sae_files, train_saes


@dataclass(frozen=True)
class DemoConfig:
    """The sizes of a demo run."""

    variants: tuple[TrainConfig, ...]
    """Recipes; the first one's residual-stream SAEs are steered."""
    study: StudyConfig
    """Its goal is set to each of `goals` in turn."""
    goals: tuple[Goal, ...] = GOALS
    differently: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Goal -> fields of its study that differ from `study`."""
    sites: str = "resid,mlp,attn"
    layers: str = "all"
    n_selection: int = 24
    """Selection prompts of each kind."""
    n_evaluation: int = 200
    """Evaluation prompts of each kind."""
    n_harmless: int | None = None
    """Harmless and borderline evaluation prompts, where fewer are wanted."""
    evaluation_tokens: int = 16_000
    """Held-out tokens for reconstruction."""
    spliced_tokens: int = 2_500
    """Held-out tokens for splicing, two passes a site."""
    own_dialogues: int = 0
    """Dialogues that the model itself writes as training data; 0: those that it comes with, the
    bundled model's world.
    """
    answer_tokens: int = ANSWER_TOKENS
    """Tokens of an answer in them."""
    indexed_tokens: int = 40_000
    """Tokens that the index of the steered SAEs looks at."""
    held_rows: int = 0
    """Rows, at most, that are read once, kept in memory and trained on in several epochs; 0: every
    batch is read anew.
    """


class DemoResult(NamedTuple):
    """What a demo run made; the same is in its folder."""

    suite: Suite
    evaluation: pd.DataFrame
    studies: list[StudyResult]
    """One for each goal."""

    @property
    def table(self) -> pd.DataFrame:
        """The tables of the studies in one, as in steering.csv; the unsteered rows come once."""
        tables = [study.table for study in self.studies]
        return pd.concat(
            [tables[0], *(table[table["goal"] != "none"] for table in tables[1:])],
            ignore_index=True,
        )


DIFFERENTLY: Mapping[str, Mapping[str, Any]] = {
    "suppress": {"against": "harmless", "max_kl_first": 0.03},
    "induce": {
        "against": "harmless",
        "target": "harmless",
        "selective": False,
        "max_kl_first": 3.0,
    },
}
"""What a study of a model that refuses by itself is asked for, by the field's unit: refusals of
harmful requests are taken away at hardly any price on harmless ones, and harmless ones are refused.
"""
REFUSING_LAYERS = (0.6, 0.68)
"""Where in the depth of such a model features of refusing are looked for."""


def default_config(lm: HookedLM) -> DemoConfig:
    """Sizes that suit a model: the bundled one whole; one that refuses by itself at two layers
    behind its middle, in both directions; another at two layers before it.
    """
    if companion_of(lm).refuses:
        return _refusing_config(lm)
    few = StudyConfig(
        strengths=(0.3, 0.45, 0.6, 0.75, 0.9, 1.5),
        n_candidates=8,
        n_trials=2,
        search_prompts=8,
        dose_prompts=32,
        cost_prompts=16,
        n_facts=40,
    )
    if companion_of(lm).documents("training") is not None:
        lead = TrainConfig(
            "jumprelu", sparsity=16, expansion=8, tokens=40_960, batch=512, pool=16_384
        )
        study = replace(few, max_new_tokens=32, control_prompts=40)
        return DemoConfig(
            (lead, replace(lead, architecture="topk")), study, evaluation_tokens=12_000
        )
    lead = TrainConfig(
        "jumprelu", sparsity=8, expansion=4, tokens=49_152, batch=512, pool=8_192, lr=1e-3
    )
    layers = sorted({round(lm.n_layers * share) for share in (0.4, 0.5)})
    study = replace(
        few,
        strengths=(0.3, 0.4, 0.5, 0.6),
        max_new_tokens=28,
        cost_prompts=4,
        control_prompts=5,
        dose_prompts=8,
        search_prompts=4,
        n_facts=16,
        n_noise=2,
    )
    return DemoConfig(
        (lead, replace(lead, architecture="topk")),
        study,
        goals=("induce",),
        layers=",".join(map(str, layers)),
        n_selection=16,
        n_evaluation=100,
        n_harmless=32,
        evaluation_tokens=2_500,
        spliced_tokens=300,
        own_dialogues=240,
    )


def _refusing_config(lm: HookedLM) -> DemoConfig:
    lead = TrainConfig(
        "jumprelu", sparsity=30, expansion=4, tokens=400_000, batch=2048, pool=32_768
    )
    study = StudyConfig(
        strengths=(0.7, 0.85, 1.0, 1.2),
        shares=(0.5, 0.75, 1.0),
        n_features=3,
        n_candidates=6,
        n_trials=1,
        n_random=5,
        n_noise=2,
        control_prompts=25,
        dose_prompts=48,
        search_prompts=10,
        trial_prompts=20,
        cost_prompts=8,
        n_facts=24,
        max_new_tokens=24,
    )
    layers = sorted({round(lm.n_layers * share) for share in REFUSING_LAYERS})
    return DemoConfig(
        (lead,),
        study,
        differently=DIFFERENTLY,
        sites="resid",
        layers=",".join(map(str, layers)),
        n_selection=48,
        n_evaluation=80,
        n_harmless=32,
        evaluation_tokens=4_000,
        spliced_tokens=1_000,
        own_dialogues=540,
        answer_tokens=64,
        held_rows=120_000,
    )


def written_dialogues(lm: HookedLM, config: DemoConfig) -> list[Document]:
    """The dialogues that a model writes itself to be trained on; none where it comes with some."""
    if config.own_dialogues == 0:
        return []
    prompts = mixed_prompts(companion_of(lm), config.own_dialogues)
    if (missing := config.own_dialogues - len(prompts)) > 0:
        prompts += self_asked(lm, missing)
    return list(own_dialogues(lm, prompts, config.answer_tokens))


def demo_documents(
    lm: HookedLM, config: DemoConfig, written: Sequence[Document] = ()
) -> tuple[Callable[[], Iterator[Document]], Sequence[Document]]:
    """Training documents, the same at each call, and held-out ones; without end but where rows are
    held (`DemoConfig.held_rows`). written: `written_dialogues`.
    """
    if not written:
        held_out, endless = documents_of(lm, None, 100)
        return endless, held_out
    held_out, training = split_documents(written, len(written) // 6)
    rest = list(training)
    return (lambda: iter(rest)) if config.held_rows else (lambda: repeat(rest)), held_out


def run_demo(
    lm: HookedLM,
    out: str | Path,
    config: DemoConfig | None = None,
    data: str | None = None,
    bar: bool = True,
    fresh: bool = False,
) -> DemoResult:
    """Trains, evaluates, steers and indexes the SAEs that are steered; writes `suite/`,
    `features/`, evaluation.csv, steering.csv, a folder of each study (`steer.report.write_study`,
    and features.html) and report.html to `out`, which `pipelines.opened.write_notebook` makes a
    notebook of.

    data: a file or data set of chats to train on instead of the default. A demo that was cut off
    there goes on after the last stage that was done; fresh: it starts anew. Raises ValueError for
    sites or layers that do not exist, and for bad data, before anything is written, where the
    folder holds another demo and `fresh` is not given, or files with these names that are of none,
    and while another process writes there.
    """
    out = Path(out)
    with only_writer(out):
        return _run_demo(lm, out, config or default_config(lm), data, bar, fresh)


DEMO = "demo.run.json"
"""The record of a demo in its folder."""
FEATURES = "features"
"""The folder of its index."""
TABLES = ("evaluation.csv", "steering.csv", "report.html")


WRITTEN = "dialogues.jsonl"
"""What the model wrote to be trained on, behind a line that says which model and how much."""


def _keep(path: Path, author: Mapping[str, Any], written: Sequence[Document]) -> None:
    lines = [{"of": author}, *({"messages": chat} for chat in written)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _kept(path: Path, author: Mapping[str, Any]) -> list[Document]:
    """The dialogues of a demo that was cut off; none where they are of another model or number."""
    if not path.is_file():
        return []
    try:
        first, *rest = lines_of(read_text(path, "dialogues", DIALOGUES_LIMIT)) or [""]
        if parse_json(first, path.name) != {"of": plain(author)}:
            return []
        read = (parse_record(parse_json(line, path.name), path.name) for line in rest)
        return [document for document in read if document is not None]
    except ValueError:  # it is written anew
        return []


DIALOGUES_LIMIT = 2**28
"""Bytes of the dialogues of a demo."""


def _trained(
    lm: HookedLM, out: Path, config: DemoConfig, source: LiveRows, run: Run, bar: bool
) -> Suite:
    """The SAEs of a demo: those in its folder where they are noted there, else trained now."""
    if "train" in run.stages and run.as_it_was("train"):
        variants = [recipe.variant for recipe in config.variants]
        there = load_suite(out / "suite", lm.device, variants=variants, hook_names=source.sites)
        kept = {name: {site: there[name][site] for site in source.sites} for name in variants}
        return Suite(kept)
    run.again("train")
    run.again("index")
    rows = held_rows(source, config.held_rows) if config.held_rows else source
    suite = train_saes(rows, list(config.variants), bar=bar)
    save_suite(suite, out / "suite")
    run.done("train", _sae_names(config, source.sites))
    return suite


def _sae_names(config: DemoConfig, sites: Sequence[str]) -> list[str]:
    return [
        name
        for recipe in config.variants
        for site in sites
        for name in sae_files(recipe.variant, site)
    ]


def _run_demo(
    lm: HookedLM, out: Path, config: DemoConfig, data: str | None, bar: bool, fresh: bool
) -> DemoResult:
    names = [
        site.hook_name
        for site in expand_sites(
            parse_kinds(config.sites), parse_layers(config.layers, lm.n_layers)
        )
    ]
    given = refusal_prompts(lm, config.n_selection, config.n_evaluation)
    fewer = {
        kind: texts if kind == "harmful" else texts[: config.n_harmless]
        for kind, texts in given.evaluation.items()
    }
    author = {**lm.identity(), "n": config.own_dialogues, "tokens": config.answer_tokens}
    written: list[Document] = []
    if data is None:
        if not (out / DEMO).exists():
            check_free(out, [WRITTEN], "demo")
        written = _kept(out / WRITTEN, author) or written_dialogues(lm, config)
        training, held_out = demo_documents(lm, config, written)
    else:
        if parse_source(data).is_file:
            # a malformed line is better found now than in the middle of the training
            for _ in stream_of(lm, data)():
                pass
        held_out, training = documents_of(lm, data, 64)

    source = LiveRows(lm, names, TokenStream(lm, training))
    own = (*STUDY_FILES, PAGES, JOURNAL)
    studied = [f"{goal}/{name}" for goal in config.goals for name in own]
    files = [*TABLES, WRITTEN, *studied, *_sae_names(config, names)]
    # the first documents are read for it, before anything is written
    policy = source.origin.policy._asdict()
    identity = {**read_by(lm, data), "policy": policy, "demo": asdict(config)}
    run = Run(out, identity, files, name=DEMO, what="demo", fresh=fresh)
    if not run.path.exists():
        check_free(out, [f"{FEATURES}/{MANIFEST}"], "demo")
    run.begin()
    if written:
        _keep(out / WRITTEN, author, written)
    tell = say if bar else _quiet
    n = len(config.variants) * len(names)
    tell(f"1 of 4: training {n} SAEs at {len(names)} sites of {lm.model_name}")
    suite = _trained(lm, out, config, source, run, bar)
    run.again("tables")
    tell("2 of 4: evaluating them on held-out tokens")
    batches = held_out_batches(lm, held_out, config.evaluation_tokens)
    kept = [int(batch.keep.sum()) for batch in batches]
    n_spliced = next(
        (i + 1 for i in range(len(kept)) if sum(kept[: i + 1]) >= config.spliced_tokens), len(kept)
    )
    evaluation = evaluate_suite(lm, suite, batches, n_spliced, bar)
    write_table(evaluation, out / "evaluation.csv")
    lead = suite.only([config.variants[0].variant])
    unsteered = Unsteered()
    tell(f"3 of 4: steering refusal, {len(config.goals)} studies with controls")
    studies = [
        steering_study(
            lm,
            lead,
            given.selection,
            fewer,
            given.behaviour,
            replace(config.study, goal=goal, **config.differently.get(goal, {})),
            folder=out / goal,
            bar=bar,
            unsteered=unsteered,
        )
        for goal in config.goals
    ]
    result = DemoResult(suite, evaluation, studies)
    write_table(result.table, out / "steering.csv")
    tell("4 of 4: indexing what the steered features do, and the report")
    index = _indexed(lm, lead, studies, training, out, config, "index" not in run.stages, bar)
    run.done("index", [])
    for study in studies:
        folder = out / study.config.goal
        write_study(study, lead, lm, folder, partial(feature_cards, index=index))
        write_pages(study, index, folder)

    def cards(study: StudyResult) -> list[Card]:
        return feature_cards(study, index, f"{study.config.goal}/{PAGES}")

    write_text(out / "report.html", render_report(lm, evaluation, studies, cards))
    run.done("tables", [*TABLES, *studied])
    return result


def _quiet(_text: str) -> None:
    """Says nothing."""


def _indexed(
    lm: HookedLM,
    suite: Suite,
    studies: Sequence[StudyResult],
    documents: Callable[[], Iterator[Document]],
    out: Path,
    config: DemoConfig,
    fresh: bool,
    bar: bool,
) -> FeatureIndex:
    """The index of the SAEs that the studies steer with."""
    places = dict.fromkeys(place_of(study) for study in studies)
    steered = suite.only(hook_names=[place.hook_name for place in places])
    settings = IndexConfig(tokens=config.indexed_tokens)
    build_index(
        lm, steered, documents, out / FEATURES, settings, data="the demo's", fresh=fresh, bar=bar
    )
    return load_index(out / FEATURES, lm, steered)
