"""Attention that keeps packed documents apart, registered with transformers as ``omnilmm``.

A pack joins documents in one row: ``[a a a b b c]`` with ``cu_seqlens = [0, 3, 5, 6]``. A token may see
only earlier tokens of its own document. transformers can infer that from position ids, but silently does
not when a cache or an attention mask is about; here the boundaries go down to the kernel as they are.

    cu_seq_lens given, GPU, half precision   torch's variable-length flash attention: no mask, no padding
    cu_seq_lens given, GPU, float32          one masked call (exact, quadratic memory: for tests)
    cu_seq_lens given, CPU                   one causal call a document
    otherwise                                transformers' own SDPA and mask (padded batches, cache)

None of these copies anything from the GPU to the host.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "omnilmm"
# torch 2.11's kernel wants a key and value for each query head; they are repeated there.
KERNEL_GROUPS_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
_as_on_gpu = False


def takes_gpu_path(tensor: torch.Tensor) -> bool:
    """Whether code that differs by device must do what it does on a GPU: there, and in a rehearsal."""
    return _as_on_gpu or tensor.device.type != "cpu"


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """For a rehearsal: tensors without memory lie on the "cpu", but must be treated as a GPU's would be."""
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before


class Pack(NamedTuple):
    """Which tokens of a row belong together, and what a token may see of its own document."""

    cu_seqlens: torch.Tensor  # int32 [D + 1]: where documents start, and the end
    max_seqlen: int | None = None  # tokens of the longest; a GPU kernel needs it
    scale: float | None = None  # of the scores; None: 1 / sqrt(width of a head)
    window: int | None = None  # tokens seen, itself included; None: all before it


def omnilmm_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: ``[B, H, T, d]`` in, ``[B, T, H, d]`` and no weights out."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(
            f"attention_dropout={dropout} is not supported for packed documents; set it to 0 in the config"
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"packed attention takes one row without a cache, got {query.shape[0]} rows with "
            f"{query.shape[2]} queries and {key.shape[2]} keys"
        )
    window = sliding_window if sliding_window and sliding_window < (max_length_q or query.shape[2]) else None
    # Under autocast rotary tables, and so queries and keys, are float32; values have the kernel's dtype.
    query, key = query.to(value.dtype), key.to(value.dtype)
    attend = _choose(query)
    output_THd = attend(query, key, value, Pack(cu_seq_lens_q, max_length_q, scaling, window))
    return output_THd[None], None


def _choose(query: torch.Tensor) -> Callable[..., torch.Tensor]:
    if not takes_gpu_path(query):
        return per_document_attention
    return varlen_attention if query.dtype in (torch.float16, torch.bfloat16) else masked_attention


@torch.compiler.disable(recursive=False)
def per_document_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack
) -> torch.Tensor:
    """One causal SDPA call a document. Reads ``cu_seqlens`` on the host, so only for the CPU."""
    lengths = pack.cu_seqlens.diff().tolist()
    # split, not slices: its backward pass joins the documents' gradients instead of adding full-size zeros.
    documents = zip(lengths, *(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = []
    for length, q, k, v in documents:
        mask = None
        if pack.window is not None and length > pack.window:
            mask = _causal_window(torch.arange(length, device=q.device), pack.window)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=pack.scale, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def masked_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack) -> torch.Tensor:
    """One SDPA call with a ``[T, T]`` mask: any device, any dtype, exact, quadratic memory."""
    positions = torch.arange(query.shape[2], device=query.device)
    document = torch.bucketize(positions, pack.cu_seqlens[1:], right=True)
    mask = _causal_window(positions, pack.window) & (document[:, None] == document[None])
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=pack.scale, enable_gqa=True
    )
    return output[0].transpose(0, 1)


def varlen_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack) -> torch.Tensor:
    """torch's variable-length flash attention: CUDA, half precision."""
    if pack.max_seqlen is None:
        raise ValueError("cu_seqlens on a GPU needs max_seqlen: the kernel is launched from the host")
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    grouped = {"enable_gqa": True} if KERNEL_GROUPS_HEADS else {}
    if not grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # The kernel's window counts the tokens to the left, transformers' the token itself as well.
    left = -1 if pack.window is None else pack.window - 1
    bounds = (pack.cu_seqlens, pack.cu_seqlens, pack.max_seqlen, pack.max_seqlen)
    return varlen_attn(q, k, v, *bounds, scale=pack.scale, window_size=(left, 0), **grouped)


def _causal_window(positions: torch.Tensor, window: int | None) -> torch.Tensor:
    """``[T, T]``, True where the row may see the column: itself and the ``window - 1`` before it."""
    distance = positions[:, None] - positions[None]
    causal = distance >= 0
    return causal if window is None else causal & (distance < window)


AttentionInterface.register(NAME, omnilmm_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for padded batches and the cache
