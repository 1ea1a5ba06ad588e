"""MFU of a full-width OmniLMM on one GPU, and where the time goes.

    python benchmarks/train_gpu.py [--layers 12] [--checkpointing selective] [--compile] [--json]

OmniLMM-12B's widths with as many language-model layers as asked for, stages align and sft with a frozen
tower, 448² images, packs of 8k tokens, FSDP on one rank (bf16 compute, fp32 masters). Random data: what is
measured is the model, its loss and the update. Beside it: the device's own matrix-product rate, the data
sheet's peak, and the planner's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from omnimodel import OmniLMMConfig
from pipelines.config import Recipe, parse_recipe
from pipelines.flops import peak_flops
from pipelines.measure import random_inputs
from pipelines.memory import Shape, estimate
from pipelines.model import build_model
from pipelines.optim import build_optimizer, clip_gradients
from pipelines.parallel import start

STAGES = {"align": ["vision_tower", "language_model"], "sft": ["vision_tower"]}
SHAPE = Shape(num_tokens=8192, num_images=24, num_documents=20, num_supervised=2400)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both stages, and what the device can do at all."""
    device = torch.device("cuda", 0)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "gemm_flops": gemm_rate(device),
        "peak_flops": peak_flops(device),
    }
    # One rank's environment, as torchrun would make it.
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    os.environ.setdefault("MASTER_PORT", "29511")
    for stage, frozen in STAGES.items():
        report[stage] = measure_stage(recipe_of(frozen, options), options.layers)
        torch.cuda.empty_cache()
    return report


def recipe_of(frozen: list[str], options: argparse.Namespace) -> Recipe:
    """A stage as a recipe with random weights."""
    model = {"activation_checkpointing": options.checkpointing, "compile": options.compile}
    return parse_recipe(
        {
            "run": {"dir": "unused", "dtype": "bfloat16"},
            "data": {"train": [{"path": "unused"}], "max_tokens": SHAPE.num_tokens},
            "model": {"config": {}, "freeze": frozen, **model},
            "optim": {"steps": 1},
            "parallel": {"strategy": "fsdp"},
        }
    )


def measure_stage(recipe: Recipe, layers: int) -> dict[str, float]:
    """One stage of the full-width model."""
    config = OmniLMMConfig(vocab_size=32009, num_hidden_layers=layers)
    torch.cuda.reset_peak_memory_stats()
    with start(recipe) as world:
        built = build_model(recipe, config, world)
        optimizer = build_optimizer(built.model, recipe.optim)
        inputs = random_inputs(config, SHAPE, world.device)
        seconds = min(step(built.model, optimizer, inputs) for _ in range(8))
        memory = torch.cuda.max_memory_allocated()
        forward = min(time_forward(built.model, inputs) for _ in range(5))
        images = min(time_images(built.model, inputs["pixel_values"]) for _ in range(5))
        peak = peak_flops(world.device) or float("nan")
    lengths = [SHAPE.num_tokens / SHAPE.num_documents] * SHAPE.num_documents
    flops = built.flop_count.of(lengths, images=SHAPE.num_images, supervised=SHAPE.num_supervised)
    planned = estimate(recipe, config, SHAPE, num_ranks=1, device="cuda", microbatches=1)
    return {
        "mfu": flops / seconds / peak,
        "tokens_per_s": SHAPE.num_tokens / seconds,
        "images_per_s": SHAPE.num_images / seconds,
        "step_seconds": seconds,
        "forward_seconds": forward,
        "tower_and_resampler_seconds": images,
        "memory_gb": memory / 1e9,
        "planned_memory_gb": (planned.total - planned.overhead) / 1e9,
    }


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Any]) -> float:
    """Seconds of a whole step."""
    with _Seconds() as clock:
        model(**inputs).loss.backward()
        clip_gradients([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return clock.seconds


@torch.no_grad()
def time_forward(model: torch.nn.Module, inputs: dict[str, Any]) -> float:
    """Seconds of the forward pass."""
    with _Seconds() as clock:
        model(**inputs)
    return clock.seconds


@torch.no_grad()
def time_images(model: Any, images: torch.Tensor) -> float:
    """Seconds of tower and resampler in the forward pass, by the difference of hooks around them."""
    with _Seconds() as clock, torch.autocast("cuda", torch.bfloat16):
        model.unshard() if hasattr(model, "unshard") else None
        model.model.encode_images(images)
    return clock.seconds


class _Seconds:
    """Wall-clock seconds of the GPU's work inside the block."""

    def __enter__(self) -> _Seconds:
        torch.cuda.synchronize()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._started


def gemm_rate(device: torch.device, *, size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a large bf16 matrix product: what this very device can do."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    with _Seconds() as clock:
        for _ in range(repeats):
            torch.mm(a, b)
    return 2 * size**3 * repeats / clock.seconds


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12, help="of the language model")
    parser.add_argument("--checkpointing", default="none", choices=["none", "selective", "full"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    report = measure(options)
    if options.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        if isinstance(value, dict):
            print(name, *(f"    {key:<28} {figure:.4g}" for key, figure in value.items()), sep="\n")
        else:
            print(f"{name:<12} {value}")


if __name__ == "__main__":
    main()
