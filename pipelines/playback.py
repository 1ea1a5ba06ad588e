"""What a step without numbers shows: bytes, waits, FLOPs, collectives, and what a kernel would refuse.

Every operation of the step passes through ``Playback``, with tensors that have shapes but no memory:

    result's storage        counted while it lives, by what it is for      -> peak, and where it was
    _local_scalar_dense     the host needs a value: it would wait          -> waits, with file and line
    matrix products         torch's own FLOP formulas                      -> flops by part of the model
    c10d::…                 bytes and order                                -> collectives
    varlen attention        dtypes, head widths, grouped heads             -> refusals

torch frees FSDP's gathered weights by shrinking their storages, which no operation shows; so that is watched
as well.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from omnimodel.attention import KERNEL_GROUPS_HEADS

MAX_HEAD_WIDTH = 256  # of flash attention 2, which takes multiples of 8


class Playback(TorchDispatchMode):
    """Enter it inside of a FakeTensorMode; set ``part`` and ``place`` as the step goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        # Storage -> [kind, bytes]
        self._records: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()
        self.restart()

    def restart(self) -> None:
        """Forget all but what is in memory."""
        self.part, self.place = "other", "before the step"
        self.peak: dict[str, int] = {}
        self.peak_place = ""
        self.flops: Counter[str] = Counter()
        self.work: list[tuple[float, float]] = []  # (FLOPs, bytes) of every kernel
        self.collectives: list[tuple[str, int]] = []
        self.waits: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()

    def __enter__(self) -> Playback:
        self._resize = torch.UntypedStorage.resize_
        playback, resize = self, self._resize

        def watched(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            playback._resized(storage)
            return result

        torch.UntypedStorage.resize_ = watched
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            self.waits[_place_of_caller()] += 1
            dtype = args[0].dtype  # any value will do: the step goes on with it
            return 1.0 if dtype.is_floating_point else True if dtype == torch.bool else 1
        space = func.namespace
        result = func(*args, **kwargs)
        kind = "communication" if space in ("c10d", "fsdp") else "activations"
        tensors = _local_tensors(result)
        for tensor in tensors:
            self._count(tensor.untyped_storage(), kind)
        if space == "c10d":
            self._communicated(func, args, kwargs)
        elif not (func.is_view or space == "prim"):
            self._computed(func, args, kwargs, result, tensors)
        return result

    # --- memory -------------------------------------------------------------------------------------------

    def assign(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """Count these tensors, which may be counted already, as ``kind``."""
        for tensor in tensors:
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            record = self._records.get(storage)
            if record is None:
                self._count(storage, kind)
            else:
                self.now[record[0]] -= record[1]
                self.now[kind] += record[1]
                record[0] = kind

    def _count(self, storage: Any, kind: str) -> None:
        if storage in self._records:
            return
        record = self._records[storage] = [kind, storage.nbytes()]
        self.now[kind] += record[1]
        weakref.finalize(storage, self._released, record)
        self._look()

    def _released(self, record: list[Any]) -> None:
        self.now[record[0]] -= record[1]

    def _resized(self, storage: Any) -> None:
        record = self._records.get(storage)
        if record is not None:
            self.now[record[0]] += storage.nbytes() - record[1]
            record[1] = storage.nbytes()
            self._look()

    def _look(self) -> None:
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak, self.peak_place = dict(self.now), self.place

    # --- work ---------------------------------------------------------------------------------------------

    def _computed(self, func: Any, args: Any, kwargs: Any, result: Any, results: list[torch.Tensor]) -> None:
        flops = 0
        packet = func._overloadpacket
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
        elif "varlen_attn" in func.name():
            flops = self._attended(func, args)
        self.flops[self.part] += flops
        inputs = _local_tensors((args, kwargs))
        self.work.append((flops, sum(x.numel() * x.element_size() for x in (*inputs, *results))))

    def _attended(self, func: Any, args: Any) -> float:
        """FLOPs of causal attention over documents of equal lengths, and what its kernel would refuse."""
        tensors = [x for x in args if isinstance(x, torch.Tensor) and x.ndim == 3]
        is_backward = "backward" in func.name()
        query, key = tensors[is_backward], tensors[is_backward + 1]
        for problem in refusals(query, key):
            self.refusals[f"{problem} ({_place_of_caller()})"] += 1
        bounds = next(x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.int32)
        length = query.shape[0] / max(1, len(bounds) - 1)
        forward = 2.0 * query.shape[0] * length * query.shape[1] * query.shape[2]
        return forward * (2.5 if is_backward else 1)

    def _communicated(self, func: Any, args: Any, kwargs: Any) -> None:
        sizes = [x.numel() * x.element_size() for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        self.collectives.append((func._opname, max(sizes, default=0)))


def refusals(query: torch.Tensor, key: torch.Tensor) -> list[str]:
    """What torch's variable-length flash attention refuses on a GPU, ``[T, heads, width]`` each.

    Source: the checks at the head of mha_varlen_fwd in flash attention 2, built into torch; grouped heads by
    the signature of the torch that runs here.
    """
    problems = []
    if query.dtype not in (torch.float16, torch.bfloat16):
        problems.append(f"variable-length attention takes float16 and bfloat16, not {query.dtype}")
    if query.shape[-1] > MAX_HEAD_WIDTH or query.shape[-1] % 8:
        problems.append(f"a head width of {query.shape[-1]}: multiples of 8 up to {MAX_HEAD_WIDTH} are taken")
    if query.shape[1] != key.shape[1] and not KERNEL_GROUPS_HEADS:
        problems.append(f"{query.shape[1]} query heads and {key.shape[1]} of keys: torch 2.11 wants as many")
    if query.stride(-1) != 1 or key.stride(-1) != 1:
        problems.append("the last dimension of queries and keys must be contiguous")
    return problems


def _local_tensors(tree: Any) -> list[torch.Tensor]:
    """A tree's tensors; of a sharded one this rank's part, for the whole has no memory of its own."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [getattr(leaf, "_local_tensor", leaf) for leaf in leaves]


def _place_of_caller() -> str:
    """``pipelines/optim.py:83``: the innermost line that is not torch's own."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path != Path(__file__) and "torch" not in path.parts:
            return f"{path.parent.name}/{path.name}:{frame.lineno}"
    return "torch"
