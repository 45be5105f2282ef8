"""Measures the bundled model and writes its card: `python -m qsae_kit.tiny.model_card --weights
DIR`.

The card (card.json) holds what it took to train, the hashes of generator and weights, every
behaviour with its interval, and per tier of concepts what a linear probe, the best neuron, the best
principal component, an n-gram and the permuted null reach. `--freeze` also writes the list of
concepts that later scoring uses.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from qsae_kit.io.files import write_text
from qsae_kit.io.progress import tqdm
from qsae_kit.lm.hooked import HookedLM, load_model
from qsae_kit.tiny import behaviour, build, concepts
from qsae_kit.world import world

HERE = Path(__file__).parent
N_DIALOGUES = 30_000
SOURCES = ("world.py", "lexicon.py", "build.py", "chat_template.jinja", "words.txt")
"""What the training data and the tokenizer come from, beside the seeds."""


def sites(lm: HookedLM) -> list[str]:
    """Where concepts are looked for: the residual stream after every block."""
    return [f"blocks.{layer}.hook_resid_post" for layer in range(lm.n_layers)]


def measure_concepts(
    lm: HookedLM, freeze: bool
) -> tuple[list[dict[Any, Any]], list[dict[Any, Any]]]:
    """The tier table and every concept's row; with `freeze` the concept list is written."""
    corpus = concepts.build_corpus(lm, N_DIALOGUES)
    units = concepts.concept_units(corpus)
    if freeze:
        frozen = {"n": N_DIALOGUES, "seed": 0, "digest": corpus.digest, "concepts": sorted(units)}
        write_text(concepts.CONCEPTS_FILE, json.dumps(frozen, indent=0, ensure_ascii=False) + "\n")
    acts, neurons = (
        concepts.corpus_activations(lm, corpus, sites(lm)),
        concepts.corpus_neurons(lm, corpus),
    )
    scores = concepts.score_concepts(
        corpus, units, acts, {"neuron": neurons}, bar=lambda names: tqdm(names, desc="concepts")
    )
    return concepts.tier_table(scores).to_dict("records"), scores.round(4).to_dict("records")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--weights",
        type=Path,
        required=True,
        help="the folder that build wrote, card.json included",
    )
    p.add_argument("--n", type=int, default=300, help="requests a measure and language")
    p.add_argument("--freeze", action="store_true", help="write the concept list")
    a = p.parse_args()
    lm = load_model(str(a.weights))
    path = a.weights / "card.json"
    card = json.loads(path.read_text())
    table = behaviour.measure(lm, a.n)
    print(table.to_string(index=False), flush=True)
    tiers, scores = measure_concepts(lm, a.freeze)
    card |= {
        "planted": world.planted()._asdict(),
        "dialogues_sha256": build.data_fingerprints(),
        "sources_sha256": {
            name: hashlib.sha256((HERE / name).read_bytes()).hexdigest() for name in SOURCES
        },
        "tokenizer_sha256": hashlib.sha256((a.weights / "tokenizer.json").read_bytes()).hexdigest(),
        "measured_on_sha256": behaviour.fingerprint(a.n),
        "behaviour": [
            {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            for row in table.to_dict("records")
        ],
        "tiers": tiers,
        "concepts": scores,
    }
    write_text(path, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    for row in tiers:
        print(row, flush=True)


if __name__ == "__main__":
    main()
