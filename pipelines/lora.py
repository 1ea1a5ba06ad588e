"""Low-rank adapters (extra: peft): y = W x + (alpha / rank) B A x, with W frozen and only A and B trained.

Adapters are injected in place, so the model keeps its class and its parameter names get one more part:

    …q_proj.weight  ->  …q_proj.base_layer.weight, …q_proj.lora_A.default.weight, …q_proj.lora_B.…
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from omnidata.schema import UserError
from pipelines.config import LoraConfig


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Put adapters into the language model's blocks and freeze the blocks themselves."""
    try:
        import peft
    except ImportError:
        raise UserError("model.lora needs peft: pip install 'omnilmm-toolkit[peft]'") from None
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=rf"model\.layers\.\d+\..*\.({'|'.join(config.target_modules)})",
    )
    peft.inject_adapter_in_model(settings, model)
    if not any(is_adapter(name) for name, _ in model.named_parameters()):
        raise UserError(
            f"model.lora.target_modules {config.target_modules} match nothing in the language model"
        )
    for name, parameter in model.named_parameters():  # peft has frozen everything but its own
        in_blocks = name.startswith(("model.layers.", "model.norm."))
        parameter.requires_grad_(is_adapter(name) or (trainable[base_name(name)] and not in_blocks))


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
