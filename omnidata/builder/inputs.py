"""Inputs: what the user named must exist. Source files, and the tokenizer as the dataset will carry it."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import Any

from omnidata import corpus
from omnidata.builder.plan import identity_of
from omnidata.builder.settings import BuildSettings
from omnidata.corpus.source import with_names
from omnidata.images.store import ImageStore
from omnidata.render import Renderer
from omnidata.schema import IMAGE_TOKENS, UserError
from omnidata.text.prepared import load_prepared
from omnidata.text.tokenizer import (
    fingerprint,
    load_tokenizer,
    prepare_tokenizer,
    template_fingerprint,
    template_text,
)


def open_inputs(
    settings: BuildSettings, folder: str
) -> tuple[tuple[corpus.SourceFile, ...], dict[str, Any], Any]:
    """Files, identity and tokenizer of the build; the tokenizer is saved in ``folder``.

    A tokenizer that lacks the image tokens gets them here.
    """
    files = open_sources(settings)
    images = None
    if settings.image_root is not None:  # raises where there is none
        images = ImageStore(settings.image_root, allow_http=settings.allow_http).digest()
    tokenizer = save_tokenizer(settings.tokenizer, folder)
    if settings.max_slices:  # raises here, not in a worker
        Renderer(tokenizer, content_tokens=settings.content_tokens, slice_tokens=settings.slice_tokens)
    marks = {"behaviour": fingerprint(tokenizer), "chat template": template_fingerprint(tokenizer)}
    return files, identity_of(settings, files, marks, images=images), tokenizer


def open_sources(settings: BuildSettings) -> tuple[corpus.SourceFile, ...]:
    """All input files in order; the same file twice is refused."""
    files: list[corpus.SourceFile] = []
    for source in settings.source:
        files += corpus.open_source(source, format=settings.format)
    names = Counter(file.source for file in files)
    if repeated := sorted(name for name, count in names.items() if count > 1):
        raise UserError(f"{repeated[0]} is given twice: name each source once")
    return tuple(with_names(files))


def save_tokenizer(source: str, folder: str) -> Any:
    """Write the tokenizer as the dataset will carry it; return it as loaded from there."""
    tokenizer = load_prepared(source) or load_tokenizer(source)
    if not template_text(tokenizer):
        raise UserError(
            f"tokenizer {source} has no chat template; name one: omnidata prepare-tokenizer "
            f"{shlex.quote(source)} --out DIR --chat-template zephyr (or a Jinja file)"
        )
    if not set(IMAGE_TOKENS) <= tokenizer.added_tokens_encoder.keys():
        return prepare_tokenizer(source, folder)
    tokenizer.save_pretrained(folder)
    saved = load_prepared(folder) or load_tokenizer(folder)
    if fingerprint(saved) != fingerprint(tokenizer):
        raise UserError(f"tokenizer {source} does not survive being saved and loaded; do not train with it")
    return saved
