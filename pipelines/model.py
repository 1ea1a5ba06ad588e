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
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from omnidata.schema import UserError
from omnimodel.blocks import checkpoint_blocks, compile_blocks, transformer_blocks
from omnimodel.packed import class_for, is_packed
from omnimodel.parts import Parts, freeze

from . import lora
from .config import ModelConfig, Recipe
from .flops import FlopCount, ProcessorFlopCount, count_flops
from .parallel import DTYPES, World, distribute


@dataclass(frozen=True)
class BuiltModel:
    """A model as the loop needs it."""

    model: PreTrainedModel  # names, state dict, generate
    wrapped: nn.Module  # what the loop calls: `model` itself, or DDP around it
    flop_count: FlopCount | ProcessorFlopCount


def build_model(recipe: Recipe, config: PreTrainedConfig, world: World) -> BuiltModel:
    """Everything between a recipe and a model whose forward can be called."""
    path = recipe.model.path
    from_meta = world.is_sharded and path is not None
    torch.manual_seed(recipe.run.seed)  # the same weights on every rank
    if from_meta:
        with torch.device("meta"):
            model = new_model(config)
    elif path is not None:
        model = load_model(recipe.model, config)
    else:
        with world.device:  # a GPU draws billions of numbers in a moment
            model = new_model(config)
        if world.device.type == "cuda" and not is_packed(model):
            model.reset_buffers()  # computed on the CPU, as when weights are loaded
    model.train()
    choose_trainable(model, recipe)
    flop_count = count_flops(model)
    checkpoint_blocks(model, recipe.model.activation_checkpointing)
    if recipe.model.compile:
        compile_blocks(model)
    if not world.is_sharded:
        model.to(world.device)
    in_files = names_in_files(model, path) if from_meta and path is not None else {}
    wrapped = distribute(model, recipe, world, blocks=transformer_blocks(model))
    if from_meta and path is not None:
        model.to_empty(device=world.device)
        model.reset_buffers()
        load_shards(model, path, in_files, seed=recipe.run.seed)
    elif world.is_sharded:
        model.to(world.device)  # buffers and the replicated tower; the shards are there already
    return BuiltModel(model, wrapped, flop_count)


def new_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights, float32; UserError for a configuration that cannot be built."""
    try:  # by this way its parts are float32 as well, whatever a published config.json says of them
        return class_for(config)._from_config(config, dtype=torch.float32)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"model.config cannot be built: {error}") from error


def load_model(settings: ModelConfig, config: PreTrainedConfig) -> PreTrainedModel:
    """The weights of ``model.path``, whole, float32; UserError if they are not this model's."""
    transformers.utils.logging.disable_progress_bar()
    try:
        return class_for(config).from_pretrained(settings.path, config=config, dtype=torch.float32)
    except (ValueError, OSError) as error:
        raise UserError(f"model.path {settings.path}: {error}") from error


def choose_trainable(model: PreTrainedModel, recipe: Recipe) -> None:
    """Freeze by component, add adapters, and keep what is frozen in the compute dtype.

    Nothing is added to a frozen weight, so float32 would only be a larger copy of what the forward casts.
    """
    try:
        freeze(model, recipe.model.freeze)
    except ValueError as error:
        raise UserError(f"model.freeze: {error}") from error
    if recipe.model.lora is not None:
        lora.add_adapters(model, recipe.model.lora)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("model.freeze leaves nothing to train")
    if not is_packed(model) and Parts(model).is_frozen("vision_tower"):  # adapters train in float32
        model.model.vision_tower.to(DTYPES[recipe.run.dtype])  # its buffers, too
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(DTYPES[recipe.run.dtype])


def names_in_files(model: PreTrainedModel, path: str) -> dict[str, str]:
    """Name of each weight here -> in the folder's safetensors files. Before the model is sharded.

    Raises:
        UserError: there are none, or they do not hold this model's weights as they are.
    """
    if not list(Path(path).glob("*.safetensors")):
        raise UserError(
            f"{path} has no safetensors files, which sharded loading needs; convert it once with "
            "`python -m omnimodel.weights convert`"
        )
    names = [lora.base_name(name) for name in model.state_dict() if not lora.is_adapter(name)]
    if not is_packed(model):
        return {name: name for name in names}
    keys = list(dcp.HuggingFaceStorageReader(path).read_metadata().state_dict_metadata)
    try:
        found = model.names_in_files(keys)
    except ValueError as error:
        raise UserError(
            f"{error}: sharded loading reads weights as they are. Load and save the model once with the "
            "installed transformers, or train with parallel.strategy=ddp"
        ) from error
    tied = model.all_tied_weights_keys or {}
    missing = sorted(name for name in names if name not in found and name not in tied)
    unknown = sorted(set(found) - set(names))
    if missing or unknown:
        raise UserError(
            f"model.path {path} does not hold this model's weights: missing {missing[:8]}, "
            f"left over {unknown[:8]}"
        )
    return found


def load_shards(model: nn.Module, path: str, in_files: dict[str, str], *, seed: int) -> None:
    """Each rank reads its own rows of ``path``'s safetensors files, straight into its shards."""
    state = {lora.base_name(name): tensor for name, tensor in model.state_dict().items()}
    wanted = {key: state[name] for name, key in in_files.items()}  # what shares another's memory is read once
    dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(path))
    lora.reset_adapters(model, seed=seed)
