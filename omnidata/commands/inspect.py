"""``omnidata inspect``, once its options are parsed: numbers from the index, samples, or rejects."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from omnidata.inspect.samples import choose_positions, read_views, rejects_of
from omnidata.inspect.summary import summarize
from omnidata.plan.cost import Assumptions
from omnidata.printable import to_json

if TYPE_CHECKING:
    from omnidata.dataset import Dataset

NUM_SAMPLES, NUM_REJECTS, NUM_SAMPLES_HTML = 3, 20, 1000  # shown unless --limit says otherwise


@dataclass(frozen=True, slots=True)
class Choice:
    """Which samples or rejects to show."""

    key: str | None = None
    sample: int | None = None
    source: str | None = None
    limit: int | None = None
    rejects: bool = False

    @classmethod
    def names(cls) -> list[str]:
        """The options of the command line that it takes."""
        return [field.name for field in fields(cls)]

    @property
    def is_one(self) -> bool:
        """One sample was asked for by name."""
        return self.key is not None or self.sample is not None

    def positions(self, dataset: Dataset, *, default: int) -> list[int]:
        """Positions of the samples; ``default`` is the limit if none was given."""
        limit = default if self.limit is None else self.limit
        return choose_positions(dataset, key=self.key, sample=self.sample, source=self.source, limit=limit)


def show(dataset: Dataset, *, choice: Choice, assume: Assumptions) -> None:
    """The summary, then samples; or one sample; or rejects."""
    from omnidata.inspect import terminal

    console = terminal.make_console()
    if choice.rejects:
        limit = NUM_REJECTS if choice.limit is None else choice.limit
        terminal.print_rejects(console, rejects_of(dataset, source=choice.source), limit=limit)
        return
    views = read_views(dataset, choice.positions(dataset, default=NUM_SAMPLES))
    if not choice.is_one:
        terminal.print_summary(console, summarize(dataset, assume=assume))
    terminal.print_samples(console, views)


def show_unfinished(path: str, *, choice: Choice, as_json: bool) -> None:
    """The rejects of a build that is not finished."""
    from omnidata.inspect import terminal
    from omnidata.inspect.unfinished import rejects_so_far

    rejects = rejects_so_far(path, source=choice.source)
    if as_json:
        print(to_json({"complete": False, "reject_records": rejects[: choice.limit]}))
        return
    console = terminal.make_console()
    console.print(f"{path} is an unfinished build; its rejects so far:")
    limit = NUM_REJECTS if choice.limit is None else choice.limit
    terminal.print_rejects(console, rejects, limit=limit)


def write_html(dataset: Dataset, path: str, *, choice: Choice, assume: Assumptions) -> str:
    """Write the report; return the line that says so."""
    from omnidata.inspect.html_report import write_report
    from omnidata.inspect.terminal import human_bytes

    positions = choice.positions(dataset, default=NUM_SAMPLES_HTML)
    size = write_report(dataset, path, positions=positions, assume=assume)
    return f"Report written to {path} ({human_bytes(size)}, {len(positions):,} of {len(dataset):,} samples)"


def summary_json(dataset: Dataset, *, choice: Choice, assume: Assumptions) -> str:
    """The summary; with ``samples`` or ``reject_records`` beside it if they were asked for."""
    report = summarize(dataset, assume=assume).as_dict()
    if choice.rejects:
        report["reject_records"] = rejects_of(dataset, source=choice.source)[: choice.limit]
    elif choice.is_one or choice.limit is not None:
        positions = choice.positions(dataset, default=NUM_SAMPLES)
        report["samples"] = [view.as_dict() for view in read_views(dataset, positions)]
    return to_json(report)
