"""The corpus that benchmarks build from: LLaVA JSON lines and real photographs of mixed sizes.

70 % of the photographs are about 640×480, 20 % 1024×768 and 10 % 2000×1500: random cuts of scikit-image's
own, JPEG quality 90. Records ask two or three questions and may share a photograph. Their texts are passages
of Python's own language reference (65,000 words, 8,800 different ones), or words drawn from a short list.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

SIZES = [((640, 480), 0.7), ((1024, 768), 0.2), ((2000, 1500), 0.1)]
PHOTOS = ["astronaut.png", "coffee.png", "chelsea.png", "motorcycle_left.png", "motorcycle_right.png"]
PHOTOS += ["rocket.jpg", "retina.jpg", "hubble_deep_field.jpg", "ihc.png"]
TEXT = """
the a of in on with and to it is are was red green small large wooden metal table chair window street
person child woman man dog cat bird tree mountain river building car bicycle holding standing sitting walking
looking near behind under above left right corner background photograph shows appears likely because sunlight
shadow texture surface colour bright dark several two three many people objects scene describe what where how
restaurant landscape astronaut telescope galaxy coffee spoon saucer rocket engine tissue sample motorcycle
"""
WORDS = TEXT.split()


def make_photos(folder: Path, count: int) -> list[str]:
    """Write ``count`` JPEG files; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB") for name in PHOTOS]
    rng = np.random.default_rng(0)
    names = []
    for number in range(count):
        index = int(np.searchsorted(np.cumsum([share for _, share in SIZES]), (number * 0.618) % 1))
        width, height = (round(side * rng.uniform(0.9, 1.1)) for side in SIZES[min(index, 2)][0])
        if rng.random() < 0.25:
            width, height = height, width
        names.append(f"{number:05d}.jpg")
        _cut(sources[number % len(sources)], width, height, rng).save(folder / names[-1], quality=90)
    return names


def _cut(photo: Image.Image, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """A random part of a photograph at this size, never less than half of it."""
    share = rng.uniform(0.5, 1.0) * min(photo.width / width, photo.height / height)
    part = (width * share, height * share)
    left, top = rng.uniform(0, photo.width - part[0]), rng.uniform(0, photo.height - part[1])
    return photo.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + part[0], top + part[1]))


def prose() -> list[str]:
    """The words of Python's language reference, in order."""
    from pydoc_data.topics import topics

    return " ".join(topics.values()).split()


def write_records(path: Path, count: int, photos: list[str], *, text: list[str] | None = None) -> None:
    """LLaVA records, one per line; with no photos they are text only.

    Turns are passages of ``text``, or words of WORDS drawn at random.
    """
    rng = random.Random(0)

    def say(fewest: int, most: int) -> str:
        number = rng.randint(fewest, most)
        start = rng.randrange(len(text) - number) if text else 0
        return " ".join(text[start : start + number] if text else rng.choices(WORDS, k=number)).capitalize()

    with path.open("w") as file:
        for number in range(count):
            turns: list[dict[str, str]] = []
            for _ in range(rng.randint(2, 3)):
                turns.append({"from": "human", "value": say(6, 14) + "?"})
                turns.append({"from": "gpt", "value": say(15, 80) + "."})
            record = {"id": f"r{number:07d}", "conversations": turns}
            if photos:
                turns[0]["value"] = f"<image>\n{turns[0]['value']}"
                record["image"] = photos[number % len(photos)]
            file.write(json.dumps(record) + "\n")


def write_uneven_records(path: Path, count: int, photos: list[str], *, tokens_per_word: float) -> None:
    """LLaVA records of log-normal lengths, around 200 tokens, as benchmarks/plan.py's.

    The rounds of several even ones are joined, and the last answer is cut at the length drawn.
    """
    write_records(path, 20 * count, photos)
    spare = iter([json.loads(line) for line in path.read_text().splitlines()])
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            record = next(spare)
            room = min(1900, max(30, draw.lognormvariate(5.3, 0.9))) / tokens_per_word
            rounds, record["conversations"] = record["conversations"], []
            while room >= 1:
                if not rounds:
                    rounds = next(spare)["conversations"]
                    rounds[0]["value"] = rounds[0]["value"].removeprefix("<image>\n")
                question, answer, *rounds = rounds
                words = answer["value"].split()[: max(1, int(room - len(question["value"].split())))]
                record["conversations"] += [question, {**answer, "value": " ".join(words)}]
                room -= len(question["value"].split()) + len(words)
            file.write(json.dumps(record) + "\n")
