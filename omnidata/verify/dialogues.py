"""The deep check of ``KEY.json``: it has its one spelling, and rendered again it gives what is stored.

The second needs the tokenizer (and the processor) of the build. Where they do not load, or the settings are
not those of a build, it is left out: other checks say so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np

from omnidata.builder.records import load_renderer
from omnidata.builder.settings import settings_from_json
from omnidata.conversation import trained_on
from omnidata.dialogue import Dialogue, DialogueError, dialogue_json, read_dialogue
from omnidata.durable import Store
from omnidata.origin import settings_of_builds
from omnidata.render import Renderer
from omnidata.schema import Manifest, RejectError, Sample, UserError


def check_dialogue(sample: Sample, manifest: Manifest, url: str) -> Iterator[tuple[str, str]]:
    """(code, what) of everything that is wrong with a sample's KEY.json."""
    if not sample.dialogue:
        return
    try:
        dialogue = read_dialogue(sample.dialogue)
        if dialogue_json(dialogue.conversation, dialogue.sizes) != sample.dialogue:
            yield "dialogue", "KEY.json is not spelled as a build spells it"
    except DialogueError as error:
        yield "dialogue", f"KEY.json: {error}"
        return
    except RejectError as error:
        yield "dialogue", f"KEY.json: {error.detail}"
        return
    found = [
        rendered_otherwise(sample, dialogue, replace(manifest, settings=settings), url)
        for settings in settings_of_builds(manifest.settings, manifest.origin)
    ]
    if all(found):
        yield "dialogue", f"KEY.json rendered again gives {found[0]}"


def rendered_otherwise(sample: Sample, dialogue: Dialogue, manifest: Manifest, url: str) -> str | None:
    """How what the conversation renders to differs from the stored ids and labels; None: not, or unknown."""
    renderer = _renderer(json.dumps(manifest.settings), url)
    if renderer is None or (not manifest.is_omnilmm and None in dialogue.sizes):
        return None
    try:
        messages = trained_on(dialogue.conversation.messages, manifest.settings.get("train_on", "all"))
        sizes = tuple(size for size in dialogue.sizes if size)
        rendered = renderer.render(replace(dialogue.conversation, messages=messages, image_sizes=sizes))
    except RejectError as error:
        return f"a reject ({error.reason}: {error.detail})"
    for name in ("input_ids", "labels"):
        stored, now = getattr(sample, name), getattr(rendered, name)
        if len(stored) != len(now):
            return f"{len(now)} {name}, {len(stored)} are stored"
        if len(different := np.flatnonzero(stored != now)):
            at = different[0]
            return f"other {name}, the first at {at}: {now[at]}, stored is {stored[at]}"
    return None


@lru_cache(maxsize=8)
def _renderer(settings: str, url: str) -> Renderer | None:
    try:
        return load_renderer(settings_from_json(json.loads(settings)), Store(url))
    except (UserError, TypeError):  # the tokenizer's own check says so; or settings that no build wrote
        return None
