"""Data recipes: named data sets in stated shares -> one file of documents, streamed,
decontaminated, resumable.

A manifest is a versioned JSON file; its data sets are never bundled. Documents of every slot go to
a file of their own, batch by batch, and are then dealt out in the manifest's shares of tokens.
"""

import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal, get_args

from qsae_kit.data.benchmarks import read_bench
from qsae_kit.data.companions import Companion, companion_of
from qsae_kit.data.documents import check_chat, tokenize_document
from qsae_kit.data.readers import DataSource, parse_source, read_documents
from qsae_kit.data.records import Document
from qsae_kit.data.streams import named
from qsae_kit.data.written import ANSWER_TOKENS, mixed_prompts, own_dialogues
from qsae_kit.io.files import atomic_file, check_file, checked_name, write_text
from qsae_kit.io.jsonfiles import read_json
from qsae_kit.io.progress import tqdm
from qsae_kit.io.runs import check_same, checksum, plain
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.world import world

MANIFESTS = Path(__file__).parent / "manifests"
BUDGETS = {"smoke": 5_000_000, "useful": 100_000_000, "publish": 500_000_000}
"""Training tokens by name."""
Kind = Literal["prompts", "chats", "texts"]
WORLD, OWN = "tiny world", "own dialogues"
"""Data sets that are made here: the bundled model's world, and the package's prompts with the
model's own answers.
"""
WORLD_SEEDS: dict[Kind, int] = {"chats": 1_000_011, "prompts": 1_000_012, "texts": 1_000_013}
DEALT, ABOUT, SLOTS = "documents.jsonl", "data.json", "slots"
MAX_LENGTH = 512
"""Tokens of a prompt that the model answers, at most."""


@dataclass(frozen=True)
class Slot:
    """One data set of a manifest, and its part in the whole."""

    name: str
    kind: Kind
    """prompts: user turns that the model answers itself; chats and texts: taken as they are."""
    dataset: str
    """An id on the hub; or `WORLD` or `OWN`."""
    share: float
    """Of the tokens."""
    licence: str = ""
    publish: bool = False
    """Whether the licence lets texts of it be passed on, as a published index's examples do."""
    gated: bool = False
    config: str | None = None
    split: str = "train"
    column: str = ""
    skip: int = 0
    """Rows at the beginning that are left to another slot."""
    max_bad: float = 0.01
    """Share of rows, at most, that are left out because they cannot be read."""
    thinking: bool = False
    """prompts: whether the model thinks before it answers, where it can."""
    max_new_tokens: int = 400

    def __post_init__(self) -> None:
        checked_name(self.name, "A slot of the recipe")
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"The slot {self.name!r} has the kind {self.kind!r}; allowed are"
                f" {', '.join(get_args(Kind))}."
            )
        if not 0 < self.share <= 1:
            raise ValueError(
                f"The slot {self.name!r} has a share of {self.share}; it lies above 0 and is at"
                " most 1."
            )
        if self.skip < 0 or self.max_new_tokens < 1 or not 0 <= self.max_bad < 1:
            raise ValueError(
                f"The slot {self.name!r} skips no negative number of rows, answers have a token at"
                " least, and max_bad is a share from 0 to below 1."
            )


@dataclass(frozen=True)
class Manifest:
    """A versioned data recipe."""

    name: str
    about: str
    slots: tuple[Slot, ...]
    epochs: int = 1
    """How often training sees a document, about: as many tokens fewer are fetched or written."""
    ngram: int = 8
    """Words in a row that no document may share with an evaluation prompt."""
    benches: tuple[str, ...] = ()
    """Public prompt sets (`data.benchmarks.BENCHES`) that count as evaluation prompts too."""
    sampling: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """How answers are drawn: `answer`, and `thinking` where the model thinks."""

    def __post_init__(self) -> None:
        if not self.slots or len({slot.name for slot in self.slots}) < len(self.slots):
            raise ValueError(f"The manifest {self.name!r} needs slots with distinct names.")
        if abs(sum(slot.share for slot in self.slots) - 1) > 1e-6:
            raise ValueError(
                f"The shares of the manifest {self.name!r} add up to"
                f" {sum(s.share for s in self.slots):g}, not to 1."
            )
        if self.epochs < 1 or self.ngram < 2:
            raise ValueError(
                f"The manifest {self.name!r} needs at least one epoch, and n-grams of two words or"
                " more."
            )
        drawn = [
            number for settings in self.sampling.values() for number in dict(settings).values()
        ]
        if not all(isinstance(name, str) for name in self.benches) or not all(
            isinstance(n, NUMBER) for n in drawn
        ):
            raise ValueError(
                f"The manifest {self.name!r} needs names as benches, and numbers as settings of"
                " sampling."
            )


