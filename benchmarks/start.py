"""Seconds, and seconds of CPU, from a command's start to its end on next to nothing: what users wait for.

    python benchmarks/start.py [--repeats 5] [--vocabularies Mistral Qwen] [--training] [--json]

A corpus of eight records, half of them with a picture that is shrunk, is built with a throw-away vocabulary
and with Mistral's and Qwen's real ones, then inspected, planned and verified; each command is a process of
its own. Its CPU is that of all processes that it starts, also of those that outlive it for a moment (the
server from which workers are forked). The smallest of the repeats counts. ``--training``: a tiny Qwen3-VL's
processor too, one step of train.py, from its start to the end of ``final/``, and one word of generate.py.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

from processors import save_model
from tiny_corpus import write_corpus
from tiny_recipe import tiny_recipe, write_recipe
from vocabularies import NAMES, prepared

ROOT = Path(__file__).resolve().parents[1]
PR_SET_CHILD_SUBREAPER = 36  # children of ended children become ours (Linux)


def commands(folder: Path, vocabularies: Sequence[str]) -> dict[str, list[str]]:
    """Name -> arguments; the first one writes what the others read."""
    corpus = write_corpus(folder / "corpus", num_llava=6, num_chat=2, bad=False)
    settings, data = corpus.settings, str(folder / "data")
    build = ["build-shards", *settings.source, "--out", data, "--quiet", "--workers", "1"]
    build += ["--image-root", str(settings.image_root), "--image-size", "32", "--overwrite", "--tokenizer"]
    for name in vocabularies:
        prepared(name, folder / name)
    return {
        "--help": ["--help"],
        **{f"build-shards, {name}": [*build, str(folder / name)] for name in vocabularies},
        "build-shards, 8 records": [*build, settings.tokenizer],
        "inspect": ["inspect", data],
        "inspect --sample 0": ["inspect", data, "--sample", "0"],
        "plan": ["plan", data],
        "verify": ["verify", data, "--quiet"],
    }


def training(folder: Path) -> dict[str, list[str]]:
    """The same of commands that need torch, on the data that ``commands`` built."""
    build = ["build-shards", str(folder / "corpus" / "llava.json"), "--out", str(folder / "data-processor")]
    build += ["--image-root", str(folder / "corpus" / "photos"), "--quiet", "--workers", "1", "--overwrite"]
    tree = tiny_recipe(folder / "data", folder / "run", data={"max_tokens": 2048}, optim={"steps": 1})
    tree["optim"]["warmup_steps"] = 0
    tree["model"]["config"]["max_position_embeddings"] = 2048
    recipe = write_recipe(folder / "recipe.yaml", tree)
    ask = ["--model", str(folder / "run" / "final"), "--question", "Who?", "--max-new-tokens", "1"]
    return {
        "build-shards --model": [*build, "--model", save_model("qwen3_vl", folder / "model")],
        "train.py, 1 step": ["pipelines/train.py", str(recipe)],
        "generate.py, 1 word": ["pipelines/generate.py", *ask],
    }


def seconds(arguments: list[str]) -> tuple[float, float]:
    """(wall, CPU of the process and of all that it started) of one run."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    program = [] if arguments[0].endswith(".py") else ["-m", "omnidata"]
    start, before = time.perf_counter(), os.times()
    subprocess.run(
        [sys.executable, *program, *arguments],
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env=environment | {"PYTHONPATH": paths},
    )
    wall = time.perf_counter() - start
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, used


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="the smallest of so many counts")
    parser.add_argument("--vocabularies", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--training", action="store_true", help="also what imports torch")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    result = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = commands(folder, options.vocabularies)
        for command, arguments in (measured | (training(folder) if options.training else {})).items():
            runs = []
            for _ in range(options.repeats):
                if command.startswith("train.py"):  # or the run would be complete
                    shutil.rmtree(folder / "run", ignore_errors=True)
                runs.append(seconds(arguments))
            wall, used = (min(column) for column in zip(*runs, strict=True))
            result[command] = {"s": round(wall, 2), "CPU s": round(used, 2)}
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for command, taken in result.items():
        print(f"{command:26} {taken['s']:6.2f} s {taken['CPU s']:6.2f} s of CPU")


if __name__ == "__main__":
    main()
