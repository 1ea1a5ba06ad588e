"""Loading: samples per second, time to the first batch, exactness of a restart, memory; beside the peers.

    python benchmarks/load.py [--samples 4000] [--repeat 2] [--workers 0 1 2] [--names ours webdataset ...]
                              [--peers-python .bench/bin/python] [--folder DIR] [--json]
                              [--only speed floor restart million memory]

Speed takes about two minutes for each number of workers and repetition, restart four, the others one.

(1) A corpus (benchmarks/corpus.py), built once by ``omnidata build-shards --image-policy keep``, and the
    same samples as MDS and litdata chunks.
(2) speed: each contender (benchmarks/load_peers.py) in a process of its own, in turns; the best of
    ``--repeat`` counts. (a) tokens + decoded 448x448 images, (b) tokens + encoded bytes; with each number of
    workers. All files are read once before, so that nobody waits for the disk.
(3) floor: decode + resize of the same pictures and nothing else, on one core.
(4) restart: stop in the middle of an epoch, go on from what was saved, with as many ranks and with others;
    count repeats and losses (benchmarks/load_exact.py).
(5) million: time to the first batch on an index of a million samples, beside a list of JSON lines.
(6) memory: of all processes, while 100,000 samples are read by two workers.

On a machine that is busy with other work trust the ratios only. The peers' environment is described in
benchmarks/peers-requirements.txt; without it the peers that need it are left out.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

from build import Corpus
from corpus import prose, write_records
from load_peers import CONTENDERS, RECORDS, SIZE

HERE = Path(__file__).parent
OWN_ENVIRONMENT = ("ours", "ours, no checksum", "webdataset", "energon", "datasets", "lazy JSON")


def prepare(folder: Path, samples: int, peers_python: str | None) -> None:
    """(1) Everything to read, once."""
    if (folder / "ours").exists():
        return
    corpus, records = Corpus(folder / "corpus", samples=samples, photos=samples // 8), folder / RECORDS
    write_records(records, samples, corpus.names, text=prose())
    command = [sys.executable, "-m", "omnidata.cli", "build-shards", str(records)]
    command += ["--out", str(folder / "ours"), "--tokenizer", str(corpus.tokenizer), "--quiet"]
    command += ["--image-root", str(corpus.images), "--image-policy", "keep", "--samples-per-shard", "500"]
    subprocess.run(command, check=True)
    if peers_python:
        environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
        subprocess.run(
            [peers_python, str(HERE / "load_formats.py"), str(folder)], check=True, env=environment
        )


def ask(python: str, script: str, *words: Any) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [python, str(HERE / script), *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:160]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def python_of(name: str, args: argparse.Namespace) -> str | None:
    """Who runs a contender."""
    return args.peers_python or (sys.executable if name in OWN_ENVIRONMENT else None)


def warm(folder: Path) -> None:
    """Read every file once: the disk is slow and the same for all, so nobody pays for being the first."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 22):
                    pass