def read_manifest(source: str) -> Manifest:
    """A manifest by its name (`qwen3-chat-v1`) or from a file. Raises ValueError for one that is
    not there or malformed.
    """
    own = {path.stem: path for path in sorted(MANIFESTS.glob("*.json"))}
    path = Path(source) if source.endswith(".json") else own.get(source)
    if path is None or not path.is_file():
        known = ", ".join(own)
        raise ValueError(
            f"There is no data recipe {source!r}; choose from {known}, or give a .json file."
        )
    try:
        entry = read_json(path, "a data recipe", MANIFEST_LIMIT)
        slots = tuple(_typed(Slot, slot) for slot in entry.pop("slots"))
        return _typed(
            Manifest, {**entry, "slots": slots, "benches": tuple(entry.get("benches", ()))}
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path.name} is no data recipe ({error}); take"
            f" {str(MANIFESTS / 'qwen3-chat-v1.json')!r} as a pattern."
        ) from error


MANIFEST_LIMIT = 2**20
"""Bytes of a recipe."""
NUMBER = (int, float)
ENTRIES: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "kind": str,
    "dataset": str,
    "share": NUMBER,
    "licence": str,
    "publish": bool,
    "gated": bool,
    "config": (str, type(None)),
    "split": str,
    "column": str,
    "skip": int,
    "max_bad": NUMBER,
    "thinking": bool,
    "max_new_tokens": int,
    "about": str,
    "slots": tuple,
    "epochs": int,
    "ngram": int,
    "benches": tuple,
    "sampling": dict,
}
"""What a recipe's file may hold for a field of a slot or a manifest."""


def _typed(kind: type, entry: Mapping[str, Any]) -> Any:
    """A slot or manifest of a file's entries. Raises TypeError for one that is unknown or of
    another type.
    """
    known = {own.name for own in fields(kind)}
    for name, value in entry.items():
        numeric = isinstance(value, bool) and ENTRIES.get(name) is not bool
        if name not in known or numeric or not isinstance(value, ENTRIES[name]):
            raise TypeError(f"{str(name)[:40]} is {str(value)[:40]!r}")
    return kind(**entry)


def written_tokens(manifest: Manifest, tokens: int, companion: Companion) -> float:
    """How many tokens, about, the model itself writes for a mix that trains on `tokens`."""
    written = 0.0
    for slot in manifest.slots:
        wanted = tokens * slot.share / manifest.epochs
        if slot.dataset == OWN:
            written += min(wanted, len(mixed_prompts(companion)) * ANSWER_TOKENS)
        elif slot.kind == "prompts":
            written += wanted
    return written


def file_id(file: str) -> str:
    """A file's name, as a source names it, and checksum: what tells it from others, wherever it
    lies.
    """
    source = parse_source(file)
    return f"{source.called(source.path.name)} {checksum(source.path)}"


