"""Fixtures that more than one test file uses."""

from __future__ import annotations

import pytest
from tiny_dataset import build_tiny_dataset


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
    """Renders with four tokens an image, at any length."""
    from omnidata.render import Renderer

    return Renderer(mistral, num_query=4, max_length=None)
