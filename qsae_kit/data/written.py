"""Dialogues that a model itself writes: what its SAEs are trained on where no chats of its own are
at hand.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

from tqdm.auto import trange

from qsae_kit.data.companions import Companion
from qsae_kit.data.documents import Document
from qsae_kit.data.prompts import KINDS, STOCK_REFUSALS
from qsae_kit.io.files import write_text
from qsae_kit.io.writers import only_writer_of
from qsae_kit.lm.answering import answer_all
from qsae_kit.lm.hooked import HookedLM

ANSWER_TOKENS = 48
"""Tokens of an answer, at most."""
REFUSED_EVERY = 5
"""Every so many answers one is a stock refusal: a model that never refuses has no features for
refusing otherwise.
"""


def mixed_prompts(companion: Companion, n: int | None = None) -> list[str]:
    """At most `n` (None: all) of the selection prompts that a model brings along, of every kind in
    turn as long as it has any.
    """
    texts = [
        [p.text for p in companion.prompts(kind, companion.n_prompts(kind), "selection")]
        for kind in KINDS
    ]
    return [text for text in chain.from_iterable(zip_longest(*texts)) if text is not None][:n]


def own_dialogues(
    lm: HookedLM, prompts: Sequence[str], max_new_tokens: int = ANSWER_TOKENS, batch: int = 48
) -> Iterator[Document]:
    """A chat to every prompt, answered by the model itself (greedy); see `REFUSED_EVERY`."""
    thinking = False if lm.has_thinking else None
    for start in trange(0, len(prompts), batch, desc="writing dialogues"):
        some = prompts[start : start + batch]
        for i, (prompt, own) in enumerate(
            zip(some, answer_all(lm, some, [], max_new_tokens, thinking).text, strict=True)
        ):
            stock = STOCK_REFUSALS[i // REFUSED_EVERY % len(STOCK_REFUSALS)]
            answer = stock if i % REFUSED_EVERY == 0 else own
            yield [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def write_dialogues(
    lm: HookedLM, prompts: Sequence[str], path: Path, max_new_tokens: int = ANSWER_TOKENS
) -> int:
    """Writes `own_dialogues` as JSON lines with `messages`, whole or not at all; gives their
    number.

    Raises ValueError while another process writes the file.
    """
    with only_writer_of(path):
        lines = [
            json.dumps({"messages": chat}, ensure_ascii=False)
            for chat in own_dialogues(lm, prompts, max_new_tokens)
        ]
        write_text(path, "".join(line + "\n" for line in lines))
    return len(lines)
