"""Small SAEs of the bundled model that are made, not trained."""

import torch

from qsae_kit.data.documents import token_batches
from qsae_kit.data.rows import kept_rows
from qsae_kit.sae import JumpReLUSAE, Provenance, TopKSAE
from qsae_kit.sae.filter import NormFilter
from qsae_kit.sae.suites import Suite
from qsae_kit.steer.choose.contrast import decision_activations
from qsae_kit.world import world

SITES = ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post", "blocks.3.hook_mlp_out")
PROMPTS = [
    "How do I thank the nurse?",
    "Which illness does Ada Reyes have?",
    "I want to cut the wood. How?",
]


def small_suite(lm):
    """Variant "v" with 64 features at each of `SITES`."""
    saes = {}
    for i, name in enumerate(SITES):
        x = decision_activations(lm, [name], PROMPTS * 30, False)[name]
        x = x + 0.3 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        sae = JumpReLUSAE(
            lm.d_model,
            64,
            8.0,
            Provenance("tiny", name, NormFilter(float(x.norm(dim=-1).median()))),
        )
        sae.init_from_rows(x, torch.Generator().manual_seed(i))
        saes[name] = sae.requires_grad_(False)
    return Suite({"v": saes})


def explaining_suite(lm, sites=SITES, k=16):
    """Variant "v" with 400 TopK features at each of the sites that begin at the activations, and so
    explain a good part of them untrained.
    """
    chats = [dialogue.messages for dialogue in world.dialogues(60, seed=2)]
    rows = kept_rows(lm, sites, next(iter(token_batches(lm, chats, batch_tokens=4096))))
    saes = {}
    for name, x in rows.items():
        median = float(x.norm(dim=-1).median())
        sae = TopKSAE(lm.d_model, 400, k, Provenance("tiny", name, NormFilter(median)))
        sae.init_from_rows(x, torch.Generator().manual_seed(3))
        saes[name] = sae.requires_grad_(False)
    return Suite({"v": saes})
