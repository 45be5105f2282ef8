"""The contract that every architecture of SAEs keeps, a check a promise.

An architecture of one's own is a subclass of `qsae_kit.sae.SAE`; with pytest it is tested by

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_contract(check):
        check(MySAE)

Every check raises AssertionError where the promise in its docstring is not kept.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from qsae_kit.sae import SAE, Provenance
from qsae_kit.sae.base import State
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.store import load_sae, save_sae

D_IN, D_SAE, SPARSITY, ROWS = 12, 40, 5.0, 600
"""Sizes of the SAEs that are checked."""
SITE = "blocks.2.hook_mlp_out"
CLOSE, NEAR = 1e-4, 0.05
"""Largest differences: of a formula rewritten, and of a length that is fitted."""


def make_sae(
    architecture: type[SAE], sparsity: float = SPARSITY, site: str = SITE
) -> tuple[SAE, Float[Tensor, "row d_in"]]:
    """A small SAE, initialised on random rows, with random biases; and the rows."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, D_IN, generator=generator)
    origin = Provenance("tiny", site, NormFilter(3.5), tokens=ROWS, figures={"l0": 5.0})
    sae = architecture(D_IN, D_SAE, sparsity, origin)
    sae.init_from_rows(x, generator)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1, generator=generator)
        sae.b_dec.normal_(std=0.1, generator=generator)
    return sae, x


def features_are_sparse_and_not_negative(architecture: type[SAE]) -> None:
    """`encode` takes rows of any leading shape; few features fire, and none below 0."""
    sae, x = make_sae(architecture)
    f = sae.encode(x)
    assert (f >= 0).all(), "a feature is negative"
    l0 = float((f > 0).float().sum(-1).mean())
    assert 0 < l0 < D_SAE / 2, f"{l0} of {D_SAE} features fire"
    assert torch.equal(sae(x), sae.decode(f)), "the forward pass is not decode(encode(x))"
    assert sae.encode(x[0]).shape == (D_SAE,)
    assert sae.encode(x.view(20, -1, D_IN)).shape == (20, ROWS // 20, D_SAE)


def decoder_rows_start_in_the_subspace_of_the_data(architecture: type[SAE]) -> None:
    """`init_from_rows` puts the decoder where the rows are."""
    rank = 3
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(rank, D_IN, generator=generator)
    sae = architecture(D_IN, D_SAE, SPARSITY)
    sae.init_from_rows(torch.randn(ROWS, rank, generator=generator) @ basis, generator)
    assert torch.linalg.matrix_rank(sae.W_dec, rtol=CLOSE) == rank


def rows_do_not_see_each_other(architecture: type[SAE]) -> None:
    """A row's features are the same alone and among others."""
    sae, x = make_sae(architecture)
    torch.testing.assert_close(sae.encode(x)[:7], sae.encode(x[:7]))


def decoder_rows_start_with_unit_norm(architecture: type[SAE]) -> None:
    """... and the first reconstructions have the length that fits best."""
    sae, x = make_sae(architecture)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE))
    sae.init_from_rows(x, torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc.zero_()
        sae.b_dec.zero_()
        x_hat = sae(x)
    length = float((x * x_hat).sum() / x_hat.pow(2).sum())
    assert abs(length - 1) < NEAR, f"the best length of reconstructions is {length} of theirs"


def the_loss_reaches_every_parameter(architecture: type[SAE]) -> None:
    """`training_loss` has a gradient for each parameter, and activations at selected places."""
    sae, x = make_sae(architecture)
    loss = sae.training_loss(x, State(torch.arange(5), 0.5))
    loss.total.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, f"{name} is not reached"
        assert parameter.grad.abs().sum() > 0, f"{name} has a gradient of 0 everywhere"
    assert len(loss.f) == len(loss.codes), "an activation has no place"


def folding_gives_the_same_reconstruction_of_raw_rows(architecture: type[SAE]) -> None:
    """`fold` moves the normalisation of training into the weights."""
    sae, x = make_sae(architecture)
    mean, scale = torch.randn(D_IN, generator=torch.Generator().manual_seed(1)), 0.37
    raw = x / scale + mean
    with torch.no_grad():
        expected, features = sae(x) / scale + mean, sae.encode(x) / scale
        sae.fold(mean, scale)
        torch.testing.assert_close(sae(raw), expected, atol=CLOSE, rtol=CLOSE)
        torch.testing.assert_close(sae.encode(raw), features, atol=CLOSE, rtol=CLOSE)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE))


def a_folder_gives_the_same_bits_back(architecture: type[SAE]) -> None:
    """What `save_sae` writes is what `load_sae` reads, for an architecture that is registered."""
    sae, x = make_sae(architecture)
    sae = sae.exported()
    with tempfile.TemporaryDirectory() as made:
        save_sae(sae, Path(made) / "sae")
        back = load_sae(Path(made) / "sae")
    assert back.provenance == sae.provenance
    assert back.sparsity == sae.sparsity
    for name, tensor in sae.tensors().items():
        assert torch.equal(tensor, back.tensors()[name]), f"{name} is another one"
    assert torch.equal(back.encode(x), sae.encode(x))


CHECKS: tuple[Callable[[type[SAE]], None], ...] = (
    features_are_sparse_and_not_negative,
    decoder_rows_start_in_the_subspace_of_the_data,
    rows_do_not_see_each_other,
    decoder_rows_start_with_unit_norm,
    the_loss_reaches_every_parameter,
    folding_gives_the_same_reconstruction_of_raw_rows,
    a_folder_gives_the_same_bits_back,
)
