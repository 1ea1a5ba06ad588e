"""Attention that keeps packed documents apart, registered with transformers as ``omnilmm``.

Towers that join pictures in one row (``cu_seqlens`` in their forward) get the same without causality, under
the name ``omnilmm_flash``: transformers takes the joined path if the name says flash.

A pack joins documents in one row: ``[a a a b b c]`` with ``cu_seqlens = [0, 3, 5, 6]``. A token may see
only earlier tokens of its own document. transformers can infer that from position ids, but silently does
not when a cache or an attention mask is about; here the boundaries go down to the kernel as they are.

    cu_seq_lens given, GPU, half precision   torch's variable-length flash attention: no mask, no padding
    cu_seq_lens given, GPU, float32          one masked call (exact, quadratic memory: for tests)
    cu_seq_lens given, CPU                   one causal call per document
    otherwise                                transformers' own SDPA and mask (padded batches, cache)

A model whose layers see more than causality allows (Gemma: a picture's tokens see each other) gets its own
mask, joined with the documents' bounds, by ``packing``: one masked call.

None of these copies anything from the GPU to the host.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, causal_mask_function, sdpa_mask

from omnimodel.host_known import plain

NAME = "omnilmm"
TOWER_NAME = "omnilmm_flash"
# torch 2.11's kernel wants a key and value for each query head; they are repeated there.
KERNEL_GROUPS_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
_as_on_gpu = False


def takes_gpu_path(where: torch.Tensor | torch.device) -> bool:
    """Whether code that differs by device must do what it does on a GPU: there, and in a rehearsal."""
    device = where.device if isinstance(where, torch.Tensor) else where
    return _as_on_gpu or device.type != "cpu"


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """For a rehearsal: tensors without memory lie on the "cpu", but must be treated as a GPU's would be."""
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before


class Packing(NamedTuple):
    """Which tokens of a row belong together, and what a token may see of its own document."""

    cu_seqlens: torch.Tensor  # int32 [D + 1]: where documents start, and the end
    max_seqlen: int | None = None  # tokens of the longest; a GPU kernel needs it
    scale: float | None = None  # of the scores; None: 1 / sqrt(width of a head)
    window: int | None = None  # tokens seen, itself included; None: all before it
    is_causal: bool = True  # False: a tower's pictures, whose patches see each other


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
    of_tower: bool = False,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: ``[B, H, T, d]`` in, ``[B, T, H, d]`` and no weights out.

    ``of_tower``: every patch sees all patches of its own stretch of the row.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse_unsupported(query, key, dropout, kwargs)
    # Under autocast rotary tables, and so queries and keys, are float32; values have the kernel's dtype.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if attention_mask is not None and attention_mask.dtype == torch.bool:  # made by packed_mask
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2), None
    is_causal = kwargs.get("is_causal") is not False and getattr(module, "is_causal", True) is not False
    if not (is_causal or of_tower):
        raise ValueError("attention that is not causal is not supported for packed documents without a mask")
    window = sliding_window if sliding_window and sliding_window < (max_length_q or query.shape[2]) else None
    pack = Packing(cu_seq_lens_q, max_length_q, scaling, window, is_causal=not of_tower)
    return _choose(query)(query, key, value, pack)[None], None


def _refuse_unsupported(
    query: torch.Tensor, key: torch.Tensor, dropout: float, kwargs: Mapping[str, object]
) -> None:
    if dropout:
        raise ValueError(
            f"attention_dropout={dropout} is not supported for packed documents; set it to 0 in the config"
        )
    unknown = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"attention with {' and '.join(unknown)} is not supported for packed documents")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"packed attention takes one row without a cache, got {query.shape[0]} rows with "
            f"{query.shape[2]} queries and {key.shape[2]} keys"
        )


def _choose(query: torch.Tensor) -> Callable[..., torch.Tensor]:
    if not takes_gpu_path(query):
        return per_document_attention
    return varlen_attention if query.dtype in (torch.float16, torch.bfloat16) else masked_attention


