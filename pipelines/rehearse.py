"""Rehearse a recipe's step at full size on GPUs that are not there: memory, waits, collectives, time.

    python pipelines/rehearse.py pipelines/recipes/sft.yaml --gpus 64 [--gpu h100] [--json]
    python pipelines/rehearse.py pipelines/recipes/sft.yaml --gpus 8 --max-tokens 8192 --max-images 32

The recipe's model is built without memory and distributed by the same code as in training, over a pretended
process group; then one rank plays a step, of two microbatches if there are several, under torch's
FakeTensorMode. Minutes for a 12B, and less than a gigabyte.

What it cannot see: CUDA's context and the allocator's gaps (plan 5 % for them), kernels slower than the
roofline, a wait inside a library's C++ code.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from omnidata.plan.cost import DEFAULT_GPU, GPUS
from omnidata.schema import UserError
from omnimodel import OmniLMMConfig
from omnimodel.attention import as_on_gpu
from omnimodel.blocks import checkpoint_blocks, transformer_blocks
from pipelines.config import Recipe, load_recipe
from pipelines.ema import Ema
from pipelines.memory import Shape, shape_of
from pipelines.model import choose_trainable, new_model
from pipelines.optim import build_optimizer, clip_gradients
from pipelines.parallel import World, distribute, mesh_of, reduce_gradients
from pipelines.plan_memory import GPU_MEMORY, open_for_planning
from pipelines.playback import Playback

# Bytes a second of the memory and of one GPU's links to others, by the makers' data sheets (NVLink inside a
# node, both ways together halved; PCIe for cards that have no NVLink).
MEMORY_RATE = {
    **{"b200": 8.0e12, "h200": 4.8e12, "h100": 3.35e12, "a100": 2.0e12, "l40s": 0.86e12, "rtx4090": 1.0e12}
}
LINK_RATE = {"b200": 900e9, "h200": 450e9, "h100": 450e9, "a100": 300e9, "l40s": 32e9, "rtx4090": 32e9}
REACHED = 0.79  # of the data sheet's matrix rate: 776 of 989 TFLOP/s measured on an H200
KERNELS = 0.77  # of that roofline, real kernels at real shapes: three measured steps lie within 3 % of it
ON_PURPOSE = (
    "pipelines/optim.py",
    "pipelines/rehearse.py",
    "pipelines/parallel.py",
)  # a step's figures, once


@contextlib.contextmanager
def pretended_world(recipe: Recipe, gpus: int) -> Iterator[World]:
    """Rank 0 of ``gpus`` ranks that are not there."""
    strategy = recipe.parallel.strategy
    if strategy in ("auto", "single"):
        strategy = "fsdp"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    device = torch.device("cpu")
    try:
        yield World(0, gpus, device, strategy, mesh_of(recipe, strategy, gpus, device))
    finally:
        dist.destroy_process_group()


def rehearse(
    recipe: Recipe, config: OmniLMMConfig, shape: Shape, *, gpus: int, gpu: str = DEFAULT_GPU
) -> dict[str, Any]:
    """Everything that the report shows, for rank 0 of ``gpus``; bytes, FLOPs, seconds."""
    microbatches = min(2, -(-recipe.data.global_batch // gpus))
    breaks = None
    with pretended_world(recipe, gpus) as world:
        playback = play(recipe, config, shape, world, microbatches=microbatches)
        kinds = {"with pictures": playback.collectives}
        if shape.num_images:
            without = dataclasses.replace(shape, num_images=0)
            try:
                text = play(recipe, config, without, world, microbatches=microbatches)
                kinds["text only"] = text.collectives
            except (AttributeError, RuntimeError) as error:  # FSDP misses what was never gathered
                breaks = f"a rank with text only cannot do the step: {error}"
    purposely = {place: n for place, n in playback.waits.items() if place.startswith(ON_PURPOSE)}
    return {
        "gpus": gpus,
        "gpu": gpu,
        "microbatches": microbatches,
        "shape": dataclasses.asdict(shape),
        "memory": {kind: size for kind, size in playback.peak.items() if size},
        "memory_gb": sum(playback.peak.values()) / 1e9,
        "peak_place": playback.peak_place,
        "fits": sum(playback.peak.values()) * 1.05 <= 0.95 * GPU_MEMORY[gpu],
        "waits": {place: n for place, n in playback.waits.items() if place not in purposely},
        "waits_on_purpose": purposely,
        "flops": dict(playback.flops),
        "collectives": summary(playback.collectives),
        "hangs": breaks or first_difference(kinds),
        "refusals": dict(playback.refusals),
        **roofline(playback, gpus=gpus, gpu=gpu),
    }


def play(
    recipe: Recipe, config: OmniLMMConfig, shape: Shape, world: World, *, microbatches: int = 2
) -> Playback:
    """Two steps of one rank. The second, which has Adam's moments from the start, is the one that is told."""
    playback = Playback()
    model, wrapped = build(recipe, config, world)  # outside: random starts read values, also on "meta"
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_gpu():
        model.to_empty(device=world.device)
        optimizer = build_optimizer(model, recipe.optim)
        for group in optimizer.param_groups:
            group |= {"fused": True, "foreach": None}  # as on a GPU
        ema = Ema(model, recipe.optim.ema) if recipe.optim.ema else None
        inputs = fake_inputs(config, shape)
        hooks = watch(model, playback)
        with playback:
            playback.assign("parameters", [*model.parameters(), *model.buffers()])
            playback.assign("average", ema.state_dict().values() if ema else [])
            step(recipe, model, wrapped, optimizer, [inputs], playback)  # makes the moments
            moments = [x for state in optimizer.state.values() for x in state.values()]
            playback.assign("optimizer", [x for x in moments if isinstance(x, torch.Tensor)])
            playback.restart()
            step(recipe, model, wrapped, optimizer, [inputs] * microbatches, playback)
        for hook in hooks:
            hook.remove()
    return playback


