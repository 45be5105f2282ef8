"""The contract that every architecture keeps, and the folders it is stored in."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qsae_kit.data.stored import save_rows
from qsae_kit.sae import ARCHITECTURES, jumprelu
from qsae_kit.sae.base import State
from qsae_kit.sae.batchtopk import BatchTopKSAE
from qsae_kit.sae.jumprelu import _Jump
from qsae_kit.sae.matryoshka import PREFIXES
from qsae_kit.sae.store import load_sae, load_suite, save_sae, save_suite
from qsae_kit.sae.topk import TopKSAE
from qsae_kit.testing.contract import CHECKS, SITE, make_sae
from qsae_kit.train.optim import Adam

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def make(architecture, **sizes):
    return make_sae(ARCHITECTURES[architecture], **sizes)


@each_architecture
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(architecture, check):
    check(ARCHITECTURES[architecture])


class Careless(TopKSAE):
    """An architecture that breaks its promises: negative features that depend on other rows."""

    def encode(self, x):
        return super().encode(x) - x.mean()


def test_the_contract_finds_what_is_not_kept():
    failed = set()
    for check in CHECKS:
        try:
            check(Careless)
        except AssertionError:
            failed.add(check.__name__)
    assert {"features_are_sparse_and_not_negative", "rows_do_not_see_each_other"} <= failed


@each_architecture
def test_gradients_stay_off_the_decoder_rows(architecture):
    sae, x = make(architecture)
    loss = sae.training_loss(x, State(torch.arange(5), 0.5))
    loss.total.backward()
    if isinstance(sae, BatchTopKSAE):  # kept by their rank in the batch
        assert len(loss.codes) == 5 * len(x)
    else:
        torch.testing.assert_close(loss.codes.dense(loss.f), sae.encode(x))
    Adam(list(sae.parameters()), unit_rows=sae.W_dec).project_gradients()
    assert (sae.W_dec.grad * sae.W_dec).sum(-1).abs().max() < 1e-5


@each_architecture
def test_the_folder_is_saelens_layout(architecture, tmp_path):
    sae, x = make(architecture)
    save_sae(sae, tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    tensors = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    stored_as = {"batchtopk": "jumprelu", "matryoshka": "jumprelu"}.get(architecture, architecture)
    assert config["architecture"] == stored_as
    assert (config["d_in"], config["d_sae"]) == (12, 40)
    assert config["metadata"]["hook_name"] == SITE
    own = {"jumprelu": {"b_enc", "threshold"}, "gated": {"b_gate", "b_mag", "r_mag"}}.get(
        stored_as, {"b_enc"}
    )
    assert set(tensors) == {"W_enc", "W_dec", "b_dec"} | own
    assert tensors["W_enc"].shape == (12, 40)
    # plain lines instead of the package's encoder
    product = x @ tensors["W_enc"]
    if stored_as == "gated":
        magnitude = (product * tensors["r_mag"].exp() + tensors["b_mag"]).relu()
        expected = torch.where(product + tensors["b_gate"] > 0, magnitude, 0)
    else:
        pre = product + tensors["b_enc"]
        floor = torch.zeros(())
        if stored_as == "topk":
            floor = (
                pre.sort(descending=True)
                .values[:, config["k"] - 1 : config["k"]]
                .nextafter(torch.tensor(-torch.inf))
            )
        elif stored_as == "jumprelu":
            floor = tensors["threshold"]
        expected = torch.where(pre > floor, pre.relu(), 0)
    torch.testing.assert_close(sae.encode(x), expected)


def test_topk_keeps_at_most_k():
    sae, x = make("topk")
    assert ((sae.encode(x) > 0).sum(-1) <= 5).all()


def test_jump_gradients_are_the_straight_through_ones():
    generator = torch.Generator().manual_seed(0)
    pre = (torch.randn(50, 6, generator=generator) * 0.05).requires_grad_()
    theta = torch.full((6,), 0.02, requires_grad=True)
    grad_f, grad_l0 = torch.randn(50, 6, generator=generator), torch.randn(50, generator=generator)
    f, fired = _Jump.apply(pre, theta.expand_as(pre), torch.ones(50, 6), 0.03)
    ((f * grad_f).sum() + (fired.sum(-1) * grad_l0).sum()).backward()
    inside = ((pre - theta).abs() < 0.03 / 2).float()
    assert torch.equal(pre.grad, grad_f * (pre > theta))
    expected = -(inside * (theta * grad_f + grad_l0[:, None])).sum(0) / 0.03
    torch.testing.assert_close(theta.grad, expected)


def test_sampled_rows_stand_for_the_others_in_jumprelu(monkeypatch):
    sae, x = make("jumprelu", sparsity=3.0)
    monkeypatch.setattr(jumprelu, "SAMPLED_ROWS", 50)
    with torch.no_grad():
        sae.bandwidth = 0.4
        sae.threshold.fill_(0.3)
    x = x[:50].repeat_interleave(4, 0)  # so the sampled rows are like those that they stand for
    state = State(torch.arange(0), 1.0)
    sae.training_loss(x, state).total.backward()
    found = sae.threshold.grad.clone(), sae.encoder.grad.clone(), sae.b_enc.grad.clone()
    sae.zero_grad()

    pre = sae.pre_activations(x)
    f, fired = _Jump.apply(pre, sae.threshold.expand_as(pre), torch.ones_like(pre), sae.bandwidth)
    l0 = fired.sum(-1).mean()
    loss = (x - sae.decode(f)).pow(2).sum(-1).mean() + sae.coefficient * (
        l0 / sae.sparsity - 1
    ) ** 2
    loss.backward()
    assert ((pre > 0.1) & (pre < 0.25)).sum() > 500  # that only sampled rows tell of
    for one, other in zip(
        found, (sae.threshold.grad, sae.encoder.grad, sae.b_enc.grad), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "cfg.json").unlink(), "cfg.json' cannot be read"),
        (lambda f: (f / "cfg.json").write_text("{"), "not JSON"),
        (lambda f: (f / "cfg.json").write_text("{}"), "no metadata"),
        (lambda f: (f / "sae_weights.safetensors").write_bytes(b"1234"), "cannot be read"),
        (lambda f: (f / "sae_weights.safetensors").unlink(), "holds no SAEs"),
        (
            lambda f: save_file({"W_enc": torch.zeros(2, 2)}, f / "sae_weights.safetensors"),
            "lacks W_dec, b_dec, b_enc",
        ),
        (lambda f: _edit(f, lambda c: c.update(architecture="magic")), "'magic' SAE"),
        (lambda f: _edit(f, lambda c: c["metadata"].update(qsae_kit=1)), "lacks 'sparsity'"),
        (
            lambda f: _edit(f, lambda c: c.update(d_sae=41)),
            "d_sae=40, its configuration says 12 and 41",
        ),
        (
            lambda f: _edit(f, lambda c: c["metadata"]["qsae_kit"].pop("median_norm")),
            "lacks 'median_norm'",
        ),
        (lambda f: _edit(f, lambda c: c["metadata"].update(hook_name="blocks.x")), "not a site"),
        (lambda f: _poison(f), "not finite"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    sae, _ = make("topk")
    save_sae(sae, tmp_path / "sae")
    damage(tmp_path / "sae")
    with pytest.raises(ValueError, match=message):
        load_sae(tmp_path / "sae")


def _edit(folder, change):
    config = json.loads((folder / "cfg.json").read_text())
    change(config)
    (folder / "cfg.json").write_text(json.dumps(config))


def _poison(folder):
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["b_enc"][0] = float("nan")
    save_file(tensors, folder / "sae_weights.safetensors")


def test_a_failed_save_leaves_the_old_folder(tmp_path, monkeypatch):
    sae, _ = make("topk")
    save_sae(sae, tmp_path / "sae")
    before = (tmp_path / "sae" / "cfg.json").read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("qsae_kit.io.tensorfiles.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        save_sae(sae, tmp_path / "sae")
    assert (tmp_path / "sae" / "cfg.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]


def test_a_suite_keeps_the_models_order(tmp_path):
    sites = ["blocks.10.hook_resid_post", "blocks.2.hook_mlp_out", "blocks.2.hook_resid_post"]
    save_suite({"topk-x3": {site: make("topk", site=site)[0] for site in sites}}, tmp_path)
    assert list(load_suite(tmp_path)["topk-x3"]) == [sites[1], sites[2], sites[0]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no SAEs"):
        load_suite(tmp_path / "empty")


def test_stored_rows_say_their_scale(tmp_path):
    from safetensors import safe_open

    x = torch.tensor([[1.0, -2.0], [90_000.0, 0.5]])
    save_rows({SITE: x}, SITE, tmp_path / "acts.safetensors", {"model": "tiny"})
    with safe_open(tmp_path / "acts.safetensors", "pt") as file:
        header, acts = file.metadata(), file.get_tensor("acts")
    assert acts.dtype == torch.float16
    assert header["hook_name"] == SITE
    torch.testing.assert_close(acts.float() / float(header["scale"]), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sparsity", [0, 41, -1])
def test_impossible_sparsities(sparsity):
    with pytest.raises(ValueError, match="allowed are 0 < sparsity"):
        ARCHITECTURES["topk"](12, 40, sparsity)


@pytest.mark.parametrize("architecture", ["topk", "matryoshka", "standard", "gated"])
def test_the_loss_is_the_one_in_the_docstring(architecture):
    """Value and gradients against dense autograd in float64, written from the equations."""
    sae, x = make(architecture)
    sae, x = sae.double(), x[:50].double()
    if architecture in ("standard", "gated"):
        sae.steered = False  # lambda stays
    state = State(torch.arange(0), 1.0)
    if architecture == "matryoshka":
        sae.eval()  # the threshold stays
    loss = sae.training_loss(x, state)
    loss.total.backward()
    found = {name: p.grad for name, p in sae.named_parameters()}
    sae.zero_grad()
    pre = x @ sae.encoder.T + sae.b_enc
    if architecture == "topk":
        values, columns = pre.topk(5)
        f = torch.zeros_like(pre).scatter(1, columns, values.relu())
        expected = (x - f @ sae.W_dec - sae.b_dec).pow(2).sum(-1).mean()
    elif architecture == "matryoshka":
        kept = torch.zeros(pre.numel(), dtype=torch.bool)
        kept[pre.detach().view(-1).topk(5 * 50).indices] = True
        f = pre * (kept.view_as(pre) & (pre > 0))
        ends = [max(1, round(share * 40)) for share in PREFIXES]
        errors = [
            (x - f[:, :end] @ sae.W_dec[:end] - sae.b_dec).pow(2).sum(-1).mean() for end in ends
        ]
        expected = sum(errors) / len(errors)
    elif architecture == "standard":
        f = pre.relu()
        expected = (x - f @ sae.W_dec - sae.b_dec).pow(2).sum(-1).mean() + sae.l1 * f.sum(-1).mean()
    else:
        magnitude = sae.r_mag.exp() * (x @ sae.encoder.T) + sae.b_mag
        f = magnitude.relu() * (pre > 0)
        by_gate = pre.relu() @ sae.W_dec.detach() + sae.b_dec.detach()
        penalty = sae.l1 * pre.relu().sum(-1).mean()
        expected = (
            (x - f @ sae.W_dec - sae.b_dec).pow(2).sum(-1).mean()
            + penalty
            + (x - by_gate).pow(2).sum(-1).mean()
        )
    expected.backward()
    torch.testing.assert_close(loss.total, expected)
    for name, p in sae.named_parameters():
        torch.testing.assert_close(found[name], p.grad, msg=name)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    sae, _ = make("topk")
    with torch.no_grad():
        sae.b_dec[3] = torch.nan
    with pytest.raises(ValueError, match="not finite in b_dec"):
        save_sae(sae, tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_the_auxiliary_loss_by_hand():
    """Dead latents decode their largest pre-activations, AUX_K times k of them, to what is left
    over; others see nothing.
    """
    generator = torch.Generator().manual_seed(0)
    x, error = (torch.randn(12, 6, generator=generator) for _ in range(2))
    sae = TopKSAE(6, 9, 1.0)
    sae.init_from_rows(x, generator)
    dead = torch.tensor([1, 2, 4])
    others = torch.tensor([0, 3, 5, 6, 7, 8])
    loss = sae.aux_k_loss(x, error, dead, sae.pre_activations(x)[::4])
    some, left = x[::4], error[::4]
    pre = (some @ sae.W_enc + sae.b_enc)[:, dead]
    kept = pre * (pre >= pre.sort(descending=True).values[:, 1:2]) * (pre > 0)
    expected = (left - kept @ sae.W_dec[dead]).pow(2).sum() / left.pow(2).sum() / 8
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert sae.W_dec.grad[dead].any()
    assert not sae.W_dec.grad[others].any()
    assert not sae.encoder.grad[others].any()
    assert sae.aux_k_loss(x, error, torch.arange(0), sae.pre_activations(x)[::4]) == 0


def test_dead_latents_are_lifted_by_their_biases_and_thresholds_alone():
    sae, x = make("jumprelu")
    with torch.no_grad():
        sae.threshold[:3] = 50.0  # they cannot fire
    sae._lift(x, torch.arange(3)).backward()
    assert (sae.b_enc.grad[:3] < 0).all()  # a step along -grad raises it
    assert (sae.threshold.grad[:3] > 0).all()
    assert not sae.b_enc.grad[3:].any()
    assert sae.encoder.grad is None


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "jumprelu"])
def test_the_auxiliary_loss_sees_the_pre_activations_of_its_rows(architecture):
    sae, x = make(architecture)
    sae.eval()  # thresholds stay
    with torch.no_grad():
        alive = sae.training_loss(x, State(torch.arange(0), 1.0))
        dead = torch.arange(3, 9)
        error = x - sae.decode(alive.codes.dense(alive.f))
        expected = sae.aux_k_loss(x, error, dead, sae.pre_activations(x)[::4])
        if architecture == "jumprelu":
            expected = expected + sae._lift(x, dead)
        found = sae.training_loss(x, State(dead, 1.0)).total - alive.total
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_optimiser_is_adam_on_clipped_gradients_beside_unit_rows():
    generator = torch.Generator().manual_seed(0)
    W, b = (
        torch.nn.functional.normalize(torch.randn(6, 5, generator=generator), dim=-1),
        torch.randn(6, generator=generator),
    )
    ours = [W.clone().requires_grad_(), b.clone().requires_grad_()]
    theirs = [W.clone().requires_grad_(), b.clone().requires_grad_()]
    optimizer, plain = Adam(ours, unit_rows=ours[0]), torch.optim.Adam(theirs)
    for scale in (0.1, 30.0, 0.2, 5.0):  # by which a clip of ever other size shows in the moments
        for one, other in zip(ours, theirs, strict=True):
            grad = torch.randn(one.shape, generator=generator) * scale
            one.grad, other.grad = grad.clone(), grad
        W, grad = theirs[0].detach(), theirs[0].grad
        theirs[0].grad = grad - (grad * W).sum(-1, keepdim=True) * W
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        plain.param_groups[0]["lr"] = 0.05
        plain.step()
        W.div_(W.norm(dim=-1, keepdim=True))
        optimizer.step(0.05, clip=min(1.0, 1 / float(optimizer.project_gradients())))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


class Plain(TopKSAE):
    """An architecture that SAELens does not have."""

    architecture = "plain"


def test_an_architecture_in_the_registry_keeps_the_contract_without_another_list(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "plain", Plain)
    for check in CHECKS:
        check(Plain)


def test_an_architecture_that_nobody_knows_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as known:
        known.setitem(ARCHITECTURES, "plain", Plain)
        save_sae(make_sae(Plain)[0], tmp_path / "sae")
    with pytest.raises(ValueError, match="'plain' SAE; known are standard, topk, jumprelu, gated"):
        load_sae(tmp_path / "sae")
    config = (tmp_path / "sae" / "cfg.json").read_text()
    (tmp_path / "sae" / "cfg.json").write_text(config.replace('"plain"', '"batchtopk"'))
    with pytest.raises(ValueError, match="'batchtopk' SAE"):  # stored as jumprelu
        load_sae(tmp_path / "sae")
