"""Models as people have them: spread over devices and disk, compiled, patched, with adapters, under
another name. All give what the plain one gives.
"""

import copy
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import accelerate
import pytest
import torch
from small import SITES, small_suite
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from qsae_kit import LiveRows, TrainConfig, load_model, token_batches, train_saes
from qsae_kit.attach import attached, check_fit, is_of
from qsae_kit.audit.patch import patch
from qsae_kit.data.streams import read_by, stream_of
from qsae_kit.evaluate.modeldiff import check_pair
from qsae_kit.features.indexing import logit_effects
from qsae_kit.lm.edits import Edit, applied
from qsae_kit.lm.hooked import HookedLM
from qsae_kit.lm.sources import TINY_WEIGHTS, public_name
from qsae_kit.steer.changes import Steering

PROMPTS = ["How do I thank the nurse?", "How do I cut the wood?"]
SITE = "blocks.4.hook_resid_post"
ON_DISK = {"model.embed_tokens": "disk", "model.norm": "disk", "lm_head": "disk"}
PLACES = {
    "layers on disk": {f"model.layers.{i}": "disk" for i in range(3, 6)},
    "all but two layers on disk": ON_DISK | {f"model.layers.{i}": "disk" for i in range(4)},
}


@pytest.fixture(scope="module")
def batch(lm):
    return lm.pad([lm.chat_tokens(p, enable_thinking=False) for p in PROMPTS], "left")


@pytest.fixture(scope="module", params=PLACES)
def offloaded(lm, request, tmp_path_factory):
    """The bundled model as `device_map` leaves it, part of it on disk."""
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    parts += [f"model.layers.{i}" for i in range(lm.n_layers)]
    model = AutoModelForCausalLM.from_pretrained(
        TINY_WEIGHTS,
        device_map=dict.fromkeys(parts, "cpu") | PLACES[request.param],
        offload_folder=tmp_path_factory.mktemp("offload"),
        dtype=torch.float32,
    )
    assert any(parameter.is_meta for parameter in model.parameters())
    return load_model(model, tokenizer=lm.tokenizer)


AWAY = torch.device("xpu:1")


class Placed(torch.Tensor):
    """A tensor of another device, imitated: it names that, and meets none of this one, but for
    single numbers and weights.
    """

    device = property(lambda self: AWAY)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        given = [x for part in (*args, *(kwargs or {}).values()) for x in _tensors(part)]
        if any(not isinstance(x, (Placed, nn.Parameter)) and x.numel() > 1 for x in given):
            raise RuntimeError(f"{function.__name__} met tensors of {AWAY} and of cpu")
        return super().__torch_function__(function, types, args, kwargs or {})


