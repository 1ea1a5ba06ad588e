"""Seconds of a rehearsed step: each kernel by its arithmetic or its bytes, beside what the links carry."""

from __future__ import annotations

from omnidata.plan.cost import GPUS

from .config import ParallelConfig, Recipe
from .playback import Playback

# By the makers' data sheets: bytes of memory, and bytes per second of it and of one GPU's links to the others
# of its node (NVLink, both ways together halved; PCIe for cards that have no NVLink).
GPU_MEMORY = {"b200": 180e9, "h200": 141e9, "h100": 80e9, "a100": 80e9, "l40s": 48e9, "rtx4090": 24e9}
MEMORY_RATE = {
    **{"b200": 8.0e12, "h200": 4.8e12, "h100": 3.35e12, "a100": 2.0e12, "l40s": 0.86e12, "rtx4090": 1.0e12}
}
LINK_RATE = {"b200": 900e9, "h200": 450e9, "h100": 450e9, "a100": 300e9, "l40s": 32e9, "rtx4090": 32e9}
NETWORK_RATE = 50e9  # between nodes: one 400 Gb/s adapter a GPU
NODE = 8  # GPUs
MATRIX_REACHED = 0.785  # of the data sheet's matrix rate: 776 of 989 TFLOP/s measured on an H200
# Of the data sheet's memory rate, eager kernels at real shapes: with it seven steps that an H200 measured
# (benchmarks/rehearsal.py) lie within 7 %, two classes whose shares of products and copies differ.
MEMORY_REACHED = 0.48
COMPILED = 0.94  # of an eager step's seconds: 0.804 of 0.855 s measured


def roofline(
    recipe: Recipe, playback: Playback, *, gpus: int, gpu: str, microbatches: int
) -> dict[str, float]:
    """Seconds of a step of so many microbatches, and of its communication as far as nothing hides it.

    Of a step with accumulation two microbatches were played: one whose gradients stay, and the last.
    """
    matrix, memory = MATRIX_REACHED * GPUS[gpu], MEMORY_REACHED * MEMORY_RATE[gpu]
    compute = sum(
        _times(phase, microbatches) * max(flops / matrix, moved / memory)
        for phase, flops, moved in playback.work
    )
    compute *= COMPILED if recipe.model.compile else 1.0
    communication = _communication(recipe.parallel, playback, gpus, gpu, microbatches) if gpus > 1 else 0.0
    exposed = max(0.0, communication - compute)
    return {
        "compute_seconds": compute,
        "communication_seconds": communication,
        "exposed_seconds": exposed,
        "step_seconds": compute + exposed,
    }


def _times(phase: str, microbatches: int) -> int:
    return max(1, microbatches - 1) if phase.endswith("of microbatch 1") else 1


def _communication(
    parallel: ParallelConfig, playback: Playback, gpus: int, gpu: str, microbatches: int
) -> float:
    """Gathers and scatters stay in their group, reductions over all ranks send everything twice."""
    in_node, between = LINK_RATE[gpu], min(NETWORK_RATE, LINK_RATE[gpu])
    group = parallel.shard_size if parallel.strategy == "hsdp" else gpus
    of_group, of_all = (in_node if size <= NODE else between for size in (group or gpus, gpus))
    return sum(
        _times(phase, microbatches) * (2 * size / of_all if "allreduce" in name else size / of_group)
        for phase, (name, size) in zip(playback.phases, playback.collectives, strict=True)
    )
