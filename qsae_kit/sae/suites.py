"""A suite: SAEs by variant and hook name."""

from collections.abc import Mapping
from typing import TypeAlias

from qsae_kit.sae import SAE

Suite: TypeAlias = Mapping[str, Mapping[str, SAE]]
"""Variant -> hook name -> SAE."""


def sae_of(suite: Suite, variant: str, hook_name: str) -> SAE:
    """An SAE of a suite; ValueError where there is none."""
    if hook_name not in suite.get(variant, {}):
        known = ", ".join(f"{v}/{name}" for v, saes in suite.items() for name in saes)
        raise ValueError(f"The suite has no SAE {variant}/{hook_name}; it has {known or 'none'}.")
    return suite[variant][hook_name]
