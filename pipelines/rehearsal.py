"""A rehearsal: a step of one rank, played at full size on GPUs that are not there.

    recipe ──the same code as training──▶ model on "meta" ──distribute over a pretended process group──▶
    memory that is not there (FakeTensorMode) ──microbatches, clipping, update──▶ Playback

The pack's own small tensors (ids, positions, grids) keep their values (pipelines.known_values), so a class of
transformers that asks them goes on, and each place where it does is told.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from omnidata.loader.microbatch import Microbatch
from omnidata.plan.cost import DEFAULT_GPU, GPUS
from omnimodel.attention import as_on_gpu
from omnimodel.blocks import checkpoint_blocks, transformer_blocks
from omnimodel.parts import Parts

from . import mixer_kernels
from .config import Recipe, RunConfig
from .data import model_inputs
from .ema import Ema
from .flops import count_flops
from .model import choose_trainable, new_model
from .optim import build_optimizer, clip_gradients
from .packs import Packs
from .parallel import World, compute_dtype, distribute, mesh_of, reduce_gradients
from .playback import Playback
from .roofline import GPU_MEMORY, roofline

OVERHEAD = 1.5e9  # bytes of a GPU that no operation shows: CUDA's context, workspaces of cuBLAS and NCCL
# A step's figures, once.
ON_PURPOSE = ("pipelines/optim.py",)
Feed = Callable[[], dict[str, Any]]  # makes the keyword arguments of a forward


@contextlib.contextmanager
def pretended_world(recipe: Recipe, gpus: int) -> Iterator[World]:
    """Rank 0 of ``gpus`` ranks that are not there."""
    strategy, device = recipe.parallel.strategy, torch.device("cpu")
    if gpus == 1 and strategy in ("auto", "single") and recipe.run.dtype == "float32":
        yield World(0, 1, device, "single")
        return
    if strategy in ("auto", "single"):
        strategy = "fsdp"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        mesh = mesh_of(recipe.parallel, strategy, gpus, device)
        yield World(0, gpus, device, strategy, mesh, is_pretended=True)
    finally:
        dist.destroy_process_group()


def peak_of(recipe: Recipe, config: PreTrainedConfig, packs: Packs, *, gpus: int) -> dict[str, int]:
    """Bytes at a GPU's fullest moment, by what they are for."""
    with pretended_world(recipe, gpus) as world:
        return played(recipe, config, packs, world).peak