def measure_speed(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """(2) One row for each contender, mode and number of workers."""
    rows: dict[tuple, dict[str, Any]] = {}
    warm(folder)
    for _ in range(args.repeat):
        for mode, flags in (("(b) tokens + bytes", []), ("(a) decoded", ["--decode"])):
            for workers in args.workers:
                for name in args.names:
                    if python := python_of(name, args):
                        words = [folder, "--name", name, "--workers", workers, *flags]
                        found = ask(python, "load_peers.py", *words)
                        old = rows.get((mode, workers, name), {})
                        if found.get("samples/s", 0) >= old.get("samples/s", 0):
                            rows[mode, workers, name] = found
    return [
        {"mode": mode, "workers": workers, "contender": name} | found
        for (mode, workers, name), found in rows.items()
    ]


def measure_floor(folder: Path) -> dict[str, float]:
    """(3) Images a second: decode + resize by the loader's own functions, and by Pillow."""
    import torch
    from load_peers import pillow

    from omnidata import Dataset
    from omnidata.images.pixels import decode_resized, decode_rgb, resize_rgb

    torch.set_num_threads(1)
    dataset = Dataset(folder / "ours", "train")
    images = [dataset[number].images[0] for number in range(min(300, len(dataset)))]
    ways = {
        "decode_resized": lambda data: decode_resized(data, SIZE, SIZE),
        "decode_rgb + resize_rgb": lambda data: resize_rgb(decode_rgb(data), SIZE, SIZE),
        "Pillow": pillow,
    }
    results = {}
    for name, way in ways.items():
        begin = time.process_time()
        for data in images:
            way(data)
        results[f"{name}, images/CPU s"] = len(images) / (time.process_time() - begin)
    return results


def measure_restart(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """(4) By contender."""
    pythons = {name: python_of(name, args) for name in args.names}
    return {
        name: ask(python, "load_exact.py", folder, "--name", name)
        for name, python in pythons.items()
        if python
    }


def measure_million(folder: Path, num_samples: int) -> dict[str, float]:
    """(5) The same samples again and again under other shard names, as symbolic links."""
    from omnidata import Dataset, PackLoader

    dataset = Dataset(folder / "ours", "train")
    copies = -(-num_samples // len(dataset))
    big = folder / "million"
    if not big.exists():
        write_repeated(dataset, big, copies)
    begin = time.perf_counter()
    loader = PackLoader(big, global_batch=8, image_size=SIZE)
    next(iter(loader))
    ours = time.perf_counter() - begin
    begin = time.perf_counter()
    steps = loader.steps_per_epoch()
    planned = time.perf_counter() - begin
    lines = (folder / RECORDS).read_bytes().splitlines()
    begin = time.perf_counter()
    records = [json.loads(line) for line in lines]
    lazy = (time.perf_counter() - begin) / len(records) * num_samples
    return {
        "samples": len(dataset) * copies,
        "ours: first batch, s": ours,
        "ours: every step of the epoch known, s": planned,
        "steps": steps,
        "lazy JSON: parsing alone, s (extrapolated)": lazy,
    }


def write_repeated(dataset: Any, root: Path, copies: int) -> None:
    """A dataset of ``copies`` times the samples whose shards are links to the original's."""
    import pyarrow as pa

    from omnidata.index import index_schema, write_tables
    from omnidata.manifest import manifest_to_json
    from omnidata.schema import INDEX, MANIFEST, shard_name

    (root / "shards").mkdir(parents=True)
    originals = [shard for shard in dataset.manifest.shards if shard.split == "train"]
    tables, shards = [], []
    for number in range(copies * len(originals)):
        original = originals[number % len(originals)]
        name = shard_name("train", number)
        (root / name).symlink_to(Path(dataset.path, original.path).resolve())
        rows = dataset.index.filter(pa.compute.equal(dataset.index["shard"], original.path))
        at = rows.schema.get_field_index("shard")
        tables.append(rows.set_column(at, index_schema().field("shard"), pa.array([name] * len(rows))))
        shards.append(replace(original, path=name))
    with (root / INDEX).open("wb") as file:
        write_tables(file, index_schema(), tables)
    total = sum(shard.num_samples for shard in shards)
    manifest = replace(dataset.manifest, shards=shards, num_samples=total, splits={"train": total})
    (root / MANIFEST).write_bytes(manifest_to_json(manifest))


def measure_memory(folder: Path, num_samples: int) -> dict[str, Any]:
    """(6) Memory of this process and its workers, MB, at ten moments."""
    from omnidata import PackLoader

    count, marks = 0, []
    loader = PackLoader(folder / "ours", global_batch=1, num_workers=2, decode_images=False, num_epochs=None)
    for microbatch in loader:
        count += len(microbatch.keys)
        if count >= num_samples * (len(marks) + 1) / 10:
            marks.append(round(memory_mb()))
        if len(marks) == 10:
            break
    return {
        "samples": count,
        "MB at each tenth": marks,
        "growth after the first tenth, MB": max(marks) - marks[0],
    }


def memory_mb() -> float:
    """Of this process and its children; pages that they share count once.

    Pages of files are left out: those of torch's libraries count less while other processes map them too.
    """
    tasks = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in ("self", *tasks)]
    kinds = ("Pss_Anon:", "Pss_Shmem:")
    return sum(int(text.split(kind)[1].split()[0]) for text in rollups for kind in kinds) / 1024


def main() -> None:
    """Measure what was asked for and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--peers-python")
    parser.add_argument("--names", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--folder", type=Path, help="keep and reuse the corpus here")
    parts = ["speed", "floor", "restart", "million", "memory"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--million", type=int, default=1_000_000, help="samples of that part")
    parser.add_argument("--memory", type=int, default=100_000, help="samples of that part")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="load-"))).resolve()
    try:
        prepare(folder, args.samples, args.peers_python)
        measures = {
            "speed": lambda: measure_speed(folder, args),
            "floor": lambda: measure_floor(folder),
            "restart": lambda: measure_restart(folder, args),
            "million": lambda: measure_million(folder, args.million),
            "memory": lambda: measure_memory(folder, args.memory),
        }
        results = {part: measures[part]() for part in args.only}
    finally:
        if not args.folder:
            shutil.rmtree(folder)
    print(json.dumps(results) if args.json else json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
