"""What the attention kernels of a GPU refuse: a table, checked at every call of a rehearsal.

    kernel                          takes                          by
    torch's variable-length flash   float16, bfloat16; widths of   mha_varlen_fwd of flash attention 2,
    attention                       a head: multiples of 8 to 256  as it is built into torch
    its backward on L40S, RTX 4090  not 193 to 224                 sdp_utils.cpp, "…_gt192_constraints_on_…"
    cuDNN's backward, which runs    up to 128, and 256             sdp_utils.cpp, "check_cudnn_d256_bprop…";
    for towers on H100, H200, B200                                 torch.nn.attention.varlen,
    (torch 2.14)                                                   "_can_use_cudnn"
    torch 2.11's                    as many heads of keys and      its signature has no enable_gqa
                                    values as of queries

A width of 112 (EVA02-E's) is taken by all of these, ran on an H200, and is refused by no kernel that torch
2.11 or later brings; the FlexAttention of torch 2.5, for one, took powers of two alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn.attention import varlen

from omnimodel.attention import KERNEL_GROUPS_HEADS


class Call(NamedTuple):
    """A call of variable-length attention, ``[T, heads, width]`` each."""

    query: torch.Tensor
    key: torch.Tensor
    gpu: str | None = None  # None: any
    is_backward: bool = False
    is_causal: bool = True

    @property
    def width(self) -> int:
        """Of a head."""
        return self.query.shape[-1]


class Widths(NamedTuple):
    """Head widths that a kernel takes."""

    kernel: str
    words: str
    takes: Callable[[int], bool]
    runs: Callable[[Call], bool] = lambda call: True


HAS_CUDNN = hasattr(varlen, "_can_use_cudnn")
WIDTHS = [
    Widths(
        "variable-length attention",
        "multiples of 8 up to 256",
        lambda width: width % 8 == 0 and width <= 256,
    ),
    Widths(
        "its backward pass on this card",
        "up to 192, and above 224",
        lambda width: not 192 < width <= 224,
        lambda call: call.is_backward and call.gpu in ("l40s", "rtx4090"),
    ),
    Widths(
        "cuDNN's backward pass",
        "up to 128, and 256",
        lambda width: width <= 128 or width == 256,
        lambda call: call.is_backward and _takes_cudnn(call),
    ),
]


def _takes_cudnn(call: Call) -> bool:
    return HAS_CUDNN and not call.is_causal and call.gpu in ("h100", "h200", "b200")


def refusals(call: Call) -> Iterator[str]:
    """Why a GPU would refuse it."""
    if call.query.dtype not in (torch.float16, torch.bfloat16):
        yield f"variable-length attention takes float16 and bfloat16, not {call.query.dtype}"
    for widths in WIDTHS:
        if widths.runs(call) and not widths.takes(call.width):
            yield f"a head width of {call.width}: {widths.kernel} takes {widths.words}"
    if call.query.shape[1] != call.key.shape[1] and not KERNEL_GROUPS_HEADS:
        yield f"{call.query.shape[1]} query heads and {call.key.shape[1]} of keys: torch 2.11 wants as many"
    if call.query.stride(-1) != 1 or call.key.stride(-1) != 1:
        yield "the last dimension of queries and keys must be contiguous"
