"""A model's fault and its mend: `qsae audit` and `qsae patch`."""

from pathlib import Path
from typing import Annotated

import typer

from qsae_kit.cli import options, outputs

CHECKED = 16
"""Prompts of a kind on which a patched checkpoint is compared with the steered model."""

INDEX = "features"
"""What a run calls the index that lies beside its suite."""


def audit(
    suite: options.Source,
    chats: Annotated[
        list[str] | None,
        typer.Argument(help="Texts, or files or folders of chats, with --data's options."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="A user's turn; also a text that is called like a file.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="To the prompt; the model's own, greedy one by default.")
    ] = None,
    instead: Annotated[
        str | None,
        typer.Option(help="Another answer: asked is why not this one, where the two part."),
    ] = None,
    token: Annotated[
        int | None,
        typer.Option(
            help=(
                "The token of the answer that is asked about, from 0; the first that the model was"
                " in doubt of by default."
            ),
            min=0,
        ),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(help="Of the features; the one beside the suite by default, if there is one."),
    ] = None,
    by: Annotated[
        str, typer.Option(help="gradient, what each feature does alone, or path, its share.")
    ] = "gradient",
    top: Annotated[int, typer.Option(help="Features that are ablated.", min=1)] = 20,
    draws: Annotated[int, typer.Option(help="Sets of random features.", min=2)] = 20,
    model: options.OtherModel = None,
    at: options.Places = None,
    variant: Annotated[
        str | None, typer.Option(help="Of a suite of several; its first by default.")
    ] = None,
    data: options.Data = None,
    seed: options.Seed = None,
    out: options.OutFile = Path("audit.html"),
    dtype: options.Dtype = "float32",
    device: options.Device = None,
) -> None:
    """Find the features that carried an answer, with controls and what no feature explains: one
    page that needs no network. A suite that names no median norms takes them from --data. Effects
    are small differences: the model is computed in float32.
    """
    from qsae_kit.attach import attached
    from qsae_kit.audit.attribution import checked_by
    from qsae_kit.audit.audit_page import write_audit
    from qsae_kit.audit.auditing import Asked, AuditConfig, asked, audit_answers, is_indexed
    from qsae_kit.data.readers import FILES, is_source, read_documents
    from qsae_kit.data.streams import stream_of
    from qsae_kit.features.index import load_index
    from qsae_kit.features.indexing import MANIFEST
    from qsae_kit.sae.store import load_suite, model_name_of

    config = AuditConfig(checked_by(by), top, draws=draws, seed=seed or 0)
    options.refuse(
        not chats and prompt is None,
        f"Nothing was given to audit; give a text, {FILES}, or --prompt.",
    )
    options.refuse(
        answer is not None and prompt is None, "--answer goes with --prompt; give both, or neither."
    )
    options.refuse(answer == "", "--answer is empty; give one that says something.")
    options.refuse(
        token is not None and instead is not None,
        "--token and --instead both say what is asked about; give one of them.",
    )
    options.refuse(out.exists(), f"{str(out)!r} is there already; give another --out.")
    outputs.write_file(out)
    questions = [] if prompt is None else [Asked(prompt, answer, instead, token)]
    for chat in chats or ():
        documents = read_documents(chat if is_source(chat) else [chat])
        questions += [asked(document, instead, token) for document in documents]
    held = load_suite(suite, variants=[variant] if variant else (), hook_names=outputs.sites_at(at))
    if len(held) > 1:
        typer.echo(f"Of the suite's variants {', '.join(held)}, the first is used (--variant).")
        held = held.only(variants=list(held)[:1])
    beside = Path(suite).parent / INDEX
    folder = index or (beside if (beside / MANIFEST).is_file() else None)
    measured = all(sae.origin.filter.measured for sae in held.saes().values())
    options.refuse(
        data is not None and measured,
        "--data is for SAEs whose median norms are not known, and these are; leave it out.",
    )
    known = load_index(folder) if folder is not None else None
    lm = outputs.loaded(model or model_name_of(held), dtype, device)
    held = attached(lm, held, None if measured else stream_of(lm, data))
    if known is not None and index is None and not is_indexed(known, held):
        typer.echo(f"The index {str(folder)!r} is of other SAEs, and is left out.")
        known = None
    found = audit_answers(lm, held, questions, known, config)
    write_audit(found, out)
    for case in found.cases:
        typer.echo(outputs.wrapped(case.in_words))
    typer.echo(f"Page: {out}")


def patch(
    steering: Annotated[
        Path | None,
        typer.Argument(help="A steering.json, as a study or the steering lab writes it."),
    ] = None,
    suite: Annotated[str | None, typer.Argument(help="The SAEs that it was made with.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="What to write: a new folder, or a .gguf file.")
    ] = None,
    as_: Annotated[
        str, typer.Option("--as", help="checkpoint, lora (PEFT) or control-vector (llama.cpp).")
    ] = "checkpoint",
    nearest: Annotated[
        bool,
        typer.Option(
            "--nearest", help="Of an edit without an exact form the nearest; its error is said."
        ),
    ] = False,
    strength: Annotated[
        float, typer.Option(help="Times the strength that the steering has.")
    ] = 1.0,
    undo: Annotated[
        Path | None,
        typer.Option(help="A patched checkpoint: write what it was made of, to the bit, to --out."),
    ] = None,
    model: options.OtherModel = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
) -> None:
    """Write an edit into the weights: a checkpoint for plain transformers, a LoRA adapter, or a
    control vector.
    """
    from qsae_kit.audit import patch as patching
    from qsae_kit.audit.agreement import agreement
    from qsae_kit.audit.agreement import nearest as nearest_form
    from qsae_kit.data.companions import companion_of
    from qsae_kit.sae.store import load_suite, model_name_of
    from qsae_kit.steer.changes import load_steering, saes_of

    if out is None:
        raise ValueError("--out is missing; give a new folder, or a .gguf file.")
    outputs.check_out(out)
    if undo is not None:
        options.refuse(
            steering is not None or suite is not None,
            "--undo takes the folder of a patched checkpoint and nothing else but --out.",
        )
        typer.echo(f"As it was: {patching.undo(undo, out)}")
        return
    if steering is None or suite is None:
        raise ValueError(
            "A steering and its suite are needed: qsae patch STEERING SUITE --out FOLDER."
        )
    places = saes_of(steering)
    held = load_suite(
        suite,
        variants=sorted({place.variant for place in places}),
        hook_names=sorted({place.hook_name for place in places}),
    )
    wanted = load_steering(steering, held).times(strength)
    lm = outputs.loaded(model or model_name_of(held), dtype, device)
    form = patching.checked_form(as_)
    prompts = [
        prompt.text
        for kind in ("harmful", "harmless")
        for prompt in companion_of(lm).prompts(kind, CHECKED, "selection")
    ]
    made = wanted
    if nearest:
        near, found = nearest_form(lm, wanted, held, prompts)
        made = near.steering
        for line in near.said:
            typer.echo(f"Nearest form, {line}")
        typer.echo(outputs.wrapped(f"It gives {found.in_words} beside the steering."))
    written = patching.patch(lm, made, held, out, form)
    typer.echo(f"Written: {written.path}, {len(written.tensors)} tensors")
    if form == "checkpoint":
        again = outputs.loaded(str(out), str(lm.dtype).removeprefix("torch."), device)
        found = agreement(lm, again, prompts, made.edits(held))
        typer.echo(outputs.wrapped(f"Loaded again it gives {found.in_words} beside the edit."))
