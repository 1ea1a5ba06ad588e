"""The vision tower: any timm ViT, run the way the original runs EVA02.

    images [N, 3, H, W], uint8 or normalised floats
      1  uint8 is normalised on its device                      -> normalize
      2  one tower call for all images of one size              -> patch_features
         (final norm applied, second-to-last block's output, prefix tokens dropped)
    features [N, rows * columns, D] and the grid (rows, columns)

The tower is timm's own module with its own parameter names, so checkpoints need no translation. Four parts
that never take part are removed when it is built: the classifier, attention pooling, the norm behind
pooling and the last block, which becomes an identity so that block numbers stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import initialization as init

from omnimodel.positions import resized_positions
from omnimodel.resampler import sincos_table

VisionTower: TypeAlias = Eva | VisionTransformer  # or another class of timm with their attributes

# CLIP's statistics of the training images, as the original uses; other towers were trained with others.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class DroppedBlock(nn.Identity):
    """Stands in for the last block: passes features on and ignores what a block is given besides."""

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``input`` as it is."""
        return input


def build_vision_tower(name: str, vision_kwargs: dict[str, Any] | None = None) -> VisionTower:
    """A timm ViT without weights: ``build_vision_tower("vit_base_patch16_clip_224", {"depth": 3})``."""
    kwargs = {"num_classes": 0, "dynamic_img_size": True, "dynamic_img_pad": True, **(vision_kwargs or {})}
    try:
        tower = timm.create_model(name, pretrained=False, **kwargs)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"timm cannot build the vision tower {name!r} with {kwargs}: {error}. Any timm ViT with "
            "dynamic_img_size works (EVA02, CLIP, SigLIP, DINOv2 families); see timm.list_models('*vit*')"
        ) from error
    tower.blocks[-1] = DroppedBlock()
    tower.attn_pool = None
    tower.fc_norm = nn.Identity()
    tower.global_pool = ""  # so that calling the tower, as sharding hooks need, returns every token
    if not tower.patch_embed.proj.weight.is_meta:
        start_positions(tower)
        mark_initialised(tower)
    return tower


@torch.no_grad()
def start_positions(module: VisionTower) -> None:
    """Let learned positions start as the 2D sin-cos table (Beyer et al. 2022, "Better plain ViT baselines").

    From noise a small tower learns colours at once but takes several times as many pictures to learn places.
    """
    positions = getattr(module, "pos_embed", None)
    if not isinstance(positions, nn.Parameter) or positions.ndim != 3 or positions.shape[-1] % 4:
        return
    grid = math.isqrt(positions.shape[1])  # prefix tokens are fewer than a row of patches
    if 0 <= positions.shape[1] - grid**2 <= module.num_prefix_tokens:
        positions[0, positions.shape[1] - grid**2 :] = sincos_table(grid, positions.shape[-1])


def dropped_names(names: list[str], tower: VisionTower) -> list[str]:
    """Of a full timm state dict's names, those that ``build_vision_tower`` removed on purpose."""
    prefixes = (f"blocks.{len(tower.blocks) - 1}.", "attn_pool.", "fc_norm.", "head.")
    kept = set(tower.state_dict())
    return [name for name in names if name not in kept and name.startswith(prefixes)]


def patch_features(tower: VisionTower, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """``[N, 3, H, W]`` normalised images -> ``[N, rows * columns, D]`` and ``(rows, columns)``."""
    rows, columns = tower.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
    grid = (rows, columns)
    with resized_positions(tower, grid):
        features_BND = tower(images)
    return features_BND[:, tower.num_prefix_tokens :], grid


def statistics_of(name: str) -> tuple[list[float], list[float]]:
    """Mean and deviation (of values in 0…1) with which timm says that a tower's weights were trained.

    ``vit_so400m_patch14_siglip_384`` -> ``[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]``; a tower that timm knows no
    weights of was not trained with any: CLIP's.
    """
    trained = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if trained is None or not trained.has_weights:
        trained = timm.get_pretrained_cfg(name.partition(".")[0], allow_unregistered=True)
    if trained is None:
        return list(CLIP_MEAN), list(CLIP_STD)
    return list(trained.mean), list(trained.std)


def normalize(
    images: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> torch.Tensor:
    """uint8 ``[..., 3, H, W]`` -> normalised ``dtype``; floats are taken to be normalised and only cast.

    The constants enter as Python numbers, one channel at a time: a tensor of them would have to be copied to
    the GPU, which waits for it.
    """
    if images.dtype != torch.uint8:
        return images.to(dtype)
    channels = [
        images[..., channel, :, :].to(torch.float32).div(255).sub(center).div(width)
        for channel, (center, width) in enumerate(zip(mean, std, strict=True))
    ]
    return torch.stack(channels, dim=-3).to(dtype)


def mark_initialised(module: nn.Module) -> None:
    """Tell transformers to leave a module's own initialisation alone."""
    for submodule in module.modules():
        submodule._is_hf_initialized = True  # type: ignore[assignment]  # an attribute of transformers'


def init_tower_module(module: nn.Module) -> None:
    """Random start for parameters that timm modules hold directly, after a build on the meta device."""
    for name, parameter in module.named_parameters(recurse=False):
        if name in ("cls_token", "reg_token", "dist_token", "pos_embed", "mask_token"):
            init.trunc_normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            init.zeros_(parameter)
        elif name in ("gamma", "gamma_1", "gamma_2"):
            init.constant_(parameter, getattr(module, "init_values", None) or 1.0)
        elif name == "weight" and parameter.ndim == 1:
            init.ones_(parameter)
    start_positions(module)
    reset_tower_buffers(module, recurse=False)


def reset_tower_buffers(tower: nn.Module, *, recurse: bool = True) -> None:
    """Recompute buffers that are in no checkpoint (EVA's zero k_bias, rotary tables)."""
    for module in tower.modules() if recurse else [tower]:
        reset = getattr(module, "init_non_persistent_buffers", None)
        if reset is not None:
            with torch.no_grad():
                reset()
