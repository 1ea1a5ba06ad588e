"""Settings: what a build was asked for. Everything in ``BuildSettings`` can change the bytes that come out,
so it is kept in the plan and in the manifest, and a build that is resumed must have the same ones.

How the build runs (workers, executor, limits on rejects) is in ``RunOptions`` and changes no byte.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from omnidata.conversation import Reading
from omnidata.corpus.columns import check_names
from omnidata.images.header import MAX_PIXELS
from omnidata.images.slices import Slicing, slicing_of
from omnidata.images.store import check_remote
from omnidata.near.hashing import COLUMNS as NEAR_COLUMNS
from omnidata.near.hashing import check_installed
from omnidata.schema import CONTENT_TOKENS, SLICE_TOKENS, UserError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
TRAIN = "train"
# settings that are lists
LISTS = (
    *("source", "content_token", "slice_tokens", "image_key", "caption_prompt", "allow_remote"),
    *("processor_arg", "keep_column"),
)
LATER = ("keep_column", "chat_template", "system")
# settings that only OmniLMM's profile has
OMNILMM_ONLY = ("num_query", "image_size", "image_fit", "max_slices", "slice_size", "slice_tokens")
MAX_LENGTH = {"tokenizer": 2048, "model": 16_384}  # tokens; a picture of current models may take thousands


@dataclass(frozen=True)
class BuildSettings:
    """What shapes the bytes of a dataset. Names are those of the flags."""

    source: tuple[str, ...]  # files, globs or URLs, in the order in which they are read
    tokenizer: str = ""  # of OmniLMM's profile …
    model: str = ""  # … or the model whose processor is asked
    processor_arg: tuple[str, ...] = ()  # NAME=VALUE of the processor's call
    date: str | None = None  # today's, for chat templates that print it
    chat_template: str | None = None  # zephyr, a Jinja file or a template; None: the tokenizer's own
    system: str | None = None  # in front of a conversation without a system turn; None: the format's own
    image_root: str | None = None
    format: str = "auto"
    num_query: int = 64  # <im_patch> tokens per image
    max_length: int | None = None  # tokens; None: MAX_LENGTH
    image_size: int = 448  # pixels
    image_policy: str | None = None  # keep | shrink; None: shrink for OmniLMM, keep for a processor
    image_fit: str = "squash"  # squash | center_crop: how the model's square is made of a picture
    max_slices: int = 0  # tiles that a large picture is cut into besides its overview; 0: none
    slice_size: int | None = None  # pixels per side of a tile; None: image_size
    slice_tokens: tuple[str, ...] = SLICE_TOKENS  # before and after a picture's tiles
    check_images: str = "full"  # full | quick
    quality: int = 90  # JPEG quality of what is encoded anew
    samples_per_shard: int | None = None
    shard_bytes: int | None = None  # neither: see layout.auto_shard_bytes
    split: dict[str, float] = field(default_factory=dict)  # name -> fraction of the ids; the rest is "train"
    seed: int = 0  # which ids go to which split
    dedup: str = "off"  # off | exact | near
    duplicate_ids: str = "keep"  # keep | reject
    content_token: tuple[str, ...] = ()  # special tokens that content may spell, besides the grounding tags
    allow_http: bool = False
    allow_remote: tuple[str, ...] = ()  # object stores that records may name: s3, gs, …
    allow_any_path: bool = False  # absolute paths of records may lead out of the image root
    image_key: tuple[str, ...] = ()  # more keys of records, turns or tar samples that hold pictures
    caption_prompt: tuple[str, ...] = ()  # what asks for a caption; one of them by the record's id
    allow_empty_replies: bool = False
    train_on: str = "all"  # all | last: which assistant turns are supervised
    turn_order: str | None = None  # alternate | template; None: alternate for OmniLMM's format only
    max_pixels: int = MAX_PIXELS  # of one picture
    keep_column: tuple[str, ...] = ()  # keys of records whose values become columns of the index, or "all"
    conversation: bool = True  # keep KEY.json, so that the dataset can be rendered again

    def __post_init__(self) -> None:
        self._choose()
        if self.samples_per_shard is not None and self.shard_bytes is not None:
            raise UserError("--samples-per-shard and --shard-bytes exclude each other: give one")
        for name in (
            "num_query",
            "max_length",
            "image_size",
            "slice_size",
            "max_pixels",
            "samples_per_shard",
            "shard_bytes",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
        check_names(self.columns)
        if self.dedup == "near":
            check_installed()
        if self.max_slices == 1 or self.max_slices < 0:
            raise UserError(f"--max-slices is {self.max_slices}: give 0 (cut nothing) or at least 2 tiles")
        if TRAIN in self.split or sum(self.split.values()) >= 1:
            raise UserError(f"--split {self.split}: name other splits than train, and leave it some records")

    def _choose(self) -> None:
        """The defaults that depend on the profile; refuse flags of the other one."""
        if bool(self.model) == bool(self.tokenizer):
            raise UserError("give either --model (its processor) or --tokenizer (OmniLMM's profile)")
        if self.max_length is None:
            object.__setattr__(self, "max_length", MAX_LENGTH["model" if self.model else "tokenizer"])
        if self.image_policy is None:
            object.__setattr__(self, "image_policy", "keep" if self.model else "shrink")
        if not self.model and self.processor_arg:
            raise UserError("--processor-arg goes with --model: OmniLMM's profile has no processor")
        given = [name for name in OMNILMM_ONLY if self.model and getattr(self, name) != _default(name)]
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(
                f"{flags}: of OmniLMM's profile; with --model the processor decides, say it with "
                "--processor-arg NAME=VALUE"
            )

    @property
    def arguments(self) -> dict[str, object]:
        """Arguments of the processor's call."""
        from omnidata.profiles.folder import parse_arguments

        return parse_arguments(self.processor_arg)

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits: train first, then the others as given."""
        return (TRAIN, *self.split)

    @property
    def content_tokens(self) -> tuple[str, ...]:
        """Special tokens that content may spell."""
        return tuple(dict.fromkeys((*CONTENT_TOKENS, *self.content_token)))

    @property
    def columns(self) -> tuple[str, ...]:
        """What the index keeps besides its own columns: those of records, and hashes for ``dedup near``."""
        return (*self.keep_column, *(NEAR_COLUMNS if self.dedup == "near" else ()))

    def reading(self, *, is_omnilmm: bool) -> Reading:
        """How records are understood, for a tokenizer of OmniLMM's format or another."""
        return Reading(
            self.image_key,
            self.caption_prompt,
            self.allow_empty_replies,
            self.train_on,
            turn_order=self.turn_order or ("alternate" if is_omnilmm else "template"),
            keep_column=self.keep_column,
        )

    @property
    def slicing(self) -> Slicing | None:
        """How large pictures are cut; None: not at all."""
        return slicing_of(self.to_json())

    def to_json(self) -> dict[str, object]:
        """Plain JSON values, as they stand in the plan and in the manifest."""
        lists = {name: list(getattr(self, name)) for name in LISTS}
        values = asdict(self) | lists | {"slice_size": self.slice_size or self.image_size}
        unused: tuple[str, ...] = OMNILMM_ONLY if self.model else ("model", "processor_arg")
        # A build without these is what it was before there were such flags.
        unused += tuple(name for name in LATER if not values[name] and values[name] != "")
        return {name: value for name, value in values.items() if name not in unused}


