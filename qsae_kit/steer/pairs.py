"""An answer without and with edits, from one seed, and what the edits did to every token of it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch

from qsae_kit.lm.edits import Edit, applied
from qsae_kit.lm.hooked import Generation, HookedLM, Prompt, Step, by_token
from qsae_kit.sae import SAE


class Pair(NamedTuple):
    """Two answers to one prompt."""

    prompt: list[int]
    """Its token ids."""
    base: Generation
    steered: Generation


def answer_pair(
    lm: HookedLM,
    prompt: Prompt,
    edits: Sequence[Edit],
    max_new_tokens: int = 64,
    *,
    enable_thinking: bool | None = None,
    seed: int = 0,
    base: Generation | None = None,
    on_step: Callable[[Step], None] | None = None,
    **options: Any,
) -> Pair:
    """Answers a prompt without and with edits, in one batch; both draw the same random numbers.

    So they differ by the edits alone. base: the unedited answer where it is known; then only the
        other one is generated, but in half precision, where both have to be of one batch.
    on_step: as for `HookedLM.generate`; the edited answer is the last row. options: those of
        `HookedLM.generate`.
    """
    ids = lm.chat_tokens(prompt, enable_thinking)
    base = None if lm.half else base
    n = 1 if base else 2
    rows = torch.arange(n, device=lm.device) == n - 1
    with applied(lm, edits, rows):
        out = lm.generate(
            [prompt] * n,
            max_new_tokens,
            enable_thinking=enable_thinking,
            on_step=on_step,
            seed=[seed] * n if options.get("do_sample") else None,
            **options,
        )
    return Pair(ids, base or out.one(0), out.one(n - 1))


@torch.no_grad()
def token_table(
    lm: HookedLM,
    prompt: list[int],
    answer: list[int],
    edits: Sequence[Edit] = (),
    watch: tuple[SAE, int] | None = None,
) -> pd.DataFrame:
    """A row a token of an answer, read in one pass (no cache).

    Columns: token; logprob under the edits and base_logprob without them, in nats; change, the
    first minus the second; activation of the watched feature at the token, as its SAE reads the
    edited model (NaN without one).
    """
    ids, mask = lm.pad([prompt + answer])
    at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    names: list[str] = []
    if watch is not None:
        assert watch[0].provenance is not None
        names = [watch[0].provenance.hook_name]
    logprobs = []
    for used in ((), edits):
        with applied(lm, used):
            logits, cache = lm.run_with_cache(ids, mask, names_filter=names)
        rows = logits[0, at].float().log_softmax(-1)
        logprobs.append(rows.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu())
    acts = torch.full((len(answer),), float("nan"))
    if watch is not None:
        x = by_token(cache[names[0]])[0, len(prompt) :].float()
        acts = watch[0].encode(x)[:, watch[1]].cpu()
    return pd.DataFrame(
        {
            "token": lm.to_str_tokens(answer),
            "logprob": logprobs[1].numpy(),
            "base_logprob": logprobs[0].numpy(),
            "change": (logprobs[1] - logprobs[0]).numpy(),
            "activation": acts.numpy(),
        }
    )
