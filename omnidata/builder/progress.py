"""Progress of a build on stderr: one line that is rewritten on a terminal, plain lines everywhere else.

12,400 of 100,000 records · 1,240/s · 1:11 left · 12 rejected · 3 of 40 shards
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

from omnidata.printable import clock

LINE_SECONDS = 10.0  # between plain lines
REDRAW_SECONDS = 0.2


@dataclass
class Progress:
    """What is known of a running build.

    Records of shards that an earlier run built count as done, but not towards the rate.
    """

    total_records: int
    total_shards: int
    quiet: bool = False
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    old_records: int = 0  # built by an earlier run
    done_records: int = 0
    done_rejects: int = 0
    done_shards: int = 0
    running: dict[str, tuple[int, int]] = field(default_factory=dict)  # shard -> (records, rejects) so far

    def __post_init__(self) -> None:
        self._start = self._drawn = time.monotonic()
        self._on_terminal = self.stream.isatty()

    def resume(self, num_records: int, num_rejects: int) -> None:
        """Count a shard that an earlier run built."""
        self.old_records += num_records
        self.finish("", num_records, num_rejects)

    def update(self, shard: str, num_records: int, num_rejects: int) -> None:
        """A running shard has come so far."""
        self.running[shard] = (num_records, num_rejects)
        self._draw()

    def finish(self, shard: str, num_records: int, num_rejects: int) -> None:
        """A shard is done."""
        self.running.pop(shard, None)
        self.done_records += num_records
        self.done_rejects += num_rejects
        self.done_shards += 1
        self._draw()

    @property
    def num_records(self) -> int:
        """Records seen, those of running shards included."""
        return self.done_records + sum(records for records, _ in self.running.values())

    @property
    def num_rejects(self) -> int:
        """Rejects seen, those of running shards included."""
        return self.done_rejects + sum(rejects for _, rejects in self.running.values())

    @property
    def seconds(self) -> float:
        """Since the start of this run."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Records a second in this run."""
        return (self.num_records - self.old_records) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """At this run's rate; 0 as long as there is none."""
        return (self.total_records - self.num_records) / self.rate if self.rate else 0.0

    def line(self) -> str:
        """The line as it stands."""
        parts = [
            f"{self.num_records:,} of {self.total_records:,} records",
            f"{self.rate:,.0f}/s",
            f"{clock(self.seconds_left)} left",
            f"{self.num_rejects:,} rejected",
            f"{self.done_shards:,} of {self.total_shards:,} shards",
        ]
        return " · ".join(parts)

    def _draw(self) -> None:
        now = time.monotonic()
        if self.quiet or now - self._drawn < (REDRAW_SECONDS if self._on_terminal else LINE_SECONDS):
            return
        self._drawn = now
        end = "\x1b[K\r" if self._on_terminal else "\n"
        print(self.line(), end=end, file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the terminal with a clean line."""
        if self._on_terminal and not self.quiet:
            print("\x1b[K", end="", file=self.stream, flush=True)