def _default(name: str) -> object:
    return next(setting.default for setting in fields(BuildSettings) if setting.name == name)


def settings_from_json(values: dict[str, Any]) -> BuildSettings:
    """The settings that ``to_json`` gave."""
    given: dict[str, Any] = {name: tuple(v) if name in LISTS else v for name, v in values.items()}
    return BuildSettings(**given)


@dataclass(frozen=True)
class RunOptions:
    """How a build runs. None of it changes a byte of the dataset."""

    workers: int | None = None  # None: the CPUs this process may use; on Ray, the cluster's
    executor: str = "local"  # local | ray; inline: in this process, for debuggers and tests
    task: tuple[int, int] | None = None  # (I, N): build the I-th of N parts
    finalize: bool = False  # only complete a dataset whose tasks are done
    max_rejects: float | None = None  # fraction of the records (below 1) or a number of them
    overwrite: bool = False
    quiet: bool = False


def settings_of(flags: dict[str, Any]) -> BuildSettings:
    """Settings from the values of the flags, as text where they have a notation of their own."""
    values = {setting.name: flags[setting.name] for setting in fields(BuildSettings)}
    values["split"] = dict(parse_split(text) for text in flags["split"])
    if len(values["split"]) != len(flags["split"]):
        raise UserError(f"--split {' '.join(flags['split'])}: a name is given twice")
    if flags["shard_bytes"] is not None:
        values["shard_bytes"] = parse_size(str(flags["shard_bytes"]))
    for name in LISTS:
        values[name] = tuple(values[name])
    values["allow_remote"] = tuple(
        part for text in values["allow_remote"] for part in text.split(",") if part
    )
    check_remote(values["allow_remote"])
    return BuildSettings(**values)


