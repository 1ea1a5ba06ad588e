"""Inputs: what the user named must exist. Sources; tokenizer and processor as the dataset will carry them."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omnidata import corpus
from omnidata.builder.identity import identity_of
from omnidata.builder.records import load_part_renderer, renderer_of
from omnidata.builder.settings import BuildSettings
from omnidata.builder.survey import Opened, OpenTask, RunTasks, in_order, in_runs, open_files
from omnidata.corpus.source import file_size, is_url, with_names
from omnidata.durable import Store
from omnidata.images.store import ImageStore
from omnidata.profiles.omnilmm import OmniLMMProfile
from omnidata.render import Renderer
from omnidata.schema import CONTENT_TOKENS, IMAGE_TOKENS, PROCESSOR_DIR, TOKENIZER_DIR, UserError
from omnidata.text.preparation import prepare_tokenizer, resolved_template
from omnidata.text.prepared import PreparedTokenizer, load_prepared
from omnidata.text.tokenizer import fingerprint, load_tokenizer, template_fingerprint, template_text

if TYPE_CHECKING:
    from omnidata.text.prepared import AnyTokenizer

FEW_FILES, FEW_BYTES = 64, 64 << 20


@dataclass(frozen=True)
class Inputs:
    """What a build is made from."""

    files: tuple[corpus.SourceFile, ...]  # in order
    identity: dict[str, Any]  # see plan.identity_of
    renderer: Renderer


def open_inputs(settings: BuildSettings, folder: str, run: RunTasks) -> Inputs:
    """Open all of it; ``folder`` gets ``tokenizer/``, and ``processor/`` if any.

    A tokenizer that lacks OmniLMM's image tokens gets them here.
    """
    opened = open_sources(settings, run)
    images = None
    if settings.image_root is not None:  # raises if there is none
        images = ImageStore(settings.image_root, allow_http=settings.allow_http).digest()
    if settings.model:
        renderer, profile = save_model(settings, folder)
    else:
        place = f"{folder}/{TOKENIZER_DIR}"
        tokenizer = save_tokenizer(settings.tokenizer, place, chat_template=settings.chat_template)
        renderer = renderer_of(settings, tokenizer)  # raises here, not in a worker
        profile = OmniLMMProfile(settings.num_query, settings.image_size).to_json()
    tokenizer = renderer.tokenizer
    marks = {"behaviour": fingerprint(tokenizer), "chat template": template_fingerprint(tokenizer)}
    files = tuple(with_names([each.file for each in opened]))
    return Inputs(files, identity_of(settings, opened, marks, profile, images=images), renderer)


def open_sources(settings: BuildSettings, run: RunTasks) -> list[Opened]:
    """All input files in order, by the workers if there are many; the same file twice is refused."""
    names = [name for source in settings.source for name in corpus.expand(source)]
    tasks = [OpenTask(number, some, settings.format) for number, some in enumerate(in_runs(names))]
    opened = in_order(_here if _are_few(names) else run, tasks)
    for each in opened:
        if isinstance(each, str):
            raise UserError(each)
    counts = Counter(names)
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        raise UserError(f"{repeated[0]} is given twice: name each source once")
    return opened


def _are_few(names: Sequence[str]) -> bool:
    """Whether to read these files takes no longer than to ask a worker."""
    if len(names) > FEW_FILES or any(is_url(name) for name in names):
        return False
    return sum(file_size(name) for name in names) <= FEW_BYTES


def _here(tasks: Sequence[OpenTask]) -> Iterator[tuple[OpenTask, list[Opened | str]]]:
    return ((task, open_files(task)) for task in tasks)


def save_model(settings: BuildSettings, folder: str, *, source: str = "") -> tuple[Renderer, dict[str, Any]]:
    """Write processor and tokenizer as the dataset will carry them; a renderer from there, and the profile.

    ``source``: where to take them from, if not from the settings' model.

    Raises:
        UserError: there is no processor of pictures, or what was saved behaves otherwise.
    """
    from omnidata.profiles.fingerprint import describe, fingerprint_of
    from omnidata.profiles.folder import chat_template, load_processor, save_processor
    from omnidata.profiles.positions import kind_of_positions
    from omnidata.profiles.processor import ProcessorProfile

    source = source or settings.model
    processor = load_processor(source)
    if settings.chat_template is not None:
        processor.chat_template = resolved_template(settings.chat_template)
    save_processor(processor, source, f"{folder}/{PROCESSOR_DIR}")
    processor.tokenizer.chat_template = chat_template(processor)
    processor.tokenizer.save_pretrained(f"{folder}/{TOKENIZER_DIR}")
    renderer = load_part_renderer(settings, Store(folder))
    for saved in (renderer.tokenizer, load_tokenizer(f"{folder}/{TOKENIZER_DIR}")):
        if fingerprint(saved) != fingerprint(processor.tokenizer):
            raise UserError(
                f"the tokenizer of {settings.model} does not survive being saved and loaded; "
                "do not train with it"
            )
    before = fingerprint_of(ProcessorProfile(processor, settings.arguments))
    assert isinstance(renderer.profile, ProcessorProfile), "load_part_renderer makes one"
    after = fingerprint_of(renderer.profile)
    if changes := describe(before, after):
        raise UserError(f"the processor of {settings.model} does not survive being saved: {changes[0]}")
    positions = kind_of_positions(f"{folder}/{PROCESSOR_DIR}")
    return renderer, renderer.profile.to_json() | {"positions": positions, "fingerprint": after}


def save_tokenizer(source: str, folder: str, *, chat_template: str | None = None) -> AnyTokenizer:
    """Write the tokenizer as the dataset will carry it; return it as loaded from there."""
    if chat_template is not None:
        return prepare_tokenizer(source, folder, chat_template=chat_template)
    tokenizer = load_prepared(source) or load_tokenizer(source)
    if not template_text(tokenizer):
        raise UserError(
            f"tokenizer {source} has no chat template; name one: omnidata prepare-tokenizer "
            f"{shlex.quote(source)} --out DIR --chat-template zephyr (or a Jinja file)"
        )
    if not set(IMAGE_TOKENS) <= tokenizer.added_tokens_encoder.keys():
        if not isinstance(tokenizer, PreparedTokenizer):
            return prepare_tokenizer(source, folder)
        tokenizer = tokenizer.with_special_tokens(IMAGE_TOKENS + CONTENT_TOKENS)
    tokenizer.save_pretrained(folder)
    saved = load_prepared(folder) or load_tokenizer(folder)
    if fingerprint(saved) != fingerprint(tokenizer):
        raise UserError(f"tokenizer {source} does not survive being saved and loaded; do not train with it")
    return saved
