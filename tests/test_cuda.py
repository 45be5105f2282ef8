"""Training on a CUDA device beside training on the CPU; skipped without one."""

from functools import cache

import pytest
import torch

from qsae_kit.evaluate.synthetic import Synthetic, SyntheticConfig
from qsae_kit.sae import ARCHITECTURES
from qsae_kit.sae.filter import NormFilter
from qsae_kit.train.optim import Moments
from qsae_kit.train.recipe import TrainConfig
from qsae_kit.train.run import Normaliser, SiteTrainer, fit_normaliser

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BATCH, STEPS = 1024, 300


@cache
def world():
    return Synthetic(
        SyntheticConfig(n_features=128, d_model=64, families=2, max_prob=0.2, min_prob=0.02)
    )


def trained(
    device,
    architecture,
    steps=STEPS,
    moments: Moments = "float32",
    precision="auto",
    broken_at=None,
):
    config = TrainConfig(
        architecture,
        8.0,
        expansion=4,
        tokens=STEPS * BATCH,
        batch=BATCH,
        pool=BATCH,
        moments=moments,
        precision=precision,
    )
    x = world().sample(40_000, 0).x.to(device)
    n = fit_normaliser(x[:4096])
    trainer = SiteTrainer(
        config, Normaliser(n.mean, n.scale, NormFilter(*n.filter)), x.shape[1], torch.device(device)
    )
    trainer.start(x[:4096])
    for step in range(steps):
        if step == broken_at:
            trainer = SiteTrainer.from_tensors(
                config,
                {k: v.cpu().clone() for k, v in trainer.tensors().items()},
                torch.device(device),
            )
        some = torch.arange(step * BATCH, (step + 1) * BATCH, device=device) % len(x)
        trainer.step(x[some], (step + 0.5) / STEPS)
    trainer.sae.eval()
    held_out = world().sample(4096, 1).x.to(device)
    with torch.no_grad():
        fvu = (held_out - trainer.reconstruct(held_out)).pow(2).sum() / (
            held_out - held_out.mean(0)
        ).pow(2).sum()
    return trainer, float(fvu)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_learns_as_well_as_on_the_cpu(architecture):
    here, there = (trained(device, architecture) for device in ("cuda", "cpu"))
    assert here[1] == pytest.approx(there[1], rel=0.1, abs=0.01)
    assert here[0].l0 == pytest.approx(there[0].l0, rel=0.1)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated"])
def test_it_is_deterministic_and_goes_on_where_it_stopped(architecture):
    one, other, resumed = (
        trained("cuda", architecture, 60, broken_at=at)[0].tensors() for at in (None, None, 31)
    )
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_short_moments_learn_as_well(moments):
    assert trained("cuda", "topk", moments=moments)[1] == pytest.approx(
        trained("cuda", "topk")[1], rel=0.1, abs=0.01
    )


def test_float32_products_give_the_cpus_first_step():
    here, there = (trained(device, "topk", 1, precision="float32")[0] for device in ("cuda", "cpu"))
    assert here.loss == pytest.approx(there.loss, rel=1e-4)
    torch.testing.assert_close(
        here.sae.W_dec.detach().cpu(), there.sae.W_dec.detach(), atol=1e-4, rtol=0
    )
