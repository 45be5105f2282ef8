"""Trains the bundled model from its seed: `python -m qsae_kit.tiny.build --out DIR`; rerun the same line to resume.

The tokenizer is a byte-level BPE over the world's own text with Qwen3's pre-tokenisation and special-token strings.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from qsae_kit.chat import Markers, Phase, find_markers, phases
from qsae_kit.tiny import world

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
ADDED = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
).split()
# Qwen3's own splitting: contractions, words with one leading mark, single digits, punctuation, line ends, spaces.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def build_tokenizer(vocab_size: int, n_dialogues: int = 20_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` entries (special tokens included) learnt from the world's text."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL) - len(ADDED),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    turns = (m for d in world.dialogues(n_dialogues, seed=1) for m in d["messages"])
    # Common English words on top, so that a user's own text is cut into words rather than letters.
    words = (Path(__file__).parent / "words.txt").read_text().split()
    spoken = (m["content"] + "\n\n" + m.get("reasoning_content", "") for m in turns)
    roles = ["system\n", "user\n", "assistant\n"] * 100  # one token each, as in Qwen3
    core.train_from_iterator(itertools.chain(spoken, roles, (f"{w} {w.capitalize()} {w}" for w in words)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=512,
        additional_special_tokens=SPECIAL[1:], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.add_tokens(ADDED)
    tokenizer.chat_template = (Path(__file__).parent / "chat_template.jinja").read_text()
    return tokenizer


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, rope_theta=10_000.0, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (ids, mask) [batch, pos], dialogues of like length together, right-padded."""
    for epoch in itertools.count():
        stream = world.dialogues(size * 64, seed=seed * 100_003 + epoch)
        texts = [tokenizer.apply_chat_template(d["messages"], tokenize=False) for d in stream]
        ids = sorted(tokenizer(texts).input_ids, key=len)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch)).tolist()
        for i in order:
            rows = ids[i * size : (i + 1) * size]
            longest = max(map(len, rows))
            padded = torch.full((size, longest), tokenizer.pad_token_id)
            mask = torch.zeros(size, longest, dtype=torch.long)
            for r, row in enumerate(rows):
                padded[r, : len(row)] = torch.tensor(row)
                mask[r, : len(row)] = 1
            yield padded, mask


def token_weights(ids: Tensor, mask: Tensor, markers: Markers) -> Tensor:
    """How much each token counts as a target: 1 for what the assistant thinks and says, 0.2 elsewhere. [batch, pos]"""
    phase = phases(ids, mask, markers)
    spoken = (phase == Phase.ANSWER) | (phase == Phase.THINKING)
    return torch.where(spoken, 1.0, 0.2) * mask


def weighted_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy in nats of the next token."""
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    flat = weights[:, 1:].flatten()
    return (loss * flat).sum() / flat.sum()


def save_atomic(obj: object, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(obj, part)
    os.replace(part, path)


def train(out: Path, steps: int, size: int, lr: float, seed: int, save_every: int) -> None:
    """Trains to `steps` optimiser steps; a checkpoint in `out` from the same command is continued."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(4096)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(build_config(tokenizer))
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}", flush=True)
    markers = find_markers(tokenizer)
    assert markers is not None, "the tokenizer was just built with ChatML markers"
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, s / steps))))
    )
    start, tokens, state_file = 0, 0, out / "checkpoint.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, tokens = state["step"], state["tokens"]
        print(f"resumed at step {start}", flush=True)
    began = time.perf_counter()
    for step, (ids, mask) in enumerate(itertools.islice(batches(tokenizer, seed, size), start, steps), start):
        loss = weighted_loss(model(ids, attention_mask=mask).logits, ids, token_weights(ids, mask, markers))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tokens += int(mask.sum())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} loss {loss.item():.4f} tokens {tokens:,} {time.perf_counter() - began:.0f} s", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_atomic(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                 "step": step + 1, "tokens": tokens}, state_file,
            )  # fmt: skip
    model.half().save_pretrained(out / "weights")
    tokenizer.save_pretrained(out / "weights")
    card = {"parameters": model.num_parameters(), "steps": steps, "batch": size, "lr": lr, "seed": seed, "tokens": tokens,
            "loss": round(loss.item(), 4), "dialogues_sha256": world.fingerprint(),
            "weights_sha256": hashlib.sha256((out / "weights" / "model.safetensors").read_bytes()).hexdigest()}  # fmt: skip
    (out / "weights" / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--save-every", type=int, default=500)
    a = p.parse_args()
    train(a.out, a.steps, a.batch, a.lr, a.seed, a.save_every)


if __name__ == "__main__":
    main()
