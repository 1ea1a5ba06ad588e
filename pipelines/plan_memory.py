"""What a recipe will need: memory and time, on any number of GPUs, without having any.

    python pipelines/plan_memory.py pipelines/recipes/sft.yaml --gpus 1 8 64
    python pipelines/plan_memory.py pipelines/recipes/tiny_cpu.yaml --measure

Memory is traced (pipelines.memory). Time is model FLOPs over the data sheet's peak times an assumed MFU.
``--measure`` runs the recipe's model here on random microbatches, prints prediction beside measurement, and
the seconds of a step at this machine's own rate, which it takes from smaller ones.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pyarrow.compute as pc

from omnidata import Dataset
from omnidata.plan.cost import DEFAULT_GPU, DEFAULT_MFU, GPUS
from omnidata.schema import MANIFEST, UserError
from omnimodel import OmniLMMConfig, OmniLMMForCausalLM
from pipelines.config import Recipe, load_recipe
from pipelines.data import model_config
from pipelines.flops import count_flops
from pipelines.memory import NOTHING, Shape, Traced, estimate, planned_model, shape_of

GPU_MEMORY = {"b200": 180e9, "h200": 141e9, "h100": 80e9, "a100": 80e9, "l40s": 48e9, "rtx4090": 24e9}
PUBLISHED = {"vocab_size": 32009}  # OmniLMM-12B; everything else is OmniLMMConfig's default


def open_for_planning(recipe: Recipe) -> tuple[OmniLMMConfig, Dataset | None]:
    """The model's configuration, and the first dataset if it is built; what is missing is assumed."""
    source = recipe.data.train[0]
    dataset = Dataset(source.path, source.split) if (Path(source.path) / MANIFEST).exists() else None
    if dataset is not None and not dataset.manifest.is_omnilmm:
        return model_config(recipe, dataset), dataset
    if recipe.model.path is not None:
        known = (Path(recipe.model.path) / "config.json").exists()
        return OmniLMMConfig.from_pretrained(recipe.model.path) if known else OmniLMMConfig(
            **PUBLISHED
        ), dataset
    if dataset is not None:
        return model_config(recipe, dataset), dataset
    return OmniLMMConfig(**(PUBLISHED | recipe.model.config)), dataset


def step_flops(recipe: Recipe, model: OmniLMMForCausalLM, shape: Shape) -> float:
    """Model FLOPs of a whole step, over all ranks."""
    lengths = [shape.num_tokens / shape.num_documents] * shape.num_documents
    microbatch = count_flops(model).of(lengths, images=shape.num_images, supervised=shape.num_supervised)
    return recipe.data.global_batch * microbatch


def plan(
    recipe: Recipe, *, gpus: Sequence[int], gpu: str = DEFAULT_GPU, mfu: float = DEFAULT_MFU
) -> list[dict[str, Any]]:
    """Everything that the table shows, for each number of GPUs."""
    config, dataset = open_for_planning(recipe)
    if not isinstance(config, OmniLMMConfig):
        return [_plan_weights(recipe, config, dataset, gpus=n, gpu=gpu, mfu=mfu) for n in gpus]
    shape = shape_of(recipe, config, dataset)
    traced = Traced.of(recipe, config, shape)
    flops = step_flops(recipe, traced.model, shape_of(recipe, config, dataset, fullest=False))
    return [_plan_one(recipe, config, shape, traced, flops, gpus=n, gpu=gpu, mfu=mfu) for n in gpus]


def _plan_one(
    recipe: Recipe,
    config: OmniLMMConfig,
    shape: Shape,
    traced: Traced,
    flops: float,
    *,
    gpus: int,
    gpu: str,
    mfu: float,
) -> dict[str, Any]:
    microbatches = math.ceil(recipe.data.global_batch / gpus)
    memory = estimate(
        recipe, config, shape, num_ranks=gpus, device="cuda", microbatches=microbatches, traced=traced
    )
    # Ranks that have one microbatch less than others wait for them.
    busy = recipe.data.global_batch / (microbatches * gpus)
    seconds = flops / (gpus * GPUS[gpu] * mfu * busy)
    return {
        "gpus": gpus,
        "gpu": gpu,
        "mfu": mfu,
        "microbatches": microbatches,
        "shape": asdict(shape),
        "memory": asdict(memory),
        "memory_gb": memory.total / 1e9,
        "fits": memory.total <= 0.95 * GPU_MEMORY[gpu],
        "step_seconds": seconds,
        "tokens_per_s": recipe.data.global_batch * shape.num_tokens / seconds,
    }


