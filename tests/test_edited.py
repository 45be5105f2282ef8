"""Whether a checkpoint was edited: planted edits are found, copies in other formats are none."""

import gguf
import pytest
import torch
from small import SITES, small_suite

from qsae_kit import load_model
from qsae_kit.audit.edited import was_edited
from qsae_kit.audit.patch import patch
from qsae_kit.steer.changes import Change, Steering


def out_of_all(features, strength=1.0):
    return Change(
        "project_out",
        SITES[0],
        "v",
        features,
        strength=strength,
        positions="every",
        everywhere=True,
    )


@pytest.fixture(scope="module")
def suite(lm):
    return small_suite(lm)


@pytest.fixture
def copy(lm, tmp_path):
    """Another model, to be changed at will."""
    lm.hf.save_pretrained(tmp_path / "copy")
    lm.tokenizer.save_pretrained(tmp_path / "copy")
    return load_model(str(tmp_path / "copy"), dtype="float32")


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_feature_that_was_projected_out_is_named(lm, suite, tmp_path, strength, dtype):
    patch(lm, Steering((out_of_all((5,), strength),)), suite, tmp_path / "mended")
    after = load_model(str(tmp_path / "mended"), dtype=dtype)
    found = was_edited(lm, after, suite)
    n = 2 * lm.n_layers + 1
    assert found.edited
    kinds = found.tensors.set_index("name")
    low = kinds[kinds["kind"] == "low rank"]
    assert set(low["rank"]) == {1}
    assert len(low) == n
    assert set(kinds["kind"]) <= {"low rank", "rounding"}
    best = found.features.iloc[0]
    assert (best["variant"], best["site"], best["feature"]) == ("v", SITES[0], 5)
    assert abs(best["cosine"]) > 0.98
    assert best["writers"] == n
    assert f"{n} of them along a direction whose nearest feature is 5" in found.in_words


def test_several_directions_and_constants_are_counted(lm, suite, tmp_path):
    constant = Change(
        "add",
        "blocks.2.hook_attn_out",
        direction=tuple([1.0] * lm.d_model),
        strength=0.5,
        median_norm=3.0,
        positions="every",
    )
    steering = Steering((out_of_all((5,)), out_of_all((9,)), constant))
    patch(lm, steering, suite, tmp_path / "mended")
    found = was_edited(lm, load_model(str(tmp_path / "mended")), suite, along=1)
    kinds = found.tensors["kind"].value_counts()
    assert kinds["low rank"] == 2 * lm.n_layers + 1
    assert kinds["bias"] == 1
    assert set(found.tensors[found.tensors["kind"] == "low rank"]["rank"]) == {2}


def test_a_change_of_low_rank_in_one_matrix_is_found(lm, copy):
    gate = copy.hf.model.layers[1].mlp.gate_proj.weight
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        change = torch.randn(len(gate), 3, generator=generator) @ torch.randn(
            3, gate.shape[1], generator=generator
        )
        gate += 0.02 * gate.norm() * change / change.norm()
    found = was_edited(lm, copy)
    [row] = found.tensors.itertuples()
    assert (row.name, row.kind, row.rank) == ("model.layers.1.mlp.gate_proj.weight", "low rank", 3)
    assert row.relative == pytest.approx(0.02, rel=1e-3)


@torch.no_grad()
def test_copies_in_other_formats_are_no_edits(lm, copy):
    assert was_edited(lm, copy).in_words == "The weights are the same to the bit."
    for kind in ("bfloat16", "Q8_0", "Q4_0"):
        for name, own in copy.hf.named_parameters():
            true = lm.hf.get_parameter(name)
            if not kind.startswith("Q"):
                own.copy_(true.to(getattr(torch, kind)).float())
            elif true.ndim == 2 and true.shape[1] % 32 == 0:
                form = gguf.GGMLQuantizationType[kind]
                packed = gguf.quantize(true.numpy(), form)
                own.copy_(torch.from_numpy(gguf.dequantize(packed, form)))
        found = was_edited(lm, copy)
        assert not found.edited, (kind, found.tensors[found.tensors["kind"] != "rounding"])
        assert found.in_words.startswith("No sign of an edit")


@torch.no_grad()
def test_training_is_no_edit_of_low_rank(lm, copy):
    for own in copy.hf.parameters():
        size = own.std() if own.numel() > 1 else 1.0
        own += (
            0.05
            * size
            * torch.randn(own.shape, generator=torch.Generator().manual_seed(1))
            * (1 + 5 * torch.rand(own.shape[-1], generator=torch.Generator().manual_seed(2)))
        )
    found = was_edited(lm, copy)
    assert found.edited
    assert set(found.tensors["kind"]) == {"other", "bias"}


def test_weights_that_are_not_plain_are_no_all_clear(lm, copy):
    down = copy.hf.model.layers[1].mlp.down_proj
    copy.hf.model.layers[1].mlp.down_proj = torch.nn.Sequential(down)
    copy.hf.model.layers[1].mlp.down_proj.base_layer = down
    with pytest.raises(ValueError, match="are not plain"):
        was_edited(lm, copy)


def test_models_of_other_shapes_are_refused(lm, copy):
    copy.hf.model.layers[0].mlp.gate_proj.weight = torch.nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"has the shapes .* give two models of one shape"):
        was_edited(lm, copy)
