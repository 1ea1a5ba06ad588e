"""What a step without numbers shows: bytes, waits, FLOPs, collectives, and what a kernel would refuse.

Every operation of the step passes through ``Playback``, with tensors that have shapes but no memory:

    result's storage        counted while it lives, by what it is for      -> peak, and where it was
    a value is read         the host would wait (known_values)             -> waits, with file and line
    matrix products         torch's own FLOP formulas                      -> flops by part of the model
    c10d::…                 bytes and order                                -> collectives
    varlen attention        dtypes, head widths, grouped heads             -> refusals

torch frees FSDP's gathered weights by shrinking their storages, which no operation shows; so that is watched
as well.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from omnimodel import host_known
from omnimodel.host_known import HostKnown

from . import known_values, mixer_kernels
from .kernel_limits import Call, refusals
from .known_values import KnownValues

FLOPS = dict(flop_registry)  # torch's formulas; a GPU has a kernel for what a CPU's kernel stands for here
for name in ("", "_backward"):
    on_cpu = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{name}")
    FLOPS[on_cpu] = FLOPS[getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{name}")]


def _of_grouped_heads(formula: Callable[..., float], first: int) -> Callable[..., float]:
    """The same where keys have fewer heads than queries, which torch 2.11's formulas of attention refuse.

    ``first``: where the query is among the arguments.
    """

    def count(*args: object, **settings: object) -> float:
        shapes: list[Any] = [x.shape if isinstance(x, torch.Tensor) else x for x in args]
        heads = shapes[first][1]
        for place in (first + 1, first + 2):
            batch, _, length, width = shapes[place]
            shapes[place] = torch.Size((batch, heads, length, width))
        return formula(*shapes, **settings)

    return count


for packet, formula in FLOPS.items():
    if "scaled_dot_product" in str(packet):
        FLOPS[packet] = _of_grouped_heads(formula, first=int("backward" in str(packet)))
OWN = {Path(__file__), Path(known_values.__file__), Path(host_known.__file__)}


class Playback(TorchDispatchMode):
    """Enter it inside of a FakeTensorMode; set ``part`` and ``place`` as the step goes on."""

    def __init__(self, *, device_is_host: bool = False, gpu: str | None = None) -> None:
        super().__init__()
        self.gpu = gpu  # whose kernels may refuse what others take
        self.values = KnownValues(self._waited, device_is_host=device_is_host)
        self.kind = "activations"  # what new memory is for
        self.assumed: list[str] = []  # of the GPUs' machine
        self.now: Counter[str] = Counter()
        # Storage -> [kind, bytes]
        self._records: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()
        self.restart()

    def restart(self) -> None:
        """Forget all but what is in memory."""
        self.part, self.place = "other", "before the step"
        self.peak: dict[str, int] = {}
        self.peak_place = ""
        self.peaks: dict[str, int] = {}  # of each phase of the step: "backward of microbatch 2"
        self.flops: defaultdict[str, float] = defaultdict(float)
        self.work: list[tuple[str, float, float]] = []  # (phase, FLOPs, bytes) of every kernel
        self.collectives: list[tuple[str, int]] = []  # (name, bytes)
        self.phases: list[str] = []  # of each collective
        self.waits: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.reached: set[torch.nn.Parameter] = set()  # parameters whose gradients came

    def __enter__(self) -> Playback:
        self._resize = torch.UntypedStorage.resize_
        playback, resize = self, self._resize

        def watched(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            playback._resized(storage)
            return result

        torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, space = kwargs or {}, func.namespace
        result = func(*args, **kwargs)
        tensors = [tensor for tensor in _local_tensors(result) if not self.values.on_host(tensor)]
        for tensor in tensors:
            self._count(tensor.untyped_storage(), self.kind)
        if space == "c10d":
            self._communicated(func, args, kwargs)
        elif not (func.is_view or space == "prim"):
            self._computed(func, args, kwargs, result, tensors)
        return result

    def _waited(self) -> None:
        place = _place_of_caller()
        # Autograd's own operations have no line of their own.
        self.waits[self.place if place.startswith("pipelines/rehearsal.py") else place] += 1

    @property
    def phase(self) -> str:
        """Of the step: ``backward of microbatch 1``."""
        return self.place.partition(",")[0]

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

    def gradient_came(self, parameter: torch.nn.Parameter) -> None:
        """A hook: the parameter's gradient is whole."""
        self.reached.add(parameter)
        if parameter.grad is not None:
            self.assign("gradients", [parameter.grad])

    def had_not(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """Take tensors that were there all the time out of what was counted."""
        size = sum(x.numel() * x.element_size() for x in _local_tensors(list(tensors)))
        if self.peak:
            self.peak[kind] -= size
        self.peaks = {phase: total - size for phase, total in self.peaks.items()}

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these, which were there before."""
        for tensor in tensors:
            self._records[tensor.untyped_storage()] = ["inputs", 0]

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
        if record is not None:  # only FSDP does so, with the weights that it gathers
            self.now[record[0]] -= record[1]
            record[:] = ["gathered weights", storage.nbytes()]
            self.now[record[0]] += record[1]
            self._look()

    def _look(self) -> None:
        total = sum(self.now.values())
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), total)
        if total > sum(self.peak.values()):
            self.peak, self.peak_place = dict(self.now), self.place

    # --- work ---------------------------------------------------------------------------------------------

    def _computed(self, func: Any, args: Any, kwargs: Any, result: Any, results: list[torch.Tensor]) -> None:
        flops = 0.0
        packet = func._overloadpacket
        if "varlen_attn" in func.name():
            flops = self._attended(func, args)
        elif packet in FLOPS:
            flops = FLOPS[packet](*args, **kwargs, out_val=result)
        self.flops[self.part] += flops
        inputs = _local_tensors((args, kwargs))
        self.work.append((self.phase, flops, sum(x.numel() * x.element_size() for x in (*inputs, *results))))

    def _attended(self, func: Any, args: Any) -> float:
        """FLOPs of attention inside of documents, and what its kernel would refuse."""
        tensors = [x for x in args if isinstance(x, torch.Tensor) and x.ndim == 3]
        is_backward = "backward" in func.name()
        query, key = tensors[is_backward], tensors[is_backward + 1]
        bounds = next(x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.int32)
        known = bounds if type(bounds) is torch.Tensor else None  # else: documents of equal lengths
        with unset_fake_temporarily():
            squares = query.shape[0] ** 2 / (len(bounds) - 1) if known is None else _squares(known)
        # Grouping of heads is the schema's only other switch, and comes as a keyword.
        is_causal = any(x is True or (isinstance(x, list | tuple) and list(x) == [-1, 0]) for x in args)
        for problem in refusals(Call(query, key, self.gpu, is_backward, is_causal)):
            self.refusals[f"{problem} ({_place_of_caller()})"] += 1
        forward = (2.0 if is_causal else 4.0) * squares * query.shape[1] * query.shape[2]
        return forward * (2.5 if is_backward else 1)

    def _is_passing(self, tensor: torch.Tensor) -> bool:
        """Is it a buffer of the communication's own, or a gradient that comes to stay?"""
        record = self._records.get(tensor.untyped_storage())
        return record is not None and record[0] == "activations"

    def _communicated(self, func: Any, args: Any, kwargs: Any) -> None:
        tensors = _local_tensors(args)
        self.assign("communication", [x for x in tensors if self._is_passing(x)])
        sizes = [x.numel() * x.element_size() for x in tensors]
        self.collectives.append((func._opname, max(sizes, default=0)))
        self.phases.append(self.phase)


def _squares(bounds: torch.Tensor) -> float:
    return float((bounds.diff().double() ** 2).sum())


def _local_tensors(tree: Any) -> list[torch.Tensor]:
    """A tree's tensors; of a sharded one this rank's part, for the whole has no memory of its own."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    leaves = [leaf for leaf in leaves if not isinstance(leaf, HostKnown)]
    return [getattr(leaf, "_local_tensor", leaf) for leaf in leaves]


def _place_of_caller() -> str:
    """``pipelines/optim.py:83``: the innermost line that is not torch's own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path == Path(mixer_kernels.__file__):
            return mixer_kernels.WAITS_IN
        if path not in OWN and "torch" not in path.parts:
            return f"{path.parent.name}/{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"
