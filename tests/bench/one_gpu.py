"""The table for one GPU: groups, memory, disk and hours of `qsae run` by the planner's own
formulae, without weights.

    python tests/bench/one_gpu.py

Computed, not measured. Assumed of an 80 GB H100: products at 35 % of 989 TFLOP/s in bfloat16, 2
TB/s of 3.35 TB/s of memory, and 64 answers written at a time, a step of which reads the weights
once and takes 30 ms at least.
"""

from typing import NamedTuple

from qsae_kit.data import mixes
from qsae_kit.data.companions import GENERAL
from qsae_kit.pipelines.suite import (
    Sizes,
    Speeds,
    SuiteConfig,
    disk_bytes,
    recipe_for,
    stage_hours,
    suite_bytes,
)
from qsae_kit.steer.study import StudyConfig
from qsae_kit.train.groups import plan_groups

GPU_BYTES, FLOPS, BANDWIDTH, STEP = 80e9, 0.35 * 989e12, 2e12, 0.03


class Shape(NamedTuple):
    """A dense Qwen3."""

    name: str
    n_layers: int
    d_model: int
    parameters: float


SHAPES = (
    Shape("Qwen3-1.7B", 28, 2048, 1.72e9),
    Shape("Qwen3-4B", 36, 2560, 4.02e9),
    Shape("Qwen3-8B", 36, 4096, 8.19e9),
)


def row(shape: Shape, budget: str, expansion: float) -> list[str]:
    """One line of the table."""
    tokens, sites = (
        mixes.BUDGETS[budget],
        [f"blocks.{i}.{s}" for i in range(shape.n_layers) for s in ("resid", "mlp", "attn")],
    )
    recipe = recipe_for(
        SuiteConfig(expansion=expansion), shape.d_model, len(sites), tokens, on_gpu=True
    )
    free = int(0.9 * (GPU_BYTES - 2 * shape.parameters))
    groups = plan_groups([recipe], dict.fromkeys(sites, shape.d_model), free, 8192)
    d, m, k = shape.d_model, recipe.d_sae(shape.d_model), recipe.sparsity
    a_row = (
        2 * d * m / FLOPS
        + (8 * k * d * 4 + 16 * m) / BANDWIDTH
        + 2 * d * m * 24 / BANDWIDTH / recipe.batch
    )
    speeds = Speeds(
        FLOPS / (2 * shape.parameters), 1 / a_row, 64 / max(STEP, 2 * shape.parameters / BANDWIDTH)
    )
    sizes = Sizes(50_000, 500_000, 48, 300, 2, StudyConfig())
    written = mixes.written_tokens(mixes.read_manifest("qwen3-chat-v1"), tokens, GENERAL)
    hours = stage_hours(speeds, recipe, written, len(sites), len(groups), sizes)
    largest = max(group.bytes for group in groups)
    said = [
        shape.name,
        budget,
        f"{expansion:g}x ({m:,})",
        f"{len(sites)} in {len(groups)}",
        f"{largest / 1e9:.0f} GB",
    ]
    disk = disk_bytes(recipe, [d] * len(sites), largest, tokens)
    own = [
        f"{suite_bytes(recipe, [d] * len(sites)) / 1e9:.0f} / {disk / 1e9:.0f} GB",
        f"{hours['data']:.1f}",
        f"{hours['train']:.1f}",
    ]
    return [*said, *own, f"{sum(hours.values()):.1f}"]


def main() -> None:
    print(
        "| model | budget | width | sites in groups | memory | SAEs / disk | hours of data | of"
        " training | in all |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for budget in mixes.BUDGETS:
            print("| " + " | ".join(row(shape, budget, 8)) + " |")
    print("| " + " | ".join(row(SHAPES[-1], "useful", 16)) + " |")


if __name__ == "__main__":
    main()
