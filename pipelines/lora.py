"""Low-rank adapters (extra: peft): y = W x + (alpha / rank) B A x, with W frozen and only A and B trained.

Adapters are injected in place, so the model keeps its class and its parameter names get one more part:

    …q_proj.weight  ->  …q_proj.base_layer.weight, …q_proj.lora_A.default.weight, …q_proj.lora_B.…

``targets`` says which of language model and tower get them; what gets them is frozen but for them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from omnidata.schema import UserError
from omnimodel.parts import Parts

from .config import LoraConfig

TARGETS = ("language_model", "vision_tower")


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Put adapters into the blocks of the targets and freeze the targets themselves."""
    if not config.targets or set(config.targets) - {*TARGETS}:
        raise UserError(f"model.lora.targets is {config.targets}: name one or both of {', '.join(TARGETS)}")
    try:
        import peft
    except ImportError:
        raise UserError("model.lora needs peft: pip install 'omnilmm-toolkit[peft]'") from None
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    targets = [name for target in config.targets for name in _matrices(model, target, config)]
    peft.inject_adapter_in_model(_settings(config, targets), model)
    parts = Parts(model)
    for name, parameter in model.named_parameters():  # peft has frozen everything but its own
        is_base = parts.of(name) in config.targets
        parameter.requires_grad_(is_adapter(name) or (trainable[base_name(name)] and not is_base))


def _settings(config: LoraConfig, targets: list[str]) -> Any:
    import peft

    return peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets
    )


def peft_config(model: nn.Module, config: LoraConfig) -> Any:
    """peft's own configuration of the adapters that a model has."""
    return _settings(
        config, [n.removesuffix(".base_layer") for n, _ in model.named_modules() if n.endswith(".base_layer")]
    )


def _matrices(model: nn.Module, target: str, config: LoraConfig) -> list[str]:
    """Full names of the matrices in the target's blocks that get an adapter."""
    parts, names = Parts(model), []
    tower = set(parts.tower.modules())
    inside = {
        module
        for block in parts.blocks
        if (block in tower) == (target == "vision_tower")
        for module in block.modules()
    }
    for name, module in model.named_modules():
        if module not in inside:
            continue
        if hasattr(module, "qkv_bias_separate"):
            # timm's EVA reads this matrix without calling its module, and so without the adapter, unless told
            # to add the bias by itself: the same numbers in two steps.
            module.qkv_bias_separate = True
        chosen = None if target == "vision_tower" else config.target_modules
        if isinstance(module, nn.Linear) and (chosen is None or name.rpartition(".")[2] in chosen):
            names.append(name)
    if not names:
        raise UserError(f"model.lora.target_modules {config.target_modules} match nothing in the {target}")
    return names


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def base_name(name: str) -> str:
    """The name without adapters: ``q_proj.base_layer.weight`` -> ``q_proj.weight``."""
    return name.replace(".base_layer.", ".")


def reset_adapters(model: nn.Module, *, seed: int) -> None:
    """peft's start (A random, B zero) for adapters that were born on the meta device; alike on every rank."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            full = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
            _fill(parameter, full)


@torch.no_grad()
def _fill(parameter: nn.Parameter, full: torch.Tensor) -> None:
    full = full.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements)
    parameter.copy_(full)


def merged(state: dict[str, torch.Tensor], config: LoraConfig | None) -> dict[str, torch.Tensor]:
    """A full state dict with the adapters added into the matrices, under the plain model's names."""
    if config is None:
        return state
    result = {base_name(name): tensor for name, tensor in state.items() if not is_adapter(name)}
    for name, a in state.items():
        if ".lora_A." in name:
            b = state[name.replace(".lora_A.", ".lora_B.")]
            target = name.split(".lora_A.")[0] + ".weight"
            update = b.float() @ a.float() * (config.alpha / config.rank)
            result[target] = (result[target].float() + update).to(result[target].dtype)
    return result
