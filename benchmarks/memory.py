"""What plan_memory.py predicts beside what this machine then does: memory and time.

    python benchmarks/memory.py [--steps 8] [--json]

    memory    peak of one full microbatch with its update, traced without numbers; measured as the process's
    seconds   the same microbatch, from this machine's rate on smaller ones; measured as the fastest of three
    step      a whole step, from the same rate; measured as the median step of train.py on real data

The model and the data are those of benchmarks/train.py. Every measurement has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_setup import SETUPS, WARMUP_STEPS, make_corpus, recipe_of

from pipelines.config import to_yaml

PIPELINES = Path(__file__).resolve().parents[1] / "pipelines"


def compare(folder: Path, *, steps: int) -> dict[str, dict[str, float]]:
    """Predicted and measured figures, and their ratio."""
    setup = SETUPS["cpu"]
    make_corpus(folder, records=400, image_size=setup.model["image_size"])
    recipe = folder / "recipe.yaml"
    recipe.write_text(to_yaml(recipe_of(folder, "run", setup, steps=WARMUP_STEPS + steps)))
    planned = json.loads(script("plan_memory.py", recipe, "--measure", "--json"))
    script("train.py", recipe)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    step = statistics.median(line["seconds"] for line in lines[WARMUP_STEPS:])
    pairs = {
        "memory_gb": (planned["predicted_memory_gb"], planned["measured_memory_gb"]),
        "seconds": (planned["predicted_seconds"], planned["measured_seconds"]),
        "step_seconds": (planned["step_seconds"], step),
    }
    return {
        name: {"predicted": predicted, "measured": measured, "ratio": predicted / measured}
        for name, (predicted, measured) in pairs.items()
    }


def script(name: str, *arguments: Any) -> str:
    """What a pipeline script prints."""
    command = [sys.executable, str(PIPELINES / name), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8, help="timed, after the warm-up")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report = compare(Path(name), steps=options.steps)
    if options.json:
        print(json.dumps(report))
        return
    for name, figures in report.items():
        print(f"{name:<14}" + "  ".join(f"{key} {value:.3f}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