# --- what must not be in the data

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation; a Chinese or Japanese character is a word."""
    return _WORD.findall(text.lower())


class Decontaminator:
    """Finds documents that share `n` words in a row with an evaluation prompt, or a whole turn with
    a shorter one.
    """

    def __init__(self, prompts: Iterable[str], n: int = 8) -> None:
        self.n, self.grams, self.short = n, set[tuple[str, ...]](), set[tuple[str, ...]]()
        for prompt in prompts:
            words = words_of(prompt)
            if len(words) < n:
                self.short.add(tuple(words))
            self.grams.update(self._grams(words))

    def _grams(self, words: Sequence[str]) -> Iterator[tuple[str, ...]]:
        return (tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1))

    def finds(self, document: Document) -> bool:
        """Whether a document is to be left out."""
        turns = (
            [document]
            if isinstance(document, str)
            else [message["content"] for message in document]
        )
        told = [words_of(turn) for turn in turns]
        return any(
            tuple(words) in self.short or any(gram in self.grams for gram in self._grams(words))
            for words in told
        )


def evaluation_prompts(
    companion: Companion, benches: Collection[str] = (), folder: Path | None = None
) -> list[str]:
    """Every prompt that a model is evaluated on here: studies, facts, and public sets by name.

    folder: where downloaded sets lie. Raises ValueError for one that cannot be had.
    """
    texts = companion.measured_on() + [fact.question for fact in companion.facts()]
    return texts + [
        text
        for name in benches
        for part in read_bench(name, folder=folder).values()
        for text in part
    ]


# --- one slot


def _documents(
    lm: HookedLM, slot: Slot, file: str | None, folder: Path | None
) -> Iterator[Document]:
    """A slot's documents; of prompts, chats of the user's first turn alone (with the system prompt
    before it).
    """
    if file is None and slot.dataset == WORLD:
        found: Iterator[Document] = (
            dialogue.messages
            for dialogue in world.dialogues(10**9, seed=WORLD_SEEDS[slot.kind] + slot.thinking)
        )
    elif file is None and slot.dataset == OWN:
        found = own_dialogues(lm, mixed_prompts(companion_of(lm)))
    else:
        found = _brought(lm, slot, file, folder)
    for document in found:
        if slot.kind != "prompts":
            yield document
        elif asked := _first_turn(document):
            yield asked


def _brought(lm: HookedLM, slot: Slot, file: str | None, folder: Path | None) -> Iterator[Document]:
    """Documents of a file, or of a data set on the hub or in a folder of downloads."""
    if file is not None:
        yield from read_documents(file, check_chat(lm))
        return
    name = slot.dataset if folder is None else str(folder / slot.dataset)
    parts = (slot.split,) if slot.config is None else (slot.config, slot.split)
    source = DataSource(name, parts, slot.column, slot.max_bad)
    try:
        yield from islice(read_documents(source, check_chat(lm)), slot.skip, None)
    except ValueError as error:
        gate = (
            "it is gated: accept its terms on the hub and log in (hf auth login); "
            if slot.gated
            else ""
        )
        raise ValueError(
            f"The slot {slot.name!r} could not be read: {str(error).rstrip('.')}; {gate}check the"
            " network and run the same command again, which goes on, or give the slot a file of"
            f" your own: --slot {slot.name}=FILE."
        ) from error


def _first_turn(document: Document) -> Document | None:
    if isinstance(document, str):
        return [{"role": "user", "content": document}]
    first = next((i for i, message in enumerate(document) if message["role"] == "user"), None)
    return (
        None
        if first is None or any(m["role"] != "system" for m in document[:first])
        else document[: first + 1]
    )


def _answered(
    lm: HookedLM, slot: Slot, manifest: Manifest, asked: Sequence[Document], seed: int
) -> Iterator[Document]:
    """Chats with the model's own answers, drawn as the manifest says, each under its own seed."""
    thinking = slot.thinking if lm.has_thinking else None
    thinks = thinking or lm.always_thinks
    drawn = {
        name: value
        for name, value in manifest.sampling.get("thinking" if thinks else "answer", {}).items()
    }
    if "top_k" in drawn:
        drawn["top_k"] = int(drawn["top_k"])
    out = lm.generate(
        list(asked),
        slot.max_new_tokens,
        enable_thinking=thinking,
        do_sample=bool(drawn),
        seed=seed if drawn else None,
        **drawn,  # type: ignore[arg-type]
    )
    for document, answer in zip(asked, out.text, strict=True):
        assert not isinstance(document, str)
        if answer.strip():
            yield [*document, {"role": "assistant", "content": answer}]


