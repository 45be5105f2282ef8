"""SAEs laid out as public releases are, with what their own libraries compute from them in plain
lines.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MODEL = "Qwen/Qwen3-8B"


class Laid(NamedTuple):
    """A release on disk: its folder, the folder of its SAE, the tensors, and x -> (f, x_hat) as its
    library has it.
    """

    root: Path
    folder: Path
    tensors: dict[str, Tensor]
    forward: Callable[[Tensor], tuple[Tensor, Tensor]]
    hook_name: str
    scale: Tensor
    """[d_sae]: our activations over theirs, the decoder norms where they are folded."""


def random_tensors(d_in, d_sae, seed=0, dtype=torch.float32, unit=True):
    """Encoder [d_sae, d_in], decoder [d_sae, d_in] and biases; the encoder follows the decoder, so
    that features fire.
    """
    g = torch.Generator().manual_seed(seed)
    dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g), dim=-1)
    enc = dec + 0.05 * torch.randn(d_sae, d_in, generator=g)
    if not unit:
        dec *= torch.rand(d_sae, 1, generator=g) + 0.5
    b_enc, b_dec = 0.1 * torch.randn(d_sae, generator=g), 0.3 * torch.randn(d_in, generator=g)
    return [t.to(dtype) for t in (enc, dec, b_enc, b_dec)]


def top_k(pre, k):
    values, at = pre.relu().topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, at, values)


def dictionary_learning(
    root,
    kind="BatchTopKSAE",
    layer=3,
    d_in=16,
    d_sae=64,
    k=5,
    dtype=torch.float32,
    model=MODEL,
    trainer=0,
):
    """`saes_<model>_<architecture>/resid_post_layer_<n>/trainer_<i>/{ae.pt, config.json}`, as
    `trainSAE` writes them.
    """
    enc, dec, b_enc, b_dec = random_tensors(
        d_in, d_sae, layer, dtype, unit=kind not in ("AutoEncoder", "GatedAutoEncoder")
    )
    threshold, k_ = torch.tensor(0.25), torch.tensor(k, dtype=torch.int)
    g = torch.Generator().manual_seed(9)
    r_mag, b_mag = 0.1 * torch.randn(d_sae, generator=g), 0.1 * torch.randn(d_sae, generator=g)
    linear = {"encoder.weight": enc, "encoder.bias": b_enc, "decoder.weight": dec.T.contiguous()}
    plain = {"W_enc": enc.T.contiguous(), "b_enc": b_enc, "W_dec": dec, "b_dec": b_dec}
    state = {
        "BatchTopKSAE": linear | {"b_dec": b_dec, "k": k_, "threshold": threshold},
        "AutoEncoderTopK": linear | {"b_dec": b_dec, "k": k_, "threshold": torch.tensor(-1.0)},
        "MatryoshkaBatchTopKSAE": (
            plain | {"k": k_, "threshold": threshold, "group_sizes": torch.tensor([16, d_sae - 16])}
        ),
        "JumpReluAutoEncoder": (
            plain | {"threshold": threshold + 0.2 * torch.rand(d_sae, generator=g)}
        ),
        "AutoEncoder": linear | {"bias": b_dec},
        "AutoEncoderNew": linear | {"decoder.bias": b_dec},
        "GatedAutoEncoder": {
            "decoder_bias": b_dec,
            "encoder.weight": enc,
            "r_mag": r_mag,
            "gate_bias": b_enc,
            "mag_bias": b_mag,
            "decoder.weight": dec.T.contiguous(),
        },
    }[kind]

    def forward(x):
        e, d, be, bd = enc.float(), dec.float(), b_enc.float(), b_dec.float()
        x = x if kind in ("JumpReluAutoEncoder", "AutoEncoderNew") else x - bd
        pre = x @ e.T + be
        f = pre.relu()
        if "BatchTopK" in kind:
            f = f * (f > threshold)
        elif kind == "JumpReluAutoEncoder":
            f = (pre * (pre > state["threshold"])).relu()
        elif kind == "AutoEncoderTopK":
            f = top_k(pre, k)
        elif kind == "GatedAutoEncoder":
            f = (pre > 0) * (r_mag.exp() * (x @ e.T) + b_mag).relu()
        return f, f @ d + bd

    top = root / f"saes_{model.replace('/', '_')}_batch_top_k"
    folder = top / f"resid_post_layer_{layer}" / f"trainer_{trainer}"
    folder.mkdir(parents=True)
    torch.save(state, folder / "ae.pt")
    config = {
        "trainer": (
            {
                "trainer_class": "Trainer",
                "dict_class": kind,
                "lr": 5e-5,
                "steps": 244140,
                "seed": 0,
                "activation_dim": d_in,
                "dict_size": d_sae,
                "device": "cuda:0",
                "layer": layer,
                "lm_name": model,
                "wandb_name": f"trainer_{trainer}",
                "submodule_name": f"resid_post_layer_{layer}",
            }
            | (
                {"k": k}
                if "TopK" in kind
                else {"target_l0": 7}
                if kind == "JumpReluAutoEncoder"
                else {}
            )
        ),
        "buffer": {
            "d_submodule": d_in,
            "io": "out",
            "n_ctxs": 122,
            "ctx_len": 2048,
            "refresh_batch_size": 4,
            "out_batch_size": 2048,
            "device": "cuda:0",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    scale = torch.ones(d_sae) if kind == "AutoEncoderTopK" else dec.float().norm(dim=-1)
    return Laid(root, folder, state, forward, f"blocks.{layer}.hook_resid_post", scale)


def qwen_scope(root, layer=3, d_in=16, d_sae=1024, k=5, model="Qwen3-8B-Base", config=True):
    """`SAE-Res-<model>-W<n>K-L0_<k>/layer<n>.sae.pt`, a dict of four tensors."""
    enc, dec, b_enc, b_dec = random_tensors(d_in, d_sae, layer, unit=False)
    folder = root / f"SAE-Res-{model}-W{d_sae // 1024}K-L0_{k}"
    folder.mkdir(parents=True, exist_ok=True)
    state = {"W_enc": enc, "W_dec": dec.T.contiguous(), "b_enc": b_enc, "b_dec": b_dec}
    torch.save(state, folder / f"layer{layer}.sae.pt")
    if config:
        about = {
            "model_type": "topk_sae",
            "base_model": f"Qwen/{model}",
            "d_model": d_in,
            "d_sae": d_sae,
            "k": k,
            "num_layers": 36,
            "hook_point": "resid_post",
            "dtype": "float32",
        }
        (folder / "config.json").write_text(json.dumps(about))

    def forward(x):
        f = top_k(x @ enc.T + b_enc, k)
        return f, f @ dec + b_dec

    return Laid(
        folder, folder, state, forward, f"blocks.{layer}.hook_resid_post", torch.ones(d_sae)
    )


def saelens(
    root,
    kind="topk",
    layer=3,
    d_in=16,
    d_sae=64,
    k=5,
    hook="blocks.{}.hook_resid_post",
    dtype=torch.float32,
    model=MODEL,
):
    """`<folder>/{cfg.json, sae_weights.safetensors}` of SAELens 6."""
    enc, dec, b_enc, b_dec = random_tensors(d_in, d_sae, layer, dtype, unit=False)
    g = torch.Generator().manual_seed(9)
    threshold, r_mag = torch.rand(d_sae, generator=g) * 0.4, 0.1 * torch.randn(d_sae, generator=g)
    b_mag = 0.1 * torch.randn(d_sae, generator=g)
    hook = hook.format(layer)
    folder = root / hook
    folder.mkdir(parents=True)
    tensors = {"W_enc": enc.T.contiguous(), "W_dec": dec, "b_enc": b_enc, "b_dec": b_dec}
    if kind == "gated":
        tensors = {name: t for name, t in tensors.items() if name != "b_enc"} | {
            "b_gate": b_enc,
            "r_mag": r_mag,
            "b_mag": b_mag,
        }
    if kind == "jumprelu":
        tensors["threshold"] = threshold
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": kind,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cuda",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.12",
            "model_name": model,
            "hook_name": hook,
            "hook_head_index": None,
            "context_size": 1024,
            "prepend_bos": True,
            "exclude_special_tokens": False,
        },
    } | ({"k": k, "rescale_acts_by_decoder_norm": True} if kind == "topk" else {})
    (folder / "cfg.json").write_text(json.dumps(config))

    def forward(x):
        e, d, be, bd = enc.float(), dec.float(), b_enc.float(), b_dec.float()
        product = (x - bd) @ e.T
        pre, norms = product + be, d.norm(dim=-1)
        if kind == "topk":
            f = top_k(pre * norms, k)
            return f, (f / norms) @ d + bd  # its activations are multiples of the norms already
        f = pre.relu()
        if kind == "jumprelu":
            f = f * (pre > threshold)
        elif kind == "gated":
            f = (pre > 0) * (r_mag.exp() * product + b_mag).relu()
        return f, f @ d + bd

    scale = torch.ones(d_sae) if kind == "topk" else dec.float().norm(dim=-1)
    return Laid(root, folder, tensors, forward, f"blocks.{layer}.hook_resid_post", scale)


def sparsify(
    root,
    hookpoint="layers.3",
    hook_name="blocks.3.hook_resid_post",
    d_in=16,
    d_sae=64,
    k=5,
    model=MODEL,
    dtype=torch.float32,
):
    """`<run>/{config.json, <hookpoint>/{cfg.json, sae.safetensors}}`."""
    enc, dec, b_enc, b_dec = random_tensors(d_in, d_sae, 3, dtype, unit=False)
    folder = root / hookpoint
    folder.mkdir(parents=True)
    tensors = {"encoder.weight": enc, "encoder.bias": b_enc, "W_dec": dec, "b_dec": b_dec}
    save_file(tensors, folder / "sae.safetensors")
    config = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": d_sae,
        "k": k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d_in,
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    (root / "config.json").write_text(
        json.dumps({"sae": config, "model": model, "ctx_len": 2048, "hookpoints": [hookpoint]})
    )

    def forward(x):
        f = top_k((x - b_dec.float()) @ enc.float().T + b_enc.float(), k)
        return f, f @ dec.float() + b_dec.float()

    return Laid(root, folder, tensors, forward, hook_name, torch.ones(d_sae))


def jump(pre, threshold):
    """What Gemma Scope's report calls JumpReLU."""
    return pre.relu() * (pre > threshold)


