"""Reports on a terminal, with rich: the summary on one screen, samples in colour, rejects, the forecast.

Colour says what is learned: supervised text is green, context plain, special tokens dim, an image block one
chip. Where there is no colour (a pipe, a file, ``NO_COLOR``), supervised text stands between ``«`` and ``»``.
Text that only looks like a special token has a backslash before it: ``\\</s>`` was typed, ``</s>`` is one.
Text of the dataset is never read as markup, and its control characters are shown, not sent.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from omnidata.inspect.samples import Run, SampleView, kept_values
from omnidata.printable import printable
from omnidata.verify.findings import REPAIRABLE

if TYPE_CHECKING:
    from omnidata.inspect.distributions import Distribution
    from omnidata.inspect.summary import Summary
    from omnidata.plan.cost import Cost
    from omnidata.plan.forecast import Forecast
    from omnidata.verify.repair import RepairReport
    from omnidata.verify.run import VerifyReport

BARS = "▁▂▃▄▅▆▇█"
SUPERVISED, SPECIAL, CHIP, HEADING, MUTED = "bold green", "dim", "reverse", "bold", "dim"


def make_console() -> Console:
    """Standard output; rich turns colour off by itself for a pipe and for NO_COLOR."""
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that cannot show ▁ gets "?", not a traceback
        sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False, markup=False, emoji=False)


# --- summary ----------------------------------------------------------------------------------------------


def print_summary(console: Console, summary: Summary) -> None:
    """One screen: totals, distributions, sources, rejects, cost."""
    title = Text(summary.dataset, style=HEADING)
    if summary.split:
        title.append(f"  split {summary.split}")
    if summary.where:
        title.append(f"  where {printable(summary.where)}")
    console.print(title)
    console.print(_totals(summary))
    console.print(_distributions(summary))
    console.print(_sources(summary))
    if summary.columns:
        console.print(_columns(summary))
    if summary.rejects:
        console.print(_reject_counts(summary))
    console.print(cost_line(summary.cost, num_samples=summary.num_samples))


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=MUTED)
    return grid


def _totals(summary: Summary) -> Table:
    grid = _grid()
    splits = ", ".join(f"{name} {count:,}" for name, count in summary.splits.items())
    grid.add_row("samples", f"{summary.num_samples:,}  ({splits})")
    if summary.origin:
        grid.add_row("copied", printable(summary.origin))
    grid.add_row("records", f"{summary.num_records:,} read, {summary.num_rejects:,} rejected")
    share = f"{summary.supervised_share:.1%} supervised ({summary.num_supervised:,})"
    grid.add_row("tokens", f"{summary.num_tokens:,}, {share}")
    grid.add_row("images", f"{summary.num_images:,}{_each(summary)} ({summary.model})")
    talks = f" ({human_bytes(summary.num_dialogue_bytes)} of them conversations)"
    size = human_bytes(summary.num_bytes) + (talks if summary.num_dialogue_bytes else "")
    grid.add_row("shards", f"{summary.num_shards:,}, {size}")
    if summary.num_truncated:
        where = " in what it was copied from" if summary.origin else ""
        grid.add_row("truncated", f"{summary.num_truncated:,} samples lost turns to --max-length{where}")
    return grid


def _each(summary: Summary) -> str:
    """How many tokens an image takes: `, 66 tokens each`, `, 4 to 1,200 tokens each`."""
    of = summary.tokens_per_image
    if not summary.num_images:
        return ""
    span = _number(of.min) if of.min == of.max else f"{_number(of.min)} to {_number(of.max)}"
    return f", {span} tokens each"


def _distributions(summary: Summary) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=MUTED)
    table.add_column("per sample")
    table.add_column("")
    for name in ("min", "median", "mean", "p95", "max"):
        table.add_column(name, justify="right")
    rows = (
        ("tokens", summary.tokens_per_sample, _number),
        ("supervised share", summary.supervised_per_sample, lambda value: f"{value:.0%}"),
        ("images", summary.images_per_sample, _number),
        ("image's tokens", summary.tokens_per_image, _number),
        ("image's longer side, px", summary.longer_side, _number),
    )
    for name, of, show in rows:
        table.add_row(name, sparkline(of), *(show(v) for v in (of.min, of.median, of.mean, of.p95, of.max)))
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:,.1f}"


def sparkline(distribution: Distribution) -> str:
    """The histogram as one line: no count is a blank, the fewest a low bar, the most a full one."""
    counts = [bar.count for bar in distribution.histogram]
    top = max(counts, default=0)
    return "".join(BARS[(len(BARS) - 1) * count // top] if count else " " for count in counts)


def _sources(summary: Summary) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=MUTED)
    table.add_column("source", overflow="fold")
    for name in ("samples", "tokens", "supervised", "images", "rejected"):
        table.add_column(name, justify="right")
    shown = summary.sources[:10]
    for totals in shown:
        share = f"{totals.num_supervised / max(1, totals.num_tokens):.0%}"
        numbers = (totals.num_samples, totals.num_tokens, totals.num_images, totals.num_rejects)
        samples, tokens, images, rejects = (f"{number:,}" for number in numbers)
        table.add_row(printable(totals.source), samples, tokens, share, images, rejects)
    if len(summary.sources) > len(shown):
        table.add_row(f"… and {len(summary.sources) - len(shown):,} more (all of them in --json)")
    return table


def _columns(summary: Summary) -> Table:
    """A histogram or a table of each kept column."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=MUTED)
    table.add_column("column", overflow="fold")
    table.add_column("values", justify="right")
    table.add_column("without", justify="right")
    table.add_column("")
    for column in summary.columns:
        of = column.distribution
        if of is not None:
            span = f"  {_number(of.min)} to {_number(of.max)}, median {_number(of.median)}"
            shown = sparkline(of) + span if of.histogram else ""
        else:
            shown = ", ".join(f"{printable(item.value)} {item.count:,}" for item in column.values)
            shown += ", …" if column.num_distinct > len(column.values) else ""
        table.add_row(printable(column.name), f"{column.num_distinct:,}", f"{column.num_missing:,}", shown)
    return table


