"""The repeated blocks of tower and language model: recomputed in the backward pass, compiled, or both.

    checkpoint_blocks(model, "selective")   keep matrix products and attention, recompute the rest
    checkpoint_blocks(model, "full")        keep a block's input only: least memory, one more forward
    compile_blocks(model)                   torch.compile, one block at a time: the blocks share one graph

Both act on ``block.forward``, so parameter names and hooks (FSDP's) stay as they are. Call compile_blocks
first: what is recomputed is then the compiled block. Checkpointing changes no bit of loss or gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Mode = Literal["none", "selective", "full"]

# Results that cost much to compute and little to keep: matrix products and attention.
KEPT_OPS = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
}


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Blocks of tower and language model in the order of the forward pass, without the dropped one."""
    tower = [block for block in model.model.vision_tower.blocks if not isinstance(block, nn.Identity)]
    return [*tower, *model.model.layers]


def checkpoint_blocks(model: nn.Module, mode: Mode) -> None:
    """Recompute activations in the backward pass instead of keeping them. Once a model."""
    if mode not in ("none", "selective", "full"):
        raise ValueError(f"activation checkpointing is none, selective or full, not {mode!r}")
    if mode == "none":
        return
    for block in transformer_blocks(model):
        block.forward = _recomputed(block.forward, selective=mode == "selective")


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile each block's forward with torch.compile; ``options`` go to it."""
    for block in transformer_blocks(model):
        block.forward = torch.compile(block.forward, **options)


def _recomputed(forward: Callable[..., Any], *, selective: bool) -> Callable[..., Any]:
    extra = {"context_fn": _keep_expensive} if selective else {}

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # a frozen tower, generation
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **extra, **kwargs)

    return run


def _keep_expensive() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = op.name() if hasattr(op, "name") else str(op)
    return CheckpointPolicy.MUST_SAVE if name.split(".")[0] in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE
