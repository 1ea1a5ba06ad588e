"""Model FLOPs of any transformers model, from its modules: matrices, blocks and widths, no family's formula.

    a token of the language model   2 x its matrices + attention to all before it; experts by those it takes
    a patch of the tower            2 x its matrices, the first one's too, + attention to its whole picture
    a token of a picture            2 x the connector's matrices
    a supervised token              2 x lm_head

Left out: norms and activations. A tower that takes pictures as tiles attends
inside of them, which its configuration's image_size tells. The figure, and so the MFU, is high for towers
that attend in windows, that join patches between their blocks (MiniCPM-V 4.6's matrices, tiny: 1.33 times)
or pad every picture to one number of patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from omnidata.loader.microbatch import Microbatch
from omnidata.plan.catalog import IMAGE_PIXELS
from omnimodel.parts import Parts

from .data import num_supervised


@dataclass(frozen=True)
class ProcessorFlopCount:
    """Training FLOPs of one model under one choice of what is trained; multipliers as in pipelines.flops."""

    token_params: float
    token_attention: float  # layers x width
    patch_params: float
    patch_attention: float
    embedding_params: float  # what makes features of the pixels of a patch
    patches_of_tile: float  # that see each other; inf: all of a picture
    connector_params: float
    head_params: float
    values_per_patch: int  # pixel values of the processor's tensors
    passes: dict[str, int]  # of each part

    def microbatch(self, microbatch: Microbatch) -> float:
        """FLOPs of one forward and backward; a dummy picture does not count."""
        lengths = np.diff(microbatch.cu_seqlens.numpy())
        has_dummy = microbatch.has_dummy
        assert microbatch.token_type_ids is not None, "a processor's microbatch marks its pictures' tokens"
        return self.of(
            lengths[:-1] if has_dummy else lengths,
            images=microbatch.num_images,
            supervised=num_supervised(microbatch),
            pixel_values=microbatch.num_pixels,
            features=0 if has_dummy else int(microbatch.token_type_ids.sum()),
        )

    @property
    def token_weights(self) -> dict[str, float]:
        """What 448² pixels and a document's squared length weigh in tokens: for ``PackLoader.weigh``.

        The connector's work goes with tokens of pictures, which are tokens, so it is left out.
        """
        token = 2 * self.token_params * self.passes["language_model"]
        picture = self.of([], images=1, supervised=0, pixel_values=IMAGE_PIXELS)
        return {"image_cost": picture / token, "attention_cost": self.token_attention / self.token_params}

    def of(
        self,
        lengths: Sequence[float] | np.ndarray,
        *,
        images: int,
        supervised: int,
        pixel_values: float = 0.0,
        features: float = 0.0,
    ) -> float:
        """FLOPs for documents of ``lengths`` tokens with ``images`` of so many values and tokens together."""
        lengths = np.asarray(lengths, float)
        tokens = 2 * self.token_params * lengths.sum() + 2 * self.token_attention * (lengths**2).sum()
        patches = pixel_values / self.values_per_patch
        seen = min(patches / max(1, images), self.patches_of_tile)
        tower = 2 * self.patch_params * patches + 4 * self.patch_attention * patches * seen
        first_passes = min(2, self.passes["vision_tower"])  # pixels need no gradient
        return float(
            2 * self.embedding_params * patches * first_passes
            + tokens * self.passes["language_model"]
            + tower * self.passes["vision_tower"]
            + 2 * self.connector_params * features * self.passes["connector"]
            + 2 * self.head_params * supervised * self.passes["lm_head"]
        )


def count_processor_flops(model: PreTrainedModel, passes: dict[str, int]) -> ProcessorFlopCount:
    """Read the modules of a model, before anything is wrapped or sharded."""
    parts, text = Parts(model), model.config.get_text_config()
    tower = set(parts.tower.modules())
    of_tower = [block for block in parts.blocks if block in tower]
    of_decoder = [block for block in parts.blocks if block not in tower]
    heads = getattr(text, "num_attention_heads", 1)
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    head = model.get_output_embeddings()
    first = _first_matrix(parts.tower)
    return ProcessorFlopCount(
        token_params=_matrices(of_decoder, share=_share_of_experts(text)),
        token_attention=float(width * sum(_attends(block) for block in of_decoder)),
        patch_params=_matrices(of_tower),
        patch_attention=float(first.shape[0] * len(of_tower)),
        embedding_params=float(first.numel()),
        patches_of_tile=_patches_of_tile(parts.tower),
        connector_params=float(sum(p.numel() for p in parts.parameters("connector") if p.ndim > 1)),
        head_params=float(head.weight.numel()),
        values_per_patch=math.prod(first.shape[1:]),
        passes=passes,
    )


def _matrices(blocks: Iterable[nn.Module], *, share: float = 1.0) -> float:
    """Elements of the blocks' matrices that one token meets; experts (3-D) by the share that it takes."""
    sizes = [parameter for block in blocks for parameter in block.parameters() if parameter.ndim > 1]
    return float(sum(p.numel() * (share if p.ndim == 3 and min(p.shape) > 1 else 1.0) for p in sizes))


def _share_of_experts(text: object) -> float:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((getattr(text, name) for name in names if getattr(text, name, None)), None)
    taken = getattr(text, "num_experts_per_tok", None)
    return taken / experts if experts and taken else 1.0


def _patches_of_tile(tower: nn.Module) -> float:
    """Of the size that its configuration names, if it does: ``image_size`` of one number or of both sides."""
    config = getattr(tower, "config", None)
    sides = [getattr(config, name, None) for name in ("image_size", "patch_size")]
    if None in sides:
        return math.inf
    (height, width), (rows, columns) = (x if isinstance(x, list | tuple) else (x, x) for x in sides)
    return float((height // rows) * (width // columns))


def _attends(block: nn.Module) -> bool:
    """Has the block attention, and no recurrent or convolutional mixer in its place?"""
    return not any(isinstance(module, nn.Conv1d) for module in block.modules())


def _first_matrix(tower: nn.Module) -> torch.Tensor:
    """What turns the pixels of a patch into its features: ``[D, …]``."""
    for module in tower.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            return module.weight
    raise ValueError(f"{type(tower).__name__} has no matrix that takes patches")
