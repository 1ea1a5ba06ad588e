"""What a copy came to: as lines for people, or as JSON for scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from omnidata.builder.progress import Progress
from omnidata.printable import clock
from omnidata.schema import REJECTS


@dataclass(frozen=True)
class CopyReport:
    """Totals of the new dataset, and what each input gave."""

    out: str
    command: str  # merge | subset | export
    dry_run: bool  # nothing was written
    inputs: list[dict[str, object]]  # path, num_records, num_samples, num_taken, key_prefix
    num_records: int
    num_samples: int
    num_rejects: int  # those of the inputs, and what is left out
    num_left_out: int  # by this command
    num_bytes: int  # of the shards; in a dry run of their samples
    splits: dict[str, int]
    num_shards: int
    columns: list[str]  # kept columns that not every input has alike, in words
    shards_copied: int  # by this run
    bytes_copied: int  # by this run
    seconds: float

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The end of a copy, for people."""
        splits = ", ".join(f"{split} {count:,}" for split, count in self.splits.items())
        size = f"{self.num_samples:,} samples ({splits}) in {self.num_shards:,} shards, "
        size += f"{self.num_bytes / 1e6:,.1f} MB"
        rate = self.bytes_copied / 1e6 / max(self.seconds, 1e-9)
        copied = f"copied {self.shards_copied:,} shards in {clock(self.seconds)} ({rate:,.0f} MB/s)"
        return [
            f"{self.out} would hold {size}." if self.dry_run else f"{self.out}: {size}; {copied}.",
            *(self._input_line(each) for each in self.inputs),
            *self._left_out_lines(),
            *(f"  column {text}" for text in self.columns),
        ]

    def _input_line(self, each: dict[str, object]) -> str:
        prefix = f"; its keys begin with {each['key_prefix']} here" if each["key_prefix"] else ""
        taken = f"{each['num_taken']:,} of {each['num_samples']:,}" if self.command == "subset" else ""
        return f"  {each['path']}: {taken or format(each['num_samples'], ',')} samples{prefix}"

    def _left_out_lines(self) -> list[str]:
        if not self.num_left_out:
            return []
        return [f"  {self.num_left_out:,} samples left out, each in {REJECTS} (left_out)"]


class CopyProgress(Progress):
    """``12,400 of 100,000 samples · 410 MB/s · 1:11 left · 3 of 40 shards``."""

    done_bytes = 0  # of shards that this run finished

    def line(self) -> str:
        """The line as it stands; a running shard's second number is its bytes."""
        copied = self.done_bytes + self.num_rejects - self.done_rejects
        parts = [
            f"{self.num_records:,} of {self.total_records:,} samples",
            f"{copied / 1e6 / max(self.seconds, 1e-9):,.0f} MB/s",
            f"{clock(self.seconds_left)} left",
            f"{self.done_shards:,} of {self.total_shards:,} shards",
        ]
        return " · ".join(parts)