def _reject_counts(summary: Summary) -> Table:
    from omnidata.schema import REASONS

    table = Table(box=None, padding=(0, 2, 0, 0), header_style=MUTED)
    table.add_column("rejected", justify="right")
    table.add_column("reason")
    table.add_column("")
    for reason, count in summary.rejects.items():
        table.add_row(f"{count:,}", Text(reason, style="yellow"), Text(REASONS.get(reason, ""), style=MUTED))
    return table


def cost_line(cost: Cost, *, num_samples: int) -> Text:
    """One epoch's cost in a sentence, with what it assumes."""
    frozen = f"frozen: {', '.join(cost.frozen)}" if cost.frozen else "nothing frozen"
    line = Text("one epoch of ", style=MUTED)
    line.append(f"{num_samples:,} samples through {cost.model}: ")
    line.append(f"{human_flops(cost.flops)}, {human_hours(cost.hours)}", style=HEADING)
    line.append(f" on {cost.num_gpus} × {cost.gpu}")
    line.append(
        f"\nassumed: {cost.peak_flops_per_gpu / 1e12:,.0f} TFLOP/s peak, MFU {cost.mfu:.0%}, {frozen}, "
        f"images of {cost.patches_per_image:,.0f} patches at {cost.tflops_per_image:.3g} TFLOP forward"
    )
    return line


def human_bytes(count: float) -> str:
    """Decimal units: 1234567 -> 1.23 MB."""
    return f"{count:,.0f} B" if count < 1000 else _scaled(count, "B")


def human_flops(count: float) -> str:
    """9.25e12 -> 9.25 TFLOP."""
    return _scaled(count, "FLOP")