def _plan_weights(
    recipe: Recipe, config: Any, dataset: Dataset, *, gpus: int, gpu: str, mfu: float
) -> dict[str, Any]:
    """The same for any other class: what its modules say, without activations, which are not traced yet."""
    traced = Traced(planned_model(recipe, config), NOTHING)
    microbatches = math.ceil(recipe.data.global_batch / gpus)
    memory = estimate(
        recipe, config, None, num_ranks=gpus, device="cuda", microbatches=microbatches, traced=traced
    )
    tokens, manifest = recipe.data.max_tokens, dataset.manifest
    share = tokens / manifest.num_tokens
    documents = max(1, round(manifest.num_samples * share))
    images, supervised = (round(n * share) for n in (manifest.num_images, manifest.num_supervised))
    values, features = (
        (pc.sum(pc.list_flatten(dataset.index[name])).as_py() or 0) * share
        for name in ("image_pixels", "image_tokens")
    )
    count = count_flops(traced.model)
    flops = count.of(
        [tokens / documents] * documents,
        images=images,
        supervised=supervised,
        pixel_values=values,
        features=features,
    )
    busy = recipe.data.global_batch / (microbatches * gpus)
    seconds = recipe.data.global_batch * flops / (gpus * GPUS[gpu] * mfu * busy)
    return {
        "gpus": gpus,
        "gpu": gpu,
        "mfu": mfu,
        "microbatches": microbatches,
        "shape": asdict(Shape(tokens, images, documents, max(1, supervised))),
        "memory": asdict(memory),
        "memory_gb": memory.total / 1e9,
        "without_activations": True,
        "fits": memory.total <= 0.95 * GPU_MEMORY[gpu],
        "step_seconds": seconds,
        "tokens_per_s": recipe.data.global_batch * tokens / seconds,
    }


def estimate_line(figures: dict[str, Any]) -> str:
    """The line that recipes carry, and that a test compares with the planner."""
    more = " and activations" if figures.get("without_activations") else ""
    return (
        f"estimate: {figures['gpus']:>2} x {figures['gpu']}  {figures['memory_gb']:.0f} GB{more}"
        f"{'' if figures['fits'] else ' (does not fit)'}  {figures['step_seconds']:.1f} s a step  "
        f"{figures['tokens_per_s'] / 1000:.1f}k tokens/s  (MFU {figures['mfu']:.0%} assumed)"
    )


def describe(figures: dict[str, Any]) -> str:
    """The table for people."""
    rows = [f"{name:<12} {size / 1e9:8.2f} GB" for name, size in figures["memory"].items()]
    shape = figures["shape"]
    head = (
        f"a microbatch: {shape['num_tokens']} tokens in {shape['num_documents']} documents, "
        f"{shape['num_images']} images; {figures['microbatches']} of them a rank and step"
    )
    return "\n".join([head, *rows, f"{'peak':<12} {figures['memory_gb']:8.2f} GB", estimate_line(figures)])


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="before the options")
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[1], metavar="N", help="one or several numbers"
    )
    parser.add_argument("--gpu", choices=list(GPUS), default=DEFAULT_GPU)
    parser.add_argument("--mfu", type=float, default=DEFAULT_MFU, help="assumed share of the peak")
    parser.add_argument("--measure", action="store_true", help="run it here, prediction beside measurement")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if options.measure:
            from pipelines.measure import measure

            figures = measure(recipe, *open_for_planning(recipe))
            text = "\n".join(f"{name:<24} {value:.4g}" for name, value in figures.items())
        else:
            plans = plan(recipe, gpus=options.gpus, gpu=options.gpu, mfu=options.mfu)
            figures = plans if len(plans) > 1 else plans[0]
            text = "\n\n".join(map(describe, plans))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures) if options.json else text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