class _SlotFile:
    """A slot's documents on disk, with how far its source was read; what was half-written when it
    was cut off is dropped.
    """

    def __init__(self, out: Path, name: str, about: Mapping[str, Any], fresh: bool = False) -> None:
        """about: what the slot's documents are made of. fresh: those that are there go.

        Raises ValueError where another file has the slot's name, or the slot is of another mix and
        `fresh` is not given.
        """
        self.path, self.state_path = _slot_files(out, name)
        path = self.path
        check_file(path)
        size = path.stat().st_size if path.is_file() else 0
        state = (
            read_json(self.state_path, "a slot's state")
            if os.path.lexists(self.state_path)
            else None
        )
        if (size or state is not None) and not (isinstance(state, dict) and _is_slot_state(state)):
            raise ValueError(
                f"{str(path)!r} is no slot that this package wrote, and stays; give another folder."
            )
        self.state: dict[str, Any] = {
            "about": plain(about),
            **dict.fromkeys(COUNTS, 0),
            "done": False,
        }
        if state is not None and not fresh:
            check_same(path, "mix", about, state["about"])
            if state["bytes"] <= size:
                self.state = state
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.state_path, json.dumps(self.state) + "\n")
        with path.open("ab") as file:
            file.truncate(self.state["bytes"])

    def add(
        self,
        documents: Sequence[Document],
        rows: int,
        tokens: int,
        left_out: int,
        too_long: int,
        done: bool,
    ) -> None:
        with self.path.open("ab") as file:
            for document in documents:
                record = {"text": document} if isinstance(document, str) else {"messages": document}
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        state = self.state
        self.state = state | {
            "rows": rows,
            "tokens": state["tokens"] + tokens,
            "documents": state["documents"] + len(documents),
            "left_out": state["left_out"] + left_out,
            "too_long": state["too_long"] + too_long,
            "bytes": size,
            "done": done,
        }
        write_text(self.state_path, json.dumps(self.state) + "\n")


COUNTS = ("rows", "tokens", "documents", "left_out", "too_long", "bytes")
"""What a slot's state counts."""


def _is_slot_state(state: Mapping[str, Any]) -> bool:
    """Whether a file's entries are a slot's state."""
    if "about" not in state or not isinstance(state.get("done"), bool):
        return False
    counts = all(isinstance(state.get(name), int) and state[name] >= 0 for name in COUNTS)
    return counts and isinstance(state["about"], dict)


BATCH = 64
"""Rows of a source that are taken at a time: answered together, and written together."""


def _fill(
    lm: HookedLM,
    slot: Slot,
    manifest: Manifest,
    wanted: int,
    store: _SlotFile,
    source: Callable[[], Iterator[Document]],
    clean: Decontaminator,
    seed: int,
    bar: bool,
) -> None:
    """Takes documents of a slot until it holds `wanted` tokens or its source ends."""
    if store.state["done"]:
        return
    stream = islice(source(), store.state["rows"], None)
    with tqdm(
        total=wanted, initial=store.state["tokens"], unit="tok", desc=slot.name, disable=not bar
    ) as meter:
        while not store.state["done"]:
            rows = store.state["rows"]
            some = list(islice(stream, BATCH))
            kept = [document for document in some if not clean.finds(document)]
            left_out = len(some) - len(kept)
            room = lm.context_size - slot.max_new_tokens
            fitting = kept
            if slot.kind == "prompts":
                fitting = [
                    d
                    for d in kept
                    if not isinstance(d, str) and len(lm.chat_tokens(d)) <= min(room, MAX_LENGTH)
                ]
            made = (
                list(_answered(lm, slot, manifest, fitting, seed + rows))
                if slot.kind == "prompts" and fitting
                else fitting
            )
            lengths = [len(tokenize_document(lm, document, sys.maxsize)) for document in made]
            needed = 1 + sum(
                total < wanted - store.state["tokens"] for total in accumulate(lengths)
            )
            made, tokens = made[:needed], sum(lengths[:needed])
            reached = store.state["tokens"] + tokens >= wanted or len(some) < BATCH
            store.add(made, rows + len(some), tokens, left_out, len(kept) - len(fitting), reached)
            meter.update(tokens)


# --- the whole


