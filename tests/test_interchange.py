"""Swapping everything flips the answer, swapping nothing does not."""

import pytest
import torch

from qsae_kit.sae import Provenance, ReLUSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.tiny.interchange import interchange, matching
from qsae_kit.world import world


def whole(lm, layer):
    """An SAE whose features are all directions, so that swapping all of them swaps the
    activation.
    """
    d = lm.d_model
    sae = ReLUSAE(
        d, 2 * d, 1.0, Provenance("tiny", f"blocks.{layer}.hook_resid_post", NormFilter(1e9))
    )
    with torch.no_grad():
        both = torch.cat([torch.eye(d), -torch.eye(d)])
        sae.encoder.copy_(both)
        sae.W_dec.copy_(both)
    return sae.requires_grad_(False)


def test_positions_match_by_their_tokens():
    assert matching([1, 2, 3, 4], [1, 9, 9, 3, 4]) == [(1, 2), (2, 3), (3, 4)]
    assert matching([1, 2, 3], [1, 2, 3]) == [(1, 1), (2, 2)]
    assert matching([1, 2, 5, 3], [1, 2, 3]) == [(1, 1), (3, 2)]


@pytest.mark.parametrize("changed", ["person", "asker", "object"])
def test_swapping_the_whole_last_layer_flips_and_nothing_keeps(lm, changed):
    sae = whole(lm, lm.n_layers - 1)
    pairs = list(world.pairs(changed, 12))
    everything, nothing = range(sae.d_sae), [0]
    none = [interchange(lm, [(sae, nothing)], pair) for pair in pairs]
    right = [n.before < 0 for n in none]
    assert sum(right) >= 8  # the model gives the base answer
    assert sum(n.flipped for n in none) <= 2
    swapped = [interchange(lm, [(sae, everything)], pair) for pair in pairs]
    if changed != "object":  # there the tool is named after the swapped tokens
        assert sum(s.flipped for s, r in zip(swapped, right, strict=True) if r) >= 0.7 * sum(right)
    for before, after in zip(none, swapped, strict=True):
        assert before.before == pytest.approx(after.before, abs=1e-6)
