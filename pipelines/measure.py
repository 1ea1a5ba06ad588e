"""Run random microbatches of a recipe on this machine, and compare with what the planner says.

memory   peak of the GPU's allocator, or of this process on a CPU, less what was there before
time     this machine is calibrated with microbatches of an eighth and of a half of the size: seconds are a
         fixed part and a rate of FLOPs; a full one, and a step of them with its update, follow from that
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import resource
import time
from collections.abc import Sequence
from typing import Any

import torch

from omnidata import Dataset
from omnidata.schema import IGNORE_INDEX
from omnimodel import OmniLMMConfig, OmniLMMForCausalLM
from pipelines.config import Recipe
from pipelines.flops import FlopCount, count_flops
from pipelines.memory import Shape, estimate, shape_of
from pipelines.model import build_model
from pipelines.optim import build_optimizer, clip_gradients
from pipelines.parallel import World, compute_dtype


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What this machine does with this model: seconds = fixed + FLOPs / rate, and an update a step."""

    fixed: float
    rate: float  # FLOP/s of the forward and backward pass
    update: float  # clipping, optimizer, zeroing

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]], *, update: float) -> Calibration:
        """From ``(FLOPs, seconds)`` of a small and of a larger microbatch.

        >>> Calibration.of([(1.0, 3.0), (5.0, 5.0)], update=0.5).step(9.0, microbatches=2)
        14.5
        """
        (small_flops, small), (flops, seconds) = points
        rate = (flops - small_flops) / max(seconds - small, 1e-9)
        rate = min(rate, flops / (0.5 * seconds))  # noise must not make most of it fixed
        return cls(fixed=max(0.0, seconds - flops / rate), rate=rate, update=update)

    def microbatch(self, flops: float) -> float:
        """Seconds of one forward and backward pass."""
        return self.fixed + flops / self.rate

    def step(self, flops: float, *, microbatches: int) -> float:
        """Seconds of a step whose microbatches have ``flops`` each."""
        return microbatches * self.microbatch(flops) + self.update


def measure(recipe: Recipe, config: OmniLMMConfig, dataset: Dataset | None) -> dict[str, float]:
    """Predicted and measured memory and seconds of one microbatch, and the seconds of a step."""
    is_cuda = torch.cuda.is_available() and recipe.run.device != "cpu"
    device = torch.device("cuda", 0) if is_cuda else torch.device("cpu")
    world = World(0, 1, device, "single")
    shape = shape_of(recipe, config, dataset)
    if not is_cuda:
        _give_back_at_once()
    eighth, half = _part(shape, 8), _part(shape, 2)
    _warm_up(recipe, config, world, eighth)
    before = _memory_now(device)
    model = build_model(recipe, config, world).model
    optimizer = build_optimizer(model, recipe.optim)
    count = count_flops(model)
    _seconds(recipe, model, optimizer, world, [shape], repeats=1)
    peak = _memory_peak(device)
    if not is_cuda:
        _hold_on()
    timings = _seconds(recipe, model, optimizer, world, [eighth, half, shape])
    *calibration, (seconds, update) = timings
    points = [(_flops(count, s), fb) for s, (fb, _) in zip((eighth, half), calibration, strict=True)]
    machine = Calibration.of(points, update=min(u for _, u in calibration))
    predicted = estimate(recipe, config, shape, num_ranks=1, device=device.type, microbatches=1)
    flops = _flops(count, shape)
    average = _flops(count, shape_of(recipe, config, dataset, fullest=False))
    return {
        "predicted_memory_gb": (predicted.total - predicted.overhead) / 1e9,
        "measured_memory_gb": (peak - before) / 1e9,
        "predicted_seconds": machine.step(flops, microbatches=1),
        "measured_seconds": seconds + update,
        "flops_per_second": machine.rate,
        "step_seconds": machine.step(average, microbatches=recipe.data.global_batch),
    }


def _warm_up(recipe: Recipe, config: OmniLMMConfig, world: World, shape: Shape) -> None:
    """Load the libraries and start the threads that the first step brings: they are no part of the plan."""
    model = build_model(recipe, config, world).model
    _seconds(recipe, model, build_optimizer(model, recipe.optim), world, [shape], repeats=1)


def _part(shape: Shape, parts: int) -> Shape:
    """A microbatch of 1/``parts`` of the size, its documents as long as before."""
    numbers = {name: number // parts for name, number in dataclasses.asdict(shape).items()}
    documents = max(1, numbers["num_documents"])
    return Shape(
        num_tokens=round(shape.num_tokens / shape.num_documents * documents),
        num_images=max(min(1, shape.num_images), numbers["num_images"]),
        num_documents=documents,
        num_supervised=max(1, numbers["num_supervised"]),
    )


def _flops(count: FlopCount, shape: Shape) -> float:
    lengths = [shape.num_tokens / shape.num_documents] * shape.num_documents
    return count.of(lengths, images=shape.num_images, supervised=shape.num_supervised)


def _seconds(
    recipe: Recipe,
    model: OmniLMMForCausalLM,
    optimizer: torch.optim.Optimizer,
    world: World,
    shapes: Sequence[Shape],
    *,
    repeats: int = 3,
) -> list[tuple[float, float]]:
    """(forward and backward, update) of each shape, the fastest of a few: others only add noise.

    The shapes take turns, so that a machine that slows down meanwhile slows all of them.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = [random_inputs(model.config, shape, world.device) for shape in shapes]
    best = [(float("inf"), float("inf"))] * len(shapes)
    for _ in range(repeats):
        for number, batch in enumerate(inputs):
            _wait(world.device)
            started = time.perf_counter()
            with compute_dtype(recipe, world):
                loss = model(**batch).loss
            loss.backward()
            _wait(world.device)
            between = time.perf_counter()
            clip_gradients(trainable, recipe.optim.clip)
            optimizer.step()
            optimizer.zero_grad()
            _wait(world.device)
            times = (between - started, time.perf_counter() - between)
            best[number] = tuple(map(min, best[number], times))
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


MAP_THRESHOLD, MAX_MAPS, TRIM_THRESHOLD = -3, -4, -1  # of mallopt(3)


def _give_back_at_once() -> None:
    """Let malloc map every tensor by itself: otherwise it holds on to a third of what was freed."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(MAP_THRESHOLD, 1 << 16)
    libc.mallopt(MAX_MAPS, 1 << 20)


def _hold_on() -> None:
    """Undo that before time is measured, with the values that malloc grows to by itself in a training."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(MAP_THRESHOLD, 32 << 20)
    libc.mallopt(TRIM_THRESHOLD, 64 << 20)


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
