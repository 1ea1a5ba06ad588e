"""Vocabulary files: what stands in for tokenizer.json in a folder, and what to do with it."""

from __future__ import annotations

import shlex
from pathlib import Path

_VOCABULARIES = (
    "tekken*.json",
    "*.model",
    "*.model.v*",
)  # of a folder without tokenizer.json, best first


def how_to_convert(path: Path) -> str:
    """What to do with a file, or a folder without tokenizer.json, given where a tokenizer is needed."""
    if path.name == "tokenizer.json":
        return f"give its folder, {path.parent}"
    what = "is a file" if path.is_file() else "the folder has no tokenizer.json"
    if path.is_dir() and not vocabulary_of(path) and not any(path.glob("vocab.*")):
        return f"{what}, nor another vocabulary that can be converted; save one there"
    return f"{what}; first run: omnidata prepare-tokenizer {shlex.quote(str(path))} --out DIR"


def vocabulary_of(folder: Path) -> Path | None:
    """The best vocabulary among a folder's files that can be converted; None if there is none."""
    found = (sorted(folder.glob(pattern)) for pattern in _VOCABULARIES)
    return next((names[0] for names in found if names), None)