def gemma_tensors(layer, d_in, d_sae):
    enc, dec, b_enc, b_dec = random_tensors(d_in, d_sae, layer, unit=False)
    g = torch.Generator().manual_seed(9)
    threshold = 0.4 * torch.rand(d_sae, generator=g)

    def forward(x):
        f = jump(x @ enc.T + b_enc, threshold)
        return f, f @ dec + b_dec

    own = {"W_enc": enc.T.contiguous(), "W_dec": dec, "b_enc": b_enc, "b_dec": b_dec}
    return own | {"threshold": threshold}, forward


def gemma_scope(root, layer=3, d_in=16, d_sae=64, repository="gemma-scope-2b-pt-res", l0=7):
    """`<repository>/layer_<n>/width_<w>/average_l0_<l>/params.npz`, without a configuration."""
    tensors, forward = gemma_tensors(layer, d_in, d_sae)
    folder = root / repository / f"layer_{layer}" / "width_16k" / f"average_l0_{l0}"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    scale = tensors["W_dec"].norm(dim=-1)
    return Laid(root, folder, tensors, forward, f"blocks.{layer}.hook_resid_post", scale)


def gemma_scope_2(
    root,
    layer=3,
    d_in=16,
    d_sae=64,
    repository="gemma-scope-2-4b-it",
    kind="resid_post",
    place="output",
    config=True,
):
    """`<repository>/<kind>/layer_<n>_width_<w>_l0_<size>/{config.json, params.safetensors}`."""
    tensors, forward = gemma_tensors(layer, d_in, d_sae)
    folder = root / repository / kind / f"layer_{layer}_width_16k_l0_big"
    folder.mkdir(parents=True)
    stored = {
        name.replace("W_", "w_"): tensor.contiguous().clone() for name, tensor in tensors.items()
    }
    save_file(stored, folder / "params.safetensors")
    if config:
        about = {
            "width": d_sae,
            "model_name": f"google/{repository.replace('gemma-scope-2', 'gemma-3')}",
            "architecture": "jump_relu",
            "l0": 15,
            "affine_connection": False,
            "hf_hook_point_in": f"model.layers.{layer}.{place}",
            "hf_hook_point_out": f"model.layers.{layer}.{place}",
            "type": "sae",
        }
        (folder / "config.json").write_text(json.dumps(about))
    scale = tensors["W_dec"].norm(dim=-1)
    return Laid(root, folder, stored, forward, f"blocks.{layer}.hook_resid_post", scale)


