"""Where the parts of a model lie, and what was put round it.

accelerate spreads a model over devices, memory and disk: a weight that is elsewhere is on the meta
device until its module runs. torch.compile and PEFT wrap a model in another.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def unwrapped(model: Any) -> Any:
    """The Hugging Face model inside of what torch.compile or PEFT made of one; adapters in its
    layers stay active.

    Raises ValueError for an adapter that lies outside of the layers (prompt and prefix tuning).
    """
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "get_base_model"):
        return model
    told = getattr(model, "active_peft_config", None)
    if getattr(told, "is_prompt_learning", False):
        raise ValueError(
            f"{type(model).__name__} has an adapter that puts tokens before every text"
            f" ({type(told).__name__}), which has no place among hook points; give the model"
            " without it."
        )
    return unwrapped(model.get_base_model())


def runs_on(module: nn.Module) -> torch.device:
    """The device on which a module computes, wherever its weights lie meanwhile."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if (device := getattr(one, "execution_device", None)) is not None:
            return torch.device(device)
    return next(module.parameters()).device


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Has a module's own weights in place, where accelerate keeps them elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not any(own.is_meta for own in module.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def own_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, module and the module's own name of every weight, each once, as `named_parameters`
    orders them; where accelerate has parted tied ones, the first of them. Behind them the tables of
    whole numbers that some quantised weights are.
    """
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    packed = (
        name
        for name, buffer in model.named_buffers()
        if buffer.ndim == 2 and not buffer.is_floating_point() and buffer.dtype != torch.bool
    )
    for name in chain((name for name, _ in model.named_parameters()), packed):
        if name not in tied:
            owner, _, own = name.rpartition(".")
            yield name, model.get_submodule(owner), own


def check_plain(model: Any, name: str) -> None:
    """ValueError for a model whose weights cannot be read and written as they are: some lie on
    disk, are quantised, or have an adapter beside them.
    """
    for layer in model.model.layers:
        for where, module in layer.named_modules():
            spread = any(own.is_meta for own in module.parameters(recurse=False))
            maps = isinstance(module, nn.Linear) or hasattr(module, "base_layer")
            if (maps and type(module) is not nn.Linear) or (spread and hasattr(module, "_hf_hook")):
                raise ValueError(
                    f"The weights of {name!r} are not plain ({where} is {type(module).__name__}"
                    f"{', on disk' if spread else ''}); load the model whole, not quantised and"
                    " with its adapters merged."
                )


def through(linear: nn.Module, rows: Tensor) -> Tensor:
    """What a linear map makes of rows, without its bias, in their dtype on their device.

    Of a plain linear module its weight is read; others (quantised, with an adapter, offloaded) are
    asked.
    """
    weight = getattr(linear, "weight", None)
    if type(linear) is nn.Linear and weight is not None and not weight.is_meta:
        return rows @ weight.to(rows).T
    there = runs_on(linear)
    dtype = next((p.dtype for p in linear.parameters() if p.is_floating_point()), rows.dtype)
    if dtype.itemsize < 2:  # a format of storage
        dtype = torch.bfloat16
    flat = rows.reshape(-1, rows.shape[-1])
    asked = torch.cat([flat, torch.zeros_like(flat[:1])]).to(there, dtype)
    out = linear(asked).to(rows)
    return (out[:-1] - out[-1]).reshape(*rows.shape[:-1], -1)
