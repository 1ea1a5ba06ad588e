"""Fixtures that more than one test file uses."""

from __future__ import annotations

import pytest
from tiny_dataset import build_tiny_dataset


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory):
    """Path of a tiny dataset: 24 samples, 3 shards, train and val. Read only: copy it to damage it."""
    return build_tiny_dataset(tmp_path_factory.mktemp("tiny") / "data")
