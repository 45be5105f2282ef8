"""Real models through the same wrapper: SmolLM2-135M-Instruct and Qwen2.5-Coder-0.5B-Instruct."""

import pytest
import torch

import qsae_kit
from qsae_kit.data.companions import QWEN_CODER, SLOW_AND_SMALL, companion_of
from qsae_kit.lm.chat import Phase
from qsae_kit.lm.edits import applied
from qsae_kit.steer.changes import add_direction

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def smollm2():
    try:
        return qsae_kit.load_model("smollm2", dtype="float32")
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


def test_qwen2_5_coder_answers_and_is_known_by_its_weights():
    try:
        lm = qsae_kit.load_model("qwen2.5-coder-0.5b", dtype="float32")
    except ValueError as error:
        pytest.skip(f"Qwen2.5-Coder-0.5B cannot be had here: {error}")
    assert (lm.model_name, lm.n_layers, lm.d_model) == ("qwen2.5-coder-0.5b", 24, 896)
    assert sum(parameter.numel() for parameter in lm.hf.parameters()) == 494_032_768
    assert companion_of(lm) is QWEN_CODER
    assert not lm.has_thinking
    told = lm.generate("What is the capital of France?", 12)
    assert "Paris" in told.text[0]
    assert told.finished == [True]
