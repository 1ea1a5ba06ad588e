"""Mixers other than attention, kept to their document: short convolutions, gated delta nets, state spaces.

    decoder block
      attention            cu_seq_lens_q goes to the kernel (omnimodel.attention)
      any other mixer      [1, T, D] ──split by cu_seq_lens_q──▶ once per document ──▶ [1, T, D]

What runs along the row would carry a document's end into the next one's beginning. A mixer is known by the
convolution that each of them has. With the kernels of ``causal-conv1d`` and ``flash-linear-attention`` on a
GPU the row stays whole: they take the bounds themselves.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from omnimodel.attention import takes_gpu_path
from omnimodel.host_known import plain

KERNELS = ("causal_conv1d", "fla")  # packages whose kernels take cu_seq_lens_q and seq_idx
_played: set[str] = set()  # modules of classes whose kernels a rehearsal plays


def keep_apart(decoder: nn.Module) -> list[str]:
    """Make the decoder's mixers respect ``cu_seq_lens_q``; the classes that were changed."""
    names = {module: name for name, module in decoder.named_modules()}
    changed = []
    for module in mixers_of(decoder):
        module.__class__ = _apart(type(module))
        changed.append(names[module])
    return changed


def mixers_of(decoder: nn.Module) -> list[nn.Module]:
    """Modules that hold a convolution along the row."""
    modules = list(decoder.modules())
    return [x for x in modules if any(isinstance(child, nn.Conv1d) for child in x.children())]


@contextlib.contextmanager
def with_kernels_in(modules: Iterable[str]) -> Iterator[None]:
    """For a rehearsal: mixers of classes of these Python modules take their kernels' path."""
    before = set(_played)
    _played.update(modules)
    try:
        yield
    finally:
        _played.intersection_update(before)


def _apart(kind: type[nn.Module]) -> type[nn.Module]:
    """A class like ``kind`` whose forward takes a row document by document."""

    def forward(
        self: nn.Module,
        hidden_states: torch.Tensor,
        *args: Any,
        cu_seq_lens_q: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if cu_seq_lens_q is None:
            return kind.forward(self, hidden_states, *args, **kwargs)
        if has_kernels(hidden_states) or kind.__module__ in _played:
            cu_seq_lens_q = plain(cu_seq_lens_q)  # kernels read its memory
            positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            document = torch.bucketize(positions, cu_seq_lens_q[1:], right=True).to(torch.int32)[None]
            kwargs |= {"cu_seq_lens_q": cu_seq_lens_q, "seq_idx": document}
            return kind.forward(self, hidden_states, *args, **kwargs)
        return _once_per_document(kind, self, hidden_states, cu_seq_lens_q, args, kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


@torch.compiler.disable(recursive=False)
def _once_per_document(
    kind: type[nn.Module],
    mixer: nn.Module,
    hidden_states: torch.Tensor,
    cu_seq_lens_q: torch.Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> torch.Tensor:
    kwargs = kwargs | {"attention_mask": None}  # a pack has no padding
    documents = hidden_states.split(cu_seq_lens_q.diff().tolist(), dim=1)
    return torch.cat([kind.forward(mixer, document, *args, **kwargs) for document in documents], dim=1)


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether mixers run as kernels that take a pack's bounds."""
    return takes_gpu_path(tensor) and all(importlib.util.find_spec(name) for name in KERNELS)
