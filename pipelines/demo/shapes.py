"""The shapes corpus: pictures that a program draws, with questions that only the picture answers.

    python pipelines/demo/shapes.py --out data/demo/corpus/shapes

    OUT/train.jsonl      chat JSONL: {"id", "images", "messages": [{"role", "content"}, …]}
    OUT/heldout.jsonl    the same, drawn from another seed; no picture of it is in train.jsonl
    OUT/images/…         PNG files that both refer to
    OUT/questions.jsonl  a few held-out questions as pipelines/generate.py asks them
    OUT/summary.json     counts, and how often somebody who cannot see would answer right

A conversation is one of four scenes (or, while training, plain talk without a picture):

    one     one shape                     its colour, kind, size, place
    sides   two shapes, named by place    colour and kind of each
    colours two shapes, named by colour   kind and size of each, the place of one
    pair    two pictures                  colour and kind in the first, and in the second

Within a conversation no question gives another's answer away: every attribute is drawn independently and
asked for once. So whoever answers well has looked, and with another picture falls to chance.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64  # pixels of a picture
OVERSAMPLE = 4  # shapes are drawn this many times larger and averaged down, for soft edges
NOISE = 6.0  # standard deviation of the sensor noise, of 255

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (40, 80, 220),
    "yellow": (240, 205, 40),
    "purple": (140, 50, 170),
    "white": (245, 245, 245),
}
KINDS = ("circle", "square", "triangle", "cross")
SIZES = {"small": (17, 19), "large": (27, 30)}  # pixels across, smallest and largest
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}
AXES = (("left", "right"), ("top", "bottom"))  # where two shapes stand opposite each other
OFFSET, JITTER = 16, 1.5  # pixels from the middle to a place's centre, and how far from it a shape may stray

SCENES = {"one": 0.78, "sides": 0.11, "colours": 0.03, "pair": 0.08}  # shares of the conversations
TEXT_ONLY = 0.04  # of the training conversations: no picture at all
SMALL_TALK = (
    ("How many sides does a square have?", "four"),
    ("How many sides does a triangle have?", "three"),
    ("What do you get when you mix blue and yellow?", "green"),
    ("What do you get when you mix red and blue?", "purple"),
    ("What is the opposite of small?", "large"),
    ("What is the opposite of left?", "right"),
    ("What is the opposite of top?", "bottom"),
)


@dataclass(frozen=True)
class Shape:
    """One shape of a picture."""

    colour: str
    kind: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """Pictures (each a tuple of shapes) and what is asked about them: (question, answer)."""

    name: str  # a key of SCENES, or "text"
    pictures: tuple[tuple[Shape, ...], ...]
    turns: tuple[tuple[str, str], ...]


# --- what is asked ----------------------------------------------------------------------------------------


def random_scene(rng: random.Random, *, text_only: float = 0.0) -> Scene:
    """A scene with its turns shuffled."""
    if rng.random() < text_only:
        return Scene("text", (), tuple(rng.sample(SMALL_TALK, 3)))
    name = rng.choices(list(SCENES), list(SCENES.values()))[0]
    pictures, turns = {"one": _one, "sides": _sides, "colours": _colours, "pair": _pair}[name](rng)
    return Scene(name, tuple(pictures), tuple(rng.sample(turns, len(turns))))


def _random_shape(rng: random.Random, place: str | None = None) -> Shape:
    return Shape(
        rng.choice(list(COLOURS)),
        rng.choice(KINDS),
        rng.choice(list(SIZES)),
        place or rng.choice(list(PLACES)),
    )


def _one(rng: random.Random) -> tuple[list[tuple[Shape, ...]], list[tuple[str, str]]]:
    shape = _random_shape(rng)
    return [(shape,)], [
        ("What colour is the shape?", shape.colour),
        ("What shape is it?", shape.kind),
        ("Is it small or large?", shape.size),
        ("Where is it?", shape.place),
    ]


def _sides(rng: random.Random) -> tuple[list[tuple[Shape, ...]], list[tuple[str, str]]]:
    shapes = tuple(_random_shape(rng, place) for place in rng.choice(AXES))
    turns = []
    for shape in shapes:
        where = f"{'on' if shape.place in AXES[0] else 'at'} the {shape.place}"
        turns += [
            (f"What colour is the shape {where}?", shape.colour),
            (f"What shape is {where}?", shape.kind),
        ]
    return [shapes], turns


def _colours(rng: random.Random) -> tuple[list[tuple[Shape, ...]], list[tuple[str, str]]]:
    colours = rng.sample(list(COLOURS), 2)  # different, because they are the names here
    shapes = tuple(
        replace(_random_shape(rng, place), colour=colour)
        for place, colour in zip(rng.choice(AXES), colours, strict=True)
    )
    turns = []
    for shape in shapes:
        turns += [
            (f"What shape is the {shape.colour} one?", shape.kind),
            (f"Is the {shape.colour} one small or large?", shape.size),
        ]
    one = rng.choice(shapes)  # the other's place would follow from this one's
    return [shapes], [*turns, (f"Where is the {one.colour} one?", one.place)]


def _pair(rng: random.Random) -> tuple[list[tuple[Shape, ...]], list[tuple[str, str]]]:
    shapes = _random_shape(rng), _random_shape(rng)
    turns = []
    for which, shape in zip(("first", "second"), shapes, strict=True):
        turns += [
            (f"What colour is the shape in the {which} picture?", shape.colour),
            (f"What shape is in the {which} picture?", shape.kind),
        ]
    return [(shape,) for shape in shapes], turns


# --- what is drawn ----------------------------------------------------------------------------------------


def draw_picture(rng: random.Random, shapes: Sequence[Shape]) -> bytes:
    """A PNG of the shapes on a dull background, with noise; no two calls draw the same."""
    grey = rng.randint(60, 130)
    background = tuple(grey + rng.randint(-12, 12) for _ in range(3))
    canvas = Image.new("RGB", (SIDE * OVERSAMPLE,) * 2, background)
    pen = ImageDraw.Draw(canvas)
    for shape in shapes:
        _draw_shape(pen, rng, shape)
    pixels = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0, NOISE, pixels.shape)
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _draw_shape(pen: ImageDraw.ImageDraw, rng: random.Random, shape: Shape) -> None:
    right, down = PLACES[shape.place]
    x = (SIDE / 2 + right * OFFSET + rng.uniform(-JITTER, JITTER)) * OVERSAMPLE
    y = (SIDE / 2 + down * OFFSET + rng.uniform(-JITTER, JITTER)) * OVERSAMPLE
    half = rng.uniform(*SIZES[shape.size]) / 2 * OVERSAMPLE
    fill = tuple(min(255, max(0, channel + rng.randint(-15, 15))) for channel in COLOURS[shape.colour])
    if shape.kind == "circle":
        pen.ellipse([x - half, y - half, x + half, y + half], fill=fill)
    elif shape.kind == "square":
        half *= 0.9  # about the circle's area
        pen.rectangle([x - half, y - half, x + half, y + half], fill=fill)
    elif shape.kind == "triangle":
        pen.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=fill)
    else:
        arm = half * 0.36
        pen.rectangle([x - half, y - arm, x + half, y + arm], fill=fill)
        pen.rectangle([x - arm, y - half, x + arm, y + half], fill=fill)


# --- what is written --------------------------------------------------------------------------------------


def to_record(scene: Scene, *, id: str, images: Sequence[str]) -> dict[str, Any]:
    """A line of chat JSONL. One picture is written as a placeholder in a string, several as content parts."""
    messages: list[dict[str, Any]] = []
    for question, answer in scene.turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    opening = messages[0]
    if len(images) == 1:
        opening["content"] = f"<image>\n{opening['content']}"
    elif images:
        parts = [{"type": "image"} for _ in images]
        opening["content"] = [*parts, {"type": "text", "text": "\n" + opening["content"]}]
    return {"id": id, "images": list(images), "messages": messages}


def write_split(
    out: Path, name: str, *, count: int, seed: int, text_only: float = 0.0
) -> tuple[list[Scene], set[str]]:
    """Write ``NAME.jsonl`` and its pictures; returns the scenes and the SHA-256 of every picture."""
    rng = random.Random(seed)
    (out / "images" / name).mkdir(parents=True, exist_ok=True)
    scenes, digests = [], set()
    with open(out / f"{name}.jsonl", "w") as file:
        for number in range(count):
            scene = random_scene(rng, text_only=text_only)
            images = []
            for letter, shapes in zip("ab", scene.pictures, strict=False):
                data = draw_picture(rng, shapes)
                images.append(f"images/{name}/{number:05d}{letter}.png")
                (out / images[-1]).write_bytes(data)
                digests.add(hashlib.sha256(data).hexdigest())
            record = to_record(scene, id=f"{name}-{number:05d}", images=images)
            file.write(json.dumps(record) + "\n")
            scenes.append(scene)
    return scenes, digests


def blind_accuracy(train: Sequence[Scene], heldout: Sequence[Scene]) -> float:
    """Share of held-out questions that the commonest training answer to the same words gets right.

    Nobody who does not see the picture can be expected to do better: this is chance.
    """
    seen: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for scene in train:
        for question, answer in scene.turns:
            seen[question][answer] += 1
    guesses = {question: answers.most_common(1)[0][0] for question, answers in seen.items()}
    hits = [guesses.get(question) == answer for scene in heldout for question, answer in scene.turns]
    return sum(hits) / len(hits)


def examples(heldout: Sequence[Scene], out: Path, *, count: int) -> Iterator[dict[str, Any]]:
    """First questions of the first held-out scenes, as lines for ``generate.py --questions``."""
    for number, scene in enumerate(heldout[:count]):
        question, truth = scene.turns[0]
        images = [
            str(out / f"images/heldout/{number:05d}{letter}.png")
            for letter, _ in zip("ab", scene.pictures, strict=False)
        ]
        yield {"image": images, "question": question, "truth": truth}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--num-train", type=int, default=14000, help="training conversations")
    parser.add_argument("--num-heldout", type=int, default=150, help="held-out conversations")
    parser.add_argument("--seed", type=int, default=0, help="of the training part; the held-out part adds 1")
    options = parser.parse_args()
    out = options.out
    train, shown = write_split(out, "train", count=options.num_train, seed=options.seed, text_only=TEXT_ONLY)
    heldout, hidden = write_split(out, "heldout", count=options.num_heldout, seed=options.seed + 1)
    if shown & hidden:
        raise SystemExit(f"error: {len(shown & hidden)} held-out pictures are also training pictures")
    lines = [json.dumps(line) for line in examples(heldout, out, count=5)]
    (out / "questions.jsonl").write_text("\n".join(lines) + "\n")
    summary = {
        "train_conversations": len(train),
        "train_pictures": len(shown),
        "heldout_conversations": len(heldout),
        "heldout_pictures": len(hidden),
        "heldout_questions": sum(len(scene.turns) for scene in heldout),
        "pictures_in_both": len(shown & hidden),  # by SHA-256
        "chance": round(blind_accuracy(train, heldout), 4),
    }
    (out / "summary.json").write_text(json.dumps(summary) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