def llama_scope(
    root,
    layer=3,
    d_in=16,
    d_sae=64,
    norms=(6.3125, 6.3125),
    repository="Llama3_1-8B-Base-LXR-8x",
    **changes,
):
    """`<repository>/Llama3_1-8B-Base-L<n>R-8x/{hyperparams.json, checkpoints/final.safetensors}`.

    norms: the average norms of what goes in and of what comes out; changes: of the hyperparameters.
    """
    enc, dec, b_enc, b_dec = random_tensors(d_in, d_sae, layer, unit=False)
    folder = root / repository / f"Llama3_1-8B-Base-L{layer}R-8x"
    (folder / "checkpoints").mkdir(parents=True)
    tensors = {
        "encoder.weight": enc,
        "encoder.bias": b_enc,
        "decoder.weight": dec.T.contiguous(),
        "decoder.bias": b_dec,
    }
    save_file(tensors, folder / "checkpoints" / "final.safetensors")
    about = {
        "hook_point_in": f"blocks.{layer}.hook_resid_post",
        "hook_point_out": f"blocks.{layer}.hook_resid_post",
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "expansion_factor": 8,
        "d_model": d_in,
        "d_sae": d_sae,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.2021484375,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": dict(zip(("in", "out"), norms, strict=True)),
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        "top_k": 50,
    } | changes
    (folder / "hyperparams.json").write_text(json.dumps(about))

    def forward(x):
        """On activations of the norm that training saw, where the threshold, which is of those as
        they are and of a decoder of unit norm, is as many times larger.
        """
        before, after = (d_in**0.5 / norm for norm in norms)
        dataset_wise = about["norm_activation"] == "dataset-wise"
        before, after = (before, after) if dataset_wise else (1.0, 1.0)
        centre = b_dec * before / after if about["apply_decoder_bias_to_pre_encoder"] else 0.0
        ranked = dec.norm(dim=-1) if about["sparsity_include_decoder_norm"] else torch.ones(d_sae)
        ranked = ranked * before / after
        pre = (before * x - centre) @ enc.T + b_enc
        if about["act_fn"] == "jumprelu":
            f = pre.relu() * (pre * ranked > about["jump_relu_threshold"] * before)
        else:
            f = torch.where(top_k(pre * ranked, about["top_k"]) > 0, pre, 0.0)
        return f, (f @ dec + b_dec) / after

    scale = dec.norm(dim=-1) * norms[1] / d_in**0.5
    return Laid(root, folder, tensors, forward, f"blocks.{layer}.hook_resid_post", scale)


