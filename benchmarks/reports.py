"""Time ``inspect``, quick ``verify`` and ``plan`` on a generated index of a million samples.

    python benchmarks/reports.py [--samples 1000000] [--repeats 3] [--json]

Only the index and the manifest are generated (1,000 shards of 1,000 samples): none of these opens a shard.
``inspect`` and ``plan`` are timed as whole processes, interpreter start included, as a user waits for them.
The quick check of ``verify`` is timed as far as it concerns the index.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny_dataset import build_tiny_dataset

from omnidata.dataset import Dataset
from omnidata.index import index_schema, read_table, write_tables
from omnidata.manifest import manifest_from_json, manifest_to_json
from omnidata.profiles.omnilmm import OmniLMMProfile
from omnidata.schema import INDEX, MANIFEST, ShardInfo, shard_name
from omnidata.verify.tables import check_index

ROOT = Path(__file__).resolve().parents[1]
WHERE = 'n_images <= 2 and source != "part-3.jsonl" and n_tokens >= 100'
NUM_QUERY = 64
SHARD = 1000  # samples
COMMANDS = {
    "inspect --json (s)": ["inspect", "DATA", "--json"],
    "inspect, summary only (s)": ["inspect", "DATA", "--limit", "0"],
    "plan --where (s)": ["plan", "DATA", "--where", WHERE],
    "plan (s)": ["plan", "DATA", "--max-tokens", "4096", "--global-batch", "64", "--world-size", "8"],
}


def generate(root: Path, num_samples: int) -> Path:
    """A dataset whose index and manifest are those of a million chat samples; the shards are not there."""
    build_tiny_dataset(root)
    rng = np.random.default_rng(0)
    shards: list[ShardInfo] = []
    with (root / INDEX).open("wb") as file:
        write_tables(file, index_schema(), _tables(rng, num_samples, shards))
    manifest = manifest_from_json((root / MANIFEST).read_bytes(), where=MANIFEST)
    table = Dataset(root).index_columns(["n_tokens", "n_supervised", "n_images"])
    totals = {name: int(np.sum(table[name].to_numpy(), dtype=np.int64)) for name in table.column_names}
    manifest = dataclasses.replace(
        manifest,
        profile=OmniLMMProfile(NUM_QUERY, 448).to_json(),
        num_records=num_samples + 3,
        num_samples=num_samples,
        num_tokens=totals["n_tokens"],
        num_supervised=totals["n_supervised"],
        num_images=totals["n_images"],
        splits={"train": num_samples},
        shards=shards,
    )
    (root / MANIFEST).write_bytes(manifest_to_json(manifest))
    return root


def _tables(rng: np.random.Generator, num_samples: int, shards: list[ShardInfo]) -> Iterator[pa.Table]:
    for number in range(-(-num_samples // SHARD)):
        count = min(SHARD, num_samples - number * SHARD)
        images = rng.choice(4, count, p=[0.15, 0.7, 0.1, 0.05])
        text = np.clip(rng.lognormal(5.3, 0.8, count), 16, 1600).astype(np.int64)
        tokens = text + images * (NUM_QUERY + 2)
        nbytes = 512 * (4 + tokens // 64 + images * rng.integers(60, 140, count))
        ends = np.cumsum(nbytes)
        name = shard_name("train", number)
        size = int(ends[-1]) + 1024 + -(int(ends[-1]) + 1024) % 10240
        shards.append(ShardInfo(name, "train", count, int(tokens.sum()), size, "0" * 64))
        ids = [f"{number * SHARD + i:09d}" for i in range(count)]
        columns = {
            "key": ids,
            "split": ["train"] * count,
            "shard": [name] * count,
            "offset": ends - nbytes,
            "nbytes": nbytes,
            "n_tokens": tokens,
            "n_supervised": np.maximum(1, text // 3),
            "n_images": images,
            "image_sizes": [rng.integers(448, 1024, (n, 2)).tolist() for n in images],
            "image_starts": [[i * (NUM_QUERY + 2) for i in range(n)] for n in images],
            "image_tokens": [[NUM_QUERY + 2] * n for n in images],
            "image_pixels": [[3 * 448**2] * n for n in images],
            "id": ids,
            "source": [f"part-{number % 7}.jsonl"] * count,
            "locator": [f"line {i}" for i in range(count)],
            "content_hash": rng.bytes(16 * count).hex(" ", 16).split(),
        }
        yield _table(columns, count)


def _table(columns: dict[str, Any], count: int) -> pa.Table:
    """The columns as the index has them; those that are not given are empty."""
    schema = index_schema()
    for field in schema:
        if field.name not in columns:
            empty = [] if pa.types.is_list(field.type) else "" if pa.types.is_string(field.type) else 0
            columns[field.name] = pa.array([empty] * count, field.type)
    return pa.table({name: columns[name] for name in schema.names}).cast(schema)


def measure(root: Path, repeats: int) -> dict[str, float]:
    """The best of ``repeats`` runs of each command."""
    times = {}
    for name, arguments in COMMANDS.items():
        command = [
            sys.executable,
            "-m",
            "omnidata.cli",
            *(str(root) if a == "DATA" else a for a in arguments),
        ]
        runs = [_seconds(command) for _ in range(repeats)]
        times[name], times[name.replace("(s)", "(s of CPU)")] = (
            min(column) for column in zip(*runs, strict=True)
        )
    manifest = manifest_from_json((root / MANIFEST).read_bytes(), where=MANIFEST)
    start = time.perf_counter()
    with (root / INDEX).open("rb") as file:
        findings = list(check_index(read_table(file, index_schema()), manifest))
    times["verify, index part (s)"] = time.perf_counter() - start
    assert not findings, findings[:3]
    return times


def _seconds(command: list[str]) -> tuple[float, float]:
    """Wall and processor time: the second hardly changes when the machine is busy with other things."""
    start, before = time.perf_counter(), os.times()
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": paths})
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, used


def main() -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = generate(Path(folder) / "data", arguments.samples)
        size = (root / INDEX).stat().st_size
        result = {"samples": arguments.samples, "index (MB)": round(size / 1e6, 1)} | measure(
            root, arguments.repeats
        )
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in result.items():
            print(f"{name:34} {value:>12,.2f}" if isinstance(value, float) else f"{name:34} {value:>12,}")


if __name__ == "__main__":
    main()
