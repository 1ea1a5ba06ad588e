"""Microbatch: what one rank feeds to one forward and backward, and how samples become one.

Samples of a pack are laid end to end. Each is a document that must see nothing of its neighbours::

    input_ids     [ a0 a1 a2 | b0 b1 b2 b3 ]
    labels        [ a1 a2  - | b1 b2 b3  - ]     shifted here and nowhere else; "-" is IGNORE_INDEX
    position_ids  [  0  1  2 |  0  1  2  3 ]
    cu_seqlens    [  0         3           7 ]

``labels[t]`` is what position ``t`` must predict, or IGNORE_INDEX where the prediction is not supervised.

A worker lays out ``Parts`` (small arrays that are cheap to send, and one batch of images in shared memory);
the training process expands them to a ``Microbatch``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from omnidata.schema import IGNORE_INDEX, Sample

if TYPE_CHECKING:
    import torch

    from omnidata.profiles.tensors import Normalisation


@dataclass(frozen=True, slots=True, eq=False)
class Microbatch:
    """One rank's share of a step, or one part of it; tensors on the CPU.

    A rank with nothing to do gets an empty microbatch: one token that nothing supervises, no key, so that
    every rank runs the same number of forwards and collectives.
    """

    input_ids: torch.Tensor  # int64 [T]
    labels: torch.Tensor  # int64 [T], ALREADY SHIFTED within each document; IGNORE_INDEX at its last token
    position_ids: torch.Tensor  # int64 [T], restart at every document; M-RoPE: [4, T], row 0 as that
    cu_seqlens: torch.Tensor  # int32 [D+1], first token of each document, then T
    max_seqlen: int  # tokens of the longest document
    # uint8 [N, 3, S, S] RGB; a processor's tensors by name ({} without pictures); encoded bytes if
    # decode_images=False
    images: torch.Tensor | dict[str, torch.Tensor] | tuple[bytes, ...]
    image_positions: torch.Tensor  # int64 [N], OmniLMM's: where each image's first <im_patch> stands
    num_supervised_tokens: int  # of the WHOLE GLOBAL STEP, all ranks and microbatches: the loss denominator
    keys: tuple[str, ...]  # samples, in order; () when empty
    step: int  # counted from the start of training, over epochs
    epoch: int
    num_skipped: int = 0  # unreadable samples left out under on_error="skip"
    token_type_ids: torch.Tensor | None = None  # int64 [T], a processor's: 1 at its image tokens, else 0
    groups: torch.Tensor | None = None  # int64 [D], of each document (see PackLoader); None: not asked
    supervised_groups: torch.Tensor | None = None  # int64 [N], of each supervised label, in their order
    num_images: int = 0  # of the samples
    num_pixels: int = (
        0  # a processor's: values of their pixel tensors before one picture is padded for another
    )
    has_dummy: bool = False  # the last document is no sample but one small picture with nothing supervised
    normalise: Normalisation | None = None  # makes raw pixels the processor's; None: they are that

    @property
    def num_tokens(self) -> int:
        """Of the samples: T, less a dummy's."""
        return int(self.cu_seqlens[-2]) if self.has_dummy else len(self.input_ids)


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """A microbatch on its way from a worker: everything that the rest follows from."""

    input_ids: np.ndarray  # int32 [T]
    labels: np.ndarray  # int32 [T], shifted
    lengths: np.ndarray  # int64 [D]
    image_positions: np.ndarray  # int64 [N]
    images: np.ndarray | dict[str, np.ndarray] | tuple[bytes, ...]  # uint8 [N, S, S, 3], tensors, as stored
    keys: tuple[str, ...]
    num_skipped: int
    position_ids: np.ndarray | None = None  # int64 [4, T]; None: they follow from the lengths
    token_types: np.ndarray | None = None  # bool [T]
    groups: np.ndarray | None = None  # int64 [D]
    num_images: int = 0
    num_pixels: int = 0
    has_dummy: bool = False


