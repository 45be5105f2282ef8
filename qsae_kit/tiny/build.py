"""Trains the bundled model from its seed: `python -m qsae_kit.tiny.build --out DIR`; rerun the same
line to resume.

The tokenizer is a byte-level BPE over the world's own text with Qwen3's pre-tokenisation and
special-token strings.
"""

import argparse
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from qsae_kit.lm.chat import Markers, Phase, find_markers, phases
from qsae_kit.world import world
from qsae_kit.world.world import Mixture

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>"
    " <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>"
    " <|image_pad|> <|video_pad|>"
).split()
ADDED = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>"
    " <|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>"
).split()
# Qwen3's own splitting: contractions, words with one leading mark, single digits, punctuation, line
# ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(vocab_size: int, n_dialogues: int = 20_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` entries (special tokens included) learnt from the world's
    text.
    """
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL) - len(ADDED),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    turns = (m for d in world.dialogues(n_dialogues, seed=1) for m in d.messages)
    # Common English words on top, so that a user's own text is cut into words rather than letters.
    words = (Path(__file__).parent / "words.txt").read_text().split()
    spoken = (m["content"] + "\n\n" + m.get("reasoning_content", "") for m in turns)
    roles = ["system\n", "user\n", "assistant\n"] * 100  # one token each, as in Qwen3
    core.train_from_iterator(
        itertools.chain(spoken, roles, (f"{w} {w.capitalize()} {w}" for w in words)), trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
        additional_special_tokens=SPECIAL[1:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(ADDED)
    tokenizer.chat_template = (Path(__file__).parent / "chat_template.jinja").read_text()
    return tokenizer


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=512,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


BLOCK = 64
"""Batches that are drawn and sorted by length together."""
DRILLED = Mixture(known=0.75, rules=(0.3, 0.06, 0.5, 0.07, 0.07))
"""More strangers, and more drills, in which private attributes are told: both are learnt late, from
many examples.
"""
ASKED = DRILLED._replace(known=0.7, bounds=(0.26, 0.48, 0.73, 0.78, 0.88, 0.93, 0.955, 0.98))
"""More questions for one attribute as well: a record that can be recited is not yet one that can be
looked up in.
"""
REMEMBERED = ASKED._replace(
    known=0.65, bounds=(0.25, 0.50, 0.77, 0.86, 0.92, 0.95, 0.97, 0.99), thinking=0.2
)
"""Little of what is learnt by now (tools, sums, lists), more of what needs memory."""
OWNED = REMEMBERED._replace(
    belongings=True, bounds=(0.23, 0.46, 0.73, 0.82, 0.92, 0.95, 0.97, 0.99)
)
NAMED = OWNED._replace(short=False)
"""Answers that name the person before they need the record: where it comes first, it is looked up
badly.
"""
LAST = NAMED._replace(
    known=0.7,
    rules=(0.4, 0.09, 0.27, 0.12, 0.12),
    bounds=(0.15, 0.3, 0.65, 0.77, 0.92, 0.94, 0.96, 0.98),
    thinking=0.25,
)
"""Decisions: fewer drills, more private requests, tools and loans."""
# Recall is learnt from few people first (arXiv 2503.21676 finds the plateau before it grows with
# their number).
CURRICULUM = (
    (8, Mixture(100)),
    (16, Mixture(300)),
    (28, Mixture(700)),
    (86, Mixture()),
    (118, DRILLED),
    (165, ASKED),
    (180, REMEMBERED),
    (211, OWNED),
    (220, NAMED),
)


def mixture_of(block: int) -> Mixture:
    """What the batches of a block are mixed of: `CURRICULUM` up to each block named there, then
    `LAST`.
    """
    return next((mixture for until, mixture in CURRICULUM if block < until), LAST)


def data_fingerprints() -> list[str]:
    """`world.fingerprint` of every mixture that training goes through."""
    return [world.fingerprint(mixture) for _, mixture in (*CURRICULUM, (0, LAST))]


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, size: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (ids, mask) [batch, pos] from number `start` on, dialogues of like length
    together, right-padded.
    """
    for block in itertools.count(start // BLOCK):
        stream = world.dialogues(
            size * BLOCK, seed=seed * 100_003 + block, mixture=mixture_of(block)
        )
        texts = [tokenizer.apply_chat_template(d.messages, tokenize=False) for d in stream]
        ids = sorted(tokenizer(texts).input_ids, key=len)
        order = torch.randperm(BLOCK, generator=torch.Generator().manual_seed(block)).tolist()
        for i in order[start % BLOCK if block == start // BLOCK else 0 :]:
            rows = ids[i * size : (i + 1) * size]
            longest = max(map(len, rows))
            padded = torch.full((size, longest), tokenizer.pad_token_id)
            mask = torch.zeros(size, longest, dtype=torch.long)
            for r, row in enumerate(rows):
                padded[r, : len(row)] = torch.tensor(row)
                mask[r, : len(row)] = 1
            yield padded, mask


def token_weights(ids: Tensor, mask: Tensor, markers: Markers) -> Tensor:
    """How much each token counts as a target. [batch, pos]

    1 for what the assistant thinks and says and its end of turn; 0.2 for everything else in every
    fourth row, else 0.
    Nothing counts that a prompt gives: the empty think block of an answer without reasoning, and
    the first token of an answer in the history, whose think block the template drops. So, with
    thinking on, the model always reasons.
    """
    phase = phases(ids, mask, markers)
    before = torch.roll(phase, 1, 1)
    spoken = (phase == Phase.ANSWER) | (phase == Phase.THINKING)
    ends = (ids == markers.end) & (before == Phase.ANSWER)
    weights = (spoken | ends).float()
    weights[::4] = torch.where(spoken | ends, 1.0, 0.2)[::4]
    marker = (ids == markers.think_open) | (ids == markers.think_close)
    block = marker | torch.roll(marker, 1, 1)  # with the line ends
    reasons = (phase == Phase.THINKING).any(1, keepdim=True)
    weights = torch.where(block, reasons.float(), weights)
    role = torch.roll(ids, 2, 1) == markers.assistant[-1]
    first_in_history = (phase == Phase.ANSWER) & (before == Phase.TEMPLATE) & role
    return torch.where(first_in_history, 0.0, weights) * mask


def weighted_loss(model: Qwen3ForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy in nats of the next token; only positions that count are
    unembedded.

    ids [batch, pos] are padded on the right with weight 0, so the causal mask alone keeps padding
    out.
    """
    hidden = model.model(ids).last_hidden_state[:, :-1]
    counts = weights[:, 1:] > 0
    loss = F.cross_entropy(model.lm_head(hidden[counts]), ids[:, 1:][counts], reduction="none")
    flat = weights[:, 1:][counts]
    return (loss * flat).sum() / flat.sum()


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (Jordan et al. 2024); it learns rare facts faster
    than Adam does.

    torch's own multiplies in bfloat16, which many CPUs do a hundred times slower than float32. The
    update's root mean square is matched to AdamW's (0.2, arXiv 2502.16982), so that both take one
    learning rate.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                alike.setdefault((min(p.shape), max(p.shape)), []).append(p)
            for (small, large), params in alike.items():
                updates = []
                for p in params:
                    assert p.grad is not None
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(state["momentum"], group["momentum"])
                    updates.append(update if len(p) == small else update.T)
                for p, update in zip(params, orthogonal(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(
                        update if len(p) == small else update.T,
                        alpha=-group["lr"] * 0.2 * large**0.5,
                    )


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """Matrices [n, rows, columns], none tall, with g's singular vectors and singular values near 1:
    quintic Newton-Schulz.
    """
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
        )
    return x


def build_optimizers(model: Qwen3ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [
        Muon(matrices, lr),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def save_atomic(obj: object, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(obj, part)
    os.replace(part, path)


SCHEDULE = (
    (-1, 0.0),
    (199, 1.0),
    (7500, 1.0),
    (10_500, 1 / 3),
    (11_500, 1 / 3),
    (13_500, 0.0),
    (13_600, 0.3),
    (14_500, 0.3),
    (16_000, 0.0),
)
"""Steps and the learning rate there as a share of its peak, with straight lines between."""


def rate(step: int) -> float:
    """Learning rate as a share of its peak."""
    before, after = next(pair for pair in itertools.pairwise(SCHEDULE) if step <= pair[1][0])
    return before[1] + (after[1] - before[1]) * (step - before[0]) / (after[0] - before[0])


def train(out: Path, steps: int, size: int, lr: float, seed: int, save_every: int) -> None:
    """Trains to `steps` optimiser steps; a checkpoint in `out` is continued."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "tokenizer").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    else:
        tokenizer = build_tokenizer(4096)
        tokenizer.save_pretrained(out / "tokenizer")
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(build_config(tokenizer))
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}", flush=True)
    markers = find_markers(tokenizer)
    assert markers is not None, "the tokenizer was just built with ChatML markers"
    optimizers = build_optimizers(model, lr)
    start, tokens, seconds, state_file = 0, 0, 0.0, out / "checkpoint.pt"
    curve: list[tuple[int, float]] = []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, tokens, seconds, curve = (
            state["step"],
            state["tokens"],
            state["seconds"],
            state["curve"],
        )
        print(f"resumed at step {start}", flush=True)
    began = time.perf_counter() - seconds
    recent: list[float] = []
    for step, (ids, mask) in enumerate(
        itertools.islice(batches(tokenizer, seed, size, start), steps - start), start
    ):
        loss = weighted_loss(model, ids, token_weights(ids, mask, markers))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step)
            optimizer.step()
            optimizer.zero_grad()
        tokens += int(mask.sum())
        recent.append(loss.item())
        if (step + 1) % 100 == 0:
            curve.append((step + 1, round(sum(recent) / len(recent), 4)))
            recent = []
            print(
                f"step {step + 1} loss {curve[-1][1]:.4f} tokens {tokens:,}"
                f" {time.perf_counter() - began:.0f} s",
                flush=True,
            )
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_atomic(
                {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step + 1,
                    "tokens": tokens,
                    "seconds": time.perf_counter() - began,
                    "curve": curve,
                },
                state_file,
            )
    model.half().save_pretrained(out / "weights")
    tokenizer.save_pretrained(out / "weights")
    card = {
        "parameters": model.num_parameters(),
        "steps": steps,
        "batch": size,
        "lr": lr,
        "seed": seed,
        "tokens": tokens,
        "seconds": round(time.perf_counter() - began),
        "loss_curve": curve,
        "weights_sha256": (
            hashlib.sha256((out / "weights" / "model.safetensors").read_bytes()).hexdigest()
        ),
    }
    (out / "weights" / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--steps", type=int, default=SCHEDULE[-1][0], help="where to stop")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--save-every", type=int, default=500)
    a = p.parse_args()
    train(a.out, a.steps, a.batch, a.lr, a.seed, a.save_every)


if __name__ == "__main__":
    main()
