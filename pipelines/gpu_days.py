"""How large a run is, in GPU-days: from a tenth of one on, a minute's rehearsal before it is well spent."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from omnidata.plan.cost import DEFAULT_MFU

from .config import Recipe
from .flops import peak_flops
from .parallel import World

LARGE = 0.1
SECONDS = 86400


def of_run(parameters: Iterable[nn.Parameter], tokens: float, peak: float) -> float:
    """GPU-days of ``tokens``, roughly.

    6 FLOPs per token and trained weight, 2 per frozen one, at 40 % of the peak.
    """
    flops = sum((6 if p.requires_grad else 2) * p.numel() for p in parameters)
    return flops * tokens / (peak * DEFAULT_MFU * SECONDS)


def hint(recipe: Recipe, world: World, parameters: Iterable[nn.Parameter], *, steps: int) -> list[str]:
    """The line that a run on GPUs begins with, if it is a large one."""
    peak = peak_flops(world.device)
    tokens = steps * recipe.data.global_batch * recipe.data.max_tokens
    days = of_run(parameters, tokens, peak) if peak else 0.0
    return [advice(days, str(Path(recipe.run.dir) / "recipe.yaml"), world.size)] if days > LARGE else []


def advice(days: float, recipe_name: str, gpus: int) -> str:
    """The line that points to the rehearsal."""
    return (
        f"about {days:.1f} GPU-days: `python pipelines/rehearse.py {recipe_name} --gpus {gpus}` first shows, "
        "without a GPU, memory, waits, collectives and time of a step"
    )


def pointer(recipe_name: str, figures: dict[str, Any]) -> list[str]:
    """The same for a plan, if the run is large or its length is not known yet; [] for a small one."""
    if figures["device"] == "cpu":
        return []
    steps, gpus = figures["steps"], figures["gpus"]
    if steps is None:
        return [f"waits, collectives and what each change saves: python pipelines/rehearse.py {recipe_name}"]
    days = steps * figures["step_seconds"] * gpus / SECONDS
    return [advice(days, recipe_name, gpus)] if days > LARGE else []
