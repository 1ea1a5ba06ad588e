"""How the ranks share a model: one process, DDP, FSDP2 or HSDP, all of them torch's own.

    strategy   weights              gradients                           memory a GPU (P parameters, n GPUs)
    single     one copy             -                                   16 P bytes + activations (float32)
    ddp        one copy a rank      summed over all ranks               16 P
    fsdp       1/n a rank           reduce-scattered over all ranks     16 P / n
    hsdp       1/s per rank, s ranks  reduce-scattered inside a group,    16 P / s
               share a copy         then summed over the groups

Gradients are SUMMED over ranks, never averaged: each microbatch's loss is already divided by the number
of supervised tokens of the whole global step, so the sum is the gradient of the global mean.

One process that computes in bfloat16 is FSDP over a mesh of one: the same float32 masters, bfloat16 copies
and gradients as on many GPUs, where autocast would cast every weight again in every forward pass.

A frozen vision tower stays outside of FSDP: it is replicated in the compute dtype, so that its forward pass
needs no communication.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from omnidata.schema import UserError
from omnimodel.packed import is_packed
from omnimodel.parts import Parts

from .config import ParallelConfig, Recipe, RunConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device
    strategy: str  # single | ddp | fsdp | hsdp
    mesh: DeviceMesh | None = None  # hsdp: (replicate, shard); fsdp: (shard,)
    is_pretended: bool = False  # a rehearsal's: the others are not there, and weights have no values

    @property
    def is_main(self) -> bool:
        """Rank 0 prints, logs and finalises checkpoints."""
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """Whether every forward pass is a collective of all ranks."""
        return self.strategy in ("fsdp", "hsdp")

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each number summed over the ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum([0.0])


@contextlib.contextmanager
def start(recipe: Recipe) -> Iterator[World]:
    """Join the process group that torchrun describes, if it does; leave it at the end."""
    # Before the first parallel operation: threads inherit it. The gradients of words that never come up decay
    # into denormal numbers, with which a CPU step of the demo takes ten times as long after 250 steps.
    torch.set_flush_denormal(True)
    # Packs differ in size: without growing segments the allocator keeps a block for each that it has seen.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault(
            "PYTORCH_ALLOC_CONF", "expandable_segments:True"
        )  # read at the first allocation
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    if recipe.run.deterministic:
        _compute_deterministically()
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = device_of(recipe.run.device)
    strategy = strategy_of(recipe, size)
    if strategy == "single":
        yield World(rank, size, device, strategy)
        return
    timeout = timedelta(seconds=recipe.guard.first_step_timeout)
    backend = (
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    )  # gloo: checkpoints are written by CPU
    alone: dict[str, Any] = (
        {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    )
    device_id = device if device.type == "cuda" else None
    dist.init_process_group(backend, timeout=timeout, device_id=device_id, **alone)
    try:
        yield World(rank, size, device, strategy, mesh_of(recipe.parallel, strategy, size, device))
    finally:
        dist.destroy_process_group()


def _compute_deterministically() -> None:
    """The same bits from the same inputs, on a GPU too; an operation that has no such way raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)  # flash attention's backward pass obeys it as well


