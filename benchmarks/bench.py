"""Every benchmark for the CPU, beside the peers that are installed: one table, and a figure for each race.

    python benchmarks/bench.py [--only plan build …] [--toy] [--peers-python .bench/bin/python]
                               [--out benchmarks/results]

Each benchmark is run as its own command with ``--json``. ``results/DATE.md`` has every number that it
printed, with the machine and the versions; ``results/DATE-NAME.svg`` the contenders side by side. ``--toy``
takes small sizes, which show that it works and nothing else. benchmarks/peers-requirements.txt says how to
make the environment of the peers; without one those run that share this one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "numpy", "pyarrow", "webdataset", "megatron-energon", "datasets", "trl")
Bars = dict[str, float]


@dataclass(frozen=True)
class Benchmark:
    """A command, its small form, and the race in what it prints."""

    name: str
    toy: tuple[str, ...]
    full: tuple[str, ...] = ()
    unit: str = ""
    bars: Callable[[dict[str, Any]], Bars] | None = None  # contender -> figure
    peers: bool = False  # takes --peers-python


def _speed(report: dict[str, Any]) -> Bars:
    """load.py: decoded pictures, with the most workers that were tried."""
    rows = [row for row in report["speed"] if row["mode"] == "(a) decoded"]
    most = max(row["workers"] for row in rows)
    return {row["contender"]: row["samples/s"] for row in rows if row["workers"] == most}


BENCHMARKS = (
    Benchmark(
        "plan",
        ("--samples", "20000"),
        unit="padding, share of the positions",
        bars=lambda report: report["padding"],
    ),
    Benchmark("start", ("--repeats", "1", "--vocabularies")),
    Benchmark("reports", ("--samples", "1500", "--repeats", "1")),
    Benchmark("render", ("--records", "64")),
    Benchmark("render_again", ("--records", "16", "--repeats", "1")),
    Benchmark(
        "build",
        ("--samples", "64", "--photos", "8", "--repeat", "1"),
        unit="samples/s",
        bars=lambda report: {name: row["samples_per_second"] for name, row in report["rates"].items()},
        peers=True,
    ),
    Benchmark(
        "load",
        ("--samples", "64", "--repeat", "1", "--workers", "0", "--only", "speed"),
        unit="samples/s, decoded pictures",
        bars=_speed,
        peers=True,
    ),
    Benchmark(
        "train",
        ("--records", "60", "--steps", "5"),
        unit="samples/s at equal loss",
        bars=lambda report: {name: row["samples_per_s"] for name, row in report.items()},
    ),
    Benchmark("train_processor", ("--records", "200", "--steps", "8")),
    Benchmark("families", ("--records", "120", "--families", "qwen3_vl", "--repeat", "1")),
)
NAMES = tuple(benchmark.name for benchmark in BENCHMARKS)


def main() -> int:
    """Run them, write the table and the figures; 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--toy", action="store_true", help="small sizes: no figure for anybody")
    parser.add_argument("--peers-python", help="interpreter that has benchmarks/peers-requirements.txt")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    day, failed, parts = datetime.date.today().isoformat(), [], [head(toy=args.toy)]
    for benchmark in BENCHMARKS:
        if benchmark.name not in args.only:
            continue
        words = command(benchmark, toy=args.toy, peers_python=args.peers_python)
        print("$ " + " ".join(words), flush=True)
        report = measure(words)
        if report is None:
            failed.append(benchmark.name)
            continue
        parts.append(section(benchmark, words, report))
        if benchmark.bars:
            figure = args.out / f"{day}-{benchmark.name}.svg"
            figure.write_text(svg(benchmark.bars(report), f"{benchmark.name}: {benchmark.unit}"))
            parts.append(f"![{benchmark.name}]({figure.name})\n")
    if failed:
        parts.append(f"Failed: {', '.join(failed)}\n")
    (args.out / f"{day}.md").write_text("\n".join(parts))
    print(f"wrote {args.out / day}.md" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def command(benchmark: Benchmark, *, toy: bool, peers_python: str | None) -> list[str]:
    """What a user would type, but for the interpreter."""
    words = [f"benchmarks/{benchmark.name}.py", *(benchmark.toy if toy else benchmark.full), "--json"]
    return words + (["--peers-python", peers_python] if peers_python and benchmark.peers else [])


def measure(words: list[str]) -> Any:
    """What the benchmark printed as JSON; None: it failed, and said why on standard error."""
    done = subprocess.run([sys.executable, *words], cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return None
    text = done.stdout.strip()
    return json.loads(text if text[:1] in "[{" else text.splitlines()[-1])


def head(*, toy: bool) -> str:
    """Machine, versions, date."""
    cpu = next(
        (line.partition(": ")[2] for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo")), 0) / 2**20
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} not installed")
    lines = [
        f"# Benchmarks, {datetime.date.today().isoformat()}",
        "",
        *(["**Toy sizes: these figures say nothing about anybody.**", ""] if toy else []),
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB; {', '.join(versions)}.",
        f"Load of the machine when it began: {os.getloadavg()[0]:.1f}.",
        "",
    ]
    return "\n".join(lines)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def section(benchmark: Benchmark, words: list[str], report: Any) -> str:
    """A table with every number of the report."""
    rows = [f"| {name} | {value:,.4g} |" for name, value in numbers(report)]
    return "\n".join([f"## {benchmark.name}", "", f"`python {' '.join(words)}`", "",
                      "| figure | value |", "|---|---|", *rows, ""])  # fmt: skip


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(path, number) of every number in plain JSON; a list's items are known by the texts in them."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{name}, {key}" if name else str(key))
    elif isinstance(value, list) and len(value) <= 100 and all(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            texts = [text for text in item.values() if isinstance(text, str) and len(text) < 60]
            yield from numbers(item, ", ".join(filter(None, [name, *texts, f"row {number + 1}"])))


def svg(bars: Bars, title: str) -> str:
    """Horizontal bars, the largest as wide as the figure."""
    left, width, row = 240, 360, 26
    largest = max(bars.values(), default=0) or 1
    height = row * (len(bars) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 90}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="19" font-weight="bold">{escape(title)}</text>',
    ]
    for number, (name, value) in enumerate(bars.items()):
        y = row * (number + 1) + 8
        colour = "#2a7f62" if name.startswith(("ours", "packs")) else "#9aa5b1"
        parts.append(
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{left}" y="{y}" width="{width * value / largest:.1f}" height="18" fill="{colour}"/>'
            f'<text x="{left + width * value / largest + 6:.1f}" y="{y + 14}">{value:,.4g}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    sys.exit(main())
