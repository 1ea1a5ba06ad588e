"""The optimizer: AdamW with a peak learning rate for each component, and a schedule that is a pure function.

Because ``lr_factor`` depends on the step alone, a resumed run has nothing to restore but the step.

    steps 0 … 99, warmup 10, cosine to 0.1        factor 0.1 0.2 … 1.0 ╲… 0.1
    steps 0 … 99, warmup 10, wsd, decay 20        factor 0.1 0.2 … 1.0 1.0 … ╲ 0.0
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from omnidata.schema import UserError
from omnimodel.parts import Parts

from .config import OptimConfig

UNDECAYED = ("query", "pos_embed", "cls_token", "reg_token")  # raw parameters that are no matrices of a layer


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """One group for every (component, decayed or not) that has trainable parameters."""
    parts = Parts(model)
    if unknown := sorted(set(optim.component_lr) - set(parts.names)):
        raise UserError(f"optim.component_lr: no component {unknown}; there are {', '.join(parts.names)}")
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = parts.of(name)
        decayed = part != "embeddings" and _is_matrix(name, parameter)
        peak = optim.component_lr.get(part, optim.lr)
        settings = {"weight_decay": optim.weight_decay if decayed else 0.0, "lr": peak, "peak_lr": peak}
        group = groups.setdefault((part, decayed), {"component": part, "params": [], **settings})
        group["params"].append(parameter)
    return list(groups.values())


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Matrices decay; norms, biases, queries and position tables do not, nor do embeddings."""
    return parameter.ndim >= 2 and name.split(".")[-1] not in UNDECAYED


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; fused (on a CPU ten times faster), unless sharded there."""
    groups = parameter_groups(model, optim)
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(p.is_cuda or not isinstance(p, DTensor) for p in parameters)
    return torch.optim.AdamW(groups, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=fused)


def lr_factor(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Fraction of the peak for the update number ``step`` (0, 1, …) of ``total_steps``."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "wsd":
        remaining = min(1.0, (total_steps - step) / optim.decay_steps)
        return optim.min_lr + (1 - optim.min_lr) * max(0.0, remaining)
    progress = min(1.0, (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
    return optim.min_lr + (1 - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate = its peak x ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients to a global norm of at most ``max_norm``; returns the norm before, of all ranks."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


class NewTokenRows:
    """Lets only some rows of the embedding and of lm_head learn, by zeroing the gradient of all others.

    A row whose gradient has always been zero has zero Adam moments and does not move, provided that it does
    not decay either: the embedding never does, and lm_head's decay is switched off here.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, rows: Iterable[int]) -> None:
        self.rows, parts = sorted(rows), Parts(model)
        self.parameters = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parts.of(name) in ("embeddings", "lm_head")
        ]
        for group in optimizer.param_groups:
            if group["component"] == "lm_head":
                group["weight_decay"] = 0.0

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Call between the backward pass and the clipping."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                local, first = _local_rows(parameter.grad)
                keep = torch.zeros(local.shape[0], 1, dtype=local.dtype, device=local.device)
                keep[[row - first for row in self.rows if first <= row < first + local.shape[0]]] = 1
                local.mul_(keep)


def _local_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows of a tensor that may be sharded on dimension 0, and the first row's number."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offset[0]
