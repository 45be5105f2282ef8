"""SmolLM2-135M-Instruct, a real model of another family than Qwen3's, through the same wrapper."""

import pytest
import torch

import qsae_kit
from qsae_kit.data.companions import SLOW_AND_SMALL, companion_of
from qsae_kit.lm.chat import Phase
from qsae_kit.lm.edits import applied
from qsae_kit.steer.changes import add_direction

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def smollm2():
    try:
        return qsae_kit.load_model("smollm2")
    except ValueError as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")


def test_it_is_known_by_its_weights(smollm2):
    assert companion_of(smollm2) is SLOW_AND_SMALL


def test_it_answers_through_its_own_template(smollm2):
    assert (smollm2.n_layers, smollm2.d_model) == (30, 576)
    assert "Paris" in smollm2.generate("What is the capital of France?", 24).text[0]
    assert not smollm2.has_thinking
    with pytest.raises(ValueError, match="thinking"):
        smollm2.to_chat("Hello", enable_thinking=True)


def test_the_residual_stream_adds_up_and_hooks_change_nothing(smollm2):
    ids, mask = smollm2.pad(
        [smollm2.chat_tokens(p) for p in ("Hello there!", "Name three colors of the rainbow.")]
    )
    names = [
        f"blocks.15.{h}"
        for h in (
            "hook_resid_pre",
            "hook_attn_out",
            "hook_resid_mid",
            "hook_mlp_out",
            "hook_resid_post",
        )
    ]
    logits, cache = smollm2.run_with_cache(ids, mask, names_filter=names)
    pre, attn, mid, mlp, post = (cache[name][mask.bool()] for name in names)
    torch.testing.assert_close(pre + attn, mid, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(mid + mlp, post, rtol=1e-4, atol=1e-2)
    with torch.no_grad():
        plain = smollm2.hf(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(logits[mask.bool()], plain[mask.bool()])


def test_an_edit_reaches_the_policys_positions_only(smollm2):
    ids, mask = smollm2.pad([smollm2.chat_tokens("Hello there!")])
    direction = torch.nn.functional.normalize(
        torch.randn(576, generator=torch.Generator().manual_seed(0)), dim=0
    )
    with applied(
        smollm2, [add_direction("blocks.29.hook_resid_post", direction, 0.5, 100.0, "header")]
    ):
        changed, _ = smollm2.run_with_cache(ids, mask, names_filter=[])
    plain, _ = smollm2.run_with_cache(ids, mask, names_filter=[])
    moved = (changed != plain).any(-1)[0]
    phase = qsae_kit.lm.chat.phases(ids, mask, smollm2.markers)[0]
    assert moved[-1]
    assert not moved[phase == Phase.USER].any()
