"""The ``omnidata`` commands. Each one parses, calls one function of one module, and prints what came back.

Nothing but click and the contract is imported here: a command imports its module when it runs, so that
``omnidata --help`` answers at once and never loads torch.

Exit codes: 0 done; 1 the input is bad or a check failed, with one clear message; 2 wrong usage;
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from omnidata.schema import UserError

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="omnilmm-toolkit", prog_name="omnidata")
def cli() -> None:
    """From raw conversations and images to training-ready shards, and a look inside them.

    \b
    omnidata build-shards corpus.json --image-root photos --tokenizer tok --out data
    omnidata inspect data
    omnidata verify data
    omnidata plan data --max-tokens 4096
    """


@cli.command("prepare-tokenizer")
@click.argument("source")
@click.option("--out", required=True, help="Folder to write the Hugging Face tokenizer to.")
@click.option("--chat-template", help="File with a Jinja chat template; Zephyr's where the source has none.")
def prepare_tokenizer(source: str, out: str, chat_template: str | None) -> None:
    """Make a tokenizer ready: image and grounding tokens added once, a chat template set.

    SOURCE is a Hugging Face tokenizer (folder or id) or a sentencepiece .model file.

    \b
    omnidata prepare-tokenizer tokenizer.model.v1 --out tok
    """
    from omnidata import tokenizer

    tokenizer.prepare_tokenizer(source, out, chat_template=chat_template)
    click.echo(f"Tokenizer written to {out}")


def main(args: list[str] | None = None) -> None:
    """Entry point: run a command and turn what it raises into a message and an exit code."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Run a command; return its exit code instead of leaving the process."""
    try:
        result: Any = cli.main(args=args, prog_name="omnidata", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except UserError as error:
        click.echo(f"Error: {error}", err=True)
        return 1
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # `omnidata … | head` closed our stdout: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    main()