class TwoDevices(TorchFunctionMode):
    """Moves between the device of `Placed` and the CPU, and makes what is made on the former."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)), None)
        if function is torch.Tensor.cpu or (function is torch.Tensor.to and to is not None):
            rest = [x for x in args[1:] if isinstance(x, torch.dtype)]
            rest += [kwargs["dtype"]] if kwargs.get("dtype") else []
            there = Placed if to == AWAY else torch.Tensor
            with torch._C.DisableTorchFunctionSubclass():
                moved = args[0].to(*rest) if rest else args[0]
            return moved if type(moved) is there else moved.as_subclass(there)
        if to == AWAY:
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
            return function(*args, **kwargs).as_subclass(Placed)
        return function(*args, **kwargs)


def _tensors(part):
    if isinstance(part, torch.Tensor):
        return [part]
    return [x for each in part for x in _tensors(each)] if isinstance(part, (list, tuple)) else []


def _sent(value):
    """What accelerate sends along: tensors to the other device, also within tuples."""
    if isinstance(value, tuple):
        return tuple(map(_sent, value))
    return value.to(AWAY) if isinstance(value, torch.Tensor) else value


@pytest.fixture
def sharded(lm):
    """The bundled model with all from layer 3 on at an imitated second device."""

    def send(_module, args, kwargs):
        return _sent(args), {name: _sent(value) for name, value in kwargs.items()}

    with TwoDevices():
        model = copy.deepcopy(lm.hf)
        for module in (*model.model.layers[3:], model.model.norm, model.lm_head):
            module.register_forward_pre_hook(send, with_kwargs=True)
        yield HookedLM(model, lm.tokenizer, "tiny")


def test_the_imitated_device_is_told_from_the_first():
    here = torch.ones(2)
    with TwoDevices():
        there = here.to(AWAY)
        assert there.device == AWAY
        assert (there + there).device == AWAY
        assert there.cpu().device == here.device == there.to(here.device).device
        with pytest.raises(RuntimeError, match="met tensors of xpu:1 and of cpu"):
            there + here


def same_as_plain(lm, other, batch):
    """Activations, edits at every hook point, answers and figures of another form of a model."""
    ids, mask = batch
    logits, cache = other.run_with_cache(ids, mask)
    plain, own = lm.run_with_cache(ids, mask)
    assert torch.equal(logits, plain)
    assert {name: x.device for name, x in cache.items()} == dict.fromkeys(own, lm.device)
    assert all(torch.equal(cache[name], own[name]) for name in own)
    where = torch.zeros_like(mask, dtype=torch.bool)
    where[:, -4:-1] = True
    for name in lm.hook_dict:
        push = torch.randn(lm.width(name), generator=torch.Generator().manual_seed(0))
        for positions in (where, "answer"):
            with applied(other, [Edit(name, lambda x, push=push: push.expand_as(x), positions)]):
                edited = other(ids, mask)
            with applied(lm, [Edit(name, lambda x, push=push: push.expand_as(x), positions)]):
                assert torch.equal(edited, lm(ids, mask)), name
    other_loss, loss = (float(m(ids, mask, return_type="loss")) for m in (other, lm))
    assert other_loss == loss
    answers = [m.generate(PROMPTS, 8, enable_thinking=False) for m in (other, lm)]
    assert answers[0] == answers[1]
    residual = own["blocks.1.hook_resid_post"]
    skipped = other(ids, mask, start_at_layer=2, residual=residual)
    assert torch.equal(skipped, lm(ids, mask, start_at_layer=2, residual=residual))


def trained(lm):
    """An SAE and the log of its losses, of a short training."""
    losses = []
    source = LiveRows(lm, [SITE], lambda: token_batches(lm, stream_of(lm, None)(), 1024))
    recipe = TrainConfig("topk", sparsity=4, expansion=1, tokens=512, batch=128, pool=256)
    watch = [lambda progress: losses.append(progress.figures())]
    suite = train_saes(source, [recipe], bar=False, watch=watch)
    return suite[recipe.variant][SITE], losses


@torch.no_grad()
def test_layers_on_another_device(lm, sharded, batch):
    same_as_plain(lm, sharded, batch)


def test_training_on_two_devices_is_training_on_one(lm, sharded):
    (sae, losses), (plain, expected) = trained(sharded), trained(lm)
    assert losses == expected
    assert torch.equal(sae.W_dec, plain.W_dec)
    assert replace(sae.origin, model_name="tiny") == plain.origin


@torch.no_grad()
def test_layers_on_disk(lm, offloaded, batch):
    assert (offloaded.device, offloaded.dtype) == (lm.device, lm.dtype)
    assert offloaded.weights_digest() == lm.weights_digest()
    same_as_plain(lm, offloaded, batch)
    assert any(parameter.is_meta for parameter in offloaded.hf.parameters())
    z = torch.randn(3, lm.d_heads, generator=torch.Generator().manual_seed(0))
    for layer in (0, 4):
        name = f"blocks.{layer}.attn.hook_z"
        assert torch.allclose(offloaded.to_residual(name, z), lm.to_residual(name, z), atol=1e-5)
    found, own = (
        logit_effects(offloaded, z @ z.T @ z[:, :160]),
        logit_effects(lm, z @ z.T @ z[:, :160]),
    )
    assert (found.promoted == own.promoted).all()


def test_training_on_a_model_whose_layers_lie_on_disk(lm, offloaded):
    (sae, losses), (plain, expected) = trained(offloaded), trained(lm)
    assert losses == expected
    assert torch.equal(sae.W_dec, plain.W_dec)
    assert replace(sae.origin, model_name="tiny") == plain.origin


def test_a_model_that_lies_in_several_places_is_not_moved(lm, offloaded):
    with pytest.raises(ValueError, match=r"in memory cannot be moved .*leave dtype and device out"):
        load_model(offloaded.hf, tokenizer=lm.tokenizer, dtype="bfloat16")


def test_weights_that_are_not_plain_are_not_written_into(lm, offloaded, tmp_path):
    adapted = copy.deepcopy(lm.hf)
    adapted.model.layers[1].mlp.up_proj = Adapted(adapted.model.layers[1].mlp.up_proj)
    for model, where in (
        (offloaded, "Linear, on disk"),
        (HookedLM(adapted, lm.tokenizer), "mlp.up_proj is Adapted"),
    ):
        for form in ("checkpoint", "lora"):
            with pytest.raises(ValueError, match=f"{where}.*load the model whole"):
                patch(model, Steering(), small_suite(lm), tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_all_of_a_model_on_disk(lm, batch, tmp_path):
    model = copy.deepcopy(lm.hf)
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    own = HookedLM(model, lm.tokenizer, "tiny")
    assert own.weights_digest() == lm.weights_digest()
    assert torch.equal(own(*batch), lm(*batch))


def test_a_device_of_choice_may_be_left_to_accelerate(lm, batch):
    own = load_model("tiny", device="auto")
    assert torch.equal(own(*batch), lm(*batch))


# --- compiled and patched


def compiled_whole(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_layers(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "how", [compiled_whole, compiled_in_place, compiled_layers, compiled_forward]
)
def test_hooks_of_a_compiled_model_are_seen(lm, batch, how):
    """Compiled code does not look at hooks: an edit would do nothing, without a word."""
    model = how(copy.deepcopy(lm.hf))
    inside = getattr(model, "_orig_mod", model)
    before = inside.__dict__.get("forward"), [m._compiled_call_impl for m in inside.modules()]
    own = load_model(model, tokenizer=lm.tokenizer)
    name = "blocks.2.hook_mlp_out"
    edited = []
    for each in (own, lm):
        each(*batch)  # without a hook first
        with applied(each, [Edit(name, lambda x: 1 - x, "every")]):
            edited.append(each(*batch))
            edited.append(each.generate(PROMPTS, 2, enable_thinking=False).tokens)
    assert torch.equal(edited[0], edited[2])
    assert edited[1] == edited[3]
    after = inside.__dict__.get("forward"), [m._compiled_call_impl for m in inside.modules()]
    assert after == before


def test_layers_that_are_wrapped_are_refused(lm):
    model = copy.deepcopy(lm.hf)
    layers = [torch.compile(layer, backend="eager") for layer in model.model.layers]
    model.model.layers = nn.ModuleList(layers)
    with pytest.raises(ValueError, match="compile them in place"):
        HookedLM(model, lm.tokenizer)


@torch.no_grad()
def test_a_patched_layer_keeps_its_patch(lm, batch):
    model = copy.deepcopy(lm.hf)
    own = HookedLM(model, lm.tokenizer, "patched")
    calls = []
    for i in (0, 3):
        layer = model.model.layers[i]

        def wrapped(*args, own=layer.forward, i=i, **kwargs):
            calls.append(i)
            return own(*args, **kwargs)

        layer.forward = wrapped
    patches = [layer.__dict__.get("forward") for layer in model.model.layers]
    name = "blocks.1.hook_resid_post"
    _, cache = own.run_with_cache(*batch, names_filter=name)
    logits = own(*batch, start_at_layer=2, residual=cache[name])
    assert calls == [0, 3, 3]
    with pytest.raises(ValueError, match="is left out"), own.hooks([("hook_embed", print)]):
        own(*batch, start_at_layer=2, residual=cache[name])
    assert torch.equal(own(*batch), logits)
    assert calls == [0, 3, 3, 0, 3]
    assert [layer.__dict__.get("forward") for layer in model.model.layers] == patches


@torch.no_grad()
def test_a_patch_that_goes_by_a_hooked_module_is_said(lm, batch):
    model = copy.deepcopy(lm.hf)
    own = HookedLM(model, lm.tokenizer, "patched")
    # such as a kernel of the whole layer; without hooks inside it does no harm
    model.model.layers[2].forward = lambda hidden_states, **_: hidden_states
    said = "went by blocks.2.hook_mlp_out: a patch of Qwen3ForCausalLM"
    own(*batch)
    own.run_with_cache(*batch, names_filter="blocks.2.hook_resid_post")
    with pytest.raises(ValueError, match=said):
        own.run_with_cache(*batch, names_filter="blocks.2.hook_mlp_out", return_type=None)
    with applied(own, [Edit("blocks.2.hook_mlp_out", lambda x: x, "every")]):
        for call in (partial(own, *batch), partial(own.generate, PROMPTS, 2)):
            with pytest.raises(ValueError, match=said):
                call()
    with pytest.raises(ValueError, match=r"went by blocks\.2"):
        HookedLM(model, lm.tokenizer)
    assert own.now is None


# --- adapters


class Adapted(nn.Module):
    """A linear map with a low-rank part, as PEFT puts one in a layer."""

    def __init__(self, base):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base_layer = base
        self.down = nn.Parameter(0.1 * torch.randn(2, base.in_features, generator=generator))
        self.up = nn.Parameter(0.1 * torch.randn(base.out_features, 2, generator=generator))

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T


class Wrapped(nn.Module):
    """A model as PEFT wraps it."""

    def __init__(self, model, learns_prompts=False):
        super().__init__()
        self.base_model = model
        self.active_peft_config = SimpleNamespace(is_prompt_learning=learns_prompts)

    def get_base_model(self):
        return self.base_model


@torch.no_grad()
def test_an_adapter_in_the_layers_is_part_of_the_model(lm, batch):
    model, merged = copy.deepcopy(lm.hf), copy.deepcopy(lm.hf)
    for layer, other in zip(model.model.layers, merged.model.layers, strict=True):
        adapted = layer.self_attn.o_proj = Adapted(layer.self_attn.o_proj)
        other.self_attn.o_proj.weight += adapted.up @ adapted.down
    own, whole = load_model(Wrapped(model), tokenizer=lm.tokenizer), HookedLM(merged, lm.tokenizer)
    assert torch.allclose(own(*batch), whole(*batch), atol=1e-3)
    assert not torch.allclose(own(*batch), lm(*batch), atol=1e-1)
    assert own.weights_digest() != lm.weights_digest()
    z, name = torch.randn(2, 3, lm.d_heads), "blocks.1.attn.hook_z"
    assert torch.allclose(own.to_residual(name, z), whole.to_residual(name, z), atol=1e-4)
    assert torch.allclose(
        own.to_residual(name, z[0, 0]), whole.to_residual(name, z[0, 0]), atol=1e-4
    )


@torch.no_grad()
def test_a_model_of_peft(lm, batch):
    import peft  # a second to import

    about = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(lm.hf), about)
    own = load_model(adapted, tokenizer=lm.tokenizer)
    ids, mask = batch
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = adapted(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(own(*batch), logits)
    z, name = torch.randn(3, lm.d_heads), "blocks.1.attn.hook_z"
    image = own.to_residual(name, z)
    whole = HookedLM(adapted.merge_and_unload(), lm.tokenizer)
    assert torch.allclose(image, whole.to_residual(name, z), atol=1e-4)


def test_an_adapter_before_the_text_is_refused(lm):
    with pytest.raises(ValueError, match="puts tokens before every text"):
        load_model(Wrapped(lm.hf, learns_prompts=True), tokenizer=lm.tokenizer)


@torch.no_grad()
def test_packed_weights_count_among_a_models_own(lm):
    """Of GPTQ and AWQ the weights are buffers of whole numbers."""
    digests = []
    for packed in (1, 1, 2):
        model = copy.deepcopy(lm.hf)
        table = torch.full((4, 4), packed, dtype=torch.int32)
        model.model.layers[2].mlp.up_proj.register_buffer("qweight", table)
        digests.append(HookedLM(model, lm.tokenizer).weights_digest())
    assert digests[0] == digests[1] != digests[2]
    assert lm.weights_digest() not in digests


# --- names


def renamed(sae, name):
    sae.provenance = replace(sae.origin, model_name=name, model_digest="")
    return sae


@pytest.mark.parametrize(
    ("own", "model", "one"),
    [
        ("qwen3-1.7b", "Qwen/Qwen3-1.7B", True),
        ("Qwen/Qwen3-8B", "/root/hub/models--Qwen--Qwen3-8B/snapshots/0123abc", True),
        ("/root/hub/models--Qwen--Qwen3-8B/snapshots/0123abc", "qwen3-8b", True),
        ("C:\\models\\Qwen3-8B", "Qwen/Qwen3-8B", True),
        ("gemma_2_2b", "google/gemma-2-2b", True),
        ("Qwen/Qwen3-17B", "Qwen/Qwen3-1.7B", False),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B", False),
    ],
)
def test_names_of_one_model(lm, own, model, one):
    sae = renamed(small_suite(lm)["v"][SITES[0]], own)
    other = HookedLM(lm.hf, lm.tokenizer, public_name(model))
    assert is_of(other, sae) == one
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_fit(other, sae)
        check_pair(other, other, {"v": {SITES[0]: sae}})
    assert [len(said), *{w.category for w in said}] == ([0] if one else [2, UserWarning])


def test_another_name_is_a_warning_with_the_way_out(lm):
    suite = small_suite(lm)
    for sae in suite["v"].values():
        renamed(sae, "somebody's")
    with pytest.warns(UserWarning, match=r"load_suite\(..., model_name='tiny'\)") as said:
        attached(lm, suite)
    assert len({str(warning.message) for warning in said}) == 1


def test_a_run_goes_on_whatever_its_model_is_called(lm, tmp_path, monkeypatch):
    """The same folder by a relative and by an absolute path, and under its public name."""
    lm.hf.save_pretrained(tmp_path / "mine")
    lm.tokenizer.save_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    told = [load_model(source) for source in ("mine", "./mine", str(tmp_path / "mine"))]
    told.append(HookedLM(lm.hf, lm.tokenizer, "Somebody/Mine"))
    assert [own.model_name for own in told[:3]] == ["mine"] * 3
    assert all(read_by(own, None) == read_by(told[0], None) for own in told)
    assert all(own.identity() == lm.identity() for own in told)
