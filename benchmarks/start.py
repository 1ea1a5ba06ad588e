"""Seconds, and seconds of CPU, from a command's start to its end on next to nothing: what users wait for.

    python benchmarks/start.py [--repeats 5] [--json]

A corpus of eight records, half of them with a picture that is shrunk, is built, then inspected, planned and
verified; each command is a process of its own, with what it starts. The smallest of the repeats counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny_corpus import write_corpus

ROOT = Path(__file__).resolve().parents[1]


def commands(folder: Path) -> dict[str, list[str]]:
    """Name -> arguments; the first one writes what the others read."""
    corpus = write_corpus(folder / "corpus", num_llava=6, num_chat=2, bad=False)
    settings, data = corpus.settings, str(folder / "data")
    build = ["build-shards", *settings.source, "--tokenizer", settings.tokenizer, "--out", data, "--quiet"]
    return {
        "--help": ["--help"],
        "build-shards, 8 records": [
            *build,
            *("--image-root", str(settings.image_root), "--image-size", "32", "--workers", "1"),
        ],
        "inspect": ["inspect", data],
        "inspect --sample 0": ["inspect", data, "--sample", "0"],
        "plan": ["plan", data],
        "verify": ["verify", data, "--quiet"],
    }


def seconds(arguments: list[str]) -> tuple[float, float]:
    """(wall, CPU of the process and of its children) of one run."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    start, before = time.perf_counter(), os.times()
    subprocess.run(
        [sys.executable, "-m", "omnidata", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": paths},
    )
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, used


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="the smallest of so many counts")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    options = parser.parse_args()
    result = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for command, arguments in commands(folder).items():
            runs = []
            for _ in range(options.repeats):
                if arguments[0] == "build-shards":
                    shutil.rmtree(folder / "data", ignore_errors=True)
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