def options_of(flags: dict[str, Any]) -> RunOptions:
    """Run options from the values of the flags."""
    limit, task = flags["max_rejects"], flags["task"]
    return RunOptions(
        workers=flags["workers"],
        executor=flags["executor"],
        task=parse_task(task) if task is not None else None,
        finalize=flags["finalize"],
        max_rejects=parse_limit(str(limit)) if limit is not None else None,
        overwrite=flags["overwrite"],
        quiet=flags["quiet"],
    )


def read_config(file: str, *, names: set[str]) -> dict[str, object]:
    """Flags' values from a YAML file: the flags' names, with - or _; lists where a flag may be repeated.

    Example: ``image-root: photos`` and ``split: {val: 0.01}``.
    """
    import yaml

    try:
        with open(file, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config {file}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {file}: expected lines of NAME: VALUE")
    values = {str(name).replace("-", "_"): value for name, value in content.items()}
    if unknown := sorted(values.keys() - names):
        raise UserError(f"--config {file}: no flag is named {', '.join(unknown)}")
    repeatable = ("content_token", "image_key", "caption_prompt", "allow_remote", "processor_arg")
    for name in ("source", "split", "keep_column", *repeatable):
        if name in values:
            values[name] = _as_list(values[name])
    return values


def _as_list(value: object) -> list[str]:
    if isinstance(value, dict):
        return [f"{name}={share}" for name, share in value.items()]
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def parse_size(text: str) -> int:
    """Bytes: ``parse_size("512MB")`` -> 512000000; ``"1GiB"`` -> 1073741824; ``"4096"`` -> 4096."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    unit = match and (UNITS | BINARY_UNITS).get(match[2])
    if not match or not unit:
        raise UserError(f"{text!r} is not a size: write it like 512MB, 1GiB or 4096")
    return int(float(match[1]) * unit)


def parse_split(text: str) -> tuple[str, float]:
    """``parse_split("val=0.01")`` -> ``("val", 0.01)``; ``"val=1%"`` is the same."""
    name, _, fraction = text.partition("=")
    if not re.fullmatch(r"[A-Za-z0-9_]+", name) or not 0 < (value := _fraction(fraction)) < 1:
        raise UserError(f"--split {text!r}: write NAME=FRACTION, as in val=0.01")
    return name, value


def parse_limit(text: str) -> float:
    """``"5%"`` -> 0.05 of the records; ``"200"`` -> 200 records; ``"100%"`` -> no limit."""
    if text.strip().endswith("%"):
        value = _fraction(text)
        if 0 <= value <= 1:
            return value if value < 1 else math.inf
    elif text.strip().isdigit():
        return float(text)
    raise UserError(f"--max-rejects {text!r}: write a share as in 5%, or a number of records as in 200")


def parse_task(text: str) -> tuple[int, int]:
    """``"3/8"`` -> ``(3, 8)``. Tasks may be counted from 0 or from 1: 8/8 and 0/8 are the same task."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not match or int(match[2]) < 1 or int(match[1]) > int(match[2]):
        raise UserError(f"--task {text!r}: write I/N, from 0/8 to 7/8 or from 1/8 to 8/8")
    return int(match[1]) % int(match[2]), int(match[2])


def _fraction(text: str) -> float:
    try:
        return float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        return -1.0
