"""How much memory a recipe needs on one device, found by running its model without any numbers.

    model on the meta device ──one microbatch forward and backward──▶ bytes of every tensor while it lives
    + weights, gradients and Adam moments, split as the recipe's strategy splits them

Tracing sees what formulas forget: what autograd keeps, activation checkpointing, the frozen tower's passing
giants, the chunks of the loss. Attention is traced as its fused kernels run, whatever the device. Gradients
come while activations go: the peak is that of their sum in the backward pass, not the sum of their peaks.

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
from omnimodel.parts import Parts
from pipelines.config import Recipe
from pipelines.model import choose_trainable, new_model
from pipelines.parallel import DTYPES, World

ADAM_BYTES = 8  # two float32 moments
EMA_BYTES = 4  # a float32 mean of the weights (optim.ema)
OVERHEAD = {"cpu": 0.0, "cuda": 1.5e9}  # bytes: CUDA context, NCCL and cuBLAS workspaces
# Of a dataset that is not there yet: an image and this much text per sample, a quarter of it supervised.
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
    gradients: float  # those that are there at the peak, and the buffers of their reduction
    optimizer: float  # Adam's moments, and the running mean of the weights
    activations: float  # kept from forward to backward, and not gone yet at the peak
    passing: float  # what comes and goes on top of that
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
class Timeline:
    """Bytes that come and go in one microbatch, without weights."""

    kept: int  # from forward to backward
    peak: int
    moments: tuple[tuple[int, int], ...]  # (most bytes, gradient elements there), between any two gradients

    def fullest(self, bytes_per_gradient: float) -> tuple[float, float]:
        """(bytes of activations, bytes of gradients) at the moment at which their sum is largest."""
        sums = ((size, elements * bytes_per_gradient) for size, elements in self.moments)
        return max(sums, key=sum)

    def between(self, other: Timeline) -> Timeline:
        """The mean of both, moment by moment."""
        return Timeline(
            (self.kept + other.kept) // 2,
            (self.peak + other.peak) // 2,
            tuple(((a + b) // 2, n) for (a, n), (b, _) in zip(self.moments, other.moments, strict=True)),
        )


ELSEWHERE = "of other classes weights, gradients and moments alone are known before they run"
NOTHING = Timeline(0, 0, ((0, 0),))  # of a model that was not traced


@dataclass(frozen=True)
class Traced:
    """A recipe's model after one microbatch without numbers: the same for any number of GPUs."""

    model: OmniLMMForCausalLM
    timeline: Timeline

    @classmethod
    def of(cls, recipe: Recipe, config: OmniLMMConfig, shape: Shape) -> Traced:
        """Trace it: some seconds for a 12B."""
        mode = recipe.model.activation_checkpointing
        model = planned_model(recipe, config)
        timeline = trace(model, shape)
        if recipe.model.compile and mode == "none":
            # The compiler's partitioner keeps less than eager mode (no float32 copies, no inputs of what it
            # can fuse) and more than matrix products: half of the way (measured: 78.3 GB of 73.9 to 86.2).
            timeline = timeline.between(trace(planned_model(recipe, config, mode="selective"), shape))
        return cls(model, timeline)


def estimate(
    recipe: Recipe,
    config: OmniLMMConfig,
    shape: Shape | None,
    *,
    num_ranks: int,
    device: str,
    microbatches: int,
    traced: Traced | None = None,
) -> Memory:
    """Peak memory of one device while it trains on microbatches of ``shape``, which ``traced`` may know."""
    traced = traced or Traced.of(recipe, config, shape)
    sizes, timeline = _Sizes.of(traced.model), traced.timeline
    strategy, compute = recipe.parallel.strategy, DTYPES[recipe.run.dtype].itemsize
    if strategy in ("auto", "single"):
        strategy = "fsdp" if num_ranks > 1 or compute < 4 else "single"
    is_sharded = strategy in ("fsdp", "hsdp")
    shards = {"fsdp": num_ranks, "hsdp": min(num_ranks, recipe.parallel.shard_size or 1)}.get(strategy, 1)
    frozen = sizes.sharded - sizes.trainable
    weights = (4 * sizes.trainable + compute * frozen) / shards + sizes.replicated_bytes
    buffers = 0.0
    if is_sharded and (shards > 1 or compute < 4):
        # Gathered: the root, the head, a block, the next one and what that is copied from; one block's
        # gradients in the compute dtype, and in the reduction's with those of the block before.
        weights += compute * (sizes.root + sizes.head + 3 * sizes.largest_unit)
        reduce = DTYPES[recipe.parallel.reduce_dtype].itemsize
        buffers = (compute + 2 * reduce) * sizes.largest_trainable_unit
    elif compute < 4:
        weights += compute * sizes.trainable  # autocast keeps its casts until the forward ends
    kept_bytes = ADAM_BYTES + (EMA_BYTES if recipe.optim.ema else 0)
    optimizer = kept_bytes * sizes.trainable / shards
    grads = 4 * sizes.trainable / shards
    activations, there = timeline.fullest(4 / shards)
    if microbatches > 1:  # those of the microbatches before are there from the start
        whole = is_sharded and not recipe.parallel.sync_every_microbatch
        there = 4 * sizes.trainable if whole else grads
        activations = timeline.peak
    if strategy == "ddp":
        there += 4 * sizes.trainable  # its buckets
    if activations + there + buffers < grads:  # the peak is the update's
        activations, there, buffers = 0.0, grads, 0.0
    kept = min(activations, timeline.kept)
    return Memory(
        weights=weights,
        gradients=there + buffers,
        optimizer=optimizer,
        activations=kept,
        passing=activations - kept,
        overhead=OVERHEAD[device],
    )


