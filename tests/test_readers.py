"""SAEs of public releases: as their own libraries compute them, at their site, and never
trusted.
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import mutations
import pytest
import releases
import torch
from typer.testing import CliRunner

from qsae_kit.attach import calibrate, splice
from qsae_kit.cli import app as cli
from qsae_kit.data.documents import TokenBatch, token_batches
from qsae_kit.evaluate.evaluation import evaluate_suite
from qsae_kit.features.indexing import build_index
from qsae_kit.io.tensorfiles import TensorFile
from qsae_kit.lm.edits import applied
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.layouts import READERS, Reader
from qsae_kit.sae.releases import find_saes, inspect_suite, open_release, select
from qsae_kit.sae.store import convert_suite, load_sae, load_suite, save_sae, save_suite
from qsae_kit.sites import find_site
from qsae_kit.steer.changes import FeatureSet, add_features

TESTS = Path(__file__).parent
CHATS = [
    [
        {"role": "user", "content": f"How do I thank the nurse, {n} times?"},
        {"role": "assistant", "content": "With a card."},
    ]
    for n in range(40)
]


def only(suite):
    [saes] = suite.values()
    [sae] = saes.values()
    return sae


# --- as their libraries compute them

DICTIONARIES = (
    "BatchTopKSAE MatryoshkaBatchTopKSAE AutoEncoderTopK JumpReluAutoEncoder AutoEncoder "
    "AutoEncoderNew GatedAutoEncoder"
).split()
LAID = (
    [
        (
            f"dictionary_learning {kind}",
            lambda root, kind=kind: releases.dictionary_learning(root, kind),
        )
        for kind in DICTIONARIES
    ]
    + [
        (f"SAELens {kind}", lambda root, kind=kind: releases.saelens(root, kind))
        for kind in ("standard", "topk", "jumprelu", "gated")
    ]
    + [
        ("Qwen-Scope", releases.qwen_scope),
        ("Qwen-Scope without config", lambda root: releases.qwen_scope(root, config=False)),
    ]
    + [
        ("sparsify", releases.sparsify),
        ("sparsify bfloat16", lambda root: releases.sparsify(root, dtype=torch.bfloat16)),
    ]
    + [
        (
            "dictionary_learning float16",
            lambda root: releases.dictionary_learning(root, dtype=torch.float16),
        )
    ]
    + [("Gemma Scope", releases.gemma_scope), ("Gemma Scope 2", releases.gemma_scope_2)]
    + [
        (
            f"Llama Scope {changes}",
            lambda root, changes=changes: releases.llama_scope(root, **changes),
        )
        for changes in (
            {},
            {"norms": (6.3125, 3.390625)},
            {"sparsity_include_decoder_norm": False},
            {"apply_decoder_bias_to_pre_encoder": True},
            {"norm_activation": "inference", "norms": (4.0, 4.0)},
            {"act_fn": "topk", "jump_relu_threshold": 0.0, "top_k": 5},
        )
    ]
)


@pytest.mark.parametrize("make", [make for _, make in LAID], ids=[name for name, _ in LAID])
def test_a_release_computes_what_its_library_does(make, tmp_path):
    """Reconstructions to 1e-5, features up to their decoder norms: the bias is folded, and sums run
    in another order.
    """
    laid = make(tmp_path / "release")
    sae = only(load_suite(laid.root))
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    f, x_hat = laid.forward(x)
    assert 0 < (f > 0).float().mean() < 0.95
    torch.testing.assert_close(sae(x), x_hat, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.encode(x), f * laid.scale, atol=1e-5, rtol=1e-4)
    assert torch.equal(sae.encode(x) > 0, f > 0)
    assert sae.provenance.hook_name == laid.hook_name
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in sae.parameters())
    if sae.architecture != "topk":
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(sae.d_sae), atol=2e-4, rtol=0)


def test_qwen_scope_is_taken_over_bit_for_bit(tmp_path):
    laid = releases.qwen_scope(tmp_path)
    own = only(load_suite(laid.root)).tensors()
    assert torch.equal(own["W_enc"], laid.tensors["W_enc"].T)
    assert torch.equal(own["W_dec"], laid.tensors["W_dec"].T)
    assert torch.equal(own["b_enc"], laid.tensors["b_enc"])
    assert torch.equal(own["b_dec"], laid.tensors["b_dec"])


def test_a_batchtopk_sae_of_unit_norm_keeps_the_bits_of_its_matrices_and_threshold(tmp_path):
    laid = releases.dictionary_learning(tmp_path)
    sae = only(load_suite(laid.root))
    assert torch.equal(sae.encoder, laid.tensors["encoder.weight"])
    assert torch.equal(sae.W_dec, laid.tensors["decoder.weight"].T)
    assert torch.equal(sae.threshold, laid.tensors["threshold"].expand(64))
    shift = laid.tensors["encoder.weight"].double() @ laid.tensors["b_dec"].double()
    torch.testing.assert_close(
        sae.b_enc, (laid.tensors["encoder.bias"] - shift).float(), atol=1e-7, rtol=1e-6
    )


def test_topk_keeps_decoder_norms_that_its_ranking_depends_on(tmp_path):
    laid = releases.sparsify(tmp_path)
    sae = only(load_suite(laid.root))
    assert (sae.W_dec.norm(dim=-1) - 1).abs().max() > 0.3
    assert torch.equal(sae.W_dec, laid.tensors["W_dec"])


def test_what_a_release_says_is_kept(tmp_path):
    found = {}
    for name, make in releases.FORMATS.items():
        sae = only(load_suite(make(tmp_path / name).root))
        found[name] = (
            sae.provenance.model_name,
            sae.sparsity,
            sae.provenance.context_size,
            sae.provenance.tokens,
        )
        assert sae.provenance.filter == NormFilter(float("inf"), 10.0)
    assert found == {
        "dictionary_learning": ("Qwen/Qwen3-8B", 5, 2048, 244140 * 2048),
        "Gemma Scope": ("google/gemma-2-2b", 7, 1024, 0),
        "Gemma Scope 2": ("google/gemma-3-4b-it", 15, 1024, 0),
        "Llama Scope": ("meta-llama/Llama-3.1-8B", 50, 1024, 0),
        "Qwen-Scope": ("Qwen/Qwen3-8B-Base", 5, 1024, 0),
        "SAELens": ("Qwen/Qwen3-8B", 5, 1024, 0),
        "sparsify": ("Qwen/Qwen3-8B", 5, 2048, 0),
    }


# --- which of them, and where

SITES = [
    ("blocks.4.hook_resid_post", "blocks.4.hook_resid_post"),
    ("blocks.4.hook_resid_pre", "blocks.3.hook_resid_post"),
    ("model.layers.15", "blocks.15.hook_resid_post"),
    ("model.layers.15.output", "blocks.15.hook_resid_post"),
    ("layers.0.mlp", "blocks.0.hook_mlp_out"),
    ("gpt_neox.layers.7.attention", "blocks.7.hook_attn_out"),
    ("model.layers.7.self_attn", "blocks.7.hook_attn_out"),
    ("resid_post_layer_9", "blocks.9.hook_resid_post"),
    ("mlp_out_layer_9", "blocks.9.hook_mlp_out"),
    ("blocks.4.attn.hook_z", "blocks.4.attn.hook_z"),
    ("model.layers.7.self_attn.o_proj", "blocks.7.hook_attn_out"),
    ("model.layers.7.self_attn.o_proj.input", "blocks.7.attn.hook_z"),
]


@pytest.mark.parametrize(("name", "hook_name"), SITES)
def test_sites_under_other_names(name, hook_name):
    assert find_site(name).hook_name == hook_name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "blocks.0.hook_resid_pre",
        "layers.3.mlp.act",
        "embed_tokens",
        "layers.99999",
        "../layers.3",
        "x",
    ],
)
def test_names_that_are_no_site(name):
    with pytest.raises(ValueError, match="not a site"):
        find_site(name)


def test_variants_are_what_the_folders_differ_in(tmp_path):
    for layer in (9, 18):
        for trainer in (0, 1, 2):
            releases.dictionary_learning(tmp_path, layer=layer, trainer=trainer)
    suite = load_suite(tmp_path)
    assert {variant: list(saes) for variant, saes in suite.items()} == {
        f"trainer_{n}": ["blocks.9.hook_resid_post", "blocks.18.hook_resid_post"] for n in (0, 1, 2)
    }
    some = load_suite(
        tmp_path,
        variants=["trainer_1"],
        hook_names=["blocks.18.hook_resid_post"],
        model_name="other",
    )
    assert torch.equal(only(some).W_dec, suite["trainer_1"]["blocks.18.hook_resid_post"].W_dec)
    assert only(some).provenance.model_name == "other"
    found = find_saes(open_release(tmp_path))
    assert {one.variant for one in select(found, ["trainer_1", "*frozen_decoder"])} == {"trainer_1"}
    with pytest.raises(ValueError, match="no variant 'trainer_7'; it has trainer_0, trainer_1"):
        select(found, ["trainer_7"])
    with pytest.raises(ValueError, match="no site"):
        select(found, hook_names=["blocks.3.hook_resid_post"])


@pytest.mark.parametrize("which", releases.FORMATS)
def test_the_folder_of_one_sae_is_enough(which, tmp_path):
    laid = releases.FORMATS[which](tmp_path / "release")
    assert load_sae(laid.folder).provenance.hook_name == laid.hook_name
    assert only(load_suite(laid.folder)).provenance.hook_name == laid.hook_name


def test_sites_are_the_modules_that_the_model_has(tmp_path):
    laid = [
        releases.sparsify(tmp_path / "run", point, name)
        for point, name in [
            ("layers.2", "blocks.2.hook_resid_post"),
            ("layers.2.mlp", "blocks.2.hook_mlp_out"),
            ("layers.2.self_attn", "blocks.2.hook_attn_out"),
        ]
    ]
    [(variant, saes)] = load_suite(tmp_path / "run").items()
    assert variant == "topk-k5"
    assert set(saes) == {one.hook_name for one in laid}


def test_an_sae_without_site_is_read_alone_but_not_as_a_suite(tmp_path):
    laid = releases.saelens(tmp_path)
    _edit(laid.folder / "cfg.json", lambda c: c["metadata"].update(hook_name=None))
    assert load_sae(laid.folder).provenance is None
    with pytest.raises(ValueError, match=r"names no site; write metadata\.hook_name"):
        load_suite(tmp_path)


def _edit(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


REFUSED = [
    (
        "dictionary_learning",
        lambda c: c["trainer"].update(dict_class="CrossCoder"),
        "dict_class 'CrossCoder'; known are",
    ),
    ("dictionary_learning", lambda c: c["buffer"].update(io="in"), "io='in'"),
    ("dictionary_learning", lambda c: c["trainer"].update(layer=4), "no single site"),
    (
        "dictionary_learning",
        lambda c: c["trainer"].update(submodule_name="mlp_out_layer_3"),
        "no single site",
    ),
    ("dictionary_learning", lambda c: c["trainer"].update(k=6), "trained with k=5"),
    (
        "dictionary_learning",
        lambda c: c["trainer"].update(dict_size=65),
        "configuration says 16 and 65",
    ),
    ("Qwen-Scope", lambda c: c.update(k=6), "says k=6, the folder's name k=5"),
    ("Qwen-Scope", lambda c: c.update(hook_point="mlp_out"), "hook_point='mlp_out'"),
    (
        "SAELens",
        lambda c: c.update(normalize_activations="layer_norm"),
        "normalize_activations='layer_norm'",
    ),
    ("SAELens", lambda c: c.update(architecture="temporal"), "'temporal' SAE; known are"),
    ("SAELens", lambda c: c.pop("metadata"), "no metadata"),
    ("SAELens", lambda c: c.pop("k"), "does not say k"),
    ("SAELens", lambda c: c["metadata"].update(hook_name="blocks.3.mlp.hook_pre"), "not a site"),
    ("SAELens", lambda c: c.update(reshape_activations="hook_z"), "reshape_activations='hook_z'"),
    ("SAELens", lambda c: c["metadata"].update(hook_name="../../x"), "not a site"),
    ("SAELens", lambda c: c["metadata"].update(hook_head_index=3), "hook_head_index"),
    ("sparsify", lambda c: c.update(activation="groupmax"), "activation='groupmax'"),
    ("sparsify", lambda c: c.update(transcode=True), "transcode='True'"),
    ("sparsify", lambda c: c.update(k=65), "allowed are 0 < sparsity"),
]


@pytest.mark.parametrize(("which", "change", "message"), REFUSED)
def test_what_cannot_be_used_is_said(which, change, message, tmp_path):
    laid = releases.FORMATS[which](tmp_path)
    _edit(laid.folder / releases.CONFIGS[which], change)
    with pytest.raises(ValueError, match=message):
        load_suite(tmp_path)


# --- what lies beside SAEs


def _edited(laid, which, change):
    _edit(laid.folder / releases.CONFIGS[which], change)


def _saelens_transcoder(root):
    _edited(
        releases.saelens(root, layer=4), "SAELens", lambda c: c.update(architecture="transcoder")
    )


def _saelens_embedding(root):
    laid = releases.saelens(root, layer=4)
    _edited(laid, "SAELens", lambda c: c["metadata"].update(hook_name="hook_embed"))


def _old_saelens(root):
    _edited(releases.saelens(root, layer=4), "SAELens", lambda c: c.pop("metadata"))


def _crosscoder(root):
    laid = releases.dictionary_learning(root, layer=4)
    _edited(laid, "dictionary_learning", lambda c: c["trainer"].update(dict_class="CrossCoder"))


def _of_inputs(root):
    laid = releases.dictionary_learning(root, layer=4)
    _edited(laid, "dictionary_learning", lambda c: c["buffer"].update(io="in_and_out"))


def _sparsify_transcoder(root):
    laid = releases.sparsify(root, "layers.4.mlp")
    _edited(laid, "sparsify", lambda c: c.update(transcode=True, skip_connection=True))


def _gemma_embedding(root):
    folder = releases.gemma_scope(root).folder.parent.parent
    folder.rename(folder.with_name("embedding"))


def _gemma_crosscoder(root):
    folder = root / "gemma-scope-2-4b-it" / "crosscoder" / "layer_9_17_22_29_width_65k"
    folder.mkdir(parents=True)
    for n in range(2):
        (folder / f"params_layer_{n}.safetensors").write_bytes(b"")


def _llama_transcoder(root):
    releases.llama_scope(
        root,
        4,
        repository="Llama3_1-8B-Base-LXTC-8x",
        hook_point_in="blocks.4.ln2.hook_normalized",
        hook_point_out="blocks.4.hook_mlp_out",
    )


def _newer_llama(root):
    folder = root / "800M-Slimpajama" / "L4R"
    folder.mkdir(parents=True)
    (folder / "sae_weights.safetensors").write_bytes(b"")
    (folder / "config.json").write_text('{"sae_type": "sae", "hook_point_in": "x"}')


BESIDE = [
    (_saelens_transcoder, "is of a 'transcoder' SAE", ""),
    (_saelens_embedding, "'hook_embed' is not a site", ""),
    (_old_saelens, "no SAE configuration of SAELens 6", ""),
    (_crosscoder, "dict_class 'CrossCoder'", "trainer_0"),
    (_of_inputs, "io='in_and_out'", "trainer_0"),
    (_sparsify_transcoder, "transcode='True'", ""),
    (
        lambda root: releases.sparsify(root, "embed_tokens"),
        "'embed_tokens' is not a site",
        "embed_tokens",
    ),
    (
        lambda root: releases.gemma_scope(root, repository="gemma-scope-2b-pt-transcoders"),
        "a coder of 'transcoders'",
        "average_l0_7",
    ),
    (
        _gemma_embedding,
        "a coder of no layer, such as of the embedding",
        "average_l0_7",
    ),
    (
        lambda root: releases.gemma_scope(root, repository="params"),
        "of which model and site",
        "average_l0_7",
    ),
    (
        lambda root: releases.gemma_scope_2(
            root, kind="transcoder", place="pre_feedforward_layernorm.output"
        ),
        "'model.layers.3.pre_feedforward_layernorm.output' is not a site",
        "transcoder-layer_3",
    ),
    (_gemma_crosscoder, "a coder of several layers", "crosscoder"),
    (_llama_transcoder, "is of a transcoder, from blocks.4.ln2.hook_normalized", "LXTC"),
    (_newer_llama, "Language-Model-SAEs in the format after", "L4R"),
]


@pytest.mark.parametrize(("make", "reason", "variant"), BESIDE)
def test_what_cannot_be_used_is_listed_beside_saes(make, reason, variant, tmp_path):
    laid = releases.saelens(tmp_path / "saes")
    make(tmp_path)
    table = inspect_suite(tmp_path)
    usable, left = table[table["unusable"].isna()], table[table["unusable"].notna()]
    assert usable["site"].tolist() == [laid.hook_name]
    assert left["unusable"].str.contains(reason, regex=False).all()
    assert f"Cannot be used: {left['weights'].iloc[0]} (" in run("suite", "show", tmp_path)
    with pytest.warns(UserWarning, match=re.escape(reason)):
        assert only(load_suite(tmp_path)).provenance.hook_name == laid.hook_name
    asked = [name for name in left["variant"] if variant in name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        only(load_suite(tmp_path, hook_names=[laid.hook_name]))
        if variant:
            with pytest.raises(ValueError, match=re.escape(reason)):
                load_suite(tmp_path, variants=[asked[0]])
        with pytest.raises(
            ValueError, match=re.escape(f"What is left out: {left['unusable'].iloc[0]}")
        ):
            load_suite(tmp_path, hook_names=["blocks.4.hook_mlp_out"])


def test_where_nothing_can_be_used_the_reason_is_the_error_and_the_list(tmp_path):
    _saelens_transcoder(tmp_path)
    for read in (load_suite, load_sae):
        with pytest.raises(ValueError, match="is of a 'transcoder' SAE"):
            read(tmp_path)
    assert inspect_suite(tmp_path)["unusable"].notna().all()
    assert "Cannot be used" in run("suite", "show", tmp_path)


def test_a_damaged_configuration_is_an_error_though_others_are_whole(tmp_path):
    (two(tmp_path) / "cfg.json").write_text("{")
    for read in (inspect_suite, load_suite):
        with pytest.raises(ValueError, match="is not JSON"):
            read(tmp_path)


def test_a_file_that_only_is_called_like_weights_is_none(tmp_path):
    releases.saelens(tmp_path / "saes")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "final.safetensors").write_bytes(b"a model")
    assert len(inspect_suite(tmp_path)) == 1


def test_seeds_as_folders_are_variants(tmp_path):
    for layer in (3, 4):
        for seed in (22, 23):
            laid = releases.sparsify(tmp_path / "run", f"layers.{layer}/seed{seed}")
            (laid.folder.parent.parent / "config.json").rename(tmp_path / "config.json")
    (tmp_path / "config.json").rename(tmp_path / "run" / "config.json")
    suite = load_suite(tmp_path)
    sites = ["blocks.3.hook_resid_post", "blocks.4.hook_resid_post"]
    assert {variant: list(saes) for variant, saes in suite.items()} == {
        "seed22": sites,
        "seed23": sites,
    }
    assert {sae.origin.model_name for sae in suite.saes().values()} == {releases.MODEL}
    alone = load_sae(tmp_path / "run" / "layers.4" / "seed22")
    assert alone.origin.hook_name == sites[1]
    before = releases.sparsify(tmp_path / "other", "seed1/layers.7.mlp").root
    assert [str(place) for place in load_suite(before).places()] == ["seed1/blocks.7.hook_mlp_out"]


def test_gemma_scope_s_variants_and_places(tmp_path):
    for layer, l0 in ((3, 7), (3, 9), (5, 7)):
        releases.gemma_scope(tmp_path / "1", layer, repository="gemma-scope-9b-it-att", l0=l0)
    assert [str(place) for place in load_suite(tmp_path / "1").places()] == [
        "average_l0_7/blocks.3.attn.hook_z",
        "average_l0_7/blocks.5.attn.hook_z",
        "average_l0_9/blocks.3.attn.hook_z",
    ]
    for kind, place in (
        ("resid_post", "output"),
        ("mlp_out", "post_feedforward_layernorm.output"),
        ("attn_out", "self_attn.o_proj.input"),
    ):
        for config in (True, False):
            root = tmp_path / f"2-{config}"
            for layer in (3, 5):
                releases.gemma_scope_2(root, layer, kind=kind, place=place, config=config)
    for config in (True, False):
        suite = load_suite(tmp_path / f"2-{config}")
        assert {str(place) for place in suite.places()} == {
            f"{kind}-width_16k_l0_big/blocks.{layer}.{hook}"
            for kind, hook in (
                ("resid_post", "hook_resid_post"),
                ("mlp_out", "hook_mlp_out"),
                ("attn_out", "attn.hook_z"),
            )
            for layer in (3, 5)
        }
        assert {s.origin.model_name for s in suite.saes().values()} == {"google/gemma-3-4b-it"}


def test_llama_scope_s_layers_are_one_variant(tmp_path):
    for layer in (3, 5):
        releases.llama_scope(tmp_path, layer)
    assert [str(place) for place in load_suite(tmp_path).places()] == [
        "Llama3_1-8B-Base-LXR-8x/blocks.3.hook_resid_post",
        "Llama3_1-8B-Base-LXR-8x/blocks.5.hook_resid_post",
    ]


def test_the_token_policy_is_written_as_it_is(tmp_path):
    """What a release says of its tokens goes through a conversion, and SAELens's entries say it."""
    for number, (bos, special) in enumerate(
        [(True, False), (False, True), (None, [1, 2]), (True, None)]
    ):
        root, out = tmp_path / f"{number}", tmp_path / f"{number}-ours"
        laid = releases.saelens(root)
        _edit(
            laid.folder / "cfg.json",
            lambda c, bos=bos, special=special: c["metadata"].update(
                prepend_bos=bos, exclude_special_tokens=special
            ),
        )
        [folder] = convert_suite(root, out)
        told = json.loads((folder / "cfg.json").read_text())["metadata"]
        assert told["prepend_bos"] is bos
        assert told["exclude_special_tokens"] is bool(special)
        origin = load_sae(folder).origin
        assert (origin.begins_with_bos, origin.drop_template) == (bos, bool(special))
    [folder] = convert_suite(releases.gemma_scope(tmp_path / "gemma").root, tmp_path / "of-gemma")
    assert json.loads((folder / "cfg.json").read_text())["metadata"]["prepend_bos"] is True
    # what was written before it was known said False of everything
    laid = releases.own(tmp_path / "old")
    _edit(laid.folder / "cfg.json", lambda c: c["metadata"]["qsae_kit"].pop("begins_with_bos"))
    assert load_sae(laid.folder).origin.begins_with_bos is None


def test_a_folder_that_does_not_say_k(tmp_path):
    laid = releases.qwen_scope(tmp_path, config=False)
    laid.root.rename(tmp_path / "saes")
    with pytest.raises(ValueError, match="does not say how many features"):
        load_suite(tmp_path / "saes")


def test_sources_that_are_none(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        load_suite(tmp_path / "file")
    with pytest.raises(ValueError, match="holds no SAEs; known are"):
        load_suite(tmp_path)
    for source in ("nothing", "../up", "a/b/c", tmp_path / "nothing"):
        with pytest.raises(ValueError, match="There is no folder"):
            load_suite(source)


# --- on a model


def _residual_release(tmp_path, lm):
    return releases.dictionary_learning(tmp_path, layer=3, d_in=lm.d_model, d_sae=256, model="tiny")


def _module(lm, hook_name):
    layer = lm.hf.model.layers[int(hook_name.split(".")[1])]
    return {"hook_resid_post": layer, "hook_mlp_out": layer.mlp, "hook_attn_out": layer.self_attn}[
        hook_name.split(".")[2]
    ]


ON_TINY = {
    "dictionary_learning": _residual_release,
    "Qwen-Scope": lambda path, lm: releases.qwen_scope(path, 2, lm.d_model, model="tiny"),
    "SAELens": lambda path, lm: releases.saelens(
        path, "jumprelu", 1, lm.d_model, 256, hook="model.layers.{}", model="tiny"
    ),
    "sparsify mlp": lambda path, lm: releases.sparsify(
        path, "layers.2.mlp", "blocks.2.hook_mlp_out", lm.d_model, 256, model="tiny"
    ),
    "sparsify attention": lambda path, lm: releases.sparsify(
        path, "layers.2.self_attn", "blocks.2.hook_attn_out", lm.d_model, 256, model="tiny"
    ),
}


@pytest.mark.parametrize("which", ON_TINY)
def test_it_is_spliced_and_steered_at_the_output_of_the_module_that_it_was_trained_on(
    which, lm, tmp_path
):
    """Against a plain forward hook on the Hugging Face module and the library's own forward."""
    laid = ON_TINY[which](tmp_path, lm)
    suite = load_suite(tmp_path, model_name="tiny")
    sae = only(suite)
    [batch] = list(token_batches(lm, CHATS[:4], batch_tokens=4096))
    calibrate(lm, suite, [batch])
    keep = batch.keep
    seen = {}

    def hooked(change):
        def hook(module, inputs, output):
            x = output[0] if isinstance(output, tuple) else output
            seen["x"], y = x, change(x)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        handle = _module(lm, laid.hook_name).register_forward_hook(hook)
        try:
            with torch.no_grad():
                return lm.hf(batch.ids, attention_mask=batch.mask).logits
        finally:
            handle.remove()

    hooked(lambda x: x)
    norms = seen["x"][keep].norm(dim=-1)
    assert sae.provenance.filter.median == pytest.approx(float(norms.median()), rel=1e-5)
    kept = keep & (seen["x"].norm(dim=-1) <= 10 * norms.median())
    assert not kept[:, 0].any()
    _, cache = lm.run_with_cache(batch.ids, batch.mask, names_filter=laid.hook_name)
    f, _ = laid.forward(seen["x"][kept])
    torch.testing.assert_close(sae.encode(cache[laid.hook_name][kept]) > 0, f > 0)
    expected = hooked(lambda x: torch.where(kept[..., None], laid.forward(x)[1], x))
    with torch.no_grad(), applied(lm, [splice(sae, keep)]):
        spliced = lm(batch.ids, batch.mask)
    torch.testing.assert_close(
        spliced[batch.mask.bool()], expected[batch.mask.bool()], atol=2e-3, rtol=1e-4
    )
    unit = torch.nn.functional.normalize(sae.W_dec[7], dim=-1)
    pushed = hooked(lambda x: torch.where(keep[..., None], x + 0.5 * norms.median() * unit, x))
    with torch.no_grad(), applied(lm, [add_features(sae, FeatureSet((7,), (1.0,)), 0.5, keep)]):
        steered = lm(batch.ids, batch.mask)
    torch.testing.assert_close(
        steered[batch.mask.bool()], pushed[batch.mask.bool()], atol=2e-3, rtol=1e-4
    )


def test_without_a_median_norm_it_is_refused_until_it_is_calibrated(lm, tmp_path):
    _residual_release(tmp_path, lm)
    suite = load_suite(tmp_path)
    batches = list(token_batches(lm, CHATS, batch_tokens=512))
    for use in (
        lambda: evaluate_suite(lm, suite, batches[:1], bar=False),
        lambda: build_index(lm, suite, lambda: CHATS, tmp_path / "index", bar=False),
        lambda: add_features(only(suite), FeatureSet((1,), (1.0,)), 0.5),
    ):
        with pytest.raises(ValueError, match=r"no median norm.*calibrate"):
            use()
    taken = calibrate(lm, suite, iter(batches), rows=600)
    assert 600 <= taken < 600 + 512
    assert only(suite).provenance.filter.measured
    assert only(suite).provenance.filter.factor == 10
    assert calibrate(lm, suite, (pytest.fail("no batch is needed") for _ in [1])) == 0
    assert evaluate_suite(lm, suite, batches[:1], bar=False)["fvu"].notna().all()


def test_calibration_measures_the_l0_that_a_release_does_not_say(lm, tmp_path):
    laid = releases.dictionary_learning(
        tmp_path, "AutoEncoder", d_in=lm.d_model, d_sae=256, model="tiny"
    )
    suite = load_suite(tmp_path)
    assert only(suite).sparsity == 256
    [batch] = list(token_batches(lm, CHATS[:4], batch_tokens=4096))
    calibrate(lm, suite, [batch])
    x = lm.run_with_cache(batch.ids, batch.mask, names_filter=laid.hook_name)[1][laid.hook_name][
        batch.keep
    ]
    assert only(suite).sparsity == pytest.approx(
        float((laid.forward(x)[0] > 0).float().sum(-1).mean()), rel=1e-3
    )
    empty = TokenBatch(batch.ids, batch.mask, torch.zeros_like(batch.keep))
    with pytest.raises(ValueError, match="no tokens to measure"):
        calibrate(lm, load_suite(tmp_path), [empty])


# --- qsae suite show and convert


def run(*args):
    return CliRunner().invoke(cli.app, list(map(str, args)), catch_exceptions=False).output


def test_inspect_reads_no_weights(tmp_path, monkeypatch):
    for make in releases.FORMATS.values():
        make(tmp_path)
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("weights are read"))
    table = inspect_suite(tmp_path).set_index("format")
    assert sorted(table.index) == sorted(releases.FORMATS)
    assert (table["site"] == "blocks.3.hook_resid_post").all()
    assert table.loc[
        "Qwen-Scope", ["d_in", "d_sae", "sparsity", "dtype", "architecture"]
    ].tolist() == [16, 1024, 5, "float32", "topk"]
    assert table.loc["dictionary_learning", ["d_sae", "sparsity", "architecture"]].tolist() == [
        64,
        5,
        "jumprelu",
    ]
    assert "measured when they are used" in run("suite", "show", tmp_path)
    assert {row["format"] for row in json.loads(run("suite", "show", tmp_path, "--json"))} == set(
        releases.FORMATS
    )


