"""Training on a CUDA device: a TopK step phase by phase, other architectures' steps, many SAEs on a
running model.

    python tests/bench/gpu.py [--batch 8192] [--json FILE]

It needs no network and no weights: rows and model are random.

Bounds are measured here: the bfloat16 matmul rate (a square product) and the bandwidth of a copy.
The step's bound is the encoder product at that rate plus what the step must move at that bandwidth:
weights, gradients and moments once, and one line of a table for every entry of the decoder's
forward pass and of each weight's gradient. A second read of lines that lie in the cache can beat
it. `plain` is the same phase in torch's own operations, dense where that is the obvious way,
compiled where compiling helps; the last line of the table is a whole step of that kind. The live
part trains SAEs at three sites of every fourth layer of a model of Qwen3-1.7B's shape, forward
passes included. `--device cpu --d 64 --d-sae 512 --k 8 --batch 256 --size 256 --layers 4` runs the
same script small, to test it.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from qsae_kit.data.documents import TokenBatch
from qsae_kit.data.rows import LiveRows, kept_rows
from qsae_kit.lm.hooked import HookedLM, load_model
from qsae_kit.sae.codes import Codes, path_name, select_top_k
from qsae_kit.sae.filter import NormFilter
from qsae_kit.train.optim import MOMENT_BYTES
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.train.run import Normaliser, SiteTrainer, train_saes


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median seconds of a call, after a warm-up."""
    times = []
    for _ in range(repeats + 3):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return sorted(times[3:])[repeats // 2]


def ceilings(device: torch.device, size: int) -> tuple[float, float]:
    """bfloat16 FLOP/s of a product and bytes/s (read and written) of a copy."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    rate = 2 * size**3 / seconds(lambda: a @ a, device)
    big = torch.randn(size * size * 4, device=device)
    copied = torch.empty_like(big)
    return rate, 2 * big.nbytes / seconds(lambda: copied.copy_(big), device)


class Dense(torch.nn.Module):
    """The same step as a good plain one: bfloat16 autocast, dense decoder, autograd, fused Adam;
    for torch.compile.
    """

    def __init__(self, d: int, m: int, k: int) -> None:
        super().__init__()
        self.W_enc, self.W_dec = (
            torch.nn.Parameter(torch.randn(*shape) / d**0.5) for shape in ((d, m), (m, d))
        )
        self.b_enc, self.b_dec, self.k = (
            torch.nn.Parameter(torch.zeros(m)),
            torch.nn.Parameter(torch.zeros(d)),
            k,
        )

    def forward(self, x: Tensor) -> Tensor:
        values, columns = (x @ self.W_enc + self.b_enc).topk(self.k, dim=-1, sorted=False)
        f = torch.zeros(len(x), self.W_enc.shape[1], device=x.device, dtype=values.dtype).scatter(
            -1, columns, values.relu()
        )
        return (x - (f @ self.W_dec + self.b_dec)).pow(2).sum(-1).mean()


class Phase(NamedTuple):
    name: str
    ours: Callable[[], object]
    bound: float
    """Seconds."""
    plain: Callable[[], object] | None = None


def our_step(a: argparse.Namespace, device: torch.device) -> tuple[list[dict[str, object]], float]:
    """A row a phase with its bound, and the whole step's seconds."""
    rate, bandwidth = ceilings(device, a.size)
    x = torch.randn(a.batch, a.d, device=device) / a.d**0.5
    config = TrainConfig(
        "topk",
        a.k,
        expansion=a.d_sae / a.d,
        tokens=a.batch * 1000,
        batch=a.batch,
        pool=a.batch,
        dead_after=10**12,
        moments=a.moments,
    )
    trainer = SiteTrainer(
        config, Normaliser(torch.zeros(a.d, device=device), 1.0, NormFilter(1.0)), a.d, device
    )
    trainer.start(x)
    sae = trainer.sae
    dtype = sae.product_dtype or torch.float32
    print(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'};"
        f" {path_name(device, dtype)}"
    )
    print(f"measured: {rate / 1e12:.1f} TFLOP/s in bfloat16, {bandwidth / 1e12:.3f} TB/s copied")
    table = [
        timed(phase, a.batch, device) for phase in phases(a, trainer, x, dtype, rate, bandwidth)
    ]
    bound = sum(float(row["bound_ms"]) for row in table) / 1e3  # type: ignore[arg-type]
    table.append(timed(Phase("whole step", lambda: trainer.step(x, 0.5), bound), a.batch, device))
    return table, float(table[-1]["ms"]) / 1e3  # type: ignore[arg-type]


def timed(phase: Phase, batch: int, device: torch.device) -> dict[str, object]:
    took = seconds(phase.ours, device)
    plain = seconds(phase.plain, device) if phase.plain else float("nan")
    figures = {"ms": took * 1e3, "bound_ms": phase.bound * 1e3, "bound/ms": phase.bound / took}
    return {"phase": phase.name, **figures, "tokens_per_s": batch / took, "plain_ms": plain * 1e3}


def phases(
    a: argparse.Namespace,
    trainer: SiteTrainer,
    x: Tensor,
    dtype: torch.dtype,
    rate: float,
    bandwidth: float,
) -> Iterator[Phase]:
    """What a step does, one thing after the other."""
    sae = trainer.sae
    encoder, W_dec, b_dec = sae.encoder.detach(), sae.W_dec.detach(), sae.b_dec.detach()
    on_gpu = x.is_cuda
    compiled: Callable[..., Callable[..., object]] = torch.compile if on_gpu else lambda work: work
    yield Phase(
        f"weights to {dtype}".replace("torch.", ""),
        lambda: (encoder.to(dtype), W_dec.to(dtype)),
        0.0,
    )
    rows, weights, b_enc = x.to(dtype), encoder.to(dtype), sae.b_enc.detach().to(dtype)
    decoder = W_dec.to(dtype) if on_gpu else W_dec

    def product() -> Tensor:
        return torch.addmm(b_enc, rows, weights.T)

    pre, select = product(), select_top_k(a.k)
    bound = 2 * a.batch * a.d * a.d_sae / rate + (weights.nbytes + pre.nbytes) / bandwidth
    yield Phase("encoder product", product, bound)
    yield Phase(
        "selection",
        lambda: select(pre),
        pre.nbytes / bandwidth,
        lambda: pre.topk(a.k, sorted=False),
    )
    codes = select(pre)
    f = torch.rand(len(codes), device=x.device)
    line = a.d * decoder.element_size()
    lines = len(codes) * line / bandwidth

    def dense_errors() -> object:
        error = x - codes.dense(f.to(dtype)) @ W_dec.to(dtype) - b_dec
        return error, (error.to(dtype) @ W_dec.to(dtype).T)[codes.rows, codes.cols]

    error = codes.errors(x, f, decoder, b_dec)[0]
    named = "errors (decode) and gradient of activations"
    yield Phase(
        named,
        lambda: codes.errors(x, f, decoder, b_dec),
        lines + (x.nbytes + error.nbytes) / bandwidth,
        compiled(dense_errors),
    )
    sorting = 4 * 8 * len(codes) / bandwidth
    yield Phase(
        "entries by column",
        lambda: Codes.from_columns(codes.cols.view(-1, a.k), a.d_sae).by_column(),
        sorting,
    )
    for name in ("decoder", "encoder"):
        yield Phase(
            f"gradient of the {name}",
            lambda: codes.transposed_times(f, error),
            lines + W_dec.nbytes / bandwidth,
            lambda: codes.dense(f.to(dtype)).T @ error.to(dtype),
        )
    gradients = {p: torch.randn_like(p) * 1e-3 for p in sae.parameters()}

    def update() -> None:
        for p in sae.parameters():
            p.grad = gradients[p]
        trainer.optimizer.project_gradients()
        trainer.optimizer.step(1e-4, clip=0.5)
        trainer.optimizer.zero_grad()

    # Adam reads weights, gradients and two moments and writes all but the gradients; unit norms and
    # clipping fit beside it.
    size = sum(p.numel() for p in sae.parameters()) * (
        4 + 4 + 4 + 2 * MOMENT_BYTES[trainer.config.moments]
    )
    yield Phase(
        "clipping, Adam, unit norms",
        update,
        size / bandwidth,
        plain_update(encoder.clone(), W_dec.clone(), gradients, compiled),
    )


def plain_update(
    encoder: Tensor,
    W_dec: Tensor,
    gradients: dict[Any, Tensor],
    compiled: Callable[..., Callable[..., object]],
) -> Callable[[], object]:
    """The same update in torch's own operations, with its fused Adam."""
    params = [torch.nn.Parameter(encoder), torch.nn.Parameter(W_dec)]
    given = [g for g in gradients.values() if g.shape == encoder.shape]
    optimizer = torch.optim.Adam(params, lr=1e-4, fused=True)

    @compiled
    def aside(grad: Tensor, W: Tensor) -> Tensor:
        return grad - (grad * W).sum(-1, keepdim=True) * W

    @compiled
    def unit(W: Tensor) -> Tensor:
        return W / W.norm(dim=-1, keepdim=True)

    @torch.no_grad()
    def update() -> None:
        params[0].grad, params[1].grad = given[0].clone(), aside(given[1], params[1])
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        params[1].copy_(unit(params[1]))

    return update


def dense_step(a: argparse.Namespace, device: torch.device) -> float:
    """Seconds of a dense step."""
    x = torch.randn(a.batch, a.d, device=device) / a.d**0.5
    dense = Dense(a.d, a.d_sae, a.k).to(device)
    optimizer = torch.optim.Adam(dense.parameters(), lr=1e-4, fused=True)
    compiled = torch.compile(dense) if device.type == "cuda" else dense

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = compiled(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return seconds(step, device)


def other_steps(a: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """Whole steps of other recipes, after a few."""
    recipes = [("topk", "float32", a.batch // 4), ("topk", "bfloat16", a.batch)]
    recipes += [(name, "float32", a.batch) for name in ("batchtopk", "matryoshka", "jumprelu")]
    table = []
    for name, moments, batch in recipes:
        rows = torch.randn(4 * batch, a.d, device=device) / a.d**0.5
        batches = cycle(rows.split(batch))
        config = TrainConfig(
            name,
            a.k,
            expansion=a.d_sae / a.d,
            tokens=batch * 1000,
            batch=batch,
            pool=batch,
            moments=moments,
            dead_after=10**12,
        )  # type: ignore[arg-type]
        trainer = SiteTrainer(
            config, Normaliser(torch.zeros(a.d, device=device), 1.0, NormFilter(1.0)), a.d, device
        )
        trainer.start(rows)
        for step in range(20):
            trainer.step(next(batches), (step + 1) / 1000)
        took = seconds(
            lambda trainer=trainer, batches=batches: trainer.step(next(batches), 0.02), device, 10
        )  # type: ignore[misc]
        table.append(
            {
                "step of": name,
                "batch": batch,
                "moments": moments,
                "ms": took * 1e3,
                "tokens_per_s": batch / took,
                "L0": trainer.l0,
            }
        )
    return table


def live(a: argparse.Namespace, device: torch.device) -> str:
    """SAEs at three sites of every fourth layer of a random model, from one stream."""
    shape = {
        "hidden_size": a.d,
        "intermediate_size": 3 * a.d,
        "num_hidden_layers": a.layers,
        "head_dim": min(128, a.d // 4),
    }
    heads = a.d // shape["head_dim"]
    config = Qwen3Config(
        vocab_size=151_936 if a.d > 1000 else 1000,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        tie_word_embeddings=True,
        **shape,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        hf = Qwen3ForCausalLM(config).to(dtype).eval()
    lm = HookedLM(hf, load_model("tiny").tokenizer)
    ids = torch.randint(
        0, config.vocab_size, (max(1, a.batch // 512), min(512, a.batch)), device=device
    )
    ones = torch.ones_like(ids)
    sites = [
        f"blocks.{i}.hook_{kind}"
        for i in range(3, a.layers, 4)
        for kind in ("resid_post", "mlp_out", "attn_out")
    ]

    def batches() -> Iterator[TokenBatch]:
        generator = torch.Generator(device).manual_seed(0)
        while True:
            yield TokenBatch(
                ids[torch.randperm(len(ids), device=device, generator=generator)].roll(1, 1),
                ones,
                ones.bool(),
            )

    recipe = TrainConfig(
        "topk",
        a.k,
        expansion=a.d_sae / a.d,
        tokens=24 * a.batch,
        batch=a.batch,
        pool=2 * a.batch,
        dead_after=6 * a.batch,
    )
    source = LiveRows(lm, sites, batches)
    forward = seconds(lambda: kept_rows(lm, sites, next(batches())), device, 5)
    marks: list[tuple[float, float]] = []
    train_saes(
        source,
        [recipe],
        model_name="random",
        watch=[lambda progress: marks.append((time.perf_counter(), progress.seconds))],
    )
    warm = 12  # steps, by when dead latents have been met and every kernel is there
    rows = (len(marks) - warm) * a.batch
    whole, steps = (marks[-1][i] - marks[warm - 1][i] for i in (0, 1))
    return (
        f"live: {len(sites)} SAEs from one stream of a model with"
        f" {sum(p.numel() for p in hf.parameters()) / 1e9:.2f} billion weights: {rows / whole:,.0f}"
        f" tokens/s with forward passes, {rows * len(sites) / whole:,.0f} tokens/s and SAE; forward"
        f" alone {ids.numel() / forward:,.0f} tokens/s, steps alone"
        f" {rows * len(sites) / steps:,.0f} tokens/s and SAE"
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda")
    p.add_argument("--d", type=int, default=2048)
    p.add_argument("--d-sae", type=int, default=32_768)
    p.add_argument("--k", type=int, default=64)
    p.add_argument("--batch", type=int, default=8192)
    p.add_argument("--layers", type=int, default=28, help="of the model of the live part")
    p.add_argument("--moments", default="float32", choices=sorted(MOMENT_BYTES))
    p.add_argument(
        "--size", type=int, default=8192, help="of the product and the copy that measure the bounds"
    )
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    device = torch.device(a.device)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    table, took = our_step(a, device)
    plain = dense_step(a, device)
    table.append(
        {
            "phase": "dense bfloat16 autograd, compiled",
            "ms": plain * 1e3,
            "tokens_per_s": a.batch / plain,
        }
    )
    print(pd.DataFrame(table).round(3).to_string(index=False))
    print(f"{a.batch / took:,.0f} tokens/s, {a.batch / plain:,.0f} dense", flush=True)
    others = other_steps(a, device)
    print(pd.DataFrame(others).round(3).to_string(index=False), flush=True)
    said = live(a, device)
    print(said)
    if a.json:
        a.json.write_text(json.dumps({"phases": table, "steps": others, "live": said}, indent=1))


main()