def check_fits(recipe: Recipe, config: OmniLMMConfig, dataset: Dataset, world: World) -> str:
    """What is needed and there, in a line; UserError if the device cannot hold it.

    Without ``guard.plan_memory`` only what can be counted in a moment: weights, gradients and moments. The
    estimate of a GPU may be off by some percent, so only what is clearly too large is refused.
    """
    is_planned = recipe.guard.plan_memory
    if is_planned and not isinstance(config, OmniLMMConfig):
        raise UserError(f"guard.plan_memory: activations are counted for OmniLMM only; {ELSEWHERE}")
    shape = shape_of(recipe, config, dataset) if is_planned else None
    counted = Traced(planned_model(recipe, config), NOTHING) if shape is None else None
    memory = estimate(
        recipe,
        config,
        shape,
        num_ranks=world.size,
        device=world.device.type,
        microbatches=math.ceil(recipe.data.global_batch / world.size),
        traced=counted,
    )
    needed = memory.total
    if world.device.type == "cuda":
        there = torch.cuda.mem_get_info(world.device)[1]
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world.size
    what = "about" if is_planned else "weights, gradients and moments take"
    line = f"memory: {what} {needed / 1e9:.1f} GB of {there / 1e9:.1f} GB"
    line += "" if is_planned else ", activations more (guard.plan_memory=true counts them)"
    if needed > 1.1 * there:
        raise UserError(
            f"{line} a rank: it would not fit. Lower data.max_tokens or data.max_images, set "
            "model.activation_checkpointing=full, freeze more, or use more GPUs with parallel.strategy=fsdp; "
            "python pipelines/plan_memory.py RECIPE shows what takes how much"
        )
    return line + (" - close to the limit" if needed > 0.9 * there else "")


def planned_model(recipe: Recipe, config: OmniLMMConfig, *, mode: str | None = None) -> OmniLMMForCausalLM:
    """The recipe's model without memory, in the dtype that it computes in; ``mode`` of checkpointing."""
    with torch.device("meta"):
        model = new_model(copy.deepcopy(config))
    model.train()
    choose_trainable(model, recipe)
    checkpoint_blocks(model, mode or recipe.model.activation_checkpointing)
    model.config._attn_implementation = _PLANNED_ATTENTION
    return model.to(DTYPES[recipe.run.dtype])


def trace(model: OmniLMMForCausalLM, shape: Shape) -> Timeline:
    """One microbatch's bytes. Each gradient is counted when it is ready and goes at once, as if sent off."""
    live = _LiveBytes()
    moments: list[tuple[int, int]] = []
    arrived = 0

    def arrive(parameter: nn.Parameter) -> None:
        nonlocal arrived
        moments.append((live.peak, arrived))
        arrived += parameter.numel()
        parameter.grad = None
        live.peak = live.now

    hooks = [p.register_post_accumulate_grad_hook(arrive) for p in model.parameters() if p.requires_grad]
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
    moments.append((live.peak, arrived))
    return Timeline(kept, max(size for size, _ in moments), tuple(moments))


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
    root: int  # of the sharded ones, those in no block, embedding or head
    head: int
    largest_unit: int  # block, embedding or head
    largest_trainable_unit: int

    @classmethod
    def of(cls, model: nn.Module) -> _Sizes:
        parts = Parts(model)
        tower, frozen_tower = parts.parameters("vision_tower"), parts.is_frozen("vision_tower")
        replicated = {id(p) for p in tower} if frozen_tower else set()
        sharded = [p for p in model.parameters() if id(p) not in replicated]
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        units = [
            [p for p in unit.parameters() if id(p) not in replicated]
            for unit in [*transformer_blocks(model), *ends]
        ]
        inside = {id(p) for unit in units for p in unit}
        return cls(
            trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
            sharded=sum(p.numel() for p in sharded),
            replicated_bytes=sum(p.numel() * p.element_size() for p in tower) if frozen_tower else 0,
            root=sum(p.numel() for p in sharded if id(p) not in inside),
            head=sum(p.numel() for p in ends[1].parameters()),
            largest_unit=max(sum(p.numel() for p in unit) for unit in units),
            largest_trainable_unit=max(sum(p.numel() for p in unit if p.requires_grad) for unit in units),
        )
