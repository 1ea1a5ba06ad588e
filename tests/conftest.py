"""Fixtures that more than one test file uses."""

from __future__ import annotations

import json
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
    """Renders with four tokens an image, at any length."""
    from omnidata.render import Renderer

    return Renderer(mistral, num_query=4, max_length=None)


@pytest.fixture(scope="session")
def ten_records(tmp_path_factory):
    """Ten records: text, one picture, two pictures; the last has its picture in the second turn."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("ten")
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(((64, 48), (100, 40), (60, 90), (64, 48))):
        small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height)).save(root / f"{number}.jpg")
    with (root / "a.jsonl").open("w") as file:
        for i in range(10):
            names = [f"{(i + k) % 4}.jpg" for k in range(1 if i == 9 else i % 3)]
            turns = [
                ("user", "<image>" * len(names) + f"What is number {i}?"),
                ("assistant", f"This is {i}."),
            ]
            turns = [("user", "Hi"), ("assistant", "Ho"), *turns] if i == 9 else turns
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"id": f"r{i}", "images": names, "messages": messages}) + "\n")
    return root


@pytest.fixture(scope="session")
def family(ten_records, tmp_path_factory):
    """Family -> the folder with its ``model`` and its ``data``; made when it is first asked for."""
    import tiny_families

    from omnidata import cli

    made = {}

    def of(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            model = tiny_families.save(name, root / "model")
            arguments = [
                "build-shards",
                ten_records / "a.jsonl",
                "--image-root",
                ten_records,
                "--model",
                model,
            ]
            arguments += ["--out", root / "data", "--workers", 1, "--quiet"]
            assert cli.run([str(argument) for argument in arguments]) == 0
            made[name] = root
        return made[name]

    return of
