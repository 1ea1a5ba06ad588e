"""Fixtures that more than one test file uses."""

from __future__ import annotations

import logging
import re

import pytest
from tiny_dataset import build_tiny_dataset


class _DeprecationsRaise(logging.Handler):
    """Some libraries log what others warn of: pytest's filterwarnings does not see that."""

    ABOUT_OUR_CALLS = re.compile(r"deprecat|will be removed|no longer supported", re.IGNORECASE)

    def emit(self, record: logging.LogRecord) -> None:
        if self.ABOUT_OUR_CALLS.search(message := record.getMessage()):
            raise DeprecationWarning(f"{record.name} says: {message}")


@pytest.fixture(scope="session", autouse=True)
def deprecations_raise():
    """Logged deprecations of libraries are errors where they are logged, as warned ones are."""
    handler = _DeprecationsRaise(level=logging.WARNING)
    libraries = [logging.getLogger(name) for name in ("transformers", "timm", "torch", "datasets", "peft")]
    for library in libraries:
        library.addHandler(handler)
    yield
    for library in libraries:
        library.removeHandler(handler)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory):
    """Path of a tiny dataset: 24 samples, 3 shards, train and val. Read only: copy it to damage it."""
    return build_tiny_dataset(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def mistral():
    """A real Mistral tokenizer, prepared for OmniLMM."""
    from throwaway import sentencepiece_tokenizer

    return sentencepiece_tokenizer()


@pytest.fixture(scope="session")
def renderer(mistral):
    """Renders with four tokens per image, at any length."""
    from omnidata.render import Renderer

    return Renderer(mistral, num_query=4, max_length=None)


@pytest.fixture(scope="session")
def ten_records(tmp_path_factory):
    """Ten records: text, one picture, two pictures; the last has its picture in the second turn."""
    from family_data import write_ten_records

    return write_ten_records(tmp_path_factory.mktemp("ten"))


@pytest.fixture(scope="session")
def family(ten_records, tmp_path_factory):
    """Family -> the folder with its ``model`` and its ``data``; made when it is first asked for."""
    from family_data import build_family

    made = {}

    def of(name):
        if name not in made:
            made[name] = build_family(name, ten_records, tmp_path_factory.mktemp(name))
        return made[name]

    return of
