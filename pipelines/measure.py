"""Run one random microbatch of a recipe on this machine, and compare with what the planner says.

memory   peak of the GPU's allocator, or of this process on a CPU, less what was there before
time     a step, against the rate of a microbatch of a quarter of the size
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import resource
import time
from typing import Any

import torch

from omnidata import Dataset
from omnidata.schema import IGNORE_INDEX
from omnimodel import OmniLMMConfig, OmniLMMForCausalLM
from pipelines.config import Recipe
from pipelines.flops import count_flops
from pipelines.memory import Shape, estimate, shape_of
from pipelines.model import build_model
from pipelines.optim import build_optimizer
from pipelines.parallel import World, compute_dtype


def measure(recipe: Recipe, config: OmniLMMConfig, dataset: Dataset | None) -> dict[str, float]:
    """Predicted and measured memory and seconds of one microbatch with its update."""
    is_cuda = torch.cuda.is_available() and recipe.run.device != "cpu"
    device = torch.device("cuda", 0) if is_cuda else torch.device("cpu")
    world = World(0, 1, device, "single")
    shape = shape_of(recipe, config, dataset)
    if not is_cuda:
        _give_back_at_once()
    quarter = _quarter(shape)
    _warm_up(recipe, config, world, quarter)
    before = _memory_now(device)
    model = build_model(recipe, config, world).model
    optimizer = build_optimizer(model, recipe.optim)
    count = count_flops(model)
    small = _seconds(recipe, model, optimizer, world, quarter)
    rate = _flops(count, quarter) / small
    seconds = _seconds(recipe, model, optimizer, world, shape)
    predicted = estimate(recipe, config, shape, num_ranks=1, device=device.type, microbatches=1).total
    return {
        "predicted_memory_gb": predicted / 1e9,
        "measured_memory_gb": (_memory_peak(device) - before) / 1e9,
        "predicted_seconds": _flops(count, shape) / rate,
        "measured_seconds": seconds,
    }


def _warm_up(recipe: Recipe, config: OmniLMMConfig, world: World, shape: Shape) -> None:
    """Load the libraries and start the threads that the first step brings: they are no part of the plan."""
    model = build_model(recipe, config, world).model
    _seconds(recipe, model, build_optimizer(model, recipe.optim), world, shape, repeats=1)


def _quarter(shape: Shape) -> Shape:
    return dataclasses.replace(
        shape,
        num_tokens=shape.num_tokens // 4,
        num_images=max(1, shape.num_images // 4),
        num_documents=max(1, shape.num_documents // 4),
        num_supervised=max(1, shape.num_supervised // 4),
    )


def _flops(count: Any, shape: Shape) -> float:
    lengths = [shape.num_tokens / shape.num_documents] * shape.num_documents
    return count.of(lengths, images=shape.num_images, supervised=shape.num_supervised)


def _seconds(
    recipe: Recipe,
    model: OmniLMMForCausalLM,
    optimizer: torch.optim.Optimizer,
    world: World,
    shape: Shape,
    *,
    repeats: int = 3,
) -> float:
    """The fastest of a few steps: others only add noise."""
    inputs = random_inputs(model.config, shape, world.device)
    best = float("inf")
    for _ in range(repeats):
        _wait(world.device)
        started = time.perf_counter()
        with compute_dtype(recipe, world):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(world.device)
        best = min(best, time.perf_counter() - started)
    return best


def random_inputs(config: OmniLMMConfig, shape: Shape, device: torch.device) -> dict[str, Any]:
    """A microbatch of text ids with whole image blocks at the start of its documents."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (shape.num_tokens,), generator=generator)
    bounds = torch.linspace(0, shape.num_tokens, shape.num_documents + 1).round().to(torch.int32)
    block = [config.im_start_token] + [config.im_patch_token] * config.num_query + [config.im_end_token]
    room = max(1, shape.num_tokens // shape.num_images) if shape.num_images else 0
    for image in range(shape.num_images):
        ids[image * room : image * room + len(block)] = torch.tensor(block)
    labels = torch.full((shape.num_tokens,), IGNORE_INDEX)
    supervised = torch.randperm(shape.num_tokens, generator=generator)[: shape.num_supervised]
    labels[supervised] = torch.randint(3, 100, (shape.num_supervised,), generator=generator)
    lengths = bounds.diff()
    size = (shape.num_images, 3, config.image_size, config.image_size)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    return {
        "input_ids": ids[None].to(device),
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None].to(device),
        "shift_labels": labels[None].to(device),
        "cu_seqlens": bounds.to(device),
        "max_seqlen": int(lengths.max()),
        "pixel_values": images.to(device) if shape.num_images else None,
        "num_supervised_tokens": shape.num_supervised,
        "num_supervised_rows": shape.num_supervised,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _give_back_at_once() -> None:
    """Let malloc map every tensor by itself: otherwise it holds on to a third of what was freed."""
    libc = ctypes.CDLL("libc.so.6")
    threshold, max_maps = -3, -4  # M_MMAP_THRESHOLD, M_MMAP_MAX of mallopt(3)
    libc.mallopt(threshold, 1 << 16)
    libc.mallopt(max_maps, 1 << 20)


def _memory_now(device: torch.device) -> float:
    """Bytes in use; on a CPU after giving back what malloc holds, so that the peak is a difference."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _memory_peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
