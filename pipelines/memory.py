"""Will a recipe fit its devices? Asked before the model is built, while it costs nothing.

always               weights, gradients and moments, as the strategy splits them: counted in a moment
guard.plan_memory    a step is rehearsed (pipelines.rehearsal), activations included: a minute for a 12B
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from omnidata.schema import UserError
from omnimodel.parts import Parts

from .config import Recipe
from .model import choose_trainable, new_model
from .packs import packs_of
from .parallel import DTYPES, World, device_of
from .planning import open_for_planning
from .rehearsal import overhead, peak_of

ADAM_BYTES = 8  # two float32 moments
EMA_BYTES = 4  # a float32 mean of the weights (optim.ema)
REMEDY = (
    "it would not fit. Lower data.max_tokens or data.max_images, set "
    "model.activation_checkpointing=full, freeze more, or use more GPUs with parallel.strategy=fsdp; "
    "python pipelines/rehearse.py RECIPE --gpus N shows what takes how much, and what each change saves"
)


@dataclass(frozen=True)
class Held:
    """Bytes on one device from step to step."""

    weights: float
    gradients: float
    optimizer: float  # Adam's moments, and the running mean of the weights

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer


def held(recipe: Recipe, model: nn.Module, *, strategy: str, ranks: int) -> Held:
    """What a model takes without any activation; it may be on "meta", but not distributed yet."""
    parts, compute = Parts(model), DTYPES[recipe.run.dtype].itemsize
    shards = {"fsdp": ranks, "hsdp": min(ranks, recipe.parallel.shard_size or 1)}.get(strategy, 1)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    whole = 0  # a frozen tower is replicated
    if parts.is_frozen("vision_tower") and strategy in ("fsdp", "hsdp"):
        whole = sum(p.numel() for p in parts.parameters("vision_tower"))
    moments = ADAM_BYTES + (EMA_BYTES if recipe.optim.ema else 0)
    return Held(
        weights=(4 * trained + compute * (frozen - whole)) / shards + compute * whole,
        gradients=4 * trained / shards,
        optimizer=moments * trained / shards,
    )


def check_fits(recipe: Recipe, config: PreTrainedConfig, world: World) -> str:
    """What the model itself needs and what is there, in a line; UserError if the device cannot hold it."""
    with torch.device("meta"):
        model = new_model(copy.deepcopy(config))
    choose_trainable(model, recipe)
    needed = held(recipe, model, strategy=world.strategy, ranks=world.size).total
    what = "weights, gradients and moments take"
    more = "" if recipe.guard.plan_memory else ", activations more (guard.plan_memory=true counts them)"
    return _judged(what, needed, _there(world.device, world.size), more)


def check_rehearsed(recipe: Recipe) -> str:
    """The same of a whole step, on the number of ranks that torchrun's environment names.

    Call it before a process group is there: a pretended one takes its place meanwhile. The estimate may be
    off by some percent, so only what is clearly too large is refused.
    """
    ranks, device = int(os.environ.get("WORLD_SIZE", "1")), device_of(recipe.run.device)
    config, datasets, _ = open_for_planning(recipe)
    peak = sum(peak_of(recipe, config, packs_of(recipe, config, datasets), gpus=ranks).values())
    needed = peak + (overhead(recipe.run) if device.type == "cuda" else 0.0)
    return _judged("about", needed, _there(device, ranks), "")


def _there(device: torch.device, ranks: int) -> float:
    """Bytes of the device, or a rank's share of this machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks


def _judged(what: str, needed: float, there: float, more: str) -> str:
    line = f"memory: {what} {needed / 1e9:.1f} GB of {there / 1e9:.1f} GB{more}"
    if needed > 1.1 * there:
        raise UserError(f"{line} a rank: {REMEDY}")
    return line + (" - close to the limit" if needed > 0.9 * there else "")
