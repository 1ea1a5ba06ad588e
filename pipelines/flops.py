"""Model FLOPs of a microbatch: what the mathematics needs, whatever the program recomputes or pads.

    forward     vision tower + resampler, an image;  language model, a document;  lm_head, a supervised token
    training    x 1 frozen with nothing trained before it, x 2 frozen on the gradient's way, x 3 trained

MFU = model FLOPs / (seconds x peak of all devices). Tower and language model: as omnidata.plan.cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from omnidata.loader.microbatch import Microbatch
from omnidata.plan.cost import GPUS, ModelShape, image_flops, token_flops
from omnimodel import OmniLMMConfig
from omnimodel.packed import is_packed
from omnimodel.parts import Parts
from omnimodel.vision import VisionTower

from .data import num_supervised
from .processor_flops import ProcessorFlopCount, count_processor_flops


@dataclass(frozen=True)
class FlopCount:
    """Training FLOPs of one model under one choice of what is trained."""

    shape: ModelShape
    image_flops: float  # tower and resampler, forward and backward, one image
    token_multiplier: int
    head_flops: float  # lm_head, one supervised token

    def microbatch(self, microbatch: Microbatch) -> float:
        """FLOPs of one forward and backward."""
        lengths = np.diff(microbatch.cu_seqlens.numpy())
        return self.of(lengths, images=len(microbatch.images), supervised=num_supervised(microbatch))

    @property
    def token_weights(self) -> dict[str, float]:
        """What an image and a document's squared length weigh in tokens: for ``PackLoader.weigh``."""
        shape, token = self.shape, 2 * self.shape.lm_params * self.token_multiplier
        return {
            "image_cost": self.image_flops / token,
            "attention_cost": shape.lm_layers * shape.lm_width / shape.lm_params,
        }

    def of(self, lengths: Sequence[float] | np.ndarray, *, images: int, supervised: int) -> float:
        """FLOPs for documents of ``lengths`` tokens."""
        tokens = float(token_flops(self.shape, np.asarray(lengths)).sum()) * self.token_multiplier
        return tokens + self.head_flops * supervised + self.image_flops * images


def count_flops(model: PreTrainedModel) -> FlopCount | ProcessorFlopCount:
    """Read shapes and ``requires_grad`` off a model, before anything is wrapped or sharded."""
    passes = _passes(Parts(model))
    if is_packed(model):
        return count_processor_flops(model, passes)
    config, tower = model.config, model.model.vision_tower
    shape = model_shape(config, tower)
    resampler = _resampler_flops(config, shape)
    one_image = (
        image_flops(shape, config.image_size) * passes["vision_tower"] + resampler * passes["resampler"]
    )
    return FlopCount(
        shape=shape,
        image_flops=one_image,
        token_multiplier=passes["language_model"],
        head_flops=2 * config.vocab_size * config.hidden_size * passes["lm_head"],
    )


def _passes(parts: Parts) -> dict[str, int]:
    """1, 2 or 3 for each part, in the order of the forward pass."""
    passes, upstream = {}, False
    for name in ("vision_tower", parts.connector_name, "embeddings", "language_model", "lm_head"):
        is_trained = not parts.is_frozen(
            "embeddings" if name == "lm_head" and not parts.parameters(name) else name
        )
        passes[name] = 3 if is_trained else 2 if upstream else 1
        upstream = upstream or is_trained
    return passes


def model_shape(config: OmniLMMConfig, tower: VisionTower) -> ModelShape:
    """What omnidata.plan.cost's formulas need, from a real model."""
    blocks = [block for block in tower.blocks if not isinstance(block, torch.nn.Identity)]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.hidden_size * head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    return ModelShape(
        name="recipe",
        doc="",
        tower_params=float(sum(p.numel() for block in blocks for p in block.parameters())),
        tower_layers=len(blocks),
        tower_width=tower.embed_dim,
        patch_size=tower.patch_embed.patch_size[0],
        lm_params=float(
            config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
        ),
        lm_layers=config.num_hidden_layers,
        lm_width=config.num_attention_heads * head_dim,
    )


def _resampler_flops(config: OmniLMMConfig, shape: ModelShape) -> float:
    """Forward FLOPs of one image: keys and values of its patches, attention, two projections of queries."""
    width, queries = config.hidden_size, config.num_query
    patches = shape.num_patches(config.image_size) - 1
    kv_proj = 0 if shape.tower_width == width else patches * shape.tower_width * width
    return 2.0 * (kv_proj + 2 * patches * width**2 + 2 * queries * patches * width + 2 * queries * width**2)


def peak_flops(device: torch.device) -> float | None:
    """The data sheet's dense bf16 peak of this device; None if it is not known (a CPU, say)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    return next((peak for gpu, peak in GPUS.items() if gpu in name), None)