def own(root, layer=3):
    """A suite of ours."""
    laid = saelens(root, "jumprelu", layer)
    file = laid.folder / "cfg.json"
    config = json.loads(file.read_text())
    tensors = load_file(laid.folder / "sae_weights.safetensors")
    norms = tensors["W_dec"].norm(dim=-1)
    tensors["W_dec"] /= norms[:, None]
    tensors["W_enc"] *= norms
    tensors["b_enc"] *= norms
    tensors["threshold"] *= norms
    save_file(tensors, laid.folder / "sae_weights.safetensors")
    config["apply_b_dec_to_input"] = False
    config["metadata"]["qsae_kit"] = {
        "sparsity": 5,
        "median_norm": 12.5,
        "norm_factor": 3.0,
        "drop_template": False,
        "drop_prefix": True,
        "begins_with_bos": None,
        "tokens": 2_000_000,
        "seed": 3,
        "figures": {"loss": 0.3, "l0": 5.1, "dead": 0.0},
        "recipe": {"architecture": "jumprelu", "sparsity": 5, "tokens": 2_000_000},
        "model_digest": "0" * 64,
    }
    file.write_text(json.dumps(config))
    return laid._replace(tensors=tensors)


FORMATS = {
    "dictionary_learning": dictionary_learning,
    "Gemma Scope": gemma_scope,
    "Gemma Scope 2": gemma_scope_2,
    "Llama Scope": llama_scope,
    "Qwen-Scope": qwen_scope,
    "SAELens": saelens,
    "sparsify": sparsify,
}
WEIGHTS = {
    "dictionary_learning": "ae.pt",
    "Gemma Scope": "params.npz",
    "Gemma Scope 2": "params.safetensors",
    "Llama Scope": "checkpoints/final.safetensors",
    "Qwen-Scope": "layer3.sae.pt",
    "SAELens": "sae_weights.safetensors",
    "sparsify": "sae.safetensors",
    "qsae_kit": "sae_weights.safetensors",
}
CONFIGS = {
    "dictionary_learning": "config.json",
    "Gemma Scope 2": "config.json",
    "Llama Scope": "hyperparams.json",
    "Qwen-Scope": "config.json",
    "SAELens": "cfg.json",
    "sparsify": "cfg.json",
    "qsae_kit": "cfg.json",
}
