"""The ``omnidata`` commands. Each one parses, calls one function of one module, and prints what came back.

Nothing but click and the contract is imported here: a command imports its module when it runs, so that
``omnidata --help`` answers at once and never loads torch.

Exit codes: 0 done; 1 the input is bad or a check failed, with one clear message; 2 wrong usage;
130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import click

from omnidata import __version__
from omnidata.cli_copies import export, merge, print_report, subset
from omnidata.options import build_options, cost_options, render_options
from omnidata.printable import printable
from omnidata.schema import UserError
from omnidata.start import MODEL, TOKENIZER, keep_pandas_out, worker_imports

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
UNUSABLE_PATH = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM),
    *(errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="omnidata")
def cli() -> None:
    """From raw conversations and images to training-ready shards, and a look inside them.

    \b
    omnidata build-shards corpus.json --image-root photos --tokenizer tok --out data
    omnidata inspect data
    omnidata verify data
    omnidata plan data --max-tokens 4096

    Shell completion (bash; zsh and fish likewise), for example in ~/.bashrc:

    \b
    eval "$(_OMNIDATA_COMPLETE=bash_source omnidata)"

    NO_COLOR=1 takes colours away; a pipe or a file never gets any.
    """


@cli.command("build-shards")
@build_options
@click.pass_obj
def build_shards(is_own_process: bool, **flags: Any) -> int:
    """Build a dataset from corpora: SOURCE is a file, a glob or a URL, and may be repeated.

    Interrupted, it goes on when the same command is run again. Refused records are counted and kept in
    rejects.parquet.

    \b
    omnidata build-shards corpus.json --image-root photos --tokenizer tok --out data
    omnidata build-shards 'chat/*.jsonl.zst' --tokenizer tok --out s3://bucket/data --split val=0.01
    omnidata build-shards --config build.yaml --task 3/8
    """
    from omnidata.executors import start_server

    flags["slice_tokens"] = tuple(flags["slice_tokens"])
    given = flags | {"model or --tokenizer": flags["model"] or flags["tokenizer"]}
    wanted = ("source", "model or --tokenizer", "out")
    missing = [name for name in wanted if not given[name] and not flags["dry_run"]]
    if missing:
        raise click.UsageError(f"Missing {', '.join('--' * (name != 'source') + name for name in missing)}.")
    if flags["executor"] == "local" and not (flags["dry_run"] or flags["finalize"]):
        warm = {TOKENIZER: flags["tokenizer"], MODEL: flags["model"]}
        start_server(worker_imports(model=flags["model"], max_slices=flags["max_slices"]), **warm)
    if is_own_process:
        keep_pandas_out()
    from omnidata.builder.settings import options_of, settings_of

    settings, options = settings_of(flags), options_of(flags)
    if flags["dry_run"]:
        _print_dry_run(settings, options, as_json=flags["as_json"])
        return 0
    from omnidata.builder.build import build

    report = build(settings, flags["out"], options)
    print_report(report, as_json=flags["as_json"])
    # An error that nobody foresaw ends no build, but somebody should hear of it.
    return 1 if report.rejects.get("unexpected") else 0


def _print_dry_run(settings: Any, options: Any, *, as_json: bool) -> None:
    from omnidata.commands.dry_run import dry_run
    from omnidata.inspect import terminal

    report = dry_run(settings, options)
    print_report(report, as_json=as_json)
    if not as_json:
        terminal.print_samples(terminal.make_console(), report.views)


@cli.command()
@click.argument("dataset")
@render_options
@click.pass_context
def render(context: click.Context, dataset: str, **flags: Any) -> int:
    """Make the ids and labels of DATASET anew, for another model, template, prompt or length: a view.

    No corpus is needed: the conversations are in the dataset (KEY.json). Its images stay where they are, so a
    view is small; it is a dataset like any other as long as DATASET does not change. What is not given here
    is as it was in the build of DATASET. Interrupted, it goes on when the same command is run again.

    \b
    omnidata render data --model Qwen3-VL-4B-Instruct --out data-qwen
    omnidata render data --max-length 8192 --out data-8k
    omnidata render s3://bucket/data --tokenizer tok --train-on last --out views/data-last
    omnidata render data --model OTHER --out view --refetch --image-root photos
    """
    from omnidata.commands.render import render as render_again

    default = click.core.ParameterSource.DEFAULT
    given = {name: value for name, value in flags.items() if context.get_parameter_source(name) != default}
    report = render_again(dataset, flags, given)
    print_report(report, as_json=flags["as_json"])
    return 1 if report.rejects.get("unexpected") else 0


@cli.command("prepare-tokenizer")
@click.argument("source")
@click.option("--out", required=True, help="Folder to write the Hugging Face tokenizer to.")
@click.option("--chat-template", help="zephyr or a Jinja file.  [default: the source's own]")
@click.option(
    "--slice-tokens", nargs=2, help="Also add these two, as in '<slice>' '</slice>' (--max-slices)."
)
def prepare_tokenizer(
    source: str, out: str, chat_template: str | None, slice_tokens: tuple[str, str] | None
) -> None:
    """Make a tokenizer ready: image and grounding tokens added once, a chat template set.

    SOURCE is a Hugging Face tokenizer (folder or id), a sentencepiece .model or Mistral's tekken.json.

    \b
    omnidata prepare-tokenizer Qwen2.5-7B-Instruct --out tok
    omnidata prepare-tokenizer tokenizer.model.v1 --out tok --chat-template zephyr
    omnidata prepare-tokenizer zephyr-7b-beta --out tok --slice-tokens '<slice>' '</slice>'
    """
    from omnidata.text.preparation import prepare_tokenizer as prepare

    prepare(source, out, chat_template=chat_template, slice_tokens=slice_tokens or ())
    click.echo(f"Tokenizer written to {out}")


@cli.command()
@click.argument("dataset")
@click.option("--key", help="Show the sample with this key.")
@click.option("--sample", type=int, help="Show the sample at this position, from 0; negative from the end.")
@click.option("--limit", type=click.IntRange(0), help="Samples (or rejects) to show: 3 (20), 1000 in HTML.")
@click.option("--split", help="Only this split.")
@click.option("--where", metavar="CONDITION", help="Only samples that meet it, as in 'n_images <= 8'.")
@click.option("--source", help="Only samples (or rejects) of this source.")
@click.option("--rejects", is_flag=True, help="Show the refused records, also of an unfinished build.")
@click.option("--html", metavar="FILE", help="Write one self-contained HTML report.")
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON (omnidata/inspect/summary.py).")
@cost_options
def inspect(
    dataset: str, split: str | None, where: str | None, html: str | None, as_json: bool, **options: Any
) -> None:
    """See what a model would learn from DATASET, a folder or URL: totals, then samples in colour.

    Green is supervised, dim is a special token, a chip is an image. Only the index and the samples shown are
    read. Colour goes away with NO_COLOR=1 or in a pipe, where «» mark what is supervised.

    \b
    omnidata inspect data
    omnidata inspect data --sample 12
    omnidata inspect data --rejects --limit 100
    omnidata inspect data --where 'source != "ocr.json" and n_images <= 8'
    omnidata inspect data --html report.html
    omnidata inspect s3://bucket/data --json | jq .supervised_share
    """
    from omnidata.commands import inspect as look
    from omnidata.dataset import Dataset
    from omnidata.inspect import unfinished
    from omnidata.plan.cost import assumptions

    choice = look.Choice(**{name: options.pop(name) for name in look.Choice.names()})
    if choice.rejects and not html and unfinished.is_unfinished(dataset):
        look.show_unfinished(dataset, choice=choice, as_json=as_json)
        return
    opened = Dataset(dataset, split, where)
    assume = assumptions(**options)
    if html:
        click.echo(look.write_html(opened, html, choice=choice, assume=assume))
    elif as_json:
        click.echo(look.summary_json(opened, choice=choice, assume=assume))
    else:
        look.show(opened, choice=choice, assume=assume)


@cli.command()
@click.argument("dataset")
@click.option(
    "--deep", is_flag=True, help="Also read every byte: checksums, ids, labels, image blocks, images."
)
@click.option(
    "--repair", is_flag=True, help="Rebuild a lost or damaged index, .idx or .nv-meta from the shards."
)
@click.option("--workers", type=click.IntRange(1), help="Processes for --deep; by default one per core.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--json", "as_json", is_flag=True, help="Findings as JSON (omnidata/verify/run.py).")
def verify(dataset: str, **options: Any) -> int:
    """Prove that DATASET is what its manifest says. Exit 1 with every finding (what, where) if it is not.

    The quick check takes seconds: files, sizes, index, offsets, totals, tokenizer, and that
    samples + rejects = records. --deep reads every sample in parallel.

    \b
    omnidata verify data
    omnidata verify data --deep --workers 8
    omnidata verify data --repair
    """
    from omnidata.commands.verify import verify as check

    text, exit_code = check(dataset, **options)
    click.echo(text)
    return exit_code


@cli.command()
@click.argument("datasets", metavar="DATASET...", nargs=-1, required=True)
@click.option(
    "--max-tokens", type=click.IntRange(1), help="Tokens a pack.  [default: the recipe's, else 4096]"
)
@click.option(
    "--max-images", type=click.IntRange(0), help="Images a pack.  [default: the recipe's, else no limit]"
)
@click.option(
    "--global-batch",
    type=click.IntRange(1),
    help="Packs per step.  [default: the recipe's, else one per rank]",
)
@click.option("--world-size", type=click.IntRange(1), default=1, show_default=True, help="Ranks.")
@click.option("--split", help="Split to plan; by default train.")
@click.option(
    "--where",
    multiple=True,
    metavar="CONDITION",
    help="Only samples that meet it; once for all datasets, or once for each ('' for none).",
)
@click.option("--cap", type=click.IntRange(1), help="Samples a dataset gives in one pass …")
@click.option("--cap-by", metavar="COLUMN", help="… of each value of this column.")
@click.option("--order", metavar="ORDER", help="shuffled, length or a numeric column; -length: falling.")
@click.option("--seed", default=0, show_default=True, help="Seed of the shuffle.")
@click.option("--epoch", default=0, show_default=True, help="Epoch, from 0.")
@click.option(
    "--oversize",
    type=click.Choice(["refuse", "cut", "leave_out"]),
    default="leave_out",
    show_default=True,
    help="What becomes of samples that no pack can hold; they are counted.",
)
@click.option("--json", "as_json", is_flag=True, help="The forecast as JSON (omnidata/plan/forecast.py).")
@cost_options
def plan(datasets: tuple[str, ...], **options: Any) -> None:
    """Foresee an epoch on DATASET...: packs, steps, padding, balance over ranks, FLOPs and hours.

    Everything comes from the index. No shard is opened and no GPU is needed. DATASET may also be a recipe
    (.yaml): its data.train, with each dataset's where, weights, cap and order.

    \b
    omnidata plan data --max-tokens 4096 --global-batch 64 --world-size 8 --gpus 8
    omnidata plan data more-data --max-tokens 8192 --json
    omnidata plan recipe.yaml --world-size 8 --epoch 1
    omnidata plan data --where 'relevance_min >= 4 and n_images <= 8 and source != "ocr.json"'
    """
    from omnidata.commands.plan import plan as foresee

    foresee(datasets, **options)


@cli.command()
@click.argument("dataset")
@click.option(
    "--against", multiple=True, required=True, metavar="BENCHMARK...", help="JSON, Parquet or a dataset."
)
@click.argument("more", nargs=-1, metavar="")
@click.option("--out", default="leaks", show_default=True, metavar="DIR", help="Folder for the two files.")
@click.option("--split", default="train", show_default=True, help="Split to look at; '' for all.")
@click.option("--image-root", metavar="DIR", help="Of the benchmarks' pictures.  [default: beside each file]")
@click.option(
    "--ngram", type=click.IntRange(5), default=13, show_default=True, help="Words of a run that counts."
)
@click.option("--workers", type=click.IntRange(1), help="Processes.  [default: CPUs it may use]")
@click.option("--json", "as_json", is_flag=True, help="The totals as JSON.")
def decontaminate(
    dataset: str, against: tuple[str, ...], more: tuple[str, ...], split: str, as_json: bool, **options: Any
) -> None:
    """Find samples of DATASET that hold texts or pictures of benchmarks (extra: near).

    Writes leaks.parquet, a row for each sample and entry, and exclude.txt for `exclude` in a recipe; the
    dataset stays as it is. A text has leaked if a sample has half of its runs of 13 words, a picture if one
    looks alike (a perceptual hash).

    \b
    omnidata decontaminate data --against mme.json mmmu.parquet
    omnidata decontaminate data --against questions.jsonl --image-root images --out leaks
    omnidata decontaminate data --against other-dataset
    """
    from omnidata.leaks import report

    found = report.decontaminate(dataset, against=(*against, *more), split=split or None, **options)
    print_report(found, as_json=as_json)


for command in (merge, subset, export):
    cli.add_command(command)


def main(args: list[str] | None = None) -> None:
    """Entry point: run a command and turn what it raises into a message and an exit code."""
    # Help makes no table, and a build starts the server of its workers before it imports pyarrow.
    if sys.argv[1:] and not {"-h", "--help", "--version", "build-shards"}.intersection(sys.argv):
        keep_pandas_out()
    sys.exit(run(args, is_own_process=True))


def run(args: list[str] | None = None, *, is_own_process: bool = False) -> int:
    """Run a command; return its exit code instead of leaving the process."""
    try:
        result: object = cli.main(args, prog_name="omnidata", standalone_mode=False, obj=is_own_process)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except UserError as error:
        click.echo(printable(f"Error: {error}"), err=True)
        return 1
    except (click.Abort, KeyboardInterrupt) as interrupt:
        # click wraps what it caught; a build's own interrupt says how to go on
        click.echo(printable(str(interrupt.__cause__ or interrupt)) or "Interrupted.", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # `omnidata … | head` closed our stdout: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a path of the user's that cannot be used; anything else is a fault of ours
        if error.errno not in UNUSABLE_PATH or error.filename is None:
            raise
        advice = "give another path, or mend that"
        click.echo(printable(f"Error: {error.filename}: {error.strerror}; {advice}"), err=True)
        return 1


if __name__ == "__main__":
    main()
