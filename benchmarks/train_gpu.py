"""MFU of a full-width OmniLMM on one GPU, and where the time goes.

    python benchmarks/train_gpu.py [--layers 12] [--stages sft] [--checkpointing selective] [--compile]
    python benchmarks/train_gpu.py --toy       the same code at toy sizes on the CPU, to run every line once

OmniLMM-12B's widths with as many language-model layers as asked for, stages align and sft with a frozen
tower, 448² images, packs of 8k tokens, FSDP on one rank (bf16 compute, fp32 masters). Random data: what is
measured is the model, its loss and the update. Beside it: the device's own matrix-product rate, the data
sheet's peak, and what a rehearsal says of memory and time.
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

from omnidata.plan.cost import DEFAULT_GPU, GPUS
from omnimodel import OmniLMMConfig
from pipelines.config import Recipe, parse_recipe
from pipelines.data import model_inputs
from pipelines.flops import peak_flops
from pipelines.model import build_model
from pipelines.optim import build_optimizer, clip_gradients
from pipelines.packs import Packs, omnilmm_pack
from pipelines.parallel import start
from pipelines.planning import PUBLISHED
from pipelines.rehearsal import rehearse

STAGES = {"align": ["vision_tower", "language_model"], "sft": ["vision_tower"]}
SHAPE = {"tokens": 8192, "images": 24, "documents": 20, "supervised": 2400}
TOY_SHAPE = {"tokens": 256, "images": 2, "documents": 3, "supervised": 40}
TOY = {
    "mm_vision_tower": "vit_tiny_patch16_224",
    "vision_kwargs": {"depth": 3, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "img_size": 32},
    "image_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_query": 16,
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both stages, and what the device can do at all."""
    device = torch.device("cpu") if options.toy else torch.device("cuda", 0)
    report: dict[str, Any] = {
        "device": "toy sizes on a CPU: figures mean nothing"
        if options.toy
        else torch.cuda.get_device_name(device),
        "gemm_flops": gemm_rate(device, size=64 if options.toy else 8192),
        "peak_flops": peak_flops(device),
    }
    # One rank's environment, as torchrun would make it.
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    os.environ.setdefault("MASTER_PORT", "29511")
    for stage in options.stages:
        frozen = STAGES[stage]
        config = OmniLMMConfig(
            **PUBLISHED | {"num_hidden_layers": options.layers} | (TOY if options.toy else {})
        )
        shape = TOY_SHAPE if options.toy else SHAPE
        report[stage] = measure_stage(recipe_of(frozen, options), config, shape)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return report


def recipe_of(frozen: list[str], options: argparse.Namespace) -> Recipe:
    """A stage as a recipe with random weights."""
    model = {"activation_checkpointing": options.checkpointing, "compile": options.compile}
    return parse_recipe(
        {
            "run": {"dir": "unused", "dtype": "bfloat16", "device": "cpu" if options.toy else "cuda"},
            "data": {"train": [{"path": "unused"}]},
            "model": {"config": {}, "freeze": frozen, **model},
            "optim": {"steps": 1},
            "parallel": {"strategy": "fsdp"},
        }
    )


def measure_stage(recipe: Recipe, config: OmniLMMConfig, shape: dict[str, int]) -> dict[str, float]:
    """One stage of the full-width model."""
    pack = omnilmm_pack(config, **shape)
    rehearsed = rehearse(recipe, config, Packs(pack, pack, pack), gpus=1, gpu=gpu_name())
    with start(recipe) as world:
        on_gpu = world.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        built = build_model(recipe, config, world)
        optimizer = build_optimizer(built.model, recipe.optim)
        inputs = model_inputs(pack, world.device)
        seconds = min(step(built.model, optimizer, inputs) for _ in range(8))
        memory = torch.cuda.max_memory_allocated() if on_gpu else float("nan")
        forward = min(time_forward(built.model, inputs) for _ in range(5))
        images = min(time_images(built.model, inputs["pixel_values"]) for _ in range(5))
        peak = peak_flops(world.device) or float("nan")
    flops = built.flop_count.microbatch(pack)
    return {
        "mfu": flops / seconds / peak,
        "tokens_per_s": shape["tokens"] / seconds,
        "images_per_s": shape["images"] / seconds,
        "step_seconds": seconds,
        "forward_seconds": forward,
        "tower_and_resampler_seconds": images,
        "memory_gb": memory / 1e9,
        "rehearsed_memory_gb": rehearsed["memory_gb"],
        "rehearsed_step_seconds": rehearsed["step_seconds"],
    }


def gpu_name() -> str:
    """The rehearsal's name of this device; of another than it knows, the usual one."""
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    return next((gpu for gpu in GPUS if gpu in name.replace(" ", "")), DEFAULT_GPU)


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
    with _Seconds() as clock, torch.autocast(images.device.type, torch.bfloat16):
        model.unshard() if hasattr(model, "unshard") else None
        model.model.encode_images(images)
    return clock.seconds


class _Seconds:
    """Wall-clock seconds of the device's work inside the block."""

    def __enter__(self) -> _Seconds:
        _wait()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        _wait()
        self.seconds = time.perf_counter() - self._started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU, to run every line once")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; --toy runs its code at toy sizes on the CPU")
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
