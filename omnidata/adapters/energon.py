"""Megatron-Energon: a cooker and a task encoder that yield a dataset's samples, masks and packs as they are.

    encoder = PackTaskEncoder("data/mix", model, max_tokens=8192)
    dataset = get_train_dataset("data/mix", task_encoder=encoder, packing_buffer_size=1000, batch_size=None)
    for pack in get_savable_loader(dataset):
        loss = model(**pack.inputs).loss            # the sum over the pack's supervised tokens

The order, the ranks and the state are Energon's. It does not know how many supervised tokens a step has, so
a pack's loss is a sum: divide it by the step's ``num_supervised``. A sample that cannot be read stops the
run; Energon's own
default leaves out up to a hundred in a row.
"""

from __future__ import annotations

import re
from dataclasses import field
from typing import Any, ClassVar

import numpy as np
from megatron.energon import Cooker, DefaultTaskEncoder, Sample, basic_sample_keys, edataclass, stateless

from omnidata import schema
from omnidata.adapters.batch import model_inputs
from omnidata.adapters.stream import Stream, open_packs
from omnidata.plan.packing import pack
from omnidata.schema import IMAGE_EXTENSIONS, INPUT_IDS, LABELS
from omnidata.shards import read_npy

_IMAGE = re.compile(rf"(?:(\d+)\.)?(?:{'|'.join(IMAGE_EXTENSIONS)})")


@edataclass
class TokenizedSample(Sample):
    """A sample as it lies in the shard."""

    input_ids: np.ndarray  # int32 [L]
    labels: np.ndarray  # int32 [L], unshifted
    images: tuple[bytes, ...]  # encoded, in the order of their places


@edataclass
class PackedSample(Sample):
    """Samples laid end to end."""

    inputs: dict[str, Any] = field(default_factory=dict)  # a model's forward takes them; the loss is a sum
    num_supervised: int = 0
    keys: tuple[str, ...] = ()


@stateless
def cook(raw: dict[str, Any]) -> TokenizedSample:
    """A sample of its raw members; nothing is unpickled."""
    found = [(int(match[1] or 0), name) for name in raw if (match := _IMAGE.fullmatch(name))]
    return TokenizedSample(
        **basic_sample_keys(raw),
        input_ids=read_npy(raw[INPUT_IDS]),
        labels=read_npy(raw[LABELS]),
        images=tuple(raw[name] for _, name in sorted(found)),
    )


class PackTaskEncoder(DefaultTaskEncoder[TokenizedSample, TokenizedSample, PackedSample, PackedSample]):
    """Packs of isolated documents.

    Args:
        path: the dataset, the same that Energon is given.
        model: to be checked, see Stream; None leaves that to the caller.
        max_tokens, max_images: what a pack may hold.

    Raises:
        UserError: a sample is longer than a pack, or the model cannot learn from packs.
    """

    cookers: ClassVar = [Cooker(cook)]
    decoder = None  # pictures are decoded with the pack, by the model's own processor
    __default_failure_tolerance__ = 1  # nothing is left out in silence

    def __init__(
        self, path: str, model: Any = None, *, max_tokens: int, max_images: int | None = None
    ) -> None:
        super().__init__()
        self._max_tokens, self._max_images = max_tokens, max_images
        self._loader = open_packs(path, global_batch=1, max_tokens=max_tokens, max_images=max_images)
        self._token_types = Stream(self._loader, model).token_types

    def select_samples_to_pack(self, samples: list[TokenizedSample]) -> list[list[TokenizedSample]]:
        """Best fit within the buffer."""
        tokens = np.array([len(sample.input_ids) for sample in samples])
        images = np.array([len(sample.images) for sample in samples])
        pack_of, num_packs = pack(tokens, images, max_tokens=self._max_tokens, max_images=self._max_images)
        packs: list[list[TokenizedSample]] = [[] for _ in range(num_packs)]
        for number, sample in zip(pack_of.tolist(), samples, strict=True):
            packs[number].append(sample)
        return packs

    @stateless
    def pack_selected_samples(self, samples: list[TokenizedSample]) -> PackedSample:
        """One pack's model inputs."""
        parts = [
            schema.Sample(sample.__key__, sample.input_ids, sample.labels, sample.images)
            for sample in samples
        ]
        microbatch = self._loader.of_samples(parts)
        inputs = model_inputs(microbatch, token_types=self._token_types) | {"num_items_in_batch": 1}
        return PackedSample(
            __key__=",".join(microbatch.keys),
            __restore_key__=(),
            __subflavors__=samples[0].__subflavors__,
            inputs=inputs,
            num_supervised=microbatch.num_supervised_tokens,
            keys=microbatch.keys,
        )
