"""Where a step would wait for the GPU: operations that hand the host a value, by file and line.

    with Waits() as waits:          on any device, with real numbers or without
        loss = model(**inputs).loss
        loss.backward()
    waits.places                    Counter({"qwen3_vl/modeling_qwen3_vl.py:304": 72, …})

Waits: a tensor's value (``item``, ``tolist``, ``if``), a result whose size depends on values (``nonzero``,
``x[mask]``, ``unique``, ``repeat_interleave`` without its output's size), and a copy between the host and
another device that is not asynchronous. Values that the host knows (omnimodel.host_known) are none.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omnimodel.host_known import HostKnown

aten = torch.ops.aten
VALUES = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.masked_scatter_backward),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.equal),
}
BY_MASK = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy_}


class Waits(TorchDispatchMode):
    """Counts them.

    Args:
        device: that stands for the GPU; what is made on it from Python numbers is copied there, with a wait.

    Attributes:
        places: file and line of the innermost caller that is not torch's -> how often.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._making = _Making(self, device)

    def __enter__(self) -> Waits:
        waits, read = self, torch.Tensor.tolist

        def tolist(tensor: torch.Tensor) -> Any:  # on a CPU it reads memory: no operation shows
            if not torch._C._is_torch_function_all_disabled():  # as it is where the host runs what it knows
                waits.places[place_of_caller()] += 1
            return read(tensor)

        torch.Tensor.tolist = tolist  # type: ignore[method-assign, assignment]
        self._making.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._making.__exit__(*exc)
        del torch.Tensor.tolist  # the one below it, of C, is there again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            self.places[place_of_caller()] += 1
        return func(*args, **kwargs)


class _Making(TorchFunctionMode):
    """``torch.tensor([1, 2], device=…)``, which no dispatcher sees."""

    def __init__(self, waits: Waits, device: str) -> None:
        super().__init__()
        self.waits, self.device = waits, device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        is_copied = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        if is_copied and device and torch.device(device).type == self.device:
            self.waits.places[place_of_caller()] += 1
        return func(*args, **kwargs)


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    packet = func._overloadpacket
    if packet in BY_MASK:
        return any(_is_unknown_mask(index) for index in args[1])
    if packet is aten.repeat_interleave and func is aten.repeat_interleave.Tensor:
        return not isinstance(args[0], HostKnown) and kwargs.get("output_size") is None
    if packet in COPIES:
        return _is_waiting_copy(packet, args, kwargs)
    if packet not in VALUES:
        return False
    deciding = args[1] if packet in (aten.masked_select, aten.masked_scatter_backward) else args[0]
    return not isinstance(deciding, HostKnown)


def _is_unknown_mask(index: Any) -> bool:
    is_mask = isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
    return is_mask and not isinstance(index, HostKnown)


def _is_waiting_copy(packet: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """From the host or to it, unless it said non_blocking."""
    if packet is aten._to_copy:
        source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
    else:
        source, target = args[1], args[0].device
    if any(isinstance(leaf, HostKnown) for leaf in tree_leaves(args)):
        return False
    is_asynchronous = kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2])
    return source.device.type != target.type and not is_asynchronous


def place_of_caller() -> str:
    """``qwen3_vl/modeling_qwen3_vl.py:304``: the innermost line that is neither torch's nor this file's."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if "torch" not in path.parts and path.name not in ("waits.py", "host_known.py"):
            return f"{path.parent.name}/{path.name}:{frame.lineno}"
    return "torch"
