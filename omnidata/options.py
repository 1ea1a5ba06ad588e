"""Options: the flags of ``omnidata build-shards``, and those that several commands share.

Only click and the contract are imported: ``omnidata --help`` stays instant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from omnidata.schema import SLICE_TOKENS

Command = Callable[..., Any]


def _all_of(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    """The command with these options, in the order of its help text."""
    for option in reversed(options):
        command = option(command)
    return command


def _read_config(context: click.Context, parameter: click.Parameter, file: str | None) -> None:
    """Make the values of a YAML file the defaults of this command's flags."""
    if file:
        from omnidata.builder.settings import read_config

        names = {other.name for other in context.command.params} - {"config", "source"} | {"source"}
        context.default_map = read_config(file, names=names)


BUILD_OPTIONS = (
    click.argument("source", nargs=-1),
    click.option("--out", metavar="DIR", help="Dataset folder or URL to write."),
    click.option(
        "--model", metavar="DIR_OR_ID", default="", help="Any vision-language model of transformers."
    ),
    click.option(
        "--tokenizer", metavar="DIR_OR_ID", default="", help="OmniLMM: a tokenizer with a chat template."
    ),
    click.option(
        "--processor-arg", multiple=True, metavar="NAME=VALUE", help="As max_pixels=1003520; repeatable."
    ),
    click.option("--date", metavar="YYYY-MM-DD", help="Today's, for chat templates that print it."),
    click.option(
        "--chat-template", metavar="FILE", help="zephyr or a Jinja file; by default the tokenizer's."
    ),
    click.option(
        "--system",
        metavar="TEXT",
        help="System turn of conversations that have none; '' for none.  [default: the format's own]",
    ),
    click.option("--image-root", metavar="DIR", help="Folder, zip or tar that image paths are relative to."),
    click.option(
        "--format", default="auto", show_default=True, help="auto, llava, messages, parquet, tsv, …"
    ),
    click.option("--num-query", default=64, show_default=True, help="<im_patch> tokens per image."),
    click.option("--max-length", type=int, help="Tokens per sample.  [default: 2048; with --model 16384]"),
    click.option("--image-size", default=448, show_default=True, help="Pixels of the shorter side (shrink)."),
    click.option(
        "--image-policy",
        type=click.Choice(["keep", "shrink"]),
        help="Store the original bytes, or bring large pictures down: to --image-size, or as far as the "
        "processor's answer stays the same.  [default: shrink; with --model keep]",
    ),
    click.option(
        "--image-fit",
        type=click.Choice(["squash", "center_crop"]),
        default="squash",
        show_default=True,
        help="How training and generation make the model's square of a picture.",
    ),
    click.option(
        "--max-slices", default=0, show_default=True, help="Also cut large pictures into up to N tiles."
    ),
    click.option("--slice-size", type=int, help="Pixels per side of a tile.  [default: --image-size]"),
    click.option(
        "--slice-tokens", nargs=2, default=SLICE_TOKENS, show_default=True, help="Around the tiles."
    ),
    click.option(
        "--check-images",
        type=click.Choice(["full", "quick"]),
        default="full",
        show_default=True,
        help="Decode every picture that is kept, or look at its header and end.",
    ),
    click.option("--quality", default=90, show_default=True, help="JPEG quality of what is encoded anew."),
    click.option("--samples-per-shard", type=int, metavar="N", help="Samples in every shard but the last."),
    click.option(
        "--shard-bytes", metavar="SIZE", help="About this size, as in 512MB.  [default: by the corpus]"
    ),
    click.option(
        "--split", multiple=True, metavar="NAME=SHARE", help="val=0.01: by hash of the id; repeatable."
    ),
    click.option("--seed", default=0, show_default=True, help="Which ids go to which split."),
    click.option(
        "--dedup",
        type=click.Choice(["off", "exact", "near"]),
        default="off",
        show_default=True,
        help="Refuse samples with the same, or nearly the same, pictures and text as an earlier one.",
    ),
    click.option(
        "--duplicate-ids",
        type=click.Choice(["keep", "reject"]),
        default="keep",
        show_default=True,
        help="Build records whose id an earlier one has, or refuse them.",
    ),
    click.option("--content-token", multiple=True, help="Special token that content may spell; repeatable."),
    click.option(
        "--image-key", multiple=True, metavar="NAME", help="Another key that holds pictures; repeatable."
    ),
    click.option(
        "--keep-column",
        multiple=True,
        metavar="NAME",
        help="Key whose numbers or short texts become a column of the index, or 'all'; repeatable.",
    ),
    click.option(
        "--caption-prompt",
        multiple=True,
        metavar="TEXT",
        help="What asks for a caption; repeatable: one by the id.",
    ),
    click.option(
        "--conversation/--no-conversation",
        default=True,
        show_default=True,
        help="Keep each sample's conversation (KEY.json), so that `omnidata render` needs no corpus.",
    ),
    click.option("--allow-empty-replies", is_flag=True, help="Build records whose assistant says nothing."),
    click.option(
        "--train-on",
        type=click.Choice(["all", "last"]),
        default="all",
        show_default=True,
        help="Assistant turns that are supervised, if not switched off.",
    ),
    click.option(
        "--turn-order",
        type=click.Choice(["alternate", "template"]),
        help="User and assistant in turn, or whatever the chat template prints.  [default: template; "
        "alternate for OmniLMM's format]",
    ),
    click.option(
        "--max-pixels", default=178_956_970, show_default=True, help="Of one picture; more is a reject."
    ),
    click.option("--allow-http", is_flag=True, help="Fetch images from public http(s) addresses."),
    click.option(
        "--allow-remote",
        multiple=True,
        metavar="s3,gs,…",
        help="Object stores that records may name; they are read with your credentials.",
    ),
    click.option(
        "--allow-any-path",
        is_flag=True,
        help="Absolute paths of records may lead out of --image-root (without it: out of the source's "
        "folder).",
    ),
    click.option("--workers", type=click.IntRange(1), help="Processes.  [default: CPUs it may use]"),
    click.option(
        "--executor",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Processes of this machine, or a Ray cluster.",
    ),
    click.option("--task", metavar="I/N", help="Build part I of N; the last one completes the dataset."),
    click.option("--finalize", is_flag=True, help="Build nothing, complete a dataset whose tasks are done."),
    click.option("--max-rejects", metavar="LIMIT", help="Stop beyond 5% or 200 refused records; 0: at one."),
    click.option(
        "--config", callback=_read_config, is_eager=True, help="YAML file with values for these flags."
    ),
    click.option(
        "--dry-run", is_flag=True, help="Look, count, estimate and render ten samples; write nothing."
    ),
    click.option("--overwrite", is_flag=True, help="Remove the dataset that is in --out."),
    click.option("--quiet", is_flag=True, help="No progress."),
    click.option("--json", "as_json", is_flag=True, help="The final report as JSON."),
)
COPY_OPTIONS = (
    click.option("--out", required=True, metavar="DIR", help="Dataset folder or URL to write."),
    click.option("--samples-per-shard", type=click.IntRange(1), metavar="N", help="Samples a shard."),
    click.option(
        "--shard-bytes", metavar="SIZE", help="About this size, as in 512MB.  [default: by the datasets]"
    ),
    click.option("--workers", type=click.IntRange(1), help="Processes.  [default: CPUs it may use]"),
    click.option("--dry-run", is_flag=True, help="Say what would be copied; write nothing."),
    click.option("--overwrite", is_flag=True, help="Remove the dataset that is in --out."),
    click.option("--quiet", is_flag=True, help="No progress."),
    click.option("--json", "as_json", is_flag=True, help="The final report as JSON."),
)
RENDER_NAMES = (
    *("out", "model", "tokenizer", "processor_arg", "date", "chat_template", "system", "num_query"),
    *("max_length", "image_size", "image_fit", "content_token", "train_on", "turn_order"),
    *("samples_per_shard", "shard_bytes", "image_root", "allow_http", "allow_remote", "allow_any_path"),
    *("workers", "executor", "task", "finalize", "max_rejects", "config", "overwrite", "quiet", "as_json"),
)
COST_OPTIONS = (
    click.option("--model", default="omnilmm-12b", show_default=True, help="Or so400m-7b, vitl-7b."),
    click.option("--gpu", default="h100", show_default=True, help="b200, h200, h100, a100, l40s, rtx4090."),
    click.option(
        "--gpus", "num_gpus", type=int, help="GPUs of the estimate; by default 1, in plan one per rank."
    ),
    click.option("--mfu", default=0.4, show_default=True, help="Assumed share of the peak FLOP/s."),
    click.option("--freeze", "frozen", multiple=True, help="Part not trained; repeatable, or 'none'."),
)