@pytest.mark.parametrize("which", releases.FORMATS)
def test_convert_writes_a_suite_of_ours(which, tmp_path):
    laid = releases.FORMATS[which](tmp_path / "release")
    out = tmp_path / "suite"
    run("suite", "convert", laid.root, "--out", out, "--model", "mine")
    first, second = only(load_suite(laid.root)), only(load_suite(out))
    assert all(
        torch.equal(first.tensors()[name], tensor) for name, tensor in second.tensors().items()
    )
    assert second.provenance.model_name == "mine"
    assert not second.provenance.filter.measured
    assert second.sparsity == first.sparsity
    assert inspect_suite(out)["format"].tolist() == ["qsae_kit"]
    with pytest.raises(ValueError, match="not an empty folder"):
        convert_suite(laid.root, out)


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    for trainer in (0, 1):
        releases.dictionary_learning(tmp_path / "release", trainer=trainer)
    calls = []

    def fail(sae, folder):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError("No space left on device")
        save_sae(sae, folder)

    monkeypatch.setattr("qsae_kit.sae.store.save_sae", fail)
    with pytest.raises(OSError, match="No space"):
        convert_suite(tmp_path / "release", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["release"]


@pytest.mark.parametrize("variant", ["../x", "", ".", "..", "a/b", "/etc"])
def test_no_variant_leads_out_of_a_suite(variant, tmp_path):
    sae = only(load_suite(releases.sparsify(tmp_path / "release").root))
    with pytest.raises(ValueError, match="A variant has the name"):
        save_suite({variant: {sae.provenance.hook_name: sae}}, tmp_path / "suite")
    with pytest.raises(ValueError, match="not a site"):
        save_suite({"fine": {"../../x": sae}}, tmp_path / "suite")


@pytest.mark.slow
def test_a_release_goes_through_the_commands(lm, tmp_path):
    _residual_release(tmp_path / "release", lm)
    said = run("eval", tmp_path / "release", "--tokens", 300, "--out", tmp_path / "eval")
    assert "The suite names no median norms" in said
    assert (tmp_path / "eval" / "evaluation.csv").is_file()
    said = run(
        "index",
        tmp_path / "release",
        "--tokens",
        300,
        "--at",
        "resid@3",
        "--out",
        tmp_path / "f",
    )
    assert "trainer_0/blocks.3.hook_resid_post: 256 features" in said


# --- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository of two trainers at two layers behind a patched `snapshot_download`; gives what
    was asked for.
    """
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    for layer in (9, 18):
        for trainer in (0, 1):
            releases.dictionary_learning(remote, layer=layer, trainer=trainer)
    (remote / "tokenizer.json").write_text("{}")
    asked = []

    def snapshot_download(
        repo_id, *, revision=None, allow_patterns=None, local_files_only=False, dry_run=False
    ):
        assert repo_id == "someone/saes"
        files = [p.relative_to(remote).as_posix() for p in sorted(remote.rglob("*")) if p.is_file()]
        if dry_run:
            return [
                SimpleNamespace(
                    filename=f, file_size=(remote / f).stat().st_size, commit_hash="abc"
                )
                for f in files
            ]
        assert revision == "abc"
        for name in files:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(remote / name, cache / name)
        asked.append(allow_patterns)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(remote=remote, cache=cache, asked=asked)


def test_only_the_weights_that_are_wanted_are_fetched(hub):
    table = inspect_suite("someone/saes")
    assert not list(hub.cache.rglob("ae.pt"))
    assert not (hub.cache / "tokenizer.json").exists()
    assert table["d_sae"].tolist() == [64] * 4
    assert (table["gb"] > 0).all()
    sae = only(
        load_suite("someone/saes", variants=["trainer_1"], hook_names=["blocks.18.hook_resid_post"])
    )
    assert [p.parent.name for p in hub.cache.rglob("ae.pt")] == ["trainer_1"]
    assert torch.equal(
        sae.W_dec, load_suite(hub.remote)["trainer_1"]["blocks.18.hook_resid_post"].W_dec
    )


def test_a_repository_cannot_name_files_outside_of_itself(monkeypatch, tmp_path):
    def snapshot_download(repo_id, *, dry_run=False, **_):
        return (
            [SimpleNamespace(filename="../../layer3.sae.pt", file_size=1, commit_hash="abc")]
            if dry_run
            else str(tmp_path)
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="could lie outside of it"):
        load_suite("someone/SAE-Res-x-W1K-L0_5")


def test_without_a_network_there_is_one_sentence_or_the_cache(monkeypatch, tmp_path):
    cached = releases.dictionary_learning(tmp_path)

    def unreachable(repo_id, *, local_files_only=False, **_):
        if local_files_only and repo_id == "someone/cached":
            return str(cached.root)
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        ValueError,
        match=(
            r"no folder 'someone/saes', and no repository could be had \(Name or service not"
            r" known\); check its name, the network"
        ),
    ):
        load_suite("someone/saes")
    assert only(load_suite("someone/cached")).d_sae == 64


# --- nothing is trusted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "count"),
    [
        ("dictionary_learning,SAELens", 200),
        ("Qwen-Scope,sparsify", 200),
        ("Gemma Scope,Gemma Scope 2,Llama Scope", 200),
        ("qsae_kit", 130),
    ],
)
def test_damaged_and_malicious_files(kinds, count, tmp_path):
    """Seeded mutations (200 a format of others; of our own eight in ten are of the configuration),
    in a process that may allocate half a gigabyte: refused, or loaded as what they are.
    """
    done = subprocess.run(
        [sys.executable, mutations.__file__, kinds, str(count), str(tmp_path / "work")],
        capture_output=True,
        text=True,
        cwd=TESTS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    for result in results.values():
        refused, loaded = (sum(result[name].values()) for name in ("refused", "loaded"))
        assert refused + loaded == count
        assert refused > 0.6 * count
        assert result["grown"] < 16 * 2**20
    # A number of the pickle that changes a stride within its storage is no larger claim.
    dangerous = (
        "pickle: ",
        "tensors: nan",
        "tensors: inf",
        "header: shape",
        "header: offsets",
        "config: deep",
        "bytes: truncated",
        "numpy: objects",
        "numpy: hidden",
        "numpy: claims",
        "numpy: bomb",
        "numpy: overlap",
        "numpy: duplicate",
    )
    assert not [
        kind
        for result in results.values()
        for kind in result["loaded"]
        if kind.startswith(dangerous) and kind != "pickle: claims"
    ]


@pytest.mark.parametrize("kind", ["system", "eval", "swells"])
def test_pickles_that_run_something_are_not_run(kind, tmp_path):
    laid = releases.dictionary_learning(tmp_path / "release")
    marker = tmp_path / "marker"
    thing = {"system": mutations.Runs, "eval": mutations.Evaluates, "swells": mutations.Swells}[
        kind
    ](marker)
    mutations.rewritten(laid.folder / "ae.pt", mutations.pickled(thing))
    with pytest.raises(ValueError, match="which a dict of tensors does not need"):
        load_suite(laid.root)
    assert not marker.exists()
    if kind != "swells":  # such a file does run it where it may
        with zipfile.ZipFile(laid.folder / "ae.pt") as archive:
            pickle.loads(
                archive.read(
                    next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                )
            )
        assert marker.exists()


def test_a_small_file_that_claims_a_huge_sae_allocates_nothing(tmp_path):
    """2 GB by its configuration and its shapes, a few numbers by its bytes."""
    laid = releases.dictionary_learning(tmp_path)
    huge = {
        name: (
            mutations.expanded(t) if t.ndim == 2 else torch.zeros(1).expand(2**14) if t.ndim else t
        )
        for name, t in laid.tensors.items()
    }
    torch.save(huge, laid.folder / "ae.pt")
    _edit(
        laid.folder / "config.json",
        lambda c: c["trainer"].update(activation_dim=2**14, dict_size=2**14),
    )
    assert (laid.folder / "ae.pt").stat().st_size < 10_000
    before = mutations.resident("VmHWM")
    with pytest.raises(ValueError, match="claims tensors of other sizes"):
        load_suite(tmp_path)
    assert mutations.resident("VmHWM") - before < 100e6


def test_a_training_that_was_cut_off_is_no_release(tmp_path):
    laid = releases.dictionary_learning(tmp_path)
    torch.save({"step": 1000, "ae": laid.tensors, "norm_factor": 3.0}, laid.folder / "ae.pt")
    with pytest.raises(
        ValueError, match="holds step, ae, norm_factor, not a dict of tensors alone"
    ):
        load_suite(tmp_path)


PEAK = """
import sys, torch, releases, mutations
from pathlib import Path
from qsae_kit.sae.store import load_suite
load_suite(releases.dictionary_learning(Path(sys.argv[2])).root)
before = mutations.resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
suite = load_suite(sys.argv[1])
print(mutations.resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "which",
    [
        "dictionary_learning",
        "dictionary_learning bfloat16",
        "SAELens",
        "sparsify",
        "Gemma Scope",
        "Llama Scope",
    ],
)
def test_loading_takes_less_than_twice_the_size(which, tmp_path):
    kind = which.removesuffix(" bfloat16")
    dtype = {} if kind == which else {"dtype": torch.bfloat16}
    releases.FORMATS[kind](tmp_path / "release", d_in=1024, d_sae=16384, **dtype)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "release"), str(tmp_path / "small")],
        capture_output=True,
        text=True,
        cwd=TESTS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    honest = 2 * 1024 * 16384 * 4
    assert honest < int(done.stdout) < 1.9 * honest