def _scaled(count: float, unit: str) -> str:
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"]
    power = 0
    while count >= 999.5 and power < len(prefixes) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {prefixes[power]}{unit}"


def human_hours(hours: float) -> str:
    """0.002 -> 7.2 s; 0.5 -> 30 min; 5.25 -> 5.25 h; 100 -> 100 h (4.2 days)."""
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s"
    if hours < 1:
        return f"{hours * 60:.2g} min"
    return f"{hours:.3g} h" if hours < 48 else f"{hours:,.0f} h ({hours / 24:,.1f} days)"


# --- samples ----------------------------------------------------------------------------------------------


def print_samples(console: Console, views: Iterable[SampleView]) -> None:
    """What the colours mean, then each sample."""
    print_legend(console)
    for view in views:
        print_sample(console, view)


def print_legend(console: Console) -> None:
    """What the colours of the samples mean."""
    legend = Text("\n")
    legend.append("context ").append_text(_learned(Text("supervised"), console)).append(" ")
    legend.append("special", style=SPECIAL).append(" ").append(" image ", style=CHIP)
    legend.append(" \\<typed>, not a token", style=MUTED)
    console.print(legend)


def print_sample(console: Console, view: SampleView) -> None:
    """One sample: a line about it, then its text in colour."""
    row = view.row
    line = Text(f"\n#{view.position} {row['key']}", style=HEADING)
    line.append(
        f"  {printable(row['source'])}, {printable(row['locator'])}, {row['split']}: "
        f"{row['n_tokens']} tokens, {row['n_supervised']} supervised, {row['n_images']} images",
        style=MUTED,
    )
    console.print(line)
    if kept := kept_values(view.row):
        console.print(Text(printable(", ".join(f"{name} {value}" for name, value in kept)), style=MUTED))
    body = Text()
    for supervised, runs in groupby(view.runs, key=lambda run: run.supervised):
        text = Text.assemble(*(_run(run, view) for run in runs))
        body.append_text(_learned(text, console) if supervised else text)
    console.print(body)


def _run(run: Run, view: SampleView) -> Text:
    if run.image is not None:
        return Text(chip(run, view), style=CHIP)
    if run.kind == "special":
        return Text(printable(run.text), style=SPECIAL)
    return Text(printable(view.typed(run)))


def _learned(text: Text, console: Console) -> Text:
    if console.color_system is None or console.no_color:
        return Text.assemble("«", text, "»", style=SUPERVISED)
    return Text.assemble(text, style=SUPERVISED)


def chip(run: Run, view: SampleView) -> str:
    """An image block in a word or two: `` image 640×480 · 66 tokens ``; of a cut picture also which part."""
    sizes, names = view.row["image_sizes"], view.slice_names
    size, part = "missing", ""
    if run.image is not None and run.image < min(len(sizes), len(names)):
        size = "{}×{}".format(*sizes[run.image])
        part = f" · {names[run.image]}" if names[run.image] else ""
    return f" image {size}{part} · {run.num_tokens} tokens "


# --- plan -------------------------------------------------------------------------------------------------


