"""A suite: SAEs by variant and hook name, and what the places and features in it are called."""

import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import torch

from qsae_kit.io.files import checked_name
from qsae_kit.sae import SAE
from qsae_kit.sites import parse_hook_name

ByVariant: TypeAlias = Mapping[str, Mapping[str, SAE]]
"""Variant -> hook name -> SAE: what a `Suite` is made of, and what it is itself."""
NUMBER = re.compile(r"[0-9]{1,9}")
"""A feature's number as it is written."""
SITE = re.compile(r"blocks\.\d+\.\w[\w.]*")
"""A hook name of a layer, of a kind that is known here or not."""


class Place(NamedTuple):
    """Which SAE of a suite; written `variant/hook name`."""

    variant: str
    hook_name: str

    def __str__(self) -> str:
        return f"{self.variant}/{self.hook_name}"

    @classmethod
    def parse(cls, text: str) -> "Place":
        """`jumprelu-x8-l0_13/blocks.3.hook_resid_post` -> Place; ValueError for what names none."""
        variant, _, hook_name = text.rpartition("/")
        try:
            checked_name(variant, "A variant")
            if not SITE.fullmatch(hook_name):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{text[:200]!r} names no SAE of a suite; write variant/hook name, such as"
                " jumprelu-x8-l0_13/blocks.3.hook_resid_post."
            ) from None
        return cls(variant, hook_name)


class Feature(NamedTuple):
    """A feature of an SAE of a suite, counted from 0; written `variant/hook name/number`."""

    place: Place
    number: int

    def __str__(self) -> str:
        return f"{self.place}/{self.number}"

    @classmethod
    def parse(cls, text: str) -> "Feature":
        """`jumprelu-x8-l0_13/blocks.3.hook_resid_post/41` -> Feature; ValueError for what names
        none.
        """
        place, _, number = text.rpartition("/")
        try:
            if not NUMBER.fullmatch(number):
                raise ValueError
            return cls(Place.parse(place), int(number))
        except ValueError:
            raise ValueError(
                f"{text[:200]!r} names no feature; write variant/hook name/number, such as"
                " jumprelu-x8-l0_13/blocks.3.hook_resid_post/41."
            ) from None


class Suite(ByVariant):
    """SAEs by variant and hook name, `suite[variant][hook_name]`: variants as they are given, the
    sites of each layer by layer, and those of a layer as they are given.

    What is in it does not change; `|` makes another one. `len` counts variants, as of every
    mapping; `len(suite.places())` counts SAEs. Raises ValueError for a variant or a hook name that
    is none, and for an SAE without provenance.
    """

    def __init__(self, saes: ByVariant) -> None:
        self._saes: dict[str, dict[str, SAE]] = {}
        for variant, own in saes.items():
            checked_name(variant, "A variant")
            for hook_name, sae in own.items():
                parse_hook_name(hook_name)
                if sae.provenance is None:
                    raise ValueError(
                        f"The SAE {Place(variant, hook_name)} has no provenance (site, model,"
                        " filter); load it from its folder, or set sae.provenance."
                    )
            self._saes[variant] = {name: own[name] for name in sorted(own, key=_layer)}

    @classmethod
    def of(cls, saes: ByVariant) -> "Suite":
        """A mapping as a suite; a suite is itself."""
        return saes if isinstance(saes, Suite) else cls(saes)

    @classmethod
    def of_one(cls, sae: SAE, variant: str = "") -> "Suite":
        """A suite of one SAE, at its site; the variant is called after the architecture by
        default.
        """
        return cls({variant or sae.architecture: {sae.origin.hook_name: sae}})

    def __getitem__(self, variant: str) -> Mapping[str, SAE]:
        return MappingProxyType(self._saes[variant])

    def __iter__(self) -> Iterator[str]:
        return iter(self._saes)

    def __len__(self) -> int:
        return len(self._saes)

    def __or__(self, other: ByVariant) -> "Suite":
        """The variants of both; of one that both have, the other's."""
        return Suite({**self, **other})

    def places(self) -> list[Place]:
        """Of every SAE: variant by variant, each layer by layer."""
        return [Place(variant, name) for variant, own in self._saes.items() for name in own]

    def saes(self) -> dict[Place, SAE]:
        """Every SAE by its place."""
        return {place: self._saes[place.variant][place.hook_name] for place in self.places()}

    def sae(self, place: Place) -> SAE:
        """The SAE at a place; ValueError where there is none."""
        if place.hook_name not in self._saes.get(place.variant, {}):
            known = ", ".join(map(str, self.places()))
            raise ValueError(f"The suite has no SAE {place}; it has {known or 'none'}.")
        return self._saes[place.variant][place.hook_name]

    @property
    def hook_names(self) -> list[str]:
        """Every site at which there is an SAE, layer by layer."""
        return sorted(dict.fromkeys(place.hook_name for place in self.places()), key=_layer)

    def only(self, variants: Sequence[str] = (), hook_names: Sequence[str] = ()) -> "Suite":
        """The SAEs of some variants and sites (none given: all), in this suite's order.

        Raises ValueError for a variant or a site that is not there, and where no SAE is left.
        """
        for what, wanted, known in (
            ("variant", variants, list(self)),
            ("site", hook_names, self.hook_names),
        ):
            if missing := [name for name in wanted if name not in known]:
                raise ValueError(
                    f"The suite has no {what} {missing[0]!r}; it has {', '.join(known) or 'none'}."
                )
        kept: dict[str, dict[str, SAE]] = {}
        for place, sae in self.saes().items():
            if place.variant in (variants or self) and place.hook_name in (
                hook_names or self.hook_names
            ):
                kept.setdefault(place.variant, {})[place.hook_name] = sae
        if (variants or hook_names) and not kept:
            raise ValueError(
                f"No SAE is of {', '.join(variants)} at {', '.join(hook_names)}; the suite has"
                f" {', '.join(map(str, self.places()))}."
            )
        return Suite(kept)

    def to(self, device: str | torch.device) -> "Suite":
        """Moves every SAE to a device, in place; returns the suite."""
        for sae in self.saes().values():
            sae.to(device)
        return self

    def __repr__(self) -> str:
        sites = f"{len(self.hook_names)} site{'s' * (len(self.hook_names) != 1)}"
        return f"Suite({len(self.places())} SAEs: {', '.join(self) or 'none'} at {sites})"


def _layer(hook_name: str) -> int:
    return parse_hook_name(hook_name).layer
