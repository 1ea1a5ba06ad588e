"""The kernels of gated delta nets as a rehearsal plays them: what they use and keep, no numbers.

    causal-conv1d 1.7             keeps its input and weight
    flash-linear-attention 0.6    keeps normalised queries and keys, values, gates, and a row of 64 for each
                                  head and token; its backward pass makes the states of all chunks again

GPUs are taken to have both, whether this machine has them or not: without them transformers falls back on
plain torch, document by document, which takes more memory and waits for each document.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from omnimodel import mixers

ASSUMED = "assumed: flash-linear-attention and causal-conv1d are installed where the GPUs are"
CHUNK = 64
WAITS_IN = "fla/ops/utils/index.py"  # where the real kernels wait for the GPU
STAND_INS = ("causal_conv1d_fn", "torch_chunk_gated_delta_rule")  # names in a class's module


@contextlib.contextmanager
def played(model: nn.Module) -> Iterator[list[str]]:
    """Inside, mixers run on stand-ins for their kernels. Gives what that assumes: [] or a line."""
    modules = {sys.modules[type(module).__module__] for module in mixers.mixers_of(model)}
    modules = {module for module in modules if all(hasattr(module, name) for name in STAND_INS)}
    before = [(module, name, getattr(module, name)) for module in modules for name in STAND_INS]
    delta_rule = _DeltaRule()
    for module in modules:
        module.causal_conv1d_fn = _convolve  # type: ignore[attr-defined]
        module.torch_chunk_gated_delta_rule = delta_rule  # type: ignore[attr-defined]
    with mixers.with_kernels_in(module.__name__ for module in modules):
        try:
            yield [ASSUMED] if modules else []
        finally:
            for module, name, function in before:
                setattr(module, name, function)


# --- operations that a playback sees ----------------------------------------------------------------------


@torch.library.custom_op("omnilmm_played::convolve", mutates_args=())
def _convolved(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("only its shape is known")


@torch.library.custom_op("omnilmm_played::delta_rule", mutates_args=())
def _ruled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("only its shape is known")


@_convolved.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@_ruled.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(v)


@register_flop_formula(torch.ops.omnilmm_played.delta_rule)
def _flops_of_delta_rule(q: Any, k: Any, v: Any, g: Any, **_: Any) -> int:
    """Per token and head: keys with keys, what the triangle turns, the states, and queries with both."""
    tokens, heads, width = v[1:]
    keys = k[-1]
    return 2 * tokens * heads * (CHUNK * (3 * keys + 2 * width) + 3 * keys * width)


@register_flop_formula(torch.ops.omnilmm_played.convolve)
def _flops_of_convolution(x: Any, weight: Any, **_: Any) -> int:
    return 2 * x[0] * x[1] * x[2] * weight[-1]


# --- the kernels' functions -------------------------------------------------------------------------------


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.omnilmm_played.convolve(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return torch.ops.omnilmm_played.convolve(x, weight), torch.empty_like(weight)


def _convolve(x: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return _Convolution.apply(x, weight)


class _DeltaRule:
    """The rule itself; the bounds of a pack are read once, when its first layer asks."""

    def __init__(self) -> None:
        self._read: torch.Tensor | None = None

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        g: torch.Tensor,
        beta: torch.Tensor,
        cu_seqlens: torch.Tensor,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        if cu_seqlens is not self._read:
            self._read = cu_seqlens
            cu_seqlens.sum().item()  # the host waits: fla lists the chunks
        chunks = query.shape[1] // CHUNK + len(cu_seqlens) - 1  # each document's last one may be short
        return _Chunks.apply(query, key, value, g, beta, chunks), None


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, chunks: int) -> torch.Tensor:
        # Contiguous, normalised copies; sums of gates; the inverse of each chunk's triangle.
        values, queries, keys = (x.contiguous() for x in (v, torch.empty_like(q), torch.empty_like(k)))
        norms = [torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for x in (q, k)]
        gates = torch.empty_like(g, dtype=torch.float32)
        triangle = v.new_empty(*v.shape[:3], CHUNK)
        ctx.save_for_backward(queries, keys, values, gates, beta, triangle, *norms)
        ctx.chunks = chunks
        work = _chunk_values(keys, values, chunks)
        del work
        return torch.ops.omnilmm_played.delta_rule(queries, keys, values, gates)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        queries, keys, values, gates, beta, *_ = ctx.saved_tensors
        work = _chunk_values(keys, values, ctx.chunks)
        of_values = [torch.empty_like(values) for _ in range(2)]
        of_states = torch.empty_like(work[2])
        heads = (*values.shape[:3], keys.shape[-1])
        of_queries, of_keys, of_work = (queries.new_empty(heads) for _ in range(3))
        for _ in range(2):  # twice the forward pass's work
            torch.ops.omnilmm_played.delta_rule(queries, keys, values, gates)
        more = keys.new_empty(heads)
        del work, of_values, of_states, of_queries, of_keys, of_work, more
        return (*(torch.empty_like(x) for x in (queries, keys, values, gates, beta)), None)


def _chunk_values(keys: torch.Tensor, values: torch.Tensor, chunks: int) -> list[torch.Tensor]:
    """w and u of the WY form, the state before each chunk, and values less what it says of them."""
    batch, _, heads, width = values.shape
    w = keys.new_empty(*values.shape[:3], keys.shape[-1])
    states = keys.new_empty(batch, chunks, heads, keys.shape[-1], width)
    return [w, torch.empty_like(values), states, torch.empty_like(values)]
