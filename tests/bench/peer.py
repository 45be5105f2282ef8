"""Trains one SAE with SAELens or sparsify on stored activations, in a Python that has them; prints
one line of JSON.

    pip install sae-lens==6.54.12 eai-sparsify==1.3.3
    PYTHON tests/bench/peer.py saelens-topk acts.safetensors --tokens 200000

An environment of its own is needed, since SAELens wants transformer-lens 2.

The peers' own training steps are called, on batches made here: the same rows in the same order as
`qsae rows train` gets them are not promised, the same number of epochs is. The last tenth of the
rows is held out.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator

import torch
from safetensors.torch import load_file
from torch import Tensor

Step = Callable[[Tensor], None]
Forward = Callable[[Tensor], Tensor]


def saelens(
    kind: str, d_in: int, a: argparse.Namespace
) -> tuple[Step, Forward, Callable[[Tensor], float]]:
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    shape = {
        "d_in": d_in,
        "d_sae": a.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
    }
    if kind == "topk":
        sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(k=a.k, **shape))
    else:
        config = sae_lens.JumpReLUTrainingSAEConfig(
            jumprelu_sparsity_loss_mode="quadratic", target_l0=float(a.k), **shape
        )
        sae = sae_lens.JumpReLUTrainingSAE(config)
    config = SAETrainerConfig(
        total_training_samples=a.tokens,
        train_batch_size_samples=a.batch,
        lr=a.lr,
        lr_end=a.lr,
        autocast=a.autocast,
        device="cpu",
        n_batches_for_norm_estimate=1,
    )
    trainer = SAETrainer(config, sae, iter(()))

    def step(x: Tensor) -> None:
        trainer.n_training_samples += len(x)
        trainer.n_training_steps += 1
        trainer._train_step(sae=sae, sae_in=x)

    return step, sae, lambda x: float((sae.encode(x) > 0).float().sum(-1).mean())


def sparsify(
    kind: str, d_in: int, a: argparse.Namespace
) -> tuple[Step, Forward, Callable[[Tensor], float]]:
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(
        d_in, SparseCoderConfig(num_latents=a.d_sae, k=a.k), device="cpu", dtype=torch.float32
    )
    optimizer = torch.optim.Adam(sae.parameters(), lr=a.lr)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        sae.set_decoder_norm_to_unit_norm()

    return (
        step,
        lambda x: sae(x).sae_out.float(),
        lambda x: float((sae(x).latent_acts > 0).float().sum(-1).mean()),
    )


def batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for i in range(0, len(order) - size + 1, size):
            yield rows[order[i : i + size]].float()


@torch.no_grad()
def fvu(forward: Forward, held_out: Tensor) -> float:
    error = sum(float((x - forward(x)).double().pow(2).sum()) for x in held_out.split(4096))
    return error / float((held_out - held_out.mean(0)).double().pow(2).sum())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("peer", choices=["saelens-topk", "saelens-jumprelu", "sparsify-topk"])
    p.add_argument("acts")
    p.add_argument("--d-sae", type=int, default=4608)
    p.add_argument("--k", type=int, default=32)
    p.add_argument("--batch", type=int, default=2048)
    p.add_argument("--tokens", type=int, default=200_000)
    p.add_argument("--lr", type=float, default=3e-4)
    p.add_argument("--curve", type=int, default=0)
    p.add_argument("--autocast", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.manual_seed(a.seed)
    acts = load_file(a.acts)["acts"]
    cut = round(0.9 * len(acts))
    held_out = acts[cut:].float()
    library, _, kind = a.peer.partition("-")
    step, forward, l0 = {"saelens": saelens, "sparsify": sparsify}[library](kind, acts.shape[1], a)
    seconds, timed, curve = 0.0, 0, []
    for i, x in zip(range(a.tokens // a.batch), batches(acts[:cut], a.batch, a.seed), strict=False):
        began = time.perf_counter()
        step(x)
        if i >= 3:  # warm-up
            seconds, timed = seconds + time.perf_counter() - began, timed + 1
        if a.curve and (i + 1) % a.curve == 0:
            curve.append([round(seconds, 3), (i + 1) * a.batch, round(fvu(forward, held_out), 4)])
    with torch.no_grad():
        fired = l0(held_out[:4096])
    figures = {
        "tokens_per_s": round(timed * a.batch / seconds, 1),
        "fvu": round(fvu(forward, held_out), 4),
        "l0": round(fired, 2),
    }
    print(
        json.dumps(
            {"name": a.peer + ("-autocast" if a.autocast else ""), **figures, "curve": curve}
        )
    )


main()
