"""Microbatch: what one rank feeds to one forward and backward, and how samples become one.

Samples of a pack are laid end to end. Each is a document that must see nothing of its neighbours::

    input_ids     [ a0 a1 a2 | b0 b1 b2 b3 ]
    labels        [ a1 a2  - | b1 b2 b3  - ]     shifted here and nowhere else; "-" is IGNORE_INDEX
    position_ids  [  0  1  2 |  0  1  2  3 ]
    cu_seqlens    [  0         3           7 ]

``labels[t]`` is what position ``t`` must predict, or IGNORE_INDEX where the prediction is not supervised.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class Microbatch:
    """One rank's share of a step, or one part of it; tensors on the CPU.

    A rank with nothing to do gets an empty microbatch: one token that nothing supervises, no key, so that
    every rank runs the same number of forwards and collectives.
    """

    input_ids: torch.Tensor  # int64 [T]
    labels: torch.Tensor  # int64 [T], ALREADY SHIFTED within each document; IGNORE_INDEX at its last token
    position_ids: torch.Tensor  # int64 [T], restart at every document
    cu_seqlens: torch.Tensor  # int32 [D+1], first token of each document, then T
    max_seqlen: int  # tokens of the longest document
    images: torch.Tensor | tuple[bytes, ...]  # uint8 [N, 3, S, S] RGB; encoded bytes if decode_images=False
    image_positions: torch.Tensor  # int64 [N], where in input_ids each image's first placeholder stands
    num_supervised_tokens: int  # of the WHOLE GLOBAL STEP, all ranks and microbatches: the loss denominator
    keys: tuple[str, ...]  # samples, in order; () when empty
    step: int  # counted from the start of training, over epochs
    epoch: int
    num_skipped: int = 0  # unreadable samples left out under on_error="skip"

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return len(self.input_ids)

    def pin_memory(self) -> Microbatch:
        """A copy in page-locked memory, for an asynchronous transfer to a GPU."""
        import torch

        tensors = {name: getattr(self, name) for name in self.__slots__}
        pinned = {name: x.pin_memory() for name, x in tensors.items() if isinstance(x, torch.Tensor)}
        return replace(self, **pinned)