def _available():
    lines = (
        Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    )
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0
    )


@pytest.mark.slow
@pytest.mark.skipif(_available() < 8e9, reason="needs 8 GB of free memory")
def test_one_of_full_size(tmp_path):
    """65,536 features of a width of 4,096 in bfloat16, as for Qwen3-8B, on a few rows."""
    d_in, d_sae = 4096, 65536
    g = torch.Generator().manual_seed(0)
    encoder = torch.empty(d_sae, d_in, dtype=torch.bfloat16)
    for rows in encoder.split(4096):
        rows.copy_(torch.nn.functional.normalize(torch.randn(len(rows), d_in, generator=g), dim=-1))
    folder = tmp_path / "resid_post_layer_18" / "trainer_2"
    folder.mkdir(parents=True)
    state = {
        "encoder.weight": encoder,
        "encoder.bias": torch.zeros(d_sae, dtype=torch.bfloat16),
        "decoder.weight": encoder.T.contiguous(),
        "b_dec": torch.randn(d_in, generator=g).bfloat16(),
        "k": torch.tensor(80, dtype=torch.int),
        "threshold": torch.tensor(6.0),
    }
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "trainer": {
                    "dict_class": "BatchTopKSAE",
                    "activation_dim": d_in,
                    "dict_size": d_sae,
                    "k": 80,
                    "layer": 18,
                    "lm_name": "Qwen/Qwen3-8B",
                    "submodule_name": "resid_post_layer_18",
                },
                "buffer": {"io": "out"},
            }
        )
    )
    del state["decoder.weight"]
    sae = only(load_suite(tmp_path))
    assert sae.provenance.hook_name == "blocks.18.hook_resid_post"
    x = (
        torch.randn(8, d_in, generator=g)
        + 0.3 * d_in**0.5 * encoder[[5, 77, 1000, 40000, 65535, 9, 10, 11]].float()
    )
    b_dec = state["b_dec"].float()
    pre = torch.cat([(x - b_dec) @ rows.float().T for rows in encoder.split(8192)], dim=-1)
    f = pre.relu() * (pre.relu() > 6.0)
    x_hat = (
        sum(
            part @ rows.float()
            for part, rows in zip(f.split(8192, dim=-1), encoder.split(8192), strict=True)
        )
        + b_dec
    )
    assert 8 <= (f > 0).sum() < 2000
    close = (pre - 6.0).abs() < 1e-4
    assert torch.equal((sae.encode(x) > 0) | close, (f > 0) | close)
    torch.testing.assert_close(sae(x), x_hat, atol=2e-4, rtol=1e-4)