def device_of(name: str) -> torch.device:
    """This rank's device by the recipe's ``run.device``; UserError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device=cuda, but torch sees no GPU; use run.device=auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def strategy_of(recipe: Recipe, size: int) -> str:
    """What ``recipe.parallel.strategy`` means for ``size`` ranks."""
    strategy, alone = recipe.parallel.strategy, "RANK" not in os.environ
    if strategy == "single" and size > 1:
        raise UserError(f"parallel.strategy=single, but torchrun started {size} ranks; use ddp, fsdp or hsdp")
    if strategy in ("auto", "single") and size == 1 and (alone or strategy == "single"):
        return "single" if recipe.run.dtype == "float32" else "fsdp"
    if strategy == "auto":
        return "fsdp"
    if alone:
        raise UserError(
            f"parallel.strategy={strategy} needs torchrun: torchrun --nproc-per-node N pipelines/train.py …"
        )
    return strategy


def mesh_of(parallel: ParallelConfig, strategy: str, size: int, device: torch.device) -> DeviceMesh | None:
    """The ranks as FSDP and HSDP arrange them."""
    if strategy == "fsdp":
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    if strategy == "hsdp":
        shard = parallel.shard_size
        if shard is None or size % shard:
            raise UserError(f"parallel.shard_size={shard} does not divide the {size} ranks")
        return init_device_mesh(device.type, (size // shard, shard), mesh_dim_names=("replicate", "shard"))
    return None


# Are buffers sent to all ranks in each forward? They are the same everywhere. torch 2.11's name, and 2.14's.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"
_OWN_BUFFERS: dict[str, Any] = {_BUFFERS: False}

# --- wrapping a model -------------------------------------------------------------------------------------


def distribute(
    model: PreTrainedModel, recipe: Recipe, world: World, *, blocks: Sequence[nn.Module]
) -> nn.Module:
    """Wrap ``model`` for the strategy. ``blocks`` are its transformer blocks, each gathered on its own."""
    if world.strategy == "ddp":
        wrapped = DistributedDataParallel(
            model,
            find_unused_parameters=is_packed(model),  # some towers have layers behind the one that is used
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            init_sync=not world.is_pretended,
            **_OWN_BUFFERS,
        )
        wrapped.register_comm_hook(None, _sum_bucket)
        return wrapped
    if world.is_sharded:
        _fully_shard(model, recipe, world, blocks)
    return model


def _sum_bucket(_, bucket):  # not annotated: DDP refuses annotations that are strings
    """DDP's reduction without its division by the number of ranks."""
    buffer = bucket.buffer()  # reduced in place
    return dist.all_reduce(buffer, async_op=True).get_future().then(lambda _: buffer)


def _fully_shard(model: PreTrainedModel, recipe: Recipe, world: World, blocks: Sequence[nn.Module]) -> None:
    parts = Parts(model)
    tower, is_frozen = parts.tower, parts.is_frozen("vision_tower")
    settings: dict[str, Any] = {
        "mesh": world.mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=DTYPES[recipe.run.dtype], reduce_dtype=DTYPES[recipe.parallel.reduce_dtype]
        ),
        "ignored_params": set(parts.parameters("vision_tower")) if is_frozen else set(),
    }
    inside_tower = set(tower.modules())
    for block in blocks:
        if not (is_frozen and block in inside_tower):
            fully_shard(block, reshard_after_forward=recipe.parallel.reshard_after_forward, **settings)
    for module in _large_ends(model):
        # Gathered when its turn comes, so that the root holds nothing large. lm_head's backward pass follows
        # at once: giving it back in between would only gather it twice.
        fully_shard(module, reshard_after_forward=module is not model.get_output_embeddings(), **settings)
    fully_shard(model, **settings)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def _large_ends(model: PreTrainedModel) -> list[nn.Module]:
    """Embedding and head, which lie in no block; none if they share a weight: the root holds it."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(end is None for end in ends) or ends[0].weight is ends[1].weight:
        return []
    return ends


def compute_dtype(run: RunConfig, world: World) -> contextlib.AbstractContextManager[Any]:
    """The forward pass's context: FSDP casts weights itself, the others use autocast over fp32 masters."""
    if run.dtype == "float32" or world.is_sharded:
        return contextlib.nullcontext()
    return torch.autocast(world.device.type, DTYPES[run.dtype])


@contextlib.contextmanager
def reduce_gradients(model: nn.Module, *, now: bool) -> Iterator[None]:
    """Communicate gradients in this backward pass (``now``: the step's last), or only add them up locally."""
    if isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        model.set_is_last_backward(now)
    yield


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that the host does not wait for: to a GPU it goes through page-locked memory."""
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def shorten_timeout(seconds: float) -> None:
    """After the first step, a collective that waits this long is an error rather than a slow start.

    Of every group: those of the mesh, in which FSDP gathers and reduces, are not the world's.
    """
    if dist.is_initialized():
        # Public from torch 2.13 on.
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        for group in dist.distributed_c10d._world.pg_map:
            set_timeout(timedelta(seconds=seconds), group)
