"""Run microbatches of a recipe here, and compare with what the planner says (plan_memory.py --measure).

memory   peak of the GPU's allocator, or of this process on a CPU, less what was there before
time     this machine is calibrated with microbatches of an eighth and of a half of the size: seconds are a
         fixed part and a rate of FLOPs; a full one, and a step of them with its update, follow from that
"""

from __future__ import annotations

import ctypes
import gc
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig

from omnidata import Dataset
from omnidata.loader.microbatch import Microbatch

from .config import Recipe
from .data import model_inputs
from .flops import count_flops
from .model import build_model
from .optim import build_optimizer, clip_gradients
from .packs import packs_of
from .parallel import World, compute_dtype
from .rehearsal import play


@dataclass(frozen=True)
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


def measure(recipe: Recipe, config: PreTrainedConfig, datasets: Sequence[Dataset]) -> dict[str, float]:
    """Predicted and measured memory and seconds of one microbatch, and the seconds of a step."""
    is_cuda = torch.cuda.is_available() and recipe.run.device != "cpu"
    device = torch.device("cuda", 0) if is_cuda else torch.device("cpu")
    world = World(0, 1, device, "single")
    full, half, eighth = (packs_of(recipe, config, datasets, share=share) for share in (1.0, 0.5, 0.125))
    recipe = replace(recipe, run=replace(recipe.run, device="cuda" if is_cuda else "cpu"))
    predicted = play(recipe, config, [full.full], World(0, 1, torch.device("cpu"), "single"))
    if not is_cuda:
        _give_back_at_once()
    _warm_up(recipe, config, world, eighth.full)
    before = _memory_now(device)
    model = build_model(recipe, config, world).model
    optimizer = build_optimizer(model, recipe.optim)
    count = count_flops(model)
    _seconds(recipe, model, optimizer, world, [full.full], repeats=1)
    peak = _memory_peak(device)
    if not is_cuda:
        _hold_on()
    *calibration, (seconds, update) = _seconds(
        recipe, model, optimizer, world, [eighth.full, half.full, full.full]
    )
    flops = [count.microbatch(each.full) for each in (eighth, half, full)]
    points = [(number, fb) for number, (fb, _) in zip(flops, calibration, strict=False)]
    machine = Calibration.of(points, update=min(u for _, u in calibration))
    return {
        "predicted_memory_gb": sum(predicted.peak.values()) / 1e9,
        "measured_memory_gb": (peak - before) / 1e9,
        "predicted_seconds": machine.step(flops[-1], microbatches=1),
        "measured_seconds": seconds + update,
        "flops_per_second": machine.rate,
        "step_seconds": machine.step(flops[-1] * full.load, microbatches=recipe.data.global_batch),
    }


def _warm_up(recipe: Recipe, config: PreTrainedConfig, world: World, microbatch: Microbatch) -> None:
    """Load the libraries and start the threads that the first step brings: they are no part of the plan."""
    model = build_model(recipe, config, world).model
    _seconds(recipe, model, build_optimizer(model, recipe.optim), world, [microbatch], repeats=1)


def _seconds(
    recipe: Recipe,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    microbatches: Sequence[Microbatch],
    *,
    repeats: int = 3,
) -> list[tuple[float, float]]:
    """(forward and backward, update) of each microbatch, the fastest of a few: others only add noise.

    They take turns, so that a machine that slows down meanwhile slows all of them.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = [model_inputs(microbatch, world.device) for microbatch in microbatches]
    best = [(float("inf"), float("inf"))] * len(microbatches)
    for _ in range(repeats):
        for number, batch in enumerate(inputs):
            _wait(world.device)
            started = time.perf_counter()
            with compute_dtype(recipe.run, world):
                loss = model(**batch).loss
            loss.backward()
            _wait(world.device)
            between = time.perf_counter()
            clip_gradients(trainable, recipe.optim.clip)
            optimizer.step()
            optimizer.zero_grad()
            _wait(world.device)
            times = (between - started, time.perf_counter() - between)
            best[number] = (min(best[number][0], times[0]), min(best[number][1], times[1]))
    return best


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