def _parameter(option: Callable[[Command], Command]) -> click.Parameter:
    """The parameter that a decorator adds."""

    def nothing() -> None: ...

    return option(nothing).__click_params__[0]  # type: ignore[attr-defined]


def render_options(command: Command) -> Command:
    """Those of build-shards that a view has, too. Without a value they are as in the build of its base."""
    refetch = click.option(
        "--refetch",
        is_flag=True,
        help="Read images that do not suit the model again, from --image-root: they are stored in the view.",
    )
    command = refetch(command)
    command.__click_params__ += [  # type: ignore[attr-defined]
        _of_base(parameter)
        for parameter in map(_parameter, reversed(BUILD_OPTIONS))
        if parameter.name in RENDER_NAMES
    ]
    return command


def _of_base(option: Any) -> click.Parameter:
    """The option, with the base's value as its default."""
    if option.name == "out":
        option.required = True
    if option.name in ("num_query", "image_size", "image_fit", "train_on", "max_length"):
        option.default, option.show_default = None, "the base's"
        option.help = option.help.partition("  [default")[0]
    return option


def build_options(command: Command) -> Command:
    """Everything that build-shards takes."""
    return _all_of(BUILD_OPTIONS, command)


def copy_options(command: Command) -> Command:
    """What every command takes that copies samples into a new dataset."""
    return _all_of(COPY_OPTIONS, command)


def cost_options(command: Command) -> Command:
    """The assumptions of a cost estimate, the same for every command that makes one."""
    return _all_of(COST_OPTIONS, command)
