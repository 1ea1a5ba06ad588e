"""What a recipe will need: memory and time, on any number of GPUs, without having any.

    python pipelines/plan_memory.py pipelines/recipes/sft.yaml --gpus 1 8 64
    python pipelines/plan_memory.py pipelines/recipes/tiny_cpu.yaml --measure

For each number of GPUs a step is rehearsed (pipelines.rehearsal): the peak of its memory, and its seconds by
the roofline; with ``--mfu`` by that share of the data sheet's peak instead. ``--measure`` runs the recipe's
model here on such microbatches, prints prediction beside measurement, and the seconds of a step at this
machine's own rate, which it takes from smaller ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # a file run by its path (PEP 366); the folder is `omnipipelines` in a wheel
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = Path(__file__).resolve().parent.name

from transformers import PreTrainedConfig

from omnidata.plan.cost import DEFAULT_GPU, GPUS
from omnidata.schema import UserError

from .command import add_recipe, parse
from .config import Recipe, load_recipe
from .gpu_days import pointer
from .packs import Packs, packs_of
from .planning import open_for_planning
from .rehearsal import fits, model_flops, overhead, played, pretended_world, shape_of
from .roofline import roofline


def plan(
    recipe: Recipe, *, gpus: Sequence[int], gpu: str = DEFAULT_GPU, mfu: float | None = None
) -> list[dict[str, Any]]:
    """Everything that the table shows, for each number of GPUs."""
    config, datasets, assumed = open_for_planning(recipe)
    packs = packs_of(recipe, config, datasets)
    flops = model_flops(recipe, config, packs.full) * packs.load  # of a microbatch, on average
    plans = [_plan_one(recipe, config, packs, flops, gpus=number, gpu=gpu, mfu=mfu) for number in gpus]
    for figures in plans:
        figures["assumed"] = [*assumed, *figures["assumed"]]
    return plans


def _plan_one(
    recipe: Recipe,
    config: PreTrainedConfig,
    packs: Packs,
    flops: float,
    *,
    gpus: int,
    gpu: str,
    mfu: float | None,
) -> dict[str, Any]:
    batch = recipe.data.global_batch
    microbatches = -(-batch // gpus)
    with pretended_world(recipe, gpus) as world:
        playback = played(recipe, config, packs, world)
    peak = dict(sorted(playback.peak.items(), key=lambda kind: -kind[1]))
    memory = {kind: size for kind, size in peak.items() if size} | {"overhead": overhead(recipe.run)}
    if mfu is None:
        seconds = roofline(recipe, playback, gpus=gpus, gpu=gpu, microbatches=microbatches)["step_seconds"]
        seconds *= packs.load
    else:  # ranks that have one microbatch less than others wait for them
        seconds = flops * microbatches / (GPUS[gpu] * mfu)
    return {
        "gpus": gpus,
        "gpu": gpu,
        "mfu": flops * batch / (seconds * gpus * GPUS[gpu]),
        "microbatches": microbatches,
        "shape": shape_of(packs.full),
        "memory": memory,
        "memory_gb": sum(memory.values()) / 1e9,
        "peak_place": playback.peak_place,
        "fits": fits(recipe.run, sum(peak.values()), gpu),
        "step_seconds": seconds,
        "step_flops": flops * batch,
        "tokens_per_s": batch * packs.full.num_tokens * packs.load / seconds,
        "steps": _steps(recipe, packs),
        "device": recipe.run.device,
        "assumed": playback.assumed,
    }


def _steps(recipe: Recipe, packs: Packs) -> int | None:
    """Of the whole run; None: that depends on a dataset that is not there yet."""
    if recipe.optim.steps is not None or packs.per_epoch is None:
        return recipe.optim.steps
    assert recipe.optim.epochs is not None  # a recipe names one of the two
    return recipe.optim.epochs * -(-packs.per_epoch // recipe.data.global_batch)


def estimate_line(figures: dict[str, Any]) -> str:
    """The line that recipes carry, and that a test compares with the planner."""
    if figures["device"] == "cpu":
        return f"estimate: {figures['memory_gb']:.1f} GB  {figures['step_flops'] / 1e9:.0f} GFLOP a step"
    return (
        f"estimate: {figures['gpus']:>2} x {figures['gpu']}  {figures['memory_gb']:.0f} GB"
        f"{'' if figures['fits'] else ' (does not fit)'}  {figures['step_seconds']:.1f} s a step  "
        f"{figures['tokens_per_s'] / 1000:.1f}k tokens/s  (MFU {figures['mfu']:.0%})"
    )


def describe(figures: dict[str, Any]) -> str:
    """The table for people."""
    rows = [f"{name:<17} {size / 1e9:8.2f} GB" for name, size in figures["memory"].items()]
    shape = figures["shape"]
    head = (
        f"a microbatch: {shape['num_tokens']} tokens in {shape['num_documents']} documents, "
        f"{shape['num_images']} images; {figures['microbatches']} of them a rank and step"
    )
    peak = f"{'peak':<17} {figures['memory_gb']:8.2f} GB in {figures['peak_place']}"
    return "\n".join([head, *rows, peak, estimate_line(figures)])


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe(parser)
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[1], metavar="N", help="one or several numbers"
    )
    parser.add_argument("--gpu", choices=list(GPUS), default=DEFAULT_GPU)
    parser.add_argument("--mfu", type=float, help="assumed share of the peak, instead of the roofline's")
    parser.add_argument("--measure", action="store_true", help="run it here, prediction beside measurement")
    parser.add_argument("--json", action="store_true")
    options = parse(parser, arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if options.measure:
            from .measure import measure

            config, datasets, _ = open_for_planning(recipe)
            figures: Any = measure(recipe, config, datasets)
            text = "\n".join(f"{name:<24} {value:.4g}" for name, value in figures.items())
        else:
            plans = plan(recipe, gpus=options.gpus, gpu=options.gpu, mfu=options.mfu)
            figures = plans if len(plans) > 1 else plans[0]
            text = "\n\n".join(map(describe, plans))
            hint = pointer(options.recipe, plans[-1])
            text = "\n".join([*plans[0]["assumed"], text, *hint])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures) if options.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