def print_forecast(console: Console, seen: Forecast) -> None:
    """The epoch: packs and steps, padding, balance, compute."""
    names = zip(seen.datasets, seen.where, strict=True)
    titles = [f"{name} where {printable(where)}" if where else name for name, where in names]
    console.print(Text(", ".join(titles), style=HEADING))
    grid = _grid()
    limit = "any number of" if seen.max_images is None else f"at most {seen.max_images:,}"
    grid.add_row("samples", f"{seen.num_samples:,}: {seen.num_tokens:,} tokens, {seen.num_images:,} images")
    if len(seen.datasets) > 1:
        mixture = [f"{n:,} of {name}" for name, n in zip(seen.datasets, seen.samples_of, strict=True)]
        grid.add_row("mixture", ", ".join(mixture))
    if seen.num_cut or seen.num_left_out:
        grid.add_row("too large", f"{seen.num_cut:,} cut after a reply, {seen.num_left_out:,} left out")
    grid.add_row("packs", f"{seen.num_packs:,} of {seen.max_tokens:,} tokens and {limit} images")
    per_step = f"{seen.global_batch:,} packs over {seen.world_size:,} ranks"
    grid.add_row(
        "steps", f"{seen.num_steps:,} of {per_step} ({seen.num_packs_dropped:,} packs left over: data.tail)"
    )
    unpacked = f"{seen.padding_unpacked:.1%} in padded batches of {seen.unpacked_batch}"
    grid.add_row("padding", f"{seen.padding_packed:.1%} packed, {unpacked}")
    balance = seen.balance
    grid.add_row(
        "balance",
        f"fullest rank / mean: tokens {balance.tokens:.3f}, images {balance.images:.3f}, "
        f"cost {balance.cost:.3f}; idle {balance.idle:.1%}",
    )
    console.print(grid)
    console.print(_spreads(seen))
    console.print(cost_line(seen.cost, num_samples=seen.num_samples))


def _spreads(seen: Forecast) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=MUTED)
    for name in ("", "min", "median", "max"):
        table.add_column(name, justify="right" if name else "left")
    rows = {
        "samples per pack": seen.samples_per_pack,
        "tokens per pack": seen.tokens_per_pack,
        "images per pack": seen.images_per_pack,
        "tokens per step": seen.tokens_per_step,
        "supervised tokens per step": seen.supervised_per_step,
        "images per step": seen.images_per_step,
    }
    for name, of in rows.items():
        table.add_row(name, *(_number(value) for value in (of.min, of.median, of.max)))
    return table


# --- verify -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shard_progress(*, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar over shards on standard error, if that is a terminal; calls are (shards done, in all)."""
    from rich.progress import Progress

    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("shards", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def finding_lines(report: VerifyReport) -> list[str]:
    """Every finding on a line of its own, then the verdict."""
    lines = [
        f"{finding.code}: {printable(finding.where)}: {printable(finding.what)}"
        for finding in report.findings
    ]
    size = f"{report.num_samples:,} samples in {report.num_shards:,} shards, {human_bytes(report.num_bytes)}"
    if report.ok:
        looked = "every byte was read" if report.deep else "quick check; --deep reads every byte"
        return [f"{report.dataset} is intact: {size} ({looked})"]
    count = f"{len(lines):,} finding{'s' if len(lines) > 1 else ''}"
    if any(finding.code in REPAIRABLE for finding in report.findings):
        count += "; `omnidata verify --repair` rebuilds what intact shards can give back"
    return [*lines, f"{report.dataset} is damaged: {count}"]


def repair_lines(report: RepairReport) -> list[str]:
    """What was rebuilt and what is lost."""
    rebuilt = [f"rebuilt: {name}" for name in report.rebuilt] or ["nothing to rebuild"]
    return [*rebuilt, *(f"lost: {sentence}" for sentence in report.lost)]


# --- rejects ----------------------------------------------------------------------------------------------


def print_rejects(console: Console, rejects: Sequence[dict[str, str]], *, limit: int) -> None:
    """Each refused record: where, why, and how it began; says so when there are more than ``limit``."""
    for reject in rejects[:limit]:
        line = Text(f"\n{printable(reject['source'])}, {printable(reject['locator'])} ", style=HEADING)
        line.append(reject["reason"], style="yellow").append(f" {printable(reject['detail'])}")
        console.print(line)
        if reject["raw"]:
            console.print(Text(printable(reject["raw"]), style=MUTED))
    if len(rejects) > limit:
        console.print(f"\n{limit:,} of {len(rejects):,} rejects shown: --limit shows more")
    elif not rejects:
        console.print("no rejects")
