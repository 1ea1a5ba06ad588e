"""A torch profiler trace of a few steps: ``log.profile_steps=3`` writes RUN/profile/rank0.json."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .config import Recipe
from .parallel import World

WARMUP_STEPS = 3  # compilation, allocator, first collectives


class _NoProfiler:
    def step(self) -> None:
        """Nothing is recorded."""


@contextlib.contextmanager
def profiler(recipe: Recipe, world: World) -> Iterator[Any]:
    """Something with a ``step`` method, to be called after each step."""
    if not recipe.log.profile_steps:
        yield _NoProfiler()
        return
    folder = Path(recipe.run.dir) / "profile"
    folder.mkdir(parents=True, exist_ok=True)

    def write(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(folder / f"rank{world.rank}.json"))

    schedule = torch.profiler.schedule(
        wait=WARMUP_STEPS - 1, warmup=1, active=recipe.log.profile_steps, repeat=1
    )
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write, profile_memory=True) as profile:
        yield profile