def write_mix(
    lm: HookedLM,
    manifest: Manifest,
    tokens: int,
    out: Path,
    *,
    files: Mapping[str, str] = {},
    folder: Path | None = None,
    seed: int = 0,
    fresh: bool = False,
    bar: bool = True,
) -> dict[str, Any]:
    """Writes documents.jsonl, and data.json with what is in it, to `out`; a cut-off run goes on, to
    the same bytes.

    tokens: what training will see, all epochs together. files: a file of one's own
    (`data.readers.read_documents`) in the place of a slot's data set. folder: where
    downloaded data sets lie, each under its id. Slots whose source ends early give what they have,
    and the others their share of it: training goes round more often. fresh: slots that are there
    are written anew. Raises ValueError for an unknown slot, a data set that cannot be had, slots
    without documents, and where slots of another mix are there and `fresh` is not given.
    """
    unknown = [name for name in files if name not in {slot.name for slot in manifest.slots}]
    if unknown:
        known = ", ".join(slot.name for slot in manifest.slots)
        raise ValueError(f"The recipe {manifest.name} has no slot {unknown[0]!r}; it has {known}.")
    clean = Decontaminator(
        evaluation_prompts(companion_of(lm), manifest.benches, folder), manifest.ngram
    )
    stores: dict[str, _SlotFile] = {}
    for slot in manifest.slots:
        wanted = math.ceil(tokens * slot.share / manifest.epochs)
        file = files.get(slot.name)
        about = {
            "manifest": manifest.name,
            "slot": repr(slot),
            "file": "" if file is None else file_id(file),
            "wanted": wanted,
            "seed": seed,
            **lm.identity(),
        }
        store = stores[slot.name] = _SlotFile(out, slot.name, about, fresh)
        _fill(
            lm,
            slot,
            manifest,
            wanted,
            store,
            partial(_documents, lm, slot, file, folder),
            clean,
            seed,
            bar,
        )
        if not store.state["documents"]:
            raise ValueError(
                f"The slot {slot.name!r} gave no documents ({store.state['left_out']} were left"
                " out); give it another file."
            )
    shares = {slot.name: slot.share for slot in manifest.slots}
    with atomic_file(out / DEALT) as part, part.open("wb") as dealt:
        for line in _deal({name: store.path for name, store in stores.items()}, shares, lm):
            dealt.write(line)
    about = {
        "recipe": manifest.name,
        "about": manifest.about,
        "model": lm.model_name,
        "epochs": manifest.epochs,
        "ngram": manifest.ngram,
        "decontaminated": ["own prompts", "facts", *manifest.benches],
        "tokens": sum(s.state["tokens"] for s in stores.values()),
        "slots": {
            slot.name: {
                "dataset": named(files[slot.name]) if slot.name in files else slot.dataset,
                "licence": "" if slot.name in files else slot.licence,
                "publish": slot.publish and slot.name not in files,
                "kind": slot.kind,
                "thinking": slot.thinking and lm.has_thinking,
                "share": slot.share,
                "answered": (
                    slot.kind == "prompts" or (slot.dataset == OWN and slot.name not in files)
                ),
                **{
                    name: stores[slot.name].state[name]
                    for name in ("documents", "tokens", "left_out", "too_long")
                },
            }
            for slot in manifest.slots
        },
    }
    write_text(out / ABOUT, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return about


def delete_slots(out: Path, manifest: Manifest) -> None:
    """Takes the files of single slots away, once the mix is noted as done; what others put beside
    them stays.
    """
    for slot in manifest.slots:
        for path in _slot_files(out, slot.name):
            path.unlink(missing_ok=True)
    with suppress(OSError):  # it is not there, or not empty
        (out / SLOTS).rmdir()


def delete_all_slots(out: Path) -> None:
    """Takes the slots of any mix away; what is no slot of this package stays."""
    for state_path in sorted((out / SLOTS).glob("*.json")):
        try:
            state = read_json(state_path, "a slot's state")
        except ValueError:
            continue
        if isinstance(state, dict) and _is_slot_state(state):
            state_path.with_suffix(".jsonl").unlink(missing_ok=True)
            state_path.unlink()  # last: without it the other would be nobody's
    with suppress(OSError):  # it is not there, or not empty
        (out / SLOTS).rmdir()


def _slot_files(out: Path, name: str) -> tuple[Path, Path]:
    """Where a slot's documents and its state lie."""
    path = out / SLOTS / f"{checked_name(name, 'A slot of the recipe')}.jsonl"
    return path, path.with_suffix(".json")


def _deal(paths: Mapping[str, Path], shares: Mapping[str, float], lm: HookedLM) -> Iterator[bytes]:
    """Lines of several files, always of the one that is farthest behind its share of tokens, until
    all are dealt.
    """
    opened = {name: path.open("rb") for name, path in paths.items()}
    given = dict.fromkeys(paths, 0.0)
    try:
        while opened:
            name = min(opened, key=lambda n: given[n] / shares[n])
            line = opened[name].readline()
            if not line:
                opened.pop(name).close()
                continue
            record = json.loads(line)
            given[name] += len(
                tokenize_document(lm, record.get("text") or record["messages"], sys.maxsize)
            )
            yield line
    finally:
        for file in opened.values():
            file.close()