def played(
    recipe: Recipe, config: PreTrainedConfig, packs: Packs, world: World, *, gpu: str | None = None
) -> Playback:
    """A step with the fullest microbatches.

    Compiled blocks keep less than eager ones (no float32 copies, no inputs of what the compiler can fuse) and
    more than matrix products: half of the way is taken (measured: 78.3 GB of 73.9 to 86.2).
    """
    microbatches = [packs.full] * min(2, -(-recipe.data.global_batch // world.size))
    playback = play(recipe, config, microbatches, world, gpu=gpu)
    model = recipe.model
    if model.compile and model.activation_checkpointing == "none" and recipe.run.device != "cpu":
        selective = dataclasses.replace(model, activation_checkpointing="selective")
        other = play(dataclasses.replace(recipe, model=selective), config, microbatches, world)
        playback.peak = _mean(playback.peak, other.peak)
        playback.peaks = _mean(playback.peaks, other.peaks)
    return playback


def _mean(some: dict[str, int], others: dict[str, int]) -> dict[str, int]:
    names = {**some, **others}
    return {name: (some.get(name, 0) + others.get(name, 0)) // 2 for name in names}


def rehearse(
    recipe: Recipe, config: PreTrainedConfig, packs: Packs, *, gpus: int, gpu: str = DEFAULT_GPU
) -> dict[str, Any]:
    """Everything that the report shows, for rank 0 of ``gpus``; bytes, FLOPs, seconds."""
    with pretended_world(recipe, gpus) as world:
        playback = played(recipe, config, packs, world, gpu=gpu)
        hangs = None if gpus == 1 else _hangs(recipe, config, packs, world, playback)
    purposely = {place: n for place, n in playback.waits.items() if place.startswith(ON_PURPOSE)}
    microbatches = -(-recipe.data.global_batch // gpus)
    seconds = roofline(recipe, playback, gpus=gpus, gpu=gpu, microbatches=microbatches)
    flops = model_flops(recipe, config, packs.full) * recipe.data.global_batch / gpus
    return {
        "gpus": gpus,
        "gpu": gpu,
        "microbatches": microbatches,
        "idle_gpus": max(0, gpus - recipe.data.global_batch),
        "shape": shape_of(packs.full),
        "memory": {kind: size for kind, size in playback.peak.items() if size},
        "memory_gb": sum(playback.peak.values()) / 1e9,
        "peak_place": playback.peak_place,
        "peaks_gb": {phase: size / 1e9 for phase, size in playback.peaks.items()},
        "fits": fits(recipe.run, sum(playback.peak.values()), gpu),
        "waits": {place: n for place, n in playback.waits.items() if place not in purposely},
        "waits_on_purpose": purposely,
        "flops": dict(playback.flops),
        "collectives": summary(playback.collectives),
        "hangs": hangs,
        "assumed": playback.assumed,
        "refusals": dict(playback.refusals),
        **seconds,
        "possible_mfu": flops / (seconds["step_seconds"] * GPUS[gpu]),
    }


def fits(run: RunConfig, peak: float, gpu: str) -> bool:
    """Whether a GPU holds it, with its overhead and a little room."""
    return peak + overhead(run) <= 0.95 * GPU_MEMORY[gpu]


def overhead(run: RunConfig) -> float:
    """Bytes beside the peak that a rehearsal shows."""
    return 0.0 if run.device == "cpu" else OVERHEAD


def model_flops(recipe: Recipe, config: PreTrainedConfig, microbatch: Microbatch) -> float:
    """FLOPs that the mathematics of one forward and backward needs, whatever is computed again."""
    with torch.device("meta"):
        model = new_model(copy.deepcopy(config))
    choose_trainable(model, recipe)
    return count_flops(model).microbatch(microbatch)


def shape_of(microbatch: Microbatch) -> dict[str, int]:
    """A microbatch in numbers."""
    return {
        "num_tokens": microbatch.num_tokens,
        "num_images": microbatch.num_images,
        "num_documents": len(microbatch.keys),
        "num_supervised": microbatch.num_supervised_tokens,
    }


def play(
    recipe: Recipe,
    config: PreTrainedConfig,
    microbatches: Sequence[Microbatch],
    world: World,
    *,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    gpu: str | None = None,
) -> Playback:
    """A step of one rank, with Adam's moments from the start. ``prepare`` may change the model before."""
    on_gpu = recipe.run.device != "cpu"
    playback = Playback(device_is_host=not on_gpu, gpu=gpu)
    model = build(recipe, config, world)  # outside: random starts read values, also on "meta"
    wrapped: nn.Module = model
    prepare(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if on_gpu:
            stack.enter_context(as_on_gpu())
            playback.assumed = stack.enter_context(mixer_kernels.played(model))
        model.to_empty(device=world.device)
        if not world.is_sharded:  # plain parameters forget on the way what they share; sharded ones do not
            cast(Any, model).tie_weights()
            with playback.values:  # what DDP's C++ notes for itself lies on the host, and is read there
                wrapped = distribute(model, recipe, world, blocks=[])
        optimizer = build_optimizer(model, recipe.optim)
        if on_gpu:
            for group in optimizer.param_groups:
                group |= {"fused": True, "foreach": None}
        ema = Ema(model, recipe.optim.ema) if recipe.optim.ema else None
        hooks = watch(model, playback)
        feeds = [_feed(microbatch, world, playback) for microbatch in microbatches]
        with playback.values, playback:
            playback.assign("parameters", [*model.parameters(), *model.buffers()])
            playback.assign("average", ema.state_dict().values() if ema else [])
            make_moments(optimizer)
            playback.assign("optimizer", moments_of(optimizer, optimizer.state))
            with playback.values.calls:
                if isinstance(wrapped, DistributedDataParallel):
                    step(recipe, world, model, wrapped, optimizer, feeds[-1:], playback)
                    _sort_buckets(wrapped, playback)
                playback.restart()
                step(recipe, world, model, wrapped, optimizer, feeds, playback, ema=ema)
            # Training finds these before it begins, and leaves them alone (pipelines.isolation).
            playback.had_not("optimizer", [x for x in moments_of(optimizer, unreached(model, playback))])
        for hook in hooks:
            hook.remove()
    del model, wrapped, optimizer, ema, feeds
    gc.collect()
    return playback


def build(recipe: Recipe, config: PreTrainedConfig, world: World) -> PreTrainedModel:
    """As pipelines.model does, but with no memory behind the parameters; sharded, if it will be."""
    with torch.device("meta"):
        model = new_model(copy.deepcopy(config))
    model.train()
    choose_trainable(model, recipe)
    checkpoint_blocks(model, recipe.model.activation_checkpointing)
    if world.is_sharded:
        distribute(model, recipe, world, blocks=transformer_blocks(model))
    return model


def _sort_buckets(wrapped: DistributedDataParallel, playback: Playback) -> None:
    """As DDP does at the second step's beginning: gradients travel in the order in which the first's came."""
    playback.kind = "communication"
    playback.values.fills_integers = True  # C++ writes down that order, which the others would be told
    wrapped.reducer._rebuild_buckets()
    playback.kind, playback.values.fills_integers = "activations", False


def make_moments(optimizer: torch.optim.Optimizer) -> None:
    """An update with gradients of nothing: afterwards the moments are there, the gradients are not."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def moments_of(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What the optimizer keeps of them."""
    values = (value for parameter in parameters for value in optimizer.state[parameter].values())
    return [value for value in values if isinstance(value, torch.Tensor)]


def unreached(model: nn.Module, playback: Playback) -> list[nn.Parameter]:
    """Trainable parameters that no gradient came to: some towers have layers behind the one that is used."""
    return [p for p in model.parameters() if p.requires_grad and p not in playback.reached]


def _feed(microbatch: Microbatch, world: World, playback: Playback) -> Feed:
    """The model's arguments, moved by the code that moves them in training."""
    fields = {field.name: getattr(microbatch, field.name) for field in dataclasses.fields(microbatch)}
    on_host = [x for x in tree_leaves(fields) if isinstance(x, torch.Tensor)]
    if playback.values.device_is_host:
        playback.ignore(on_host)
        return lambda: model_inputs(microbatch, world.device)
    playback.values.keep_on_host(on_host)

    def inputs() -> dict[str, Any]:
        moved = model_inputs(microbatch, world.device)
        playback.assign("inputs", [x for x in tree_leaves(moved) if type(x) is torch.Tensor])
        return moved

    return inputs


def step(
    recipe: Recipe,
    world: World,
    model: nn.Module,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    feeds: Sequence[Feed],
    playback: Playback,
    *,
    ema: Ema | None = None,
) -> None:
    """What train.py's loop does: microbatches, clipping, update."""

    def enter(place: str) -> None:
        playback.place = playback.part = place

    for number, feed in enumerate(feeds, start=1):
        is_last = number == len(feeds)
        with reduce_gradients(wrapped, now=is_last or recipe.parallel.sync_every_microbatch):
            enter(f"forward of microbatch {number}")
            with compute_dtype(recipe.run, world):
                loss = wrapped(**feed()).loss
            enter(f"backward of microbatch {number}")
            with warnings.catch_warnings():  # torch 2.11, of embeddings: no input of theirs has a gradient
                warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
                loss.backward()
            del loss
    enter("clipping")
    clip_gradients([p for p in model.parameters() if p.requires_grad], recipe.optim.clip)
    enter("update")
    optimizer.step()
    if ema is not None:
        ema.update()
    optimizer.zero_grad()


def watch(model: nn.Module, playback: Playback) -> list[Any]:
    """Hooks that tell the playback which part runs, and which tensors are gradients."""
    hooks, parts = [], Parts(model)

    def entering(name: str, part: str) -> Any:
        def enter(*_: Any) -> None:
            playback.part = part
            playback.place = f"{playback.place.split(',')[0]}, {name}"

        return enter

    ends: Any = model
    watched = {*transformer_blocks(model), ends.get_input_embeddings(), ends.get_output_embeddings()}
    for name, module in model.named_modules():
        part = parts.of_module(module)
        is_connector = part == parts.connector_name and any(True for _ in module.parameters(recurse=False))
        if module in watched or is_connector:
            enter = entering(name, part)
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_full_backward_pre_hook(enter))
    for parameter in model.parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_post_accumulate_grad_hook(playback.gradient_came))
    return hooks


# --- do ranks wait for each other? ------------------------------------------------------------------------


def _hangs(
    recipe: Recipe, config: PreTrainedConfig, packs: Packs, world: World, played: Playback
) -> str | None:
    """Why a rank with other packs would do other collectives, or None."""
    number = len([place for place in played.peaks if place.startswith("forward")])
    others = {
        "with text only": [packs.text_only] * number,
        "with an empty last microbatch": [packs.full] * (number - 1) + [packs.empty],
    }
    kinds = {"with pictures": played.collectives}
    for name, microbatches in others.items():
        try:
            kinds[name] = play(recipe, config, microbatches, world).collectives
        except (AttributeError, RuntimeError) as error:  # FSDP misses what was never gathered
            return f"a rank {name} cannot do the step: {error}"
    return first_difference(kinds)


def first_difference(kinds: dict[str, list[tuple[str, int]]]) -> str | None:
    """Why ranks of different kinds would wait for each other for ever, or None."""
    (first, ours), *others = kinds.items()
    for name, theirs in others:
        for number, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            if a != b:
                return f"collective {number}: {a[0]} of {a[1]} bytes {first}, {b[0]} of {b[1]} bytes {name}"
        if len(ours) != len(theirs):
            return f"{len(ours)} collectives {first}, {len(theirs)} {name}"
    return None


def summary(collectives: list[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """Calls and bytes of each kind."""
    table: dict[str, dict[str, int]] = {}
    for name, size in collectives:
        row = table.setdefault(name, {"calls": 0, "bytes": 0})
        row["calls"] += 1
        row["bytes"] += size
    return table
