"""Training speed of our loop beside Hugging Face's Trainer: samples/s at equal loss curves.

    python benchmarks/train.py [--steps 18] [--batch 8] [--device cuda] [--json]

One tiny model in the proportions of stage 2 of the 12B (images through a frozen tower, a language model
that learns), the same weights, and step by step the same samples, so the loss curves must agree:

    ours, packed        packs from built shards
    HF Trainer          the step's samples in padded batches of --batch, in random order; a lazy dataset
                        opens, resizes and tokenizes every sample when it is asked for, as MiniCPM-V's own
                        finetune.py does (which takes batches of 2 and no worker; LLaVA's takes 16)
    ours, unpacked      the same documents, each a microbatch of its own

Texts are as long as in benchmarks/plan.py: log-normal, around 200 tokens. Every contender runs in
a process of its own, with as many loader workers and torch's own number of threads. CPU seconds count the
workers too: on a busy machine trust their ratio. On a GPU the model is one of 1.1 billion parameters, packs
have 8,192 tokens and a step four of them. See also benchmarks/train_gpu.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from train_peers import run_trainer
from train_setup import SETUPS, WARMUP_STEPS, Clock, make_corpus, rate, recipe_of

from omnidata.loader.loader import PackLoader
from omnidata.loader.microbatch import Microbatch
from pipelines import train

# --- ours -------------------------------------------------------------------------------------------------


def run_ours(folder: Path, options: argparse.Namespace, *, unpacked: bool) -> dict[str, Any]:
    """Train with our loop, which asks for the next step's microbatches when a step has ended."""
    recipe = recipe_of(folder, f"ours-{unpacked}", SETUPS[options.device], steps=options.steps)
    original, ends = train.grouped, []

    def timed(loader: PackLoader) -> Iterator[Iterator[Microbatch]]:
        for step in original(loader):
            yield (d for m in step for d in documents(m)) if unpacked else step
            ends.append(time.perf_counter())

    train.grouped = timed
    with Clock() as clock:
        train.train(recipe)
    lines = [json.loads(line) for line in (Path(recipe.run.dir) / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(line["seconds"] for line in lines[WARMUP_STEPS:])
    return {
        **rate([line["samples"] for line in lines], ends),
        "data_wait": sum(line["data_wait"] * line["seconds"] for line in lines[WARMUP_STEPS:]) / seconds,
        "padding": 0.0,
        "cpu_seconds": clock.cpu,
        "losses": [line["loss"] for line in lines],
    }


def documents(microbatch: Microbatch) -> Iterator[Microbatch]:
    """Every document of a pack as a microbatch of its own."""
    bounds = microbatch.cu_seqlens.tolist()
    for start, stop, key in zip(bounds, bounds[1:], microbatch.keys, strict=False):
        mine = (microbatch.image_positions >= start) & (microbatch.image_positions < stop)
        yield replace(
            microbatch,
            **{
                name: getattr(microbatch, name)[start:stop]
                for name in ("input_ids", "labels", "position_ids")
            },
            cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32),
            max_seqlen=stop - start,
            images=microbatch.images[mine],
            image_positions=microbatch.image_positions[mine] - start,
            keys=(key,),
        )


# --- side by side -----------------------------------------------------------------------------------------

CONTENDERS = {
    "ours, packed": lambda folder, options: run_ours(folder, options, unpacked=False),
    "HF Trainer": run_trainer,
    "ours, unpacked": lambda folder, options: run_ours(folder, options, unpacked=True),
}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All contenders, one after the other, and what ours gains over each."""
    with tempfile.TemporaryDirectory() as name:
        image_size = SETUPS[options.device].model["image_size"]
        make_corpus(Path(name), records=options.records, image_size=image_size)
        results = {contender: in_a_process(contender, Path(name)) for contender in options.contenders}
    ours = next(iter(results.values()))
    curve = np.array(ours["losses"])
    for result in results.values():
        losses = np.array(result.pop("losses"))
        result["first_loss"], result["last_loss"] = losses[0], losses[-1]
        result["mean_loss_difference"] = np.abs(losses - curve).mean()
        result["max_loss_difference"] = np.abs(losses - curve).max()
        result["ours_is_faster"] = ours["samples_per_s"] / result["samples_per_s"]
        result["ours_cpu_saving"] = result["cpu_seconds"] / ours["cpu_seconds"]
    return results


def in_a_process(contender: str, folder: Path) -> dict[str, Any]:
    """Denormals, allocator and threads of one are no concern of the next."""
    command = [sys.executable, __file__, *sys.argv[1:], "--run", contender, str(folder)]
    print(contender, "...", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads((folder / "result.json").read_text())


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=400)
    parser.add_argument("--steps", type=int, default=WARMUP_STEPS + 16)
    parser.add_argument("--device", choices=list(SETUPS), default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="of the Trainer, about")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        contender, folder = options.run[0], Path(options.run[1])
        (folder / "result.json").write_text(json.dumps(CONTENDERS[contender](folder, options)))
        return
    report = compare(options)
    if options.json:
        print(json.dumps(report))
        return
    for name, figures in report.items():
        print(name)
        for key, value in figures.items():
            print(f"    {key:<24} {value:.4g}")


if __name__ == "__main__":
    main()
