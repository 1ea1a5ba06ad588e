"""What the ``inspect``, ``verify`` and ``plan`` commands do once their options are parsed.

Each is a few calls: numbers from summary / verify / forecast, shown by terminal or html_report, or as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from omnidata.inspect.cost import DEFAULT_FROZEN, Assumptions
from omnidata.inspect.samples import choose_positions, read_views, rejects_of
from omnidata.inspect.summary import summarize
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
        """Positions of the samples; ``default`` is the limit where none was given."""
        limit = default if self.limit is None else self.limit
        return choose_positions(dataset, key=self.key, sample=self.sample, source=self.source, limit=limit)


def assumptions(
    *, frozen: tuple[str, ...] = (), num_gpus: int | None = None, default_gpus: int = 1, **given: Any
) -> Assumptions:
    """The command line's cost options; ``--freeze none`` trains everything."""
    chosen = () if frozen == ("none",) else frozen or DEFAULT_FROZEN
    return Assumptions(frozen=tuple(chosen), num_gpus=num_gpus or default_gpus, **given)


# --- inspect ----------------------------------------------------------------------------------------------


def inspect_terminal(dataset: Dataset, *, choice: Choice, assume: Assumptions) -> None:
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


def inspect_unfinished(path: str, *, choice: Choice, as_json: bool) -> None:
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


def inspect_html(dataset: Dataset, path: str, *, choice: Choice, assume: Assumptions) -> str:
    """Write the report; return the line that says so."""
    from omnidata.inspect.html_report import write_report
    from omnidata.inspect.terminal import human_bytes

    positions = choice.positions(dataset, default=NUM_SAMPLES_HTML)
    size = write_report(dataset, path, positions=positions, assume=assume)
    return f"Report written to {path} ({human_bytes(size)}, {len(positions):,} of {len(dataset):,} samples)"


def inspect_json(dataset: Dataset, *, choice: Choice, assume: Assumptions) -> str:
    """The summary; with ``samples`` or ``reject_records`` beside it where they were asked for."""
    report = summarize(dataset, assume=assume).as_dict()
    if choice.rejects:
        report["reject_records"] = rejects_of(dataset, source=choice.source)[: choice.limit]
    elif choice.is_one or choice.limit is not None:
        positions = choice.positions(dataset, default=NUM_SAMPLES)
        report["samples"] = [view.as_dict() for view in read_views(dataset, positions)]
    return to_json(report)


# --- verify -----------------------------------------------------------------------------------------------


def verify(
    path: str, *, deep: bool, repair: bool, workers: int | None, quiet: bool, as_json: bool
) -> tuple[str, int]:
    """Verify (after a repair, if asked); return what to print and the exit code."""
    from omnidata.inspect import terminal
    from omnidata.verify.dataset import verify as check
    from omnidata.verify.repair import repair as rebuild

    with terminal.shard_progress(quiet=quiet or as_json) as on_shard:
        repaired = rebuild(path, num_workers=workers, on_shard=on_shard) if repair else None
        report = check(path, deep=deep, num_workers=workers, on_shard=on_shard)
    exit_code = 0 if report.ok and not (repaired and repaired.lost) else 1
    if as_json:
        parts = report.as_dict() | ({"repair": repaired.as_dict()} if repaired else {})
        return to_json(parts), exit_code
    lines = terminal.repair_lines(repaired) if repaired else []
    return "\n".join([*lines, *terminal.finding_lines(report)]), exit_code


# --- plan -------------------------------------------------------------------------------------------------


def plan(
    paths: Sequence[str],
    *,
    split: str | None,
    where: Sequence[str],
    cap: int | None,
    cap_by: str | None,
    order: str | None,
    seed: int,
    epoch: int,
    max_tokens: int | None,
    max_images: int | None,
    oversize: str,
    global_batch: int | None,
    world_size: int,
    as_json: bool,
    **cost: Any,
) -> None:
    """Print the forecast of an epoch over these datasets, as text or JSON."""
    from omnidata.inspect import terminal
    from omnidata.inspect.forecast import forecast
    from omnidata.plan.epoch import EpochPlan
    from omnidata.plan.recipe import open_entries

    assume = assumptions(default_gpus=world_size, **cost)
    entries, limits = open_entries(paths, split=split, where=where, cap=cap, cap_by=cap_by, order=order)
    epoch_plan = EpochPlan(
        entries,
        seed=seed,
        epoch=epoch,
        max_tokens=max_tokens or limits.get("max_tokens") or 4096,
        max_images=limits.get("max_images") if max_images is None else max_images,
        oversize=oversize,
    )
    global_batch = global_batch or limits.get("global_batch")
    foreseen = forecast(epoch_plan, world_size=world_size, global_batch=global_batch, assume=assume)
    if as_json:
        print(to_json(foreseen.as_dict()))
    else:
        terminal.print_forecast(terminal.make_console(), foreseen)
