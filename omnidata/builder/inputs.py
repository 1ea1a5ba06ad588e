"""Inputs: what the user named must exist. Sources; tokenizer and processor as the dataset will carry them."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import Any

from omnidata import corpus
from omnidata.builder.identity import identity_of
from omnidata.builder.records import load_renderer, renderer_of
from omnidata.builder.settings import BuildSettings
from omnidata.corpus.source import with_names
from omnidata.durable import Store
from omnidata.images.store import ImageStore
from omnidata.profiles.omnilmm import OmniLMMProfile
from omnidata.render import Renderer
from omnidata.schema import CONTENT_TOKENS, IMAGE_TOKENS, PROCESSOR_DIR, TOKENIZER_DIR, UserError
from omnidata.text.preparation import prepare_tokenizer
from omnidata.text.prepared import PreparedTokenizer, load_prepared
from omnidata.text.tokenizer import fingerprint, load_tokenizer, template_fingerprint, template_text


def open_inputs(
    settings: BuildSettings, folder: str
) -> tuple[tuple[corpus.SourceFile, ...], dict[str, Any], Renderer]:
    """Files, identity and renderer of the build; ``folder`` gets ``tokenizer/``, and ``processor/`` if any.

    A tokenizer that lacks OmniLMM's image tokens gets them here.
    """
    files = open_sources(settings)
    images = None
    if settings.image_root is not None:  # raises where there is none
        images = ImageStore(settings.image_root, allow_http=settings.allow_http).digest()
    if settings.model:
        renderer, profile = save_model(settings, folder)
    else:
        tokenizer = save_tokenizer(settings.tokenizer, f"{folder}/{TOKENIZER_DIR}")
        renderer = renderer_of(settings, tokenizer)  # raises here, not in a worker
        profile = OmniLMMProfile(settings.num_query, settings.image_size).to_json()
    tokenizer = renderer.tokenizer
    marks = {"behaviour": fingerprint(tokenizer), "chat template": template_fingerprint(tokenizer)}
    return files, identity_of(settings, files, marks, profile, images=images), renderer


def open_sources(settings: BuildSettings) -> tuple[corpus.SourceFile, ...]:
    """All input files in order; the same file twice is refused."""
    files: list[corpus.SourceFile] = []
    for source in settings.source:
        files += corpus.open_source(source, format=settings.format)
    names = Counter(file.source for file in files)
    if repeated := sorted(name for name, count in names.items() if count > 1):
        raise UserError(f"{repeated[0]} is given twice: name each source once")
    return tuple(with_names(files))


def save_model(settings: BuildSettings, folder: str) -> tuple[Renderer, dict[str, Any]]:
    """Write processor and tokenizer as the dataset will carry them; a renderer from there, and the profile.

    Raises:
        UserError: there is no processor of pictures, or what was saved behaves otherwise.
    """
    from omnidata.profiles.fingerprint import describe, fingerprint_of
    from omnidata.profiles.folder import chat_template, load_processor, save_processor
    from omnidata.profiles.positions import kind_of_positions
    from omnidata.profiles.processor import ProcessorProfile

    processor = load_processor(settings.model)
    save_processor(processor, settings.model, f"{folder}/{PROCESSOR_DIR}")
    processor.tokenizer.chat_template = chat_template(processor)
    processor.tokenizer.save_pretrained(f"{folder}/{TOKENIZER_DIR}")
    renderer = load_renderer(settings, Store(folder))
    for saved in (renderer.tokenizer, load_tokenizer(f"{folder}/{TOKENIZER_DIR}")):
        if fingerprint(saved) != fingerprint(processor.tokenizer):
            raise UserError(
                f"the tokenizer of {settings.model} does not survive being saved and loaded; "
                "do not train with it"
            )
    before = fingerprint_of(ProcessorProfile(processor, settings.arguments))
    after = fingerprint_of(renderer.profile)
    if changes := describe(before, after):
        raise UserError(f"the processor of {settings.model} does not survive being saved: {changes[0]}")
    positions = kind_of_positions(f"{folder}/{PROCESSOR_DIR}")
    return renderer, renderer.profile.to_json() | {"positions": positions, "fingerprint": after}


def save_tokenizer(source: str, folder: str) -> Any:
    """Write the tokenizer as the dataset will carry it; return it as loaded from there."""
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