# --- what cannot be read is named


def two(root):
    """A release of two SAEs, and the folder of the second."""
    releases.saelens(root, layer=3)
    return releases.saelens(root, layer=4).folder


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder, scandir = two(tmp_path), os.scandir

    def refused(path):
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    for read in (inspect_suite, load_suite):
        with pytest.raises(ValueError, match=r"resid_post' cannot be read \(Permission"):
            read(tmp_path)


def _replace(path, make):
    path.unlink()
    make(path)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        lambda path: path.symlink_to("/nowhere/at/all"),
        lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("/dev/zero"),
    ],
    ids=["pipe", "broken", "loop", "device"],
)
def test_files_of_an_sae_that_are_no_files_are_named(tmp_path, name, make):
    folder = two(tmp_path)
    _replace(folder / name, make)
    for read in (inspect_suite, load_suite):
        with pytest.raises(ValueError, match=rf"{name}' is no file that can be read"):
            read(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_configuration_that_never_ends_is_refused_at_once(tmp_path, make):
    laid = releases.dictionary_learning(tmp_path)
    _replace(laid.folder / "config.json", make)
    none, named = pytest.raises(ValueError, match="no regular file"), "config.json' is a link"
    with none, pytest.warns(UserWarning, match=named):
        inspect_suite(laid.root)
    (laid.folder / "config.json").unlink()
    with (laid.folder / "config.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="is larger than 1,048,576 bytes"):
        inspect_suite(laid.root)


def test_what_is_left_out_is_named(tmp_path):
    folder = two(tmp_path)
    (tmp_path / "linked").symlink_to(folder)
    (tmp_path / "README.md").symlink_to("nowhere")
    (tmp_path / ".half").symlink_to("nowhere")
    with pytest.warns(UserWarning, match=r"linked' is a link to a folder.*left out \(and 1 more"):
        assert len(inspect_suite(tmp_path)) == 2
    (tmp_path / "linked").unlink()
    (tmp_path / "README.md").unlink()
    (folder / "sae_weights.safetensors").unlink()
    for read in (inspect_suite, load_suite):
        with pytest.warns(UserWarning, match=r"resid_post' has the configuration of an SAE"):
            assert len(read(tmp_path)) == 1


def test_a_reader_is_named_where_a_folder_holds_nothing(tmp_path, monkeypatch):
    other = Reader(READERS[r"ae\.pt"].describe, "Another (other.bin)")
    monkeypatch.setitem(READERS, r"other\.bin", other)
    with pytest.raises(ValueError, match=r"Qwen-Scope .* and Another \(other\.bin\)\.$"):
        find_saes(open_release(tmp_path))
