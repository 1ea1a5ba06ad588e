"""Rehearse a recipe's step at full size on GPUs that are not there: memory, waits, collectives, time.

    python pipelines/rehearse.py pipelines/recipes/sft.yaml --gpus 64 [--gpu h100] [--json]
    python pipelines/rehearse.py pipelines/recipes/qwen3_vl_sft.yaml --gpus 8 --max-tokens 8192

The recipe's model, OmniLMM or any class of transformers, is built without memory and distributed by the same
code as in training, over a pretended process group; then one rank plays a step, of two microbatches if there
are several, under torch's FakeTensorMode (pipelines.rehearsal): less than a minute and a gigabyte for a 12B.

What it cannot see: the allocator's gaps, kernels slower than the roofline, a wait inside a library's C++
code, the memory of kernels that are not installed here (flash-linear-attention, causal-conv1d).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # a file run by its path (PEP 366); the folder is `omnipipelines` in a wheel
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = Path(__file__).resolve().parent.name

from transformers import PreTrainedConfig

from omnidata.plan.cost import DEFAULT_GPU, GPUS
from omnidata.schema import UserError

from .command import add_recipe, parse
from .config import LoraConfig, Recipe, load_recipe
from .packs import packs_of
from .planning import open_for_planning
from .rehearsal import peak_of, rehearse


def advise(
    recipe: Recipe, config: PreTrainedConfig, datasets: list[Any], report: dict[str, Any]
) -> dict[str, float | str]:
    """Change -> gigabytes that it saves by its own rehearsal, or why it is not possible."""
    savings: dict[str, float | str] = {}
    for words, changed in changes(recipe):
        try:
            peak = peak_of(changed, config, packs_of(changed, config, datasets), gpus=report["gpus"])
        except UserError as error:
            savings[words] = str(error)
        else:
            savings[words] = report["memory_gb"] - sum(peak.values()) / 1e9
    return savings


def changes(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """What may make a recipe fit, in the words of an override, and the recipe with it."""
    model, data = recipe.model, recipe.data
    for mode in ("selective", "full") if model.activation_checkpointing == "none" else ("full",):
        if model.activation_checkpointing != mode:
            words = f"model.activation_checkpointing={mode}"
            yield words, _with(recipe, "model", activation_checkpointing=mode)
    if not recipe.parallel.sync_every_microbatch:
        words = "parallel.sync_every_microbatch=true"
        yield words, _with(recipe, "parallel", sync_every_microbatch=True)
    if recipe.parallel.reduce_dtype == "float32":
        words = "parallel.reduce_dtype=bfloat16"
        yield words, _with(recipe, "parallel", reduce_dtype="bfloat16")
    if recipe.parallel.strategy == "hsdp":
        words = "parallel.strategy=fsdp parallel.shard_size=null"
        yield words, _with(recipe, "parallel", strategy="fsdp", shard_size=None)
    half = {"max_tokens": data.max_tokens // 2}
    if data.max_images is not None:
        half["max_images"] = data.max_images // 2
    yield " ".join(f"data.{name}={value}" for name, value in half.items()), _with(recipe, "data", **half)
    if model.lora is None and importlib.util.find_spec("peft"):
        frozen = sorted({*model.freeze, "vision_tower", "embeddings", "lm_head"})
        words = f"model.lora={{}} model.freeze=[{', '.join(frozen)}]"
        yield words, _with(recipe, "model", lora=LoraConfig(), freeze=frozen)


def _with(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})


def describe(report: dict[str, Any]) -> str:
    """The report for people."""
    shape = report["shape"]
    lines = [
        f"a microbatch: {shape['num_tokens']} tokens in {shape['num_documents']} documents, "
        f"{shape['num_images']} images; {report['microbatches']} a rank and step, at most two of them played"
    ]
    lines += [f"{kind:<17} {size / 1e9:8.2f} GB" for kind, size in report["memory"].items()]
    lines += [f"{'peak':<17} {report['memory_gb']:8.2f} GB in {report['peak_place']}"]
    lines += [f"{'  ' + phase:<28} {size:8.2f} GB" for phase, size in report["peaks_gb"].items()]
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
    lines.append(
        f"a step on {report['gpus']} x {report['gpu']}: {report['step_seconds']:.2f} s, "
        f"{report['exposed_seconds']:.2f} s of it waiting for other GPUs; MFU {report['possible_mfu']:.0%}"
    )
    if report["idle_gpus"]:
        lines.append(f"{report['idle_gpus']} GPUs have nothing to do: data.global_batch is less than --gpus")
    if not report["fits"]:
        lines.append("does not fit; by rehearsals of their own:")
    for words, saved in report.get("advice", {}).items():
        result = f"saves {saved:.1f} GB" if isinstance(saved, float) else f"is not possible: {saved}"
        lines.append(f"  {words} {result}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe(parser)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", choices=list(GPUS), default=DEFAULT_GPU)
    parser.add_argument("--shard-size", type=int, help="strategy hsdp with groups of this size")
    parser.add_argument("--max-tokens", type=int, help="of a microbatch, instead of the recipe's")
    parser.add_argument("--max-images", type=int)
    parser.add_argument("--json", action="store_true")
    options = parse(parser, arguments)
    overrides = list(options.overrides)
    if options.shard_size:
        overrides += ["parallel.strategy=hsdp", f"parallel.shard_size={options.shard_size}"]
    for name in ("max_tokens", "max_images"):
        if (value := getattr(options, name)) is not None:
            overrides.append(f"data.{name}={value}")
    try:
        recipe = load_recipe(options.recipe, overrides)
        config, datasets, assumed = open_for_planning(recipe)
        packs = packs_of(recipe, config, datasets)
        report = rehearse(recipe, config, packs, gpus=options.gpus, gpu=options.gpu)
        if not report["fits"]:
            report["advice"] = advise(recipe, config, datasets, report)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    assumed += report.pop("assumed")
    print(
        json.dumps(report | {"assumed": assumed}) if options.json else "\n".join([*assumed, describe(report)])
    )
    return 0 if report["fits"] and not report["hangs"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
