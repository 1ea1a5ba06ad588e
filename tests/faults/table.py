"""The table of faults: how often each was tried, and what was lost, doubled or not found: 0 of each."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

PARTS = ("power", "kills", "damage", "mutants", "training", "checkpoints", "together", "workers", "objects")
COLUMNS = ("fault", "how", "tried", "lost", "doubled", "not_found", "seconds")


@dataclass
class Row:
    """One fault, tried in one way."""

    fault: str
    how: str
    tried: int = 0
    lost: int = 0  # samples that are missing, or files that are not what they must be
    doubled: int = 0  # samples that are there twice
    not_found: int = 0  # damage that nobody named, mutants that live, errors that are no clear line
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)  # what exactly, for the first few

    @property
    def ok(self) -> bool:
        """Whether all held."""
        return self.tried > 0 and not (self.lost or self.doubled or self.not_found)

    def fail(self, column: str, what: str, number: int = 1) -> None:
        """Count ``number`` in ``column``."""
        setattr(self, column, getattr(self, column) + number)
        self.failures.append(f"{self.fault}, {self.how}: {what}")

    @contextmanager
    def timed(self) -> Iterator[Row]:
        """Measure the block."""
        start = time.monotonic()
        yield self
        self.seconds += time.monotonic() - start


def rows_of(part: str, *, short: bool) -> Iterator[Row]:
    """The rows of one part, in a folder that is removed afterwards."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the parts fork this process
    with tempfile.TemporaryDirectory(prefix="omnidata-faults-") as folder:
        yield from importlib.import_module(f"faults.{part}").rows(Path(folder), short)


def table(rows: list[dict]) -> str:
    """The rows as text."""
    cells = [[name.replace("_", " ") for name in COLUMNS]]
    for row in rows:
        cells.append([f"{row[name]:.0f}" if name == "seconds" else str(row[name]) for name in COLUMNS])
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = []
    for line in cells:
        texts = [line[i].ljust(widths[i]) if i < 2 else line[i].rjust(widths[i]) for i in range(len(COLUMNS))]
        lines.append("  ".join(texts))
    return "\n".join(lines)


def main() -> int:
    """Run the parts, two at a time; print the table; 1 if anything did not hold."""
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("parts", nargs="*", default=PARTS, help=f"of {', '.join(PARTS)}; trials")
    parser.add_argument("--short", action="store_true", help="a few of each")
    parser.add_argument("--json", action="store_true", help="one part's rows as JSON lines; for the runner")
    args = parser.parse_args()
    if args.json:
        import json

        for part in args.parts:
            for row in rows_of(part, short=args.short):
                print(json.dumps(asdict(row) | {"ok": row.ok}), flush=True)
        return 0
    rows, ended_well = _in_processes(list(args.parts), args.short)
    print(table(rows))
    for failure in [failure for row in rows for failure in row["failures"][:5]]:
        print(f"FAILED  {failure}")
    return 0 if ended_well and all(row["ok"] for row in rows) else 1


def _in_processes(parts: list[str], short: bool) -> tuple[list[dict], bool]:
    import json
    from concurrent.futures import ThreadPoolExecutor

    def run(part: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "faults", part, "--json", *(["--short"] if short else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=3600)
        print(f"{part}: {'done' if done.returncode == 0 else 'FAILED'}", file=sys.stderr, flush=True)
        return done

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(run, parts))
    rows = [json.loads(line) for each in done for line in each.stdout.splitlines() if line.startswith("{")]
    return rows, all(each.returncode == 0 for each in done)
