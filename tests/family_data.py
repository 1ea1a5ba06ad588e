"""Ten records with pictures, and what each family's processor builds of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tiny_families
from PIL import Image

from omnidata import cli


def write_ten_records(root: Path) -> Path:
    """Ten records: text, one picture, two pictures; the last has its picture in the second turn."""
    root.mkdir(parents=True, exist_ok=True)
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


def build_family(name: str, records: Path, root: Path) -> Path:
    """``root/model``, with random weights, and ``root/data``, the ten records for it; ``root``."""
    model = tiny_families.save(name, root / "model")
    arguments = ["build-shards", records / "a.jsonl", "--image-root", records, "--model", model]
    arguments += ["--out", root / "data", "--workers", 1, "--quiet"]
    assert cli.run([str(argument) for argument in arguments]) == 0
    return root
