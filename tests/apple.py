"""A device without float64, imitated on the CPU.

Tensors that are marked, and all that is computed from them, say that they lie on Apple's GPU. To
make float64 of them, to compute with them and with what was brought to the CPU, and to hand them to
numpy raises what that device raises. What the device lacks besides is not imitated.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

APPLE, HOST = torch.device("mps"), torch.device("cpu")
ACROSS = ("copy_", "_to_copy", "index", "index_put_", "set_", "_local_scalar_dense")
"""Operations that may take tensors of both."""


class _Places:
    """Where storages lie, which is nowhere as long as they were only made."""

    def __init__(self):
        self._of_storage = {}

    def of(self, tensor):
        place, _ = self._of_storage.get(tensor.untyped_storage()._cdata, (None, None))
        return place

    def put(self, tensor, place):
        storage = tensor.untyped_storage()
        self._of_storage[storage._cdata] = place, storage  # held, so that no other has its number


class _Operations(TorchDispatchMode):
    def __init__(self, places):
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        where = {self.places.of(t) for t in given}
        large = {self.places.of(t) for t in given if t.ndim}
        name = operation._schema.name.removeprefix("aten::")
        out = operation(*args, **(kwargs or {}))
        if {APPLE, HOST} <= large and name not in ACROSS:
            raise RuntimeError(f"Expected all tensors to be on the same device ({name})")
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            if APPLE in where and tensor.dtype == torch.float64:
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype ({name})")
            place = APPLE if APPLE in where else HOST if HOST in where else None
            if place is not None and self.places.of(tensor) is None:
                self.places.put(tensor, place)
        return out


class _Devices(TorchFunctionMode):
    """What code is told of a tensor's device, and what it says of the one that it wants."""

    def __init__(self, places):
        super().__init__()
        self.places = places

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__self__", None) is torch.Tensor.device:
            return APPLE if self.places.of(args[0]) == APPLE else HOST
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name == "numpy" and self.places.of(args[0]) == APPLE:
            raise TypeError("can't convert mps:0 device type tensor to numpy")
        wanted = [HOST] if name == "cpu" else []
        if name == "to" or "device" in kwargs:
            wanted += [torch.device(a) for a in tree_leaves((args[1:], kwargs)) if _is_device(a)]
        if name == "to" and isinstance(args[-1], torch.Tensor) and len(args) > 1:
            wanted = [APPLE if self.places.of(args[-1]) == APPLE else HOST]
        if not wanted:
            return function(*args, **kwargs)
        told = tree_map(lambda a: HOST if _is_device(a) else a, (args, kwargs))
        out = function(*told[0], **told[1])
        if self.places.of(out) not in (None, wanted[0]):
            with torch._C.DisableTorchFunction():
                out = out.clone()
        self.places.put(out, wanted[0])
        return out


def _is_device(thing):
    return isinstance(thing, torch.device) or thing in ("cpu", "mps")


@contextmanager
def apple(*marked):
    """Within it, tensors and the tensors of modules that are given lie on a device without
    float64.
    """
    places = _Places()
    for thing in marked:
        is_tensor = isinstance(thing, torch.Tensor)
        for tensor in [thing] if is_tensor else [*thing.parameters(), *thing.buffers()]:
            places.put(tensor, APPLE)
    with _Devices(places), _Operations(places):
        yield
