"""The repeated blocks of tower and language model: recomputed in the backward pass, compiled, or both.

    checkpoint_blocks(model, "selective")   keep matrix products and attention, recompute the rest
    checkpoint_blocks(model, "full")        keep a block's input only: least memory, one more forward
    compile_blocks(model)                   torch.compile, one block at a time: the blocks share one graph

Both act on ``block.forward``, so parameter names and hooks (FSDP's) stay as they are. Call checkpoint_blocks
first: the compiler then sees what is kept; a checkpoint around compiled code cannot choose among its results.
Checkpointing changes no bit of loss or gradients.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from omnimodel.host_known import plain

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


def blocks_of(module: nn.Module, *, without: nn.Module | None = None) -> list[nn.Module]:
    """The blocks of a tower or decoder, in order; those of the module ``without`` inside it do not count.

    transformers marks them by their class. A timm tower has a list of them, in which one may be dropped.
    """
    outside = set(without.modules()) if without is not None else set()
    marked = [each for each in module.modules() if isinstance(each, GradientCheckpointingLayer)]
    marked = [each for each in marked if each not in outside]
    if marked:
        return marked
    lists = [each for each in module.modules() if hasattr(each, "blocks")]
    blocks = lists[0].get_submodule("blocks").children() if lists else ()
    return [block for block in blocks if not isinstance(block, nn.Identity)]


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Blocks of tower and language model in the order of the forward pass, without a dropped one."""
    tower, decoder = model.get_encoder(modality="image"), model.get_decoder()
    return [*blocks_of(tower), *blocks_of(decoder, without=tower)]


def checkpoint_blocks(model: nn.Module, mode: Mode) -> None:
    """Recompute activations in the backward pass instead of keeping them. Once a model."""
    if mode not in ("none", "selective", "full"):
        raise ValueError(f"activation checkpointing is none, selective or full, not {mode!r}")
    if mode == "none":
        return
    forward = _selective_forward if mode == "selective" else _full_forward
    for block in transformer_blocks(model):
        block.forward = MethodType(forward, block)


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile each block's forward with torch.compile; ``options`` go to it."""
    for block in transformer_blocks(model):
        block.register_forward_pre_hook(_plain_inputs, with_kwargs=True)
        block.forward = torch.compile(block.forward, **options)


def _plain_inputs(_: nn.Module, args: Any, kwargs: Any) -> Any:
    """The compiler knows nothing of tensors whose values the host knows."""
    return plain(args), plain(kwargs)


# Functions of the block, no closures around its own forward: compiled blocks of one class share one graph.
def _selective_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _recomputed(self, args, kwargs, context_fn=_keep_expensive)


def _full_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _recomputed(self, args, kwargs)


def _recomputed(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], **how: Any) -> Any:
    def forward(*inner_args: Any, **inner_kwargs: Any) -> Any:
        return type(block).forward(block, *inner_args, **inner_kwargs)

    if not torch.is_grad_enabled():  # a frozen tower, generation
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **how, **kwargs)


def _keep_expensive() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = op.name() if hasattr(op, "name") else str(op)
    return CheckpointPolicy.MUST_SAVE if name.split(".")[0] in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE
