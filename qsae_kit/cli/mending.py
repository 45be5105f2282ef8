"""Edits that leave this package: `qsae patch`."""

from pathlib import Path
from typing import Annotated

import typer

from qsae_kit.cli import options, outputs

CHECKED = 16
"""Prompts of a kind on which a patched checkpoint is compared with the steered model."""


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