def build(recipe: Recipe, config: OmniLMMConfig, world: World) -> tuple[nn.Module, nn.Module]:
    """As pipelines.model does, but with no memory behind the parameters."""
    with torch.device("meta"):
        model = new_model(copy.deepcopy(config))
    model.train()
    choose_trainable(model, recipe)
    checkpoint_blocks(model, recipe.model.activation_checkpointing)
    return model, distribute(model, recipe, world, blocks=transformer_blocks(model))


def fake_inputs(config: OmniLMMConfig, shape: Shape) -> dict[str, Any]:
    """A microbatch that has shapes only; call under the fake mode."""
    size, ids = config.image_size, (1, shape.num_tokens)
    images = torch.empty(shape.num_images, 3, size, size, dtype=torch.uint8) if shape.num_images else None
    return {
        **{n: torch.empty(ids, dtype=torch.int64) for n in ("input_ids", "position_ids", "shift_labels")},
        "cu_seqlens": torch.empty(shape.num_documents + 1, dtype=torch.int32),
        "max_seqlen": -(-shape.num_tokens // shape.num_documents),
        "pixel_values": images,
        "num_supervised_tokens": shape.num_supervised,
        "num_supervised_rows": shape.num_supervised,
    }


def step(
    recipe: Recipe,
    model: nn.Module,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    microbatches: list[dict[str, Any]],
    playback: Playback,
) -> None:
    """What train.py's loop does: microbatches, clipping, update."""

    def enter(place: str) -> None:
        playback.place = playback.part = place

    for number, inputs in enumerate(microbatches, start=1):
        is_last = number == len(microbatches)
        with reduce_gradients(wrapped, now=is_last or recipe.parallel.sync_every_microbatch):
            enter(f"forward of microbatch {number}")
            loss = wrapped(**inputs).loss
            enter(f"backward of microbatch {number}")
            loss.backward()
    enter("clipping")
    clip_gradients([p for p in model.parameters() if p.requires_grad], recipe.optim.clip)
    enter("update")
    optimizer.step()
    optimizer.zero_grad()


def watch(model: nn.Module, playback: Playback) -> list[Any]:
    """Hooks that tell the playback which part runs, and which tensors are gradients."""
    hooks = []

    def entering(name: str) -> Any:
        def enter(*_: Any) -> None:
            playback.part = name.split(".")[1] if "." in name else name
            playback.place = f"{playback.place.split(',')[0]}, {name}"

        return enter

    blocks = set(transformer_blocks(model))
    for name, module in model.named_modules():
        if module in blocks or name in ("lm_head", "model.resampler", "model.embed_tokens"):
            hooks.append(module.register_forward_pre_hook(entering(name)))
            hooks.append(module.register_full_backward_pre_hook(entering(name)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            hooks.append(
                parameter.register_post_accumulate_grad_hook(lambda p: playback.assign("gradients", [p.grad]))
            )
    return hooks


# --- what it means ----------------------------------------------------------------------------------------


def first_difference(kinds: dict[str, list[tuple[str, int]]]) -> str | None:
    """Why ranks of different kinds would wait for each other for ever, or None."""
    (first, ours), *others = kinds.items()
    for name, theirs in others:
        for number, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            if a != b:
                return f"collective {number}: {a[0]} of {a[1]} bytes {first}, {b[0]} of {b[1]} bytes {name}"
        if len(ours) != len(theirs):
            return f"{len(ours)} collectives {first}, {len(theirs)} {name}"
    return None


def summary(collectives: list[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """Calls and bytes of each kind."""
    table: dict[str, dict[str, int]] = {}
    for name, size in collectives:
        row = table.setdefault(name, {"calls": 0, "bytes": 0})
        row["calls"] += 1
        row["bytes"] += size
    return table


def roofline(playback: Playback, *, gpus: int, gpu: str) -> dict[str, float]:
    """Seconds of the step: each kernel by its arithmetic or its bytes."""
    matrix, memory = REACHED * GPUS[gpu], MEMORY_RATE[gpu]
    compute = sum(max(flops / matrix, moved / memory) for flops, moved in playback.work) / KERNELS
    sent = sum(size for _, size in playback.collectives) if gpus > 1 else 0
    communication = sent / LINK_RATE[gpu]
    exposed = max(0.0, communication - compute)
    seconds = compute + exposed
    return {
        "compute_seconds": compute,
        "communication_seconds": communication,
        "exposed_seconds": exposed,
        "step_seconds": seconds,
        "possible_mfu": sum(playback.flops.values()) / (seconds * GPUS[gpu]),
    }


ADVICE = {
    "model.activation_checkpointing=full": {"model": {"activation_checkpointing": "full"}},
    "parallel.sync_every_microbatch=true": {"parallel": {"sync_every_microbatch": True}},
    "parallel.reduce_dtype=bfloat16": {"parallel": {"reduce_dtype": "bfloat16"}},
}


def advise(
    recipe: Recipe, config: OmniLMMConfig, shape: Shape, report: dict[str, Any], *, gpus: int
) -> dict[str, float]:
    """Change -> gigabytes that it saves by its own rehearsal."""
    savings = {}
    for words, sections in ADVICE.items():
        changes = {s: dataclasses.replace(getattr(recipe, s), **values) for s, values in sections.items()}
        changed = dataclasses.replace(recipe, **changes)
        if changed != recipe:
            with pretended_world(changed, gpus) as world:
                peak = play(changed, config, shape, world, microbatches=report["microbatches"]).peak
            savings[words] = report["memory_gb"] - sum(peak.values()) / 1e9
    half = dataclasses.replace(
        shape, **{name: max(1, value // 2) for name, value in dataclasses.asdict(shape).items()}
    )
    with pretended_world(recipe, gpus) as world:
        peak = play(recipe, config, half, world, microbatches=report["microbatches"]).peak
    return savings | {
        "half of data.max_tokens and max_images": report["memory_gb"] - sum(peak.values()) / 1e9
    }


def describe(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{kind:<14} {size / 1e9:8.2f} GB" for kind, size in report["memory"].items()]
    lines += [f"{'peak':<14} {report['memory_gb']:8.2f} GB in {report['peak_place']}"]
    lines += [f"{'flops':<14} {part:<24} {n / 1e12:10.2f} T" for part, n in report["flops"].items() if n]
    for name, row in report["collectives"].items():
        lines.append(f"{name:<28} {row['calls']:6} calls {row['bytes'] / 1e9:10.2f} GB")
    lines += [f"waits          {place} x {n}" for place, n in report["waits"].items()] or [
        "waits          none"
    ]
    for place, number in report["waits_on_purpose"].items():
        lines.append(f"on purpose     {place} x {number}")
    lines += [f"refused        {problem} x {n}" for problem, n in report["refusals"].items()]
    lines.append(f"will hang      {report['hangs'] or 'no: every kind of rank has the same collectives'}")
    step_of, exposed = f"a step of {report['microbatches']} microbatch(es)", report["exposed_seconds"]
    lines.append(
        f"{step_of} on {report['gpu']}: {report['step_seconds']:.2f} s, {exposed:.2f} s of it communication; "
        f"MFU {report['possible_mfu']:.0%}"
    )
    for words, saved in report.get("advice", {}).items():
        lines.append(f"does not fit   {words} saves {saved:.1f} GB")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="before the options")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", choices=list(GPUS), default=DEFAULT_GPU)
    parser.add_argument("--shard-size", type=int, help="strategy hsdp with groups of this size")
    parser.add_argument("--max-tokens", type=int, help="of a microbatch, instead of the recipe's")
    parser.add_argument("--max-images", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    overrides = list(options.overrides)
    if options.shard_size:
        overrides += ["parallel.strategy=hsdp", f"parallel.shard_size={options.shard_size}"]
    for name in ("max_tokens", "max_images"):
        if (value := getattr(options, name)) is not None:
            overrides.append(f"data.{name}={value}")
    try:
        recipe = load_recipe(options.recipe, overrides)
        config, dataset = open_for_planning(recipe)
        if not isinstance(config, OmniLMMConfig):
            raise UserError(
                "rehearse.py plays OmniLMM's steps only so far; plan_memory.py knows any class's weights"
            )
        shape = shape_of(recipe, config, dataset)
        report = rehearse(recipe, config, shape, gpus=options.gpus, gpu=options.gpu)
        if not report["fits"]:
            report["advice"] = advise(recipe, config, shape, report, gpus=options.gpus)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report) if options.json else describe(report))
    return 0 if report["fits"] and not report["hangs"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
