"""Suites in, tables out: `qsae eval`, `qsae index`, `qsae steer` and `qsae compare`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qsae_kit.cli import options, outputs

if TYPE_CHECKING:
    from qsae_kit.evaluate.score import Scores
    from qsae_kit.lm.hooked import HookedLM
    from qsae_kit.sae.suites import Suite
    from qsae_kit.steer.study import StudyResult


@dataclass(frozen=True)
class Asked:
    """What a study is asked beside `StudyConfig`."""

    n_selection: int = 72
    """Selection prompts of each kind, at most a third of a file."""
    n_evaluation: int = 300
    """Evaluation prompts of each kind, at most."""
    n_others: int | None = None
    """Evaluation prompts of kinds other than the first, where fewer are wanted."""
    bench_prompts: int | None = None
    """Prompts of each part of a bench, at most."""
    guard: str = ""
    """A guard model such as Qwen/Qwen3Guard-Gen-0.6B that judges the answers to benches."""
    data_folder: Path | None = None
    """Where downloaded data sets lie, each under its id, instead of the hub."""

    def __post_init__(self) -> None:
        for name in ("n_selection", "n_evaluation", "n_others", "bench_prompts"):
            value = getattr(self, name)
            options.refuse(
                value is not None and value < 1, f"{name}={value} was given; it must be at least 1."
            )


INDEX = options.Settings(
    ("qsae_kit.features.indexing:IndexConfig",), {"tokens": "--tokens", "seed": "--seed"}
)
STEER = options.Settings(
    ("qsae_kit.steer.study:StudyConfig", "qsae_kit.cli.judging:Asked"),
    {"goal": "--goal", "seed": "--seed"},
)
IndexSet = Annotated[list[str] | None, INDEX.option()]
SteerSet = Annotated[list[str] | None, STEER.option()]


def evaluate(
    suite: Annotated[
        list[str], typer.Argument(help="Folders of SAEs, or releases: several make one table.")
    ],
    model: options.OtherModel = None,
    at: options.Places = None,
    variant: options.Variants = None,
    data: options.Data = None,
    tokens: Annotated[str, typer.Option(help="Held-out tokens, such as 200k.")] = "20k",
    baselines: Annotated[
        str | None, typer.Option(help="A suite of what they have to beat: see qsae baselines.")
    ] = None,
    concepts: Annotated[
        bool, typer.Option("--concepts", help="Tiny only: which planted concepts are recovered.")
    ] = False,
    out: options.Out = Path("runs/eval"),
    fresh: options.Fresh = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    json_: options.Json = False,
) -> None:
    """Evaluate suites on held-out tokens of their model."""
    from qsae_kit.attach import attached
    from qsae_kit.data.streams import documents_of
    from qsae_kit.evaluate.score import score_suite
    from qsae_kit.sae.store import load_suite, load_suites, model_name_of
    from qsae_kit.tiny.scoring import score_planted

    n = options.count("--tokens", tokens)
    outputs.write_to(out)
    trained = load_suites(suite, variants=variant or (), hook_names=outputs.sites_at(at))
    to_beat = None if baselines is None else load_suite(baselines)
    lm = outputs.loaded(model or model_name_of(trained), dtype, device)
    trained = attached(lm, trained, lambda: documents_of(lm, data)[1]())
    scores = score_suite(
        lm,
        trained,
        data,
        n,
        out,
        baselines=to_beat,
        concepts=score_planted if concepts else None,
        fresh=fresh,
        bar=not json_,
    )
    if json_:
        typer.echo(scores.evaluation.to_json(orient="records"))
        return
    _say_scores(scores)
    typer.echo(f"Every table and figure: {out}")


def _say_scores(scores: "Scores") -> None:
    from qsae_kit.evaluate.score import smallest_differences
    from qsae_kit.figures.tables import in_short
    from qsae_kit.lm.chat import CATEGORIES

    table = scores.evaluation
    shown = "assistant" if (table["category"] == "assistant").any() else "all"
    of = "all tokens" if shown == "all" else f"{shown} tokens"
    typer.echo(f"On {of} (CE: nats a token)\n" + outputs.page(in_short(table, shown)))
    missing = [name for name in CATEGORIES if name not in set(table["category"])]
    if missing:
        typer.echo(f"No tokens: {', '.join(missing)}.")
    if scores.seeds is not None:
        smallest = ", ".join(
            f"{name} {value:.2g}" for name, value in smallest_differences(scores.seeds).items()
        )
        again = scores.seeds["found_again"].mean()
        typer.echo(
            f"A second seed finds {again:.0%} of the features again; smallest difference to be"
            f" told from it: {smallest}"
        )
    if scores.summary is not None and scores.interchange is not None:
        typer.echo("Concepts told by one feature\n" + outputs.page(scores.summary, 3))
        typer.echo("Features swapped between prompts\n" + outputs.page(scores.interchange, 3))


def index(
    suite: options.Source,
    model: options.OtherModel = None,
    at: options.Places = None,
    variant: options.Variants = None,
    data: options.Data = None,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens to look at, such as 1M (200k by default).")
    ] = None,
    seed: options.Seed = None,
    out: options.Out = Path("runs/features"),
    fresh: options.Fresh = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    set_: IndexSet = None,
    config: options.ConfigFile = None,
) -> None:
    """Index what every feature of a suite does: densities, examples, promoted tokens, neighbours.
    A cut-off build goes on.
    """
    from qsae_kit.attach import attached
    from qsae_kit.data.streams import named, stream_of
    from qsae_kit.features.index import load_index
    from qsae_kit.features.indexing import IndexConfig, build_index
    from qsae_kit.sae.store import load_suite, model_name_of

    n = options.count("--tokens", tokens) if tokens is not None else None
    wanted = IndexConfig(**INDEX.read(set_, config, tokens=n, seed=seed))
    outputs.write_to(out)
    trained = load_suite(suite, variants=variant or (), hook_names=outputs.sites_at(at))
    lm = outputs.loaded(model or model_name_of(trained), dtype, device)
    trained = attached(lm, trained, stream_of(lm, data))
    build_index(lm, trained, stream_of(lm, data), out, wanted, data=named(data), fresh=fresh)
    found = load_index(out)
    for place in found.places():
        figures = found.at(place).figures
        dead, dense = ((figures["warnings"].str.contains(w)).mean() for w in ("dead", "dense"))
        typer.echo(f"{place}: {len(figures):,} features, {dead:.1%} never fired, {dense:.1%} dense")
    typer.echo(
        f"{found.manifest['tokens']:,} tokens. Open it in a notebook:"
        f" qsae_kit.FeatureExplorer(qsae_kit.load_index({str(out)!r}))"
    )


def steer(
    suite: options.Source,
    model: options.OtherModel = None,
    behaviour: Annotated[
        str,
        typer.Option(
            help=(
                "refusal; on tiny also rule, language, verbosity, bias, false_fact or unknown; or a"
                " .py file of your own with PROMPTS and a judge, which is executed."
            )
        ),
    ] = "refusal",
    goal: Annotated[str | None, typer.Option(help="suppress (the default) or induce.")] = None,
    at: options.Places = None,
    variant: Annotated[
        str, typer.Option(help="Variant of the suite; its first one by default.")
    ] = "",
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "KIND=FILE with harmful, harmless or borderline prompts: one a line, a JSON list,"
                " or CSV/JSONL with prompt or instruction; may be given again."
            )
        ),
    ] = None,
    bench: Annotated[
        str,
        typer.Option(
            help=(
                "Measure the frozen edit on xstest, harmbench, jailbreakbench or orbench too, with"
                " commas between."
            )
        ),
    ] = "",
    small: Annotated[
        bool, typer.Option("--quick", help="Smaller searches, and costs on fewer prompts.")
    ] = False,
    seeds: Annotated[
        int,
        typer.Option(
            help=(
                "Answer the frozen arms again so often, drawn with Qwen's settings, each time under"
                " another seed."
            ),
            min=0,
        ),
    ] = 0,
    seed: options.Seed = None,
    out: options.Out = Path("runs/steer"),
    fresh: options.Fresh = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    set_: SteerSet = None,
    config: options.ConfigFile = None,
) -> None:
    """Choose features that steer a behaviour, and measure them with their price and controls. A
    cut-off study goes on; frozen_decoder variants of the suite are controls.
    """
    from qsae_kit.sae.store import load_suite, model_name_of
    from qsae_kit.steer.behaviours import study_prompts
    from qsae_kit.steer.repeats import over_seeds
    from qsae_kit.steer.steer_suite import CONDITIONAL, config_for, steer_suite, variants_to_load
    from qsae_kit.steer.study import StudyConfig, quick

    given = STEER.read(set_, config, goal=goal, seed=seed)
    asked = Asked(**options.of(Asked, given))
    study = replace(
        quick(StudyConfig()) if small else StudyConfig(), **options.of(StudyConfig, given)
    )
    own = _own_prompts(prompts, behaviour)
    asked_of = _prompts_of_benches(bench, asked, behaviour)
    outputs.write_to(out)
    places = outputs.sites_at(at)
    # the detector of a conditional edit may lie before them
    loaded = [] if study.conditional or behaviour in CONDITIONAL else places
    trained = load_suite(suite, variants=variants_to_load(variant), hook_names=loaded)
    lm = outputs.loaded(model or model_name_of(trained), dtype, device)
    made = study_prompts(lm, behaviour, asked.n_selection, asked.n_evaluation, study.seed, own)
    first = made.behaviour.kinds[0]
    evaluation = {
        kind: texts if kind == first else texts[: asked.n_others]
        for kind, texts in made.evaluation.items()
    }
    study = config_for(study, made)
    result = steer_suite(
        lm,
        trained,
        out,
        study,
        behaviour=made._replace(evaluation=evaluation),
        hook_names=_steered(lm, trained, variant, places),
        variant=variant,
        benches=asked_of,
        guard=asked.guard,
        guard_dtype=dtype,
        draws=seeds,
        on_study=lambda done: _say_study(done, out),
        fresh=fresh,
    )
    if result.drawn is not None:
        typer.echo(f"\nOver {seeds} seeds (seeds.csv)\n{outputs.page(over_seeds(result.drawn), 3)}")
    if result.benches is not None:
        typer.echo(f"\n{outputs.page(result.benches, 3)}\n\nBenches: {out / 'benches.csv'}")


def _own_prompts(entries: list[str] | None, behaviour: str) -> dict[str, list[str]]:
    """The prompts of --prompts KIND=FILE by kind."""
    from qsae_kit.data.prompts import KINDS, read_prompts

    files = options.files("--prompts", entries)
    for kind in files:
        options.refuse(
            kind not in KINDS,
            f"--prompts {kind}=... was given; the kinds are {', '.join(KINDS)}.",
        )
    options.refuse(
        bool(files) and behaviour != "refusal",
        "--prompts belongs to refusal; leave it or --behaviour out.",
    )
    return {kind: read_prompts(path) for kind, path in files.items()}


def _prompts_of_benches(
    bench: str, asked: Asked, behaviour: str
) -> dict[str, dict[str, list[str]]]:
    """The prompts of --bench: bench -> part -> prompts."""
    from qsae_kit.data.benchmarks import read_bench

    names = [name.strip() for name in bench.split(",") if name.strip()]
    options.refuse(
        not names and bool(asked.guard or asked.data_folder or asked.bench_prompts),
        "guard, bench_prompts and data_folder belong to --bench; give one.",
    )
    options.refuse(
        bool(names) and behaviour != "refusal",
        f"--bench measures refusal; leave it or --behaviour {behaviour} out.",
    )
    return {name: read_bench(name, asked.bench_prompts, asked.data_folder) for name in names}


def _say_study(study: "StudyResult", out: Path) -> None:
    typer.echo(outputs.study_page(study))
    typer.echo(f"\nReport: {out / 'report.html'}\nThe edit: {out / 'steering.json'}")
    typer.echo("\n" + outputs.wrapped(study.verdict))
    typer.echo("\n" + outputs.wrapped(study.in_words))


def _steered(lm: "HookedLM", trained: "Suite", variant: str, places: list[str]) -> list[str]:
    """The sites of the steered variant that patterns ask for; ValueError where it has none."""
    from fnmatch import fnmatchcase

    from qsae_kit.steer.study.steps import steered_sites

    variant, _ = steered_sites(lm, trained, variant)
    known = list(trained[variant])
    names = [name for name in known if any(fnmatchcase(name, pattern) for pattern in places)]
    options.refuse(
        bool(places) and not names,
        f"--at asks for {', '.join(places)}, where {variant} has no SAE; it has"
        f" {', '.join(known)}.",
    )
    return names


def compare(
    suite: options.Source,
    first: Annotated[str, typer.Argument(help="A model, such as a base model.")],
    second: Annotated[str, typer.Argument(help="Another one that was tuned from it.")],
    at: options.Places = None,
    variant: options.Variants = None,
    data: options.Data = None,
    tokens: Annotated[str, typer.Option(help="Tokens that both read, such as 200k.")] = "20k",
    out: options.Out = Path("runs/compare"),
    dtype: options.Dtype = "auto",
    device: options.Device = None,
) -> None:
    """Apply one suite to two models: the gap in reconstruction at each site, which features fire
    more or less, and whether the second one's weights were edited, and along what.
    """
    from qsae_kit.attach import measure, policy_of
    from qsae_kit.audit.edited import was_edited
    from qsae_kit.data.documents import held_out_batches
    from qsae_kit.data.streams import documents_of
    from qsae_kit.evaluate.modeldiff import compare_models, most_changed
    from qsae_kit.io.files import write_table
    from qsae_kit.sae.store import load_suite

    n = options.count("--tokens", tokens)
    outputs.write_to(out)
    trained = load_suite(suite, variants=variant or (), hook_names=outputs.sites_at(at))
    pair = outputs.loaded(first, dtype, device), outputs.loaded(second, dtype, device)
    held_out, others = documents_of(pair[1], data)
    measure(pair[1], trained, others)
    policy = policy_of(pair[1], trained)
    found = compare_models(*pair, trained, held_out_batches(pair[1], held_out, n, policy))
    write_table(found.sites, out / "sites.csv")
    write_table(found.features, out / "features.parquet")
    typer.echo(outputs.page(found.sites[found.sites["category"] == "all"]))
    typer.echo(
        "\nFeatures whose density changed most:\n" + outputs.page(most_changed(found.features))
    )
    weights = was_edited(*pair, trained, bar=True)
    write_table(weights.tensors, out / "weights.csv")
    write_table(weights.features, out / "directions.csv")
    typer.echo("\n" + outputs.wrapped(weights.in_words))
    typer.echo(f"\nTables in {out}: sites.csv, features.parquet, weights.csv, directions.csv")
