"""How much memory a recipe needs on one device, found by running its model without any numbers.

    model on the meta device ──one microbatch forward and backward──▶ bytes of every tensor while it lives
    + weights, gradients and Adam moments, split as the recipe's strategy splits them

Tracing sees what formulas forget: what autograd keeps, activation checkpointing, the frozen tower's passing
giants, the chunks of the loss. Attention is traced as its fused kernels run, whatever the device.

What no trace shows is added as OVERHEAD: the CUDA context, workspaces of cuBLAS and NCCL.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from omnidata import Dataset
from omnidata.schema import UserError
from omnimodel import OmniLMMConfig, OmniLMMForCausalLM
from omnimodel.attention import Pack, varlen_attention
from omnimodel.blocks import checkpoint_blocks, transformer_blocks
from pipelines.config import Recipe
from pipelines.model import choose_trainable, new_model
from pipelines.parallel import DTYPES, World

ADAM_BYTES = 8  # two float32 moments
OVERHEAD = {"cpu": 0.0, "cuda": 1.5e9}  # bytes: CUDA context, NCCL and cuBLAS workspaces
# Of a dataset that is not there yet: an image and this much text a sample, a quarter of it supervised.
TEXT_TOKENS, SUPERVISED = 96, 0.25
_PLANNED_ATTENTION = "flash_planned"  # the name must say flash: only such kernels take packed documents


@dataclass(frozen=True)
class Shape:
    """One microbatch, as the planner imagines it."""

    num_tokens: int
    num_images: int
    num_documents: int
    num_supervised: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # kept from forward to backward
    passing: float  # the most that comes and goes on top of that
    overhead: float

    @property
    def total(self) -> float:
        """The peak."""
        return (
            self.weights + self.gradients + self.optimizer + self.activations + self.passing + self.overhead
        )


def shape_of(
    recipe: Recipe, config: OmniLMMConfig, dataset: Dataset | None, *, fullest: bool = True
) -> Shape:
    """A full pack, as the dataset's samples are on average.

    The ``fullest`` has as many images as the recipe lets in: it decides the memory, the average the time.
    """
    tokens = recipe.data.max_tokens
    if dataset is None:
        documents = max(1, tokens // (config.num_query + 2 + TEXT_TOKENS))
        images, supervised = documents, int(tokens * SUPERVISED)
    else:
        manifest = dataset.manifest
        share = tokens / manifest.num_tokens
        documents = max(1, round(manifest.num_samples * share))
        images, supervised = round(manifest.num_images * share), round(manifest.num_supervised * share)
    most = recipe.data.max_images
    if most is not None:
        images = most if fullest else min(images, most)
    images = min(images, tokens // (config.num_query + 2))  # more do not fit a pack
    return Shape(tokens, images, documents, max(1, supervised))


class _LiveBytes(TorchDispatchMode):
    """Sums the storages that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def ignore(self, tensors: Any) -> None:
        """Do not count these: weights and inputs."""
        for tensor in tensors:
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """On the meta device torch would trace attention step by step, with all its weights.

    A patch rather than a torch function mode: what is recomputed in the backward pass would not see a mode.
    """
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: _fused(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention ``[B, H, T, d]`` as one row of B documents."""
    batch, _, length, _ = query.shape
    lengths = torch.empty(batch + 1, dtype=torch.int32, device="meta")
    rows = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (query, key, value))
    output_THd = varlen_attention(*rows, Pack(lengths, length))
    return output_THd.unflatten(0, (batch, length)).transpose(1, 2)


def _planned_attention(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    pack = Pack(kwargs["cu_seq_lens_q"], kwargs["max_length_q"], kwargs.get("scaling"))
    output = varlen_attention(query, key, value, pack)
    return output[None], None


AttentionInterface.register(_PLANNED_ATTENTION, _planned_attention)
AttentionMaskInterface.register(_PLANNED_ATTENTION, sdpa_mask)


@dataclass(frozen=True)
class Traced:
    """A recipe's model after one microbatch without numbers: the same for any number of GPUs."""

    model: OmniLMMForCausalLM
    kept: int
    peak: int

    @classmethod
    def of(cls, recipe: Recipe, config: OmniLMMConfig, shape: Shape) -> Traced:
        """Trace it: some seconds for a 12B."""
        model = planned_model(recipe, config)
        return cls(model, *trace(model, shape))


def estimate(
    recipe: Recipe,
    config: OmniLMMConfig,
    shape: Shape,
    *,
    num_ranks: int,
    device: str,
    microbatches: int,
    traced: Traced | None = None,
) -> Memory:
    """Peak memory of one device while it trains on microbatches of ``shape``."""
    traced = traced or Traced.of(recipe, config, shape)
    model, kept, peak = traced.model, traced.kept, traced.peak
    strategy = recipe.parallel.strategy
    if strategy == "auto":
        strategy = "fsdp" if num_ranks > 1 else "single"
    sizes = _Sizes.of(model)
    shards = {"fsdp": num_ranks, "hsdp": min(num_ranks, recipe.parallel.shard_size or 1)}.get(strategy, 1)
    grads = 4 * sizes.trainable  # float32, made while tracing in the compute dtype
    weights = 4 * sizes.sharded / shards + sizes.replicated_bytes
    compute = DTYPES[recipe.run.dtype].itemsize
    if strategy in ("fsdp", "hsdp") and (shards > 1 or compute < 4):
        weights += compute * (
            sizes.root + 2 * sizes.largest_block
        )  # gathered: the root, a block and the next
        whole = microbatches > 1 and not recipe.parallel.sync_every_microbatch
        unsharded = grads if whole else 4 * (sizes.root_trainable + 2 * sizes.largest_block)
        grads = grads / shards + min(grads, unsharded)
    elif compute < 4:
        weights += compute * sizes.sharded  # autocast keeps its casts until the forward ends
    elif microbatches == 1:  # gradients come as activations go
        _, peak_with_gradients = trace(model, shape, keep_gradients=True)
        grads = max(peak_with_gradients, grads) - peak
    if strategy == "ddp":
        grads += 4 * sizes.trainable  # its buckets
    return Memory(
        weights=weights,
        gradients=grads,
        optimizer=ADAM_BYTES * sizes.trainable / shards,
        activations=kept,
        passing=peak - kept,
        overhead=OVERHEAD[device],
    )


def check_fits(recipe: Recipe, config: OmniLMMConfig, dataset: Dataset, world: World) -> str:
    """The estimate in a line; UserError where the device cannot hold it.

    The estimate of a GPU may be off by some percent, so only what is clearly too large is refused.
    """
    microbatches = math.ceil(recipe.data.global_batch / world.size)
    needed = estimate(
        recipe,
        config,
        shape_of(recipe, config, dataset),
        num_ranks=world.size,
        device=world.device.type,
        microbatches=microbatches,
    ).total
    if world.device.type == "cuda":
        there = torch.cuda.mem_get_info(world.device)[1]
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world.size
    line = f"memory: about {needed / 1e9:.1f} GB of {there / 1e9:.1f} GB"
    if needed > 1.1 * there:
        raise UserError(
            f"{line} a rank: it would not fit. Lower data.max_tokens or data.max_images, set "
            "model.activation_checkpointing=full, freeze more, or use more GPUs with parallel.strategy=fsdp; "
            "python pipelines/plan_memory.py RECIPE shows what takes how much"
        )
    return line + (" - close to the limit" if needed > 0.9 * there else "")


def planned_model(recipe: Recipe, config: OmniLMMConfig) -> OmniLMMForCausalLM:
    """The recipe's model without memory, its blocks in the dtype that they compute in."""
    with torch.device("meta"):
        model = new_model(copy.deepcopy(config))
    model.train()
    choose_trainable(model, recipe)
    checkpoint_blocks(model, recipe.model.activation_checkpointing)
    model.config._attn_implementation = _PLANNED_ATTENTION
    return model.to(DTYPES[recipe.run.dtype])


def trace(model: OmniLMMForCausalLM, shape: Shape, *, keep_gradients: bool = False) -> tuple[int, int]:
    """(bytes kept from forward to backward, peak bytes), without weights.

    Gradients go at once, as if each were sent off when it is ready, or stay (``keep_gradients``).
    """
    hooks = []
    for parameter in model.parameters():
        parameter.grad = None
        if parameter.requires_grad and not keep_gradients:
            hooks.append(parameter.register_post_accumulate_grad_hook(_drop_gradient))
    live = _LiveBytes()
    inputs = meta_inputs(model.config, shape)
    live.ignore(
        x for x in [*model.parameters(), *model.buffers(), *inputs.values()] if isinstance(x, torch.Tensor)
    )
    with live, _fused_attention():
        loss = model(**inputs).loss
        kept = live.now
        loss.backward()
    for hook in hooks:
        hook.remove()
    return kept, live.peak


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def meta_inputs(config: OmniLMMConfig, shape: Shape) -> dict[str, Any]:
    """A microbatch without numbers."""

    def ids(length: int) -> torch.Tensor:
        return torch.empty(1, length, dtype=torch.int64, device="meta")

    size = config.image_size
    images = torch.empty(shape.num_images, 3, size, size, dtype=torch.uint8, device="meta")
    return {
        "input_ids": ids(shape.num_tokens),
        "position_ids": ids(shape.num_tokens),
        "shift_labels": ids(shape.num_tokens),
        "cu_seqlens": torch.empty(shape.num_documents + 1, dtype=torch.int32, device="meta"),
        "max_seqlen": math.ceil(shape.num_tokens / shape.num_documents),
        "pixel_values": images if shape.num_images else None,
        "num_supervised_tokens": shape.num_supervised,
        "num_supervised_rows": shape.num_supervised,
    }


@dataclass(frozen=True)
class _Sizes:
    """Numbers of parameters."""

    trainable: int
    sharded: int  # what FSDP holds: everything but a frozen tower
    replicated_bytes: int  # a frozen tower, in the compute dtype
    root: int  # of the sharded ones, those in no block
    root_trainable: int
    largest_block: int

    @classmethod
    def of(cls, model: OmniLMMForCausalLM) -> _Sizes:
        tower = list(model.model.vision_tower.parameters())
        frozen_tower = not any(p.requires_grad for p in tower)
        replicated = {id(p) for p in tower} if frozen_tower else set()
        sharded = [p for p in model.parameters() if id(p) not in replicated]
        blocks = [
            [p for p in block.parameters() if id(p) not in replicated] for block in transformer_blocks(model)
        ]
        in_blocks = {id(p) for block in blocks for p in block}
        root = [p for p in sharded if id(p) not in in_blocks]
        return cls(
            trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
            sharded=sum(p.numel() for p in sharded),
            replicated_bytes=sum(p.numel() * p.element_size() for p in tower) if frozen_tower else 0,
            root=sum(p.numel() for p in root),
            root_trainable=sum(p.numel() for p in root if p.requires_grad),
            largest_block=max((sum(p.numel() for p in block) for block in blocks), default=0),
        )
