"""HostKnown: a small tensor on a GPU whose values the host knows as well, so that nobody waits for them.

Grids of pictures, bounds of documents, token ids: the host laid them out, and models read them back from the
GPU (``tolist``, ``nonzero``, ``x[mask]``, ``repeat_interleave``), each time after all that was queued before.

    grid = known(grid_on_the_cpu, device)      says that it is on ``device``
    grid.tolist(), grid[:, 1].max(), …         operations of such tensors alone run on the CPU, and stay known
    features * grid                            beside others it is its copy on the device, made once
    hidden[mask], hidden.masked_scatter(mask)  a known mask becomes integer indices

Nothing of a model's code need know of it. ``told`` does the same for a whole function.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn, overrides
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
_FAKE = torch._C._TorchDispatchModeKey.FAKE


class HostKnown(torch.Tensor):
    """A tensor that lies on ``device`` when it is needed there; ``values`` are its values on the CPU."""

    values: torch.Tensor  # type: ignore[assignment]  # a sparse tensor's method: this one never is
    num_writes = 0  # to values of any of them: views share memory, and below autograd no version counts it

    @staticmethod
    def __new__(cls, values: torch.Tensor, device: torch.device) -> HostKnown:
        strides, offset = values.stride(), values.storage_offset()
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=strides, storage_offset=offset, dtype=values.dtype, device=device
        )

    def __init__(self, values: torch.Tensor, device: torch.device) -> None:
        self.values = values
        self._copy: torch.Tensor | None = None
        self._copied = -1  # num_writes at that time

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunction():
            return f"HostKnown({self.values!r}, device={self.device})"

    def tolist(self) -> Any:
        """As any tensor's, which reads memory that this one does not have."""
        with torch._C.DisableTorchFunction():
            return self.values.tolist()

    def numpy(self, **_: Any) -> Any:
        """Likewise."""
        return self.values.numpy()

    def on_device(self) -> torch.Tensor:
        """The plain tensor on the device, copied once as long as the values stay as they are."""
        if self._copy is None or self._copied != HostKnown.num_writes:
            self._copy, self._copied = _copied(self.values, self.device), HostKnown.num_writes
        return self._copy

    # A Python function of torch that takes one goes on as if it were any tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch itself calls it with func in front
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        device = next(tensor.device for tensor in tensors if isinstance(tensor, HostKnown))
        if all(isinstance(tensor, HostKnown) or _is_number(tensor) for tensor in tensors):
            return _on_host(func, args, kwargs, device)
        if func._schema.is_mutable and isinstance(args[0], HostKnown):  # what is written to it must be read
            args, kwargs = tree_map(lambda leaf: _known_or_read(leaf, device), (args, kwargs))
            return _on_host(func, args, kwargs, device)
        if func in _BY_INDEX:
            return _BY_INDEX[func](*args, **kwargs)
        args, kwargs = tree_map(_plain, (args, kwargs))
        return func(*args, **kwargs)


def known(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``values`` of the CPU as a tensor on ``device`` that the host need not wait for."""
    return HostKnown(values, device)


def plain(tree: Any) -> Any:
    """The same with plain tensors, and numbers for known ones: for kernels and compilers."""
    return tree_map(lambda leaf: leaf.item() if _is_known_number(leaf) else _plain(leaf), tree)


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a few tensors, run on the CPU if one of its arguments is known; its results are, too."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = [*args, *kwargs.values()]
        device = next((each.device for each in arguments if isinstance(each, HostKnown)), None)
        if device is None:
            return function(*args, **kwargs)
        args = tuple(map(_values, args))  # not the dicts inside: what is popped of them must be gone
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            result = function(*args, **{name: _values(value) for name, value in kwargs.items()})
        return tree_map(lambda leaf: _wrapped(leaf, device), result)

    run.is_told = True  # type: ignore[attr-defined]
    return run


def tell(module: nn.Module) -> None:
    """Functions of grids that the code of ``module`` and its parts imports from transformers are told."""
    for code in {sys.modules[type(each).__module__] for each in module.modules()}:
        for name, function in list(vars(code).items()):
            is_shared = getattr(function, "__module__", "") == "transformers.vision_utils"
            if isinstance(function, FunctionType) and is_shared and not hasattr(function, "is_told"):
                setattr(code, name, told(function))


# --- what a model makes of numbers ------------------------------------------------------------------------


class Making(TorchFunctionMode):
    """While a model's forward runs, but not in tower and decoder: counts and ranges that it makes are known.

    Tower and decoder are left out for speed, and because their blocks may be compiled.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_there = func in (torch.tensor, torch.arange) and kwargs.get("device") == self.device
        if not is_there or any(isinstance(value, torch.Tensor) for value in args):
            return func(*args, **kwargs)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return HostKnown(func(*args, **(kwargs | {"device": "cpu"})), self.device)


def making(like: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """``Making`` beside a known tensor; nothing beside any other."""
    return Making(like.device) if isinstance(like, HostKnown) else contextlib.nullcontext()


def leave_out(module: nn.Module) -> None:
    """``Making`` stops while this module's forward runs."""
    stopped: list[Any] = []

    def stop(*_: Any) -> None:
        is_on = isinstance(overrides._get_current_function_mode(), Making)
        stopped.append(overrides._pop_mode() if is_on else None)

    def go_on(*_: Any) -> None:
        mode = stopped.pop()
        if mode is not None:
            overrides._push_mode(mode)

    module.register_forward_pre_hook(stop, prepend=True)
    module.register_forward_hook(go_on, always_call=True)


# --- one operation ----------------------------------------------------------------------------------------


def _on_host(func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
    """Run on the values; the result is known, or plain if it was asked for on the CPU."""
    first = args[0] if args else None
    args, kwargs = tree_map(_values, (args, kwargs))
    target = kwargs.get("device")
    if target is not None:
        kwargs |= {"device": torch.device("cpu")}
    with _disable_current_modes():
        result = func(*args, **kwargs)
    if target is not None and torch.device(target).type != device.type:
        return result
    if func._schema.is_mutable:
        HostKnown.num_writes += 1
        return first
    return tree_map(lambda leaf: _wrapped(leaf, device), result)


def _copied(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, without a wait; what is expanded is copied once and expanded there."""
    shape = values.shape
    with _disable_current_modes():
        for axis, stride in enumerate(values.stride()):
            if stride == 0 and shape[axis] > 1:
                values = values.narrow(axis, 0, 1)
    fake = torch._C._get_dispatch_mode(_FAKE)
    if fake is not None:  # seen by no checkpoint, as the copy itself is not: it may come in one pass only
        with _disable_current_modes(), fake:
            return torch.empty(values.shape, dtype=values.dtype, device=device).expand(shape)
    with _disable_current_modes():
        if device.type == "cuda":
            values = values.contiguous().pin_memory()
        return values.to(device, non_blocking=True).expand(shape)


def _is_number(tensor: torch.Tensor) -> bool:
    """Is it a Python number that became a tensor on its way?"""
    return type(tensor) is torch.Tensor and tensor.ndim == 0 and tensor.device.type == "cpu"


def _is_known_number(leaf: Any) -> bool:
    return isinstance(leaf, HostKnown) and leaf.ndim == 0


def _values(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, HostKnown) else leaf


def _plain(leaf: Any) -> Any:
    return leaf.on_device() if isinstance(leaf, HostKnown) else leaf


def _wrapped(leaf: Any, device: torch.device) -> Any:
    return HostKnown(leaf, device) if isinstance(leaf, torch.Tensor) else leaf


def _known_or_read(leaf: Any, device: torch.device) -> Any:
    is_there = isinstance(leaf, torch.Tensor) and not isinstance(leaf, HostKnown)
    return HostKnown(leaf.cpu(), device) if is_there else leaf


# --- masks that are known ---------------------------------------------------------------------------------


def _places(mask: HostKnown, shape: Any) -> tuple[list[torch.Tensor], int]:
    """Integer indices of a mask's True, on the device, and the trailing axes along which it is expanded.

    Args:
        mask: of any shape that can be expanded to ``shape``.
        shape: of what is looked at.

    A mask ``[B, T, 1]`` that was expanded to ``[B, T, D]`` gives rows (b, t) and 1, not T × D indices.
    """
    repeated = 0
    with _disable_current_modes():
        values = mask.values.expand(shape)
        while values.ndim > 1 and values.stride(-1) == 0 and values.shape[-1] > 1:
            values = values.select(-1, 0)
            repeated += 1
        columns = values.nonzero(as_tuple=True)
    return [_copied(column, mask.device) for column in columns], repeated


def _indices(indices: Any, device: torch.device) -> Iterator[torch.Tensor | None]:
    """An operation's indices, masks that are known as integers."""
    for index in indices:
        if isinstance(index, HostKnown) and index.dtype in (torch.bool, torch.uint8):
            with _disable_current_modes():
                columns = index.values.nonzero(as_tuple=True)
            yield from (_copied(column, device) for column in columns)
        else:
            yield _plain(index)


def _index(tensor: Any, indices: Any) -> torch.Tensor:
    """``tensor[indices]``."""
    [*others], mask = indices[:-1], indices[-1]
    if not others and isinstance(mask, HostKnown) and mask.dtype == torch.bool and mask.ndim:
        return _select(_plain(tensor), mask)
    return aten.index.Tensor(_plain(tensor), list(_indices(indices, tensor.device)))


def _select(tensor: torch.Tensor, mask: HostKnown) -> torch.Tensor:
    """``tensor[mask]``, ``[N, …]``, where the mask may be expanded to the tensor's first axes."""
    rows, repeated = _places(mask, tensor.shape[: mask.ndim])
    found = aten.index.Tensor(tensor, rows)
    return found.reshape(-1, *found.shape[1 + repeated :]) if repeated else found


def _put(func: Any, tensor: torch.Tensor, indices: Any, values: Any, *rest: Any, **how: Any) -> torch.Tensor:
    """``tensor[indices] = values``."""
    return func(tensor, list(_indices(indices, tensor.device)), _plain(values), *rest, **how)


def _masked_select(tensor: Any, mask: Any) -> torch.Tensor:
    if not isinstance(mask, HostKnown):
        return aten.masked_select(_plain(tensor), mask)
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)
    mask = aten.expand(mask, shape)
    return _select(_plain(tensor).expand(shape), mask).reshape(-1)


def _masked_scatter(tensor: Any, mask: Any, source: Any) -> torch.Tensor:
    tensor, source = _plain(tensor), _plain(source)
    if not isinstance(mask, HostKnown) or not tensor.ndim:
        return aten.masked_scatter(tensor, _plain(mask), source)
    rows, repeated = _places(mask, tensor.shape)
    trailing = tensor.shape[tensor.ndim - repeated :]
    count = len(rows[0]) * math.prod(trailing)
    if source.numel() < count:
        raise RuntimeError(f"masked_scatter: {count} places, but only {source.numel()} values")
    values = source.reshape(-1)[:count].view(len(rows[0]), *trailing)
    return aten.index_put(tensor, rows, values)


def _masked_scatter_backward(gradient: Any, mask: Any, sizes: Any) -> torch.Tensor:
    taken, count = _masked_select(gradient, mask), math.prod(sizes)
    if taken.numel() < count:
        taken = torch.cat([taken, taken.new_zeros(count - taken.numel())])
    return taken.view(sizes)


_PUTS = (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_BY_INDEX: dict[Any, Callable[..., torch.Tensor]] = {
    aten.index.Tensor: _index,
    aten.masked_select.default: _masked_select,
    aten.masked_scatter.default: _masked_scatter,
    aten.masked_scatter_backward.default: _masked_scatter_backward,
    **{func: functools.partial(_put, func) for func in _PUTS},
}
