"""The commands that copy samples of datasets into a new one: ``omnidata merge``, ``subset``, ``export``.

As in cli.py nothing but click and the contract is imported before a command runs.
"""

from __future__ import annotations

from typing import Any

import click

from omnidata.options import copy_options
from omnidata.printable import printable, to_json


def print_report(report: Any, *, as_json: bool) -> None:
    """A report has ``to_json()`` for scripts and ``lines()`` for people."""
    click.echo(to_json(report.to_json()) if as_json else printable("\n".join(report.lines())))


@click.command()
@click.argument("datasets", metavar="DATASET...", nargs=-1, required=True)
@copy_options
def merge(datasets: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Copy the samples of every DATASET into one. Nothing is tokenized or encoded again.

    They must be of one tokenizer, chat template and profile of pictures. If they share keys, each key gets
    its dataset's number (0-, 1-, …) in front. The manifest says where everything came from. Interrupted, it
    goes on when the same command is run again.

    \b
    omnidata merge data/llava data/charts --out data/all
    omnidata merge s3://bucket/a s3://bucket/b --out data/all --shard-bytes 256MB
    """
    from omnidata.commands.copies import merge as copy

    print_report(copy(datasets, **flags), as_json=as_json)


@click.command()
@click.argument("dataset")
@click.option("--where", default="", metavar="CONDITION", help="Samples that meet it, as in 'n_images <= 8'.")
@click.option(
    "--exclude",
    default="",
    metavar="FILE",
    help="But not these keys, one per line (decontaminate writes it).",
)
@copy_options
def subset(dataset: str, as_json: bool, **flags: Any) -> None:
    """Copy some samples of DATASET into a new one. Nothing is tokenized or encoded again.

    Every sample that is left out is a row of rejects.parquet (left_out): samples + rejects = records still
    holds. `split` is a column like any other. Interrupted, it goes on when the same command is run again.

    \b
    omnidata subset data --where 'relevance_min >= 4 and n_images <= 8' --out data/good
    omnidata subset data --where 'split == "val" or n_tokens < 4096' --out data/short
    omnidata subset data --exclude leaks/exclude.txt --out data/clean
    """
    from omnidata.commands.copies import subset as copy

    print_report(copy(dataset, **flags), as_json=as_json)


@click.command()
@click.argument("view")
@copy_options
def export(view: str, as_json: bool, **flags: Any) -> None:
    """Make a dataset of its own of a VIEW (omnidata render): its ids and labels, its base's images.

    Nothing is tokenized or encoded again. What comes out is what a build from the corpus gives. Interrupted,
    it goes on when the same command is run again.

    \b
    omnidata export data/qwen-view --out data/qwen
    """
    from omnidata.commands.copies import export as copy

    print_report(copy(view, **flags), as_json=as_json)
