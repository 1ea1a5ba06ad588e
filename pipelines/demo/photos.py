"""The photo corpus: real photographs with hand-written conversations about what they show.

    python pipelines/demo/photos.py --out data/demo/corpus/photos

    OUT/photos.json     LLaVA JSON: [{"id", "image", "conversations": [{"from", "value"}, …]}, …]
    OUT/images/…        the photographs, copied from the installed scikit-image package, unchanged

Nothing is downloaded. Every sentence below was written looking at the photograph. A few answers locate what
they speak of: ``<ref>name</ref><box>left top right bottom</box>``, in thousandths of the width and height.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import skimage

# File of scikit-image -> turns (question, answer). <image> may stand anywhere in the first question.
CONVERSATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "astronaut.png": (
        (
            "<image>\nWho is in this photo?",
            "A smiling astronaut with short brown hair, wearing an orange space suit.",
        ),
        (
            "What stands behind her?",
            "On the left hangs the flag of the United States, and on the right stands a model of a space "
            "shuttle on its launch rockets.",
        ),
        ("What lies in front of her?", "A white helmet with a dark, shiny visor."),
        ("Where is her face?", "<ref>her face</ref><box>330 90 510 340</box>"),
    ),
    "coffee.png": (
        (
            "<image>\nWhat is on the table?",
            "A small cup of coffee on a saucer. Cup and saucer are red outside, and the cup is white inside.",
        ),
        ("Is the cup full?", "No, it is about half full; the coffee is light brown with a little foam."),
        (
            "What lies beside the cup?",
            "A small, shiny metal spoon lies on the saucer, to the right of the cup.",
        ),
        ("What is the table made of?", "Reddish-brown wood with a visible grain."),
    ),
    "chelsea.png": (
        ("What animal is this? <image>", "A cat: a tabby with light brown, striped fur."),
        ("What colour are its eyes?", "Greenish yellow, with dark pupils."),
        (
            "Where is its nose?",
            "Right of the middle, near the bottom: <ref>nose</ref><box>510 740 660 890</box>.",
        ),
    ),
    "rocket.jpg": (
        (
            "<image>\nDescribe the picture.",
            "A slim white rocket stands upright on its launch pad under a dark blue sky. Tall lattice towers "
            "stand around it, and bright lamps shine near the ground.",
        ),
        ("Has the rocket taken off?", "No, it still stands on the pad."),
        ("Where is the rocket?", "In the middle: <ref>rocket</ref><box>480 295 525 955</box>."),
    ),
    "camera.png": (
        (
            "<image>\nWhat is the man doing?",
            "He looks through a camera that stands on a tripod.",
        ),
        ("What does he wear?", "A long dark coat and dark gloves."),
        (
            "What can be seen in the distance?",
            "Beyond the grass stand some low buildings and one tall tower.",
        ),
        ("Is the photo in colour?", "No, it is black and white."),
    ),
    "coins.png": (
        ("<image>\nWhat is shown here?", "Old coins on a dark background, laid out in rows."),
        ("How many rows are there?", "Four rows of six coins each, so 24 coins."),
        ("Are they all of the same size?", "No, some are clearly larger, such as the one at the top right."),
    ),
    "motorcycle_left.png": (
        ("<image>\nWhat vehicle is this?", "A red motorcycle with a black seat, parked on its stand."),
        ("Where is it parked?", "Indoors, on a concrete floor, in what looks like a garage."),
        (
            "What is behind it?",
            "A wooden bench on the left, and shelves with cardboard boxes and other things on the right.",
        ),
        ("Which way does it face?", "To the right: the front wheel is on the right side of the picture."),
    ),
    "moon.png": (
        (
            "What does this photo show? <image>",
            "The grey surface of the moon, with craters of different sizes.",
        ),
        (
            "Where is the largest round crater?",
            "At the upper left: <ref>crater</ref><box>185 120 290 230</box>.",
        ),
    ),
    "hubble_deep_field.jpg": (
        (
            "<image>\nWhat do I see here?",
            "Countless galaxies in front of a black sky: the Hubble deep field.",
        ),
        ("Do they all have the same colour?", "No, some are bluish, some white, and some orange or red."),
    ),
    "retina.jpg": (
        (
            "<image>\nWhat part of the body is this?",
            "The back of an eye: the retina, seen as an orange-red disc.",
        ),
        ("What are the branching lines?", "Blood vessels. They spread from the bright spot on the left."),
        ("What is that bright spot?", "The optic disc, where the optic nerve leaves the eye."),
    ),
    "page.png": (
        ("<image>\nWhat is the heading of this page?", "Region-based segmentation"),
        (
            "What is the page about?",
            "How to find markers for the coins and for the background, from the extremes of the grey values.",
        ),
        ("Is it lit evenly?", "No, the left side is darker than the right."),
    ),
    "text.png": (
        ("<image>\nIs this printed?", "No, it is handwriting: mathematical formulas in dark ink on paper."),
        ("From which angle was it taken?", "From low and to the side, so the lines run at a slant."),
    ),
}


def to_record(name: str, turns: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """One item of LLaVA JSON."""
    conversations = []
    for question, answer in turns:
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"photo-{Path(name).stem}", "image": f"images/{name}", "conversations": conversations}


def write_corpus(out: Path) -> int:
    """Copy the photographs and write the conversations; returns how many there are."""
    photographs = Path(skimage.__file__).parent / "data"
    (out / "images").mkdir(parents=True, exist_ok=True)
    for name in CONVERSATIONS:
        shutil.copyfile(photographs / name, out / "images" / name)
    records = [to_record(name, turns) for name, turns in CONVERSATIONS.items()]
    (out / "photos.json").write_text(json.dumps(records, indent=1) + "\n")
    return len(records)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    print(f"{write_corpus(options.out)} photographs with conversations in {options.out / 'photos.json'}")


if __name__ == "__main__":
    main()