@torch.compiler.disable(recursive=False)
def per_document_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Packing
) -> torch.Tensor:
    """One SDPA call per document. Reads ``cu_seqlens`` on the host, so only for the CPU."""
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
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=pack.is_causal and mask is None,
                scale=pack.scale,
                enable_gqa=True,
            )
        )
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Packing
) -> torch.Tensor:
    """One SDPA call with a ``[T, T]`` mask: any device, any dtype, exact, quadratic memory."""
    positions = torch.arange(query.shape[2], device=query.device)
    document = torch.bucketize(positions, pack.cu_seqlens[1:], right=True)
    mask = document[:, None] == document[None]
    if pack.is_causal:
        mask = mask & _causal_window(positions, pack.window)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=pack.scale, enable_gqa=True
    )
    return output[0].transpose(0, 1)


def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Packing
) -> torch.Tensor:
    """torch's variable-length flash attention: CUDA, half precision."""
    if pack.max_seqlen is None:
        raise ValueError("cu_seqlens on a GPU needs max_seqlen: the kernel is launched from the host")
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    grouped: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        # Not said of equal heads: torch 2.14's forward pass would then keep to flash attention, and its
        # backward pass, which is not told, read the sums of a tower's documents as cuDNN's.
        grouped = {"enable_gqa": True} if KERNEL_GROUPS_HEADS else {}
        if not grouped:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # The kernel's window counts the tokens to the left, transformers' the token itself as well.
    left = -1 if pack.window is None else pack.window - 1
    right = 0 if pack.is_causal else -1
    cu_seqlens = plain(pack.cu_seqlens)
    bounds = (cu_seqlens, cu_seqlens, pack.max_seqlen, pack.max_seqlen)
    output = varlen_attn(q, k, v, *bounds, scale=pack.scale, window_size=(left, right), **grouped)
    return cast("torch.Tensor", output)  # alone, since nothing besides was asked for


def _causal_window(positions: torch.Tensor, window: int | None) -> torch.Tensor:
    """``[T, T]``, True where the row may see the column: itself and the ``window - 1`` before it."""
    distance = positions[:, None] - positions[None]
    causal = distance >= 0
    return causal if window is None else causal & (distance < window)


# --- masks ------------------------------------------------------------------------------------------------

_packing: ContextVar[Packing | None] = ContextVar("packing", default=None)


@contextlib.contextmanager
def packing(cu_seqlens: torch.Tensor, max_seqlen: int) -> Iterator[None]:
    """While a model's forward makes its masks: the row is a pack."""
    token = _packing.set(Packing(cu_seqlens, max_seqlen))
    try:
        yield
    finally:
        _packing.reset(token)


def packed_mask(*args: Any, mask_function: Any = causal_mask_function, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask interface: its own SDPA mask, but inside ``packing`` None or one that we apply.

    None if a token may see all before it in its document: ``omnilmm_attention`` does that without a mask.
    Otherwise bool ``[1, 1, T, T]``, quadratic memory.
    """
    pack = _packing.get()
    if pack is None:
        return sdpa_mask(*args, mask_function=mask_function, **kwargs)
    if _is_only_causal(mask_function, pack.max_seqlen):
        return None
    positions = torch.arange(kwargs["q_length"], device=pack.cu_seqlens.device)
    document = torch.bucketize(positions, pack.cu_seqlens[1:], right=True)

    def same_document(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
        return document[query] == document[key]

    kwargs |= {"attention_mask": None, "allow_is_causal_skip": False}
    return sdpa_mask(*args, mask_function=and_masks(mask_function, same_document), **kwargs)


def _is_only_causal(mask_function: Any, longest: int | None) -> bool:
    """Is it the causal mask, maybe within a window that no document of the pack leaves?"""
    if mask_function is causal_mask_function:
        return True
    inside = inspect.getclosurevars(mask_function).nonlocals
    if mask_function.__qualname__.startswith("sliding_window_overlay."):
        return longest is not None and longest <= inside["sliding_window"]
    if mask_function.__qualname__.startswith("and_masks."):
        return all(_is_only_causal(each, longest) for each in inside["mask_functions"])
    return False


AttentionInterface.register(NAME, omnilmm_attention)
AttentionMaskInterface.register(NAME, packed_mask)  # padded batches and the cache: as sdpa
AttentionInterface.register(TOWER_NAME, functools.partial(omnilmm_attention, of_tower=True))
