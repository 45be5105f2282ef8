"""A suite of SAEs on held-out tokens -> one table: reconstruction, sparsity, and what splicing costs the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from qsae_kit.activations import site_activations
from qsae_kit.data import TokenBatch
from qsae_kit.edits import Edit, applied
from qsae_kit.metrics import Reconstruction, ce_score, cross_entropy, kl_divergence
from qsae_kit.models import HookedLM
from qsae_kit.sae import SAE
from qsae_kit.sites import parse_hook_name


def check_fit(lm: HookedLM, sae: SAE) -> None:
    """ValueError unless an SAE has a site that the model has, of the model's width."""
    if sae.provenance is None:
        raise ValueError("This SAE names no site; load it from its folder.")
    site = parse_hook_name(sae.provenance.hook_name)
    if site.layer >= lm.n_layers:
        raise ValueError(f"The SAE sits at layer {site.layer}, but {lm.model_name!r} has layers 0 to {lm.n_layers - 1}.")
    if sae.d_in != lm.d_model:
        raise ValueError(f"The SAE has width d_in={sae.d_in}, but {lm.model_name!r} has d_model={lm.d_model}.")


def splice(sae: SAE, keep: Tensor) -> Edit:
    """Replaces a site's activations by their reconstruction at the kept tokens that pass the SAE's norm filter."""
    assert sae.provenance is not None
    norms = sae.provenance.filter

    def delta(x: Tensor) -> Tensor:
        flat = x[keep].float()
        out = torch.zeros_like(x)
        out[keep] = torch.where(norms.keeps(flat)[:, None], sae(flat) - flat, 0.0).to(x.dtype)
        return out

    return Edit(sae.provenance.hook_name, delta, keep)


def zero(sae: SAE, keep: Tensor) -> Edit:
    """Sets a site's activations to zero at the tokens that `splice` would replace."""
    assert sae.provenance is not None
    norms = sae.provenance.filter
    return Edit(sae.provenance.hook_name, lambda x: torch.where(norms.keeps(x)[..., None], -x, 0.0), keep)


@dataclass
class _Model:
    """Sums over tokens of the model's losses, clean and changed."""

    tokens: int = 0
    ce_clean: float = 0.0
    ce_spliced: float = 0.0
    ce_zero: float = 0.0
    kl: float = 0.0
    reconstruction: Reconstruction = field(default_factory=Reconstruction)


@torch.no_grad()
def evaluate_suite(
    lm: HookedLM,
    suite: dict[str, dict[str, SAE]],
    batches: Sequence[TokenBatch],
    spliced_batches: int | None = None,
    bar: bool = True,
) -> pd.DataFrame:
    """One row per variant and site.

    batches: held-out tokens. Reconstruction uses all, splicing the first `spliced_batches` (None: all) of them.
    Columns: variant, site (hook name), layer, kind, fvu, l0, dead, delta_ce and kl_nats (nats a token, spliced against
    clean), ce_score, tokens (rows behind fvu), spliced_tokens (predictions behind the spliced figures), target.
    The spliced figures count the predictions made at kept tokens. Raises ValueError where an SAE does not fit the
    model or no token is left.
    """
    saes = [(variant, name, sae) for variant, site_saes in suite.items() for name, sae in site_saes.items()]
    for _, _, sae in saes:
        check_fit(lm, sae)
    sums = {(variant, name): _Model() for variant, name, _ in saes}
    names = list(dict.fromkeys(name for _, name, _ in saes))
    n_spliced = len(batches) if spliced_batches is None else spliced_batches
    with tqdm(total=len(batches) + min(n_spliced, len(batches)) * len(saes), desc="evaluating", disable=not bar) as meter:
        for i, batch in enumerate(batches):
            acts = site_activations(lm, names, batch)
            for variant, name, sae in saes:
                assert sae.provenance is not None
                x = acts[name][batch.keep].float()
                x = x[sae.provenance.filter.keeps(x)]
                f = sae.encode(x)
                sums[variant, name].reconstruction.add(x, sae.decode(f), f)
            del acts
            meter.update()
            if i < n_spliced:
                _add_spliced(lm, saes, batch, sums, meter)
    rows = []
    for variant, name, sae in saes:
        s, site = sums[variant, name], parse_hook_name(name)
        n, r = s.tokens, s.reconstruction
        rows.append(
            {
                "variant": variant, "site": name, "layer": site.layer, "kind": site.kind, "fvu": r.fvu, "l0": r.l0, "dead": r.dead,
                "delta_ce": (s.ce_spliced - s.ce_clean) / n, "kl_nats": s.kl / n,
                "ce_score": ce_score(s.ce_clean / n, s.ce_spliced / n, s.ce_zero / n),
                "tokens": r.rows, "spliced_tokens": n, "target": sae.sparsity,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _add_spliced(
    lm: HookedLM, saes: list[tuple[str, str, SAE]], batch: TokenBatch, sums: dict[tuple[str, str], _Model], meter: tqdm
) -> None:
    """Adds one batch's losses under splicing and zeroing, a pair of passes per SAE (one zeroing pass per site)."""
    # The last token of a row predicts nothing that is known.
    counted = batch.keep[:, :-1] & batch.mask[:, 1:].bool()
    targets = batch.ids[:, 1:][counted]

    def losses(edits: list[Edit], clean: Tensor | None) -> tuple[Tensor, float, float]:
        with applied(lm, edits):
            logits = lm(batch.ids, batch.mask)[:, :-1][counted]
        divergence = 0.0 if clean is None else float(kl_divergence(clean, logits).sum())
        return logits, float(cross_entropy(logits, targets).sum()), divergence

    clean, ce_clean, _ = losses([], None)
    zeroed: dict[str, float] = {}
    for variant, name, sae in saes:
        if name not in zeroed:
            zeroed[name] = losses([zero(sae, batch.keep)], None)[1]
        _, ce, divergence = losses([splice(sae, batch.keep)], clean)
        s = sums[variant, name]
        s.tokens += len(targets)
        s.ce_clean += ce_clean
        s.ce_spliced += ce
        s.ce_zero += zeroed[name]
        s.kl += divergence
        meter.update()