def lay_out(
    samples: Sequence[Sample],
    images: np.ndarray | dict[str, np.ndarray] | tuple[bytes, ...],
    *,
    im_start: int | None = None,
    image_token_ids: Sequence[int] | None = None,
    position_ids: np.ndarray | None = None,
    num_skipped: int = 0,
    has_dummy: bool = False,
) -> Parts:
    """Lay samples end to end and shift their labels.

    Args:
        samples: at most the tokens that the model takes at once.
        images: all their images, in order.
        im_start: id that opens an image block; None: a processor's dataset.
        image_token_ids: ids that are marked as a picture's, of a processor.
        position_ids: int64 ``[4, T]``, if they are not 1-D.
        num_skipped: unreadable samples left out.
        has_dummy: the last of ``samples`` is none, but there for its picture.
    """
    ids = [sample.input_ids for sample in samples] or [np.zeros(1, np.int32)]
    lengths = np.array([len(document) for document in ids])
    labels = np.full(lengths.sum(), IGNORE_INDEX, np.int32)
    start = 0
    for sample in samples:
        stop = start + len(sample.labels)
        labels[start : stop - 1] = sample.labels[1:]
        start = stop
    input_ids = np.concatenate(ids)
    has_blocks = samples and im_start is not None
    positions = np.flatnonzero(input_ids == im_start) + 1 if has_blocks else np.zeros(0, np.int64)
    real = samples[:-1] if has_dummy else samples
    keys, num_images = tuple(sample.key for sample in real), sum(len(sample.images) for sample in real)
    types = None if image_token_ids is None else np.isin(input_ids, image_token_ids)
    return Parts(
        input_ids,
        labels,
        lengths,
        positions,
        images,
        keys,
        num_skipped,
        position_ids=position_ids,
        token_types=types,
        num_images=num_images,
        has_dummy=has_dummy,
    )


def expand(
    parts: Parts,
    *,
    num_supervised_tokens: int,
    step: int,
    epoch: int,
    pin_memory: bool = False,
    normalise: Normalisation | None = None,
) -> Microbatch:
    """The microbatch that ``parts`` stand for; with ``pin_memory`` all of it in page-locked memory.

    A copy to a GPU from any other memory makes the host wait, if it is larger than 64 KiB.
    """
    import torch

    def host(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if pin_memory else tensor

    cu_seqlens = np.concatenate(([0], np.cumsum(parts.lengths)))
    starts = np.repeat(cu_seqlens[:-1], parts.lengths)
    images: torch.Tensor | dict[str, torch.Tensor] | tuple[bytes, ...]
    if isinstance(parts.images, np.ndarray):
        images = host(parts.images).permute(0, 3, 1, 2)  # channels last: no transposition on the CPU
    elif isinstance(parts.images, dict):
        images = {name: host(array) for name, array in parts.images.items()}
    else:
        images = parts.images
    positions = np.arange(len(starts)) - starts if parts.position_ids is None else parts.position_ids
    types = None if parts.token_types is None else host(parts.token_types.astype(np.int64))
    groups = supervised_groups = None
    if parts.groups is not None:
        groups = host(parts.groups)
        of_samples = np.repeat(parts.groups, parts.lengths[: len(parts.groups)])  # a dummy has no group
        supervised_groups = host(of_samples[parts.labels[: len(of_samples)] != IGNORE_INDEX])
    return Microbatch(
        input_ids=host(parts.input_ids.astype(np.int64)),
        labels=host(parts.labels.astype(np.int64)),
        position_ids=host(positions),
        cu_seqlens=host(cu_seqlens.astype(np.int32)),
        max_seqlen=int(parts.lengths.max()),
        images=images,
        image_positions=host(parts.image_positions),
        num_supervised_tokens=num_supervised_tokens,
        keys=parts.keys,
        step=step,
        epoch=epoch,
        num_skipped=parts.num_skipped,
        token_type_ids=types,
        groups=groups,
        supervised_groups=supervised_groups,
        num_images=parts.num_images,
        num_pixels=parts.num_pixels,
        has_dummy=parts.has_dummy,
        normalise=normalise,
    )
