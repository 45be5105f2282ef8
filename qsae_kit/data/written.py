"""Dialogues and requests that a model itself writes: what its SAEs are trained on where no chats of
its own are at hand.
"""

import json
import random
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

from qsae_kit.data.companions import Companion, companion_of
from qsae_kit.data.prompts import KINDS, STOCK_REFUSALS
from qsae_kit.data.records import Document
from qsae_kit.io.files import write_text
from qsae_kit.io.progress import tqdm
from qsae_kit.io.writers import only_writer_of
from qsae_kit.lm.answering import answer_all
from qsae_kit.lm.hooked import HookedLM

ANSWER_TOKENS = 48
"""Tokens of an answer, at most."""
REFUSED_EVERY = 5
"""Every so many answers one is a stock refusal: a model that never refuses has no features for
refusing otherwise.
"""
ASKED_TOKENS = 64
"""Tokens of a request, at most."""
DRAWS_EACH = 8
"""Draws for a request that is wanted, at most, until as many distinct ones are found."""
DRAW_SEEDS = 10**6
"""Apart lie the draws of one seed and of the next."""
SHOWN = 4
"""Requests that a model is shown before it writes one."""
SHOWN_ANSWER = "Here you are."
"""What it is shown to have answered to each."""
TOP_P = 0.9
"""Of the draws: the rarest tokens would lead astray."""
CONTENT = "0815"
"""Stands for a user's request where a template is cut at it."""


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
    """A chat to every prompt, answered by the model itself (greedy); of one that hardly refuses see
    `REFUSED_EVERY`.
    """
    refuses = companion_of(lm).refuses
    thinking = False if lm.has_thinking else None
    for start in tqdm(range(0, len(prompts), batch), desc="writing dialogues"):
        some = prompts[start : start + batch]
        for i, (prompt, own) in enumerate(
            zip(some, answer_all(lm, some, [], max_new_tokens, thinking).text, strict=True)
        ):
            stock = STOCK_REFUSALS[i // REFUSED_EVERY % len(STOCK_REFUSALS)]
            answer = own if refuses or i % REFUSED_EVERY else stock
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


def self_asked(
    lm: HookedLM,
    n: int,
    seed: int = 0,
    examples: Sequence[str] | None = None,
    max_new_tokens: int = ASKED_TOKENS,
    batch: int = 48,
) -> list[str]:
    """At most `n` distinct requests that a model writes itself: it goes on from the header of a
    user's turn, with the system prompt that its template writes, to that turn's end (Magpie,
    arXiv 2406.08464).

    examples: requests; before each draw there are `SHOWN` of them, other ones each time, as turns
        that were answered. None: the harmless selection prompts that the model brings along. An
        empty list is Magpie itself, which small models follow less (a model of code writes code,
        and hardly ever ends its turn).
    What comes out is mostly like the examples, but nobody has looked at it. Left out are requests
    that are examples, are empty, longer than `max_new_tokens`, or hold other special tokens. There
    are fewer than `n` where `DRAWS_EACH` draws for each give no more distinct ones. What is drawn
    depends on the seed, not on the batch. Raises ValueError for a model without a chat template or
    known markers, and where no draw is a request.
    """
    if lm.markers is None:
        raise ValueError(
            f"The tokenizer of {lm.model_name!r} has no ChatML markers (<|im_start|>, <|im_end|>),"
            " so where a user's turn ends is not known; give a file of prompts."
        )
    if examples is None:
        companion = companion_of(lm)
        there = companion.n_prompts("harmless", "selection")
        examples = [p.text for p in companion.prompts("harmless", there, "selection")]
    shown = {text.casefold() for text in [*examples, SHOWN_ANSWER]}
    found: dict[str, str] = {}
    with tqdm(total=n, desc="writing requests") as bar:
        for start in range(0, n * DRAWS_EACH, batch):
            if len(found) >= n:
                break
            seeds = [seed * DRAW_SEEDS + draw for draw in range(start, start + batch)]
            made = lm.generate(
                [_before_request(lm, examples, each) for each in seeds],
                max_new_tokens,
                chat=False,
                do_sample=True,
                top_p=TOP_P,
                seed=seeds,
            )
            for tokens in made.tokens:
                text = _request(lm, tokens)
                if text is not None and text.casefold() not in shown and len(found) < n:
                    found.setdefault(text.casefold(), text)
            bar.update(len(found) - bar.n)
    if n and not found:
        raise ValueError(
            f"{lm.model_name!r} wrote no request of at most {max_new_tokens} tokens in"
            f" {n * DRAWS_EACH} draws; allow more tokens, or give a file of prompts."
        )
    return list(found.values())


def _before_request(lm: HookedLM, examples: Sequence[str], seed: int) -> str:
    """What a template writes before a user's request that follows some of the examples."""
    messages = []
    for text in random.Random(seed).sample(examples, min(SHOWN, len(examples))):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": SHOWN_ANSWER})
    messages.append({"role": "user", "content": CONTENT})
    before, content, _ = lm.to_chat(messages, add_generation_prompt=False).rpartition(CONTENT)
    if not content:
        raise ValueError(
            f"The chat template of {lm.model_name!r} leaves out what a user says, so no request can"
            " be asked for; give the tokenizer another template."
        )
    alone = lm.tokenizer(before, add_special_tokens=False).input_ids
    if lm.tokenizer.bos_token and lm.tokenizer(before).input_ids != alone:
        return before.removeprefix(lm.tokenizer.bos_token)  # the tokenizer adds it again
    return before


def _request(lm: HookedLM, tokens: Sequence[int]) -> str | None:
    """The request that new tokens hold up to the end of the turn; None where they hold none, or
    other special tokens, or pieces of characters.
    """
    assert lm.markers is not None
    ends = {lm.markers.end, *lm.end_ids()}
    end = next((i for i, token in enumerate(tokens) if token in ends), None)
    if end is None:
        return None
    special = {lm.markers.start, lm.markers.think_open, lm.markers.think_close}
    text = lm.tokenizer.decode(tokens[:end]).strip()
    odd = special | set(lm.tokenizer.all_special_ids)
    if odd & set(tokens[:end]) or "\ufffd" in text or not any(map(str.isalnum, text)):
        return None
    return text
