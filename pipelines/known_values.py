"""Values in a step without numbers: tensors that follow from the pack alone stay real.

Models ask the pack itself where its pictures are and how large: ``grid.tolist()``, ``ids == image_token``,
``x[mask]``, ``(pixels == 0).all()``. Weights have no values in a rehearsal, but the pack has, so the step
goes on as it would on a GPU, and every place where the host would wait for a value is told (of a value that
it knows beside the device, omnimodel.host_known, it does not):

    all tensors of an operation are real                computed, unless the result would be huge
    a real mask that picks rows of a tensor             turned into the rows' numbers; the host waits
    a mask of unknown values                            taken to keep everything; the host waits
    otherwise                                           shapes only

A rehearsal has no GPU: all tensors lie on the "cpu". Those that a real step would keep on the host carry a
mark: what is made without a device or on ``"cpu"``, what is computed from such, and inputs that were not
moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omnimodel.host_known import HostKnown

LARGEST = 1 << 26  # elements of a tensor that is computed …
GROWTH, HARMLESS = 4, 1 << 20  # … and how much larger than its arguments it may be, or than so many elements
HOST = torch.device("cpu", 0)  # what a host's tensor says of itself; a "GPU's" says cpu, without a number
aten = torch.ops.aten
# Sizes of results are read back: the host waits.
SIZE_READERS = {
    *(aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive, aten.unique_dim),
    *(aten.bincount, aten.equal),
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
FILLERS = {aten.zeros, aten.ones, aten.full, aten.new_zeros, aten.new_ones, aten.new_full}
FILLERS |= {aten.zeros_like, aten.ones_like, aten.full_like}
EMPTY = {aten.empty, aten.new_empty, aten.empty_like, aten.empty_permuted}
EMPTY |= {aten.empty_strided, aten.new_empty_strided}
LIFTS = {aten.lift, aten.lift_fresh, aten.lift_fresh_copy}  # of torch.tensor([…])
READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}
MAKERS = {torch.tensor, torch.as_tensor, torch.from_numpy}


class KnownValues(TorchDispatchMode):
    """Enter it inside of a FakeTensorMode, together with ``calls``.

    Args:
        wait: called whenever the host would wait for the device.
        device_is_host: of a CPU's step, in which nobody waits and nothing is moved.
    """

    def __init__(self, wait: Callable[[], None], *, device_is_host: bool = False) -> None:
        super().__init__()
        self.device_is_host = device_is_host
        self.wait = (lambda: None) if device_is_host else wait
        self.calls = _Calls(self)
        self._host: WeakSet[Any] = WeakSet()  # storages
        self.makes_on_host = True
        self.fills_integers = False  # is memory of integers real, which C++ may fill unseen?

    def keep_on_host(self, tensors: Iterable[torch.Tensor]) -> None:
        """Real tensors that were not moved to the device."""
        for tensor in tensors:
            self._host.add(tensor.untyped_storage())

    def on_host(self, tensor: torch.Tensor) -> bool:
        """Can its values be read without waiting?"""
        return _is_real(tensor) and tensor.untyped_storage() in self._host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func._overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(isinstance(tensor, HostKnown) for tensor in tensors):  # it sees to itself, but for other masks
            if packet in INDEXED and any(map(_is_mask, args[1])):
                self.wait()
                args = (args[0], _without_masks(args[1]), *args[2:])
            return func(*args, **kwargs)
        if self._reads(func, args, kwargs, tensors):
            self.wait()
        is_real = all(map(_is_real, tensors))
        if is_real and self._is_small(func, args, kwargs, tensors):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
            is_made = not tensors or packet in LIFTS
            is_on_host = self.makes_on_host if is_made else all(map(self.on_host, tensors))
            if is_on_host and not self.device_is_host:
                self.keep_on_host(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
            return result
        if packet is aten._local_scalar_dense:  # any value will do: the step goes on with it
            dtype = tensors[0].dtype
            return 1.0 if dtype.is_floating_point else True if dtype == torch.bool else 1
        if packet is aten.equal:
            return True
        if packet is aten.nonzero:
            return torch.stack(_rows_of(tensors[0]), dim=1)
        if packet is aten.masked_select:
            return aten.index.Tensor(args[0].expand(args[1].shape), _rows_of(args[1]))
        if packet in INDEXED:
            args = (args[0], _without_masks(args[1]), *args[2:])
        return func(*args, **kwargs)

    def _reads(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> bool:
        """Would the host wait for this operation on a device?"""
        packet = func._overloadpacket
        if packet is aten._local_scalar_dense or packet in SIZE_READERS:
            return not self.on_host(tensors[0])
        if packet is aten.repeat_interleave:
            return kwargs.get("output_size") is None and not self.on_host(tensors[0])
        if packet not in INDEXED:
            return False
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        is_fill = packet is not aten.index and len(args) > 2 and args[2].numel() == 1  # by masked_fill
        return not is_fill and not all(map(self.on_host, masks))

    def _is_small(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> bool:
        """Whether to compute it: not if it is huge, random, or a blank float tensor, which others fill."""
        packet = func._overloadpacket
        if packet in EMPTY:
            return self.fills_integers and not kwargs.get("dtype", torch.float32).is_floating_point
        if packet in FILLERS:
            dtype = kwargs.get("dtype") or (tensors[0].dtype if tensors else None)
            if dtype is None and packet is aten.full:
                dtype = torch.float32 if isinstance(args[1], float) else torch.int64
            if dtype is None or dtype.is_floating_point:
                return False
        if not tensors:
            sizes = [x for x in args if isinstance(x, list | tuple)] or [args]
            bound = math.prod(max(1, x) for x in sizes[0] if isinstance(x, int | float))
            return bound <= LARGEST and torch.Tag.nondeterministic_seeded not in func.tags
        elements = [tensor.numel() for tensor in tensors]
        try:
            bound = torch.broadcast_shapes(*(tensor.shape for tensor in tensors)).numel()
        except RuntimeError:
            bound = sum(elements)
        return bound <= LARGEST and bound <= max(HARMLESS, GROWTH * max(elements))


class _Calls(TorchFunctionMode):
    """Sees what reads values behind the dispatcher's back, and on which side tensors are made."""

    def __init__(self, values: KnownValues) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, values = dict(kwargs or {}), self._values
        if values.device_is_host:
            return func(*args, **kwargs)
        if func is torch.Tensor.device.__get__:
            return HOST if values.on_host(args[0]) else func(*args)
        if func in READS and _is_real(args[0]) and not values.on_host(args[0]):
            values.wait()
        if func is torch.Tensor.cpu or func is torch.Tensor.to:
            return self._move(func, args, kwargs)
        device = kwargs.get("device")
        values.makes_on_host, before = _is_host(device), values.makes_on_host
        if func in MAKERS and not _is_host(device):
            values.wait()  # a copy from memory that is not pinned
        if device is not None:
            kwargs["device"] = "cpu"
        try:
            return func(*args, **kwargs)
        finally:
            values.makes_on_host = before

    def _move(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """``x.to(…)``, ``x.cpu()``: where to, and does the host wait?"""
        values, tensor = self._values, args[0]
        targets = [
            x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.device | str | torch.Tensor)
        ]
        if func is torch.Tensor.cpu:
            targets = ["cpu"]
        is_on_host = values.on_host(tensor)
        goes_to_host = is_on_host
        for target in targets:
            goes_to_host = values.on_host(target) if isinstance(target, torch.Tensor) else _is_host(target)
        plain = [torch.device("cpu") if isinstance(x, torch.device) else x for x in args]
        result = func(*plain, **{k: "cpu" if k == "device" else v for k, v in kwargs.items()})
        if goes_to_host == is_on_host:
            return result
        if not kwargs.get("non_blocking"):
            values.wait()
        if _is_real(result):
            result = result.clone() if result is tensor else result
            change = values._host.add if goes_to_host else values._host.discard
            change(result.untyped_storage())
        return result


def _is_host(device: Any) -> bool:
    """Devices that a model names itself are the host; what it took from a tensor is that tensor's."""
    return device is None or isinstance(device, str) or device == HOST


def _is_real(tensor: Any) -> bool:
    """Has it values? Neither fake, nor a shard or parameter of a model, nor inside of a vmap."""
    return type(tensor) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _rows_of(mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Where a mask is true, an index a dimension; everywhere if its values are not known."""
    with unset_fake_temporarily():
        known = mask if _is_real(mask) else torch.ones(mask.shape, dtype=torch.bool)
        return known.nonzero(as_tuple=True)


def _is_mask(index: Any) -> bool:
    is_tensor = isinstance(index, torch.Tensor) and not isinstance(index, HostKnown)
    return is_tensor and index.dtype in (torch.bool, torch.uint8)


def _without_masks(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Indices in which a mask is the numbers of its rows."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and _is_mask(index):
            found.extend(_rows_of(index))
        else:
            found.append(index)
    return found
