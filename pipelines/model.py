"""The model of a recipe, ready to train: built or loaded, frozen, adapted, distributed.

one process, DDP     weights in memory  -> prepare -> wrap
FSDP, from weights   meta device -> prepare -> shard -> memory for the shards alone -> each rank reads its
                     rows of the safetensors files, so a 12B model is never whole on any host
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from omnidata.schema import UserError
from omnimodel import OmniLMMConfig, OmniLMMForCausalLM
from omnimodel.blocks import checkpoint_blocks, compile_blocks, transformer_blocks
from omnimodel.freezing import freeze
from pipelines import lora
from pipelines.config import Recipe
from pipelines.flops import FlopCount, count_flops
from pipelines.parallel import DTYPES, World, distribute


@dataclass(frozen=True)
class BuiltModel:
    """A model as the loop needs it."""

    model: OmniLMMForCausalLM  # names, state dict, generate
    wrapped: nn.Module  # what the loop calls: `model` itself, or DDP around it
    flop_count: FlopCount


def build_model(recipe: Recipe, config: OmniLMMConfig, world: World) -> BuiltModel:
    """Everything between a recipe and a model whose forward can be called."""
    from_meta = world.is_sharded and recipe.model.path is not None
    torch.manual_seed(recipe.run.seed)  # the same weights on every rank
    if from_meta:
        with torch.device("meta"):
            model = new_model(config)
    elif recipe.model.path is not None:
        model = OmniLMMForCausalLM.from_pretrained(recipe.model.path, config=config, dtype=torch.float32)
    else:
        with world.device:  # a GPU draws billions of numbers in a moment
            model = new_model(config)
        if world.device.type == "cuda":
            model.reset_buffers()  # computed on the CPU, as when weights are loaded
    model.train()
    choose_trainable(model, recipe)
    flop_count = count_flops(model)
    checkpoint_blocks(model, recipe.model.activation_checkpointing)
    if recipe.model.compile:
        compile_blocks(model)
    if not world.is_sharded:
        model.to(world.device)
    wrapped = distribute(model, recipe, world, blocks=transformer_blocks(model))
    if from_meta:
        model.to_empty(device=world.device)
        model.reset_buffers()
        load_shards(model, recipe.model.path, seed=recipe.run.seed)
    elif world.is_sharded:
        model.to(world.device)  # buffers and the replicated tower; the shards are there already
    return BuiltModel(model, wrapped, flop_count)


def new_model(config: OmniLMMConfig) -> OmniLMMForCausalLM:
    """A model with random weights; UserError for a configuration that cannot be built."""
    try:
        return OmniLMMForCausalLM(config)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"model.config cannot be built: {error}") from error


def choose_trainable(model: OmniLMMForCausalLM, recipe: Recipe) -> None:
    """Freeze by component, add adapters, and keep what is frozen in the compute dtype.

    Nothing is added to a frozen weight, so float32 would only be a larger copy of what the forward casts.
    """
    freeze(model, recipe.model.freeze)
    if recipe.model.lora is not None:
        lora.add_adapters(model, recipe.model.lora)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model.freeze leaves nothing to train")
    tower = model.model.vision_tower
    if not any(parameter.requires_grad for parameter in tower.parameters()):  # adapters train in float32
        tower.to(DTYPES[recipe.run.dtype])
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(DTYPES[recipe.run.dtype])


def load_shards(model: nn.Module, path: str, *, seed: int) -> None:
    """Each rank reads its own rows of ``path``'s safetensors files, straight into its shards."""
    if not list(Path(path).glob("*.safetensors")):
        raise UserError(
            f"{path} has no safetensors files, which sharded loading needs; convert it once with "
            "`python -m omnimodel.weights convert`"
        )
    state = {
        lora.base_name(name): tensor
        for name, tensor in model.state_dict().items()
        if not lora.is_adapter(name)
    }
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(path))
    lora.reset_adapters(model, seed=seed)
