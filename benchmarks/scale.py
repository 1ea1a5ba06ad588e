"""What the one process at the head of many workers does itself: CPU a sample, a microbatch, a small file.

    python benchmarks/scale.py [--samples 4000] [--files 50000] [--loaders 16 32] [--workers 2]
                               [--vocabulary Mistral] [--only build load files] [--json]

It is what decides how far workers scale, and it can be counted on a small machine:

(1) build: CPU of the command itself and of its workers, a sample, between a quarter of the samples and all of
    them, so that the start does not count. ``workers at most`` is how many it would take to keep the command
    busy all the time.
(2) load: CPU of the training process per microbatch, with so many workers whose decoder sleeps instead of
    decoding (as if each had a core of its own), and the pictures per second of its workers that one training
    process could take.
(3) files: a dry run over so many JSON files of one record each: CPU of the command and of its workers per
    file, and what that makes of a million files on 16 cores.

What did not help is in docs/design_notes.md, "Scale".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build import Corpus, adopt_orphans, reap
from vocabularies import NAMES

from omnidata.loader import PackLoader
from omnidata.loader.squares import Squares

ROOT = Path(__file__).resolve().parents[1]
DECODE_SECONDS = 0.0025  # a picture: decode and resize of a 640x480 JPEG on one core
WARM, COUNTED = 64, 256  # microbatches
PARTS = ("build", "load", "files")


def cpu_of(arguments: list[str]) -> tuple[float, float, float]:
    """(CPU seconds of the command, of all that it started, wall seconds)."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "omnidata", *arguments],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    usages = dict(reap())
    process.returncode = usages[process.pid][0]
    if process.returncode:
        raise SystemExit(f"omnidata {' '.join(arguments)}: exit code {process.returncode}")
    seconds = {pid: usage.ru_utime + usage.ru_stime for pid, (_, usage) in usages.items()}
    own = seconds.pop(process.pid)
    return own, sum(seconds.values()), time.perf_counter() - started


# --- (1) build ----------------------------------------------------------------------------------------------


def measure_build(corpus: Corpus, policy: str, options: argparse.Namespace) -> dict[str, float]:
    """CPU a sample of the command and of its workers."""
    most = options.samples * (4 if policy == "keep" else 1)
    taken = []
    for count in (most // 4, most):
        with tempfile.TemporaryDirectory() as out:
            build = ["build-shards", str(corpus.records(count)), "--image-root", str(corpus.images)]
            build += ["--tokenizer", str(corpus.tokenizer), "--image-policy", policy, "--quiet"]
            taken.append(cpu_of([*build, "--out", f"{out}/data", "--workers", str(options.workers)]))
    own, theirs = (
        (after - before) / (most - most // 4) for before, after in list(zip(*taken, strict=True))[:2]
    )
    return {
        "samples": most,
        "command, us per sample": round(own * 1e6, 1),
        "workers, us per sample": round(theirs * 1e6, 1),
        "command / worker, %": round(100 * own / theirs, 2),
        "workers at most": round(theirs / max(own, 1e-9)),
    }


# --- (2) load -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sleeper(Squares):
    """Decodes nothing, in the time that it takes to decode."""

    def fill(self, rows: Any, sample: Any, document: Any, *, epoch: int) -> None:
        """As ``Squares.fill``, but for the pixels."""
        time.sleep(DECODE_SECONDS * len(sample.images))


def measure_load(dataset: Path, num_workers: int) -> dict[str, float]:
    """CPU of this process per microbatch."""
    loader = PackLoader(dataset, global_batch=8, max_tokens=4096, num_workers=num_workers)
    assembler = loader._assembler
    assembler._images = Sleeper(assembler._images.size)
    microbatches, pictures = iter(loader), 0
    for _ in range(WARM):
        next(microbatches)
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(COUNTED):
        pictures += next(microbatches).num_images
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - started
    microbatches.close()
    return {
        "pictures per microbatch": round(pictures / COUNTED, 1),
        "training process, us per microbatch": round(cpu / COUNTED * 1e6),
        "pictures/s here": round(pictures / seconds),
        "pictures/s at most": round(pictures / cpu),
    }


# --- (3) files ----------------------------------------------------------------------------------------------


def write_files(folder: Path, count: int) -> Iterator[Path]:
    """One small record a file, a thousand files a folder."""
    said = "Would you be able to describe in a few sentences what the picture shows? " * 2
    for number in range(count):
        path = folder / f"{number // 1000:04d}" / f"{number:07d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        turns = [{"from": "human", "value": f"{number}: {said}"}, {"from": "gpt", "value": said}]
        path.write_text(json.dumps([{"id": f"r{number}", "conversations": turns}]))
        yield path


def measure_files(folder: Path, tokenizer: Path, options: argparse.Namespace) -> dict[str, float]:
    """CPU a file of the command and of its workers, between a quarter of the files and all."""
    taken, counts = [], (options.files // 4, options.files)
    for count in counts:
        where = folder / f"files-{count}"
        for _ in write_files(where, count):
            pass
        dry = ["build-shards", f"{where}/*/*.json", "--out", f"{folder}/none", "--dry-run"]
        taken.append(cpu_of([*dry, "--tokenizer", str(tokenizer), "--workers", str(options.workers)]))
    (own, theirs, _), (more_own, more_theirs, seconds) = taken
    many = counts[1] - counts[0]
    own, theirs = (more_own - own) / many, (more_theirs - theirs) / many
    return {
        "files": options.files,
        "seconds": round(seconds, 1),
        "command, us per file": round(own * 1e6, 1),
        "workers, us per file": round(theirs * 1e6, 1),
        "a million on 16 cores, s": round(1e6 * (own + theirs / 16)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=4000, help="of a build, shrink; keep takes four times")
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--loaders", type=int, nargs="*", default=[16, 32], help="numbers of workers")
    parser.add_argument("--workers", type=int, default=2, help="of builds")
    parser.add_argument("--vocabulary", choices=NAMES, default="Mistral")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    options = parser.parse_args()
    adopt_orphans()
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = Corpus(folder, samples=options.samples, photos=60, vocabulary=options.vocabulary)
        if "build" in options.only:
            for policy in ("shrink", "keep"):
                result[f"build, {policy}"] = measure_build(corpus, policy, options)
        if "files" in options.only:
            result["files"] = measure_files(folder, corpus.tokenizer, options)
        if "load" in options.only:
            build = [
                "build-shards",
                str(corpus.records(min(1000, options.samples))),
                "--image-root",
                str(corpus.images),
            ]
            build += ["--tokenizer", str(corpus.tokenizer), "--image-policy", "keep", "--quiet"]
            cpu_of([*build, "--out", f"{folder}/data"])
            for number in options.loaders:
                result[f"load, {number} workers"] = measure_load(folder / "data", number)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for part, figures in result.items():
        print(part)
        for figure, value in figures.items():
            print(f"    {figure:36} {value:>10,}")


if __name__ == "__main__":
    main()
