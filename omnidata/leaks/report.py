"""What a search for leaks comes to: a ledger, a file of exclusions, and lines for people.

leaks.parquet    a row for every pair of a sample and a benchmark's entry that leaked into it
exclude.txt      the samples' keys, for ``exclude`` in a recipe
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from omnidata.dataset import Dataset
from omnidata.index import write_tables
from omnidata.leaks.benchmark import MIN_WORDS, read_benchmarks
from omnidata.leaks.search import find_leaks
from omnidata.near.hashing import check_installed
from omnidata.schema import UserError

LEDGER, EXCLUDE = "leaks.parquet", "exclude.txt"
SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("key", "id", "source", "locator")),
        *(pa.field(name, pa.string(), nullable=False) for name in ("benchmark", "of_id", "of_locator")),
        pa.field("share", pa.float64(), nullable=False),  # of the entry's runs of words that the sample has
        pa.field("distance", pa.int64()),  # bits of 256 between their nearest pictures; null: none is near
    ]
)


@dataclass(frozen=True)
class LeakReport:
    """Totals of a search."""

    dataset: str
    split: str | None
    num_samples: int
    num_entries: int  # of the benchmarks
    num_bare: int  # entries with no picture and no text to compare
    num_common_runs: int  # runs of words that too many entries have to mean anything
    num_leaked: int  # samples
    by_text: int
    by_image: int
    benchmarks: dict[str, int]  # benchmark -> samples that it leaked into
    ledger: str
    exclude: str

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        split = f" (split {self.split})" if self.split else ""
        found = (
            f"{self.num_leaked:,} of {self.num_samples:,} samples hold one of {self.num_entries:,} entries"
        )
        return [
            f"{self.dataset}{split}: {found}: {self.by_text:,} by text, {self.by_image:,} by picture",
            *(f"  {count:8,}  {benchmark}" for benchmark, count in self.benchmarks.items()),
            *(
                [
                    f"  {self.num_bare:,} entries were not looked for: they have no picture, and no text of "
                    f"{MIN_WORDS} words of their own"
                ]
                if self.num_bare
                else []
            ),
            *(
                [f"  {self.num_common_runs:,} runs of words that many entries share were not counted"]
                if self.num_common_runs
                else []
            ),
            f"Each is in {self.ledger}. To train without them, give the dataset of a recipe",
            f"  exclude: {self.exclude}",
        ]


def decontaminate(
    path: str,
    *,
    against: tuple[str, ...],
    out: str,
    split: str | None,
    image_root: str | None,
    ngram: int,
    workers: int | None,
) -> LeakReport:
    """Search, and write both files into the folder ``out``.

    Raises:
        UserError: there is no dataset or benchmark, or ``out`` cannot be written.
    """
    check_installed()
    dataset = Dataset(path, split)
    table = read_benchmarks(against, image_root=image_root, ngram=ngram)
    leaks = find_leaks(dataset, table, num_workers=workers)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LEDGER).open("wb") as file:
            write_tables(file, SCHEMA, [pa.Table.from_pylist(leaks, SCHEMA)])
        (folder / EXCLUDE).write_text("".join(_exclusions(leaks)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error}; give another --out") from error
    samples = {(leak["benchmark"], leak["key"]) for leak in leaks}
    return LeakReport(
        dataset=dataset.path,
        split=split,
        num_samples=len(dataset),
        num_entries=len(table.places),
        num_bare=table.num_bare,
        num_common_runs=table.num_common,
        num_leaked=len({leak["key"] for leak in leaks}),
        by_text=len({leak["key"] for leak in leaks if leak["share"]}),
        by_image=len({leak["key"] for leak in leaks if leak["distance"] is not None}),
        benchmarks=dict(Counter(benchmark for benchmark, _ in sorted(samples)).most_common()),
        ledger=str(folder / LEDGER),
        exclude=str(folder / EXCLUDE),
    )


def _exclusions(leaks: list[dict[str, Any]]) -> list[str]:
    """A line for each sample: its key, and the first entry that leaked into it."""
    lines: dict[str, str] = {}
    for leak in leaks:
        where = f"{leak['benchmark']}, {leak['of_locator']}".replace("\n", " ").replace("\r", " ")
        lines.setdefault(leak["key"], f"{leak['key']}  # {where}\n")
    return list(lines.values())
