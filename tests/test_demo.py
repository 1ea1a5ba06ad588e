"""The demo's corpora are what they say: unseen held-out pictures, no leaks, truthful drawings."""

import hashlib
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omnidata.conversation import to_conversation
from omnidata.schema import Record
from pipelines.demo import photos, shapes

DEMO = Path(__file__).parents[1] / "pipelines" / "demo"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small shapes corpus, written by the command that the demo runs."""
    out = tmp_path_factory.mktemp("shapes")
    command = [sys.executable, DEMO / "shapes.py", "--out", out, "--num-train", "300", "--num-heldout", "60"]
    subprocess.run(command, check=True, capture_output=True)
    return out


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def turns(record):
    """(question, answer) texts of a line of chat JSONL."""
    texts = []
    for message in record["messages"]:
        content = message["content"]
        texts.append(content if isinstance(content, str) else content[-1]["text"])
    return [(q.removeprefix("<image>").strip(), a) for q, a in zip(texts[::2], texts[1::2], strict=True)]


def test_no_picture_is_shared_or_repeated(corpus):
    """By hash, over every picture that a record refers to."""
    digests = {
        split: [
            hashlib.sha256((corpus / image).read_bytes()).hexdigest()
            for record in records(corpus / f"{split}.jsonl")
            for image in record["images"]
        ]
        for split in ("train", "heldout")
    }
    assert len(set(digests["train"] + digests["heldout"])) == len(digests["train"]) + len(digests["heldout"])
    summary = json.loads((corpus / "summary.json").read_text())
    assert summary["pictures_in_both"] == 0
    assert summary["heldout_pictures"] == len(digests["heldout"])


def test_both_splits_are_conversations_the_builder_accepts(corpus):
    kinds = set()
    for split in ("train", "heldout"):
        for record in records(corpus / f"{split}.jsonl"):
            conversation = to_conversation(Record(split, "", record["id"], record))
            assert len(conversation.images) == len(record["images"])
            kinds.add((split, len(conversation.images)))
    assert kinds == {("train", 0), ("train", 1), ("train", 2), ("heldout", 1), ("heldout", 2)}


def test_answers_are_spread_so_that_guessing_is_poor(corpus):
    assert json.loads((corpus / "summary.json").read_text())["chance"] < 0.4


def test_each_split_asks_for_every_attribute(corpus):
    for split in ("train", "heldout"):
        answers = {answer for record in records(corpus / f"{split}.jsonl") for _, answer in turns(record)}
        assert answers >= {*shapes.COLOURS, *shapes.KINDS, *shapes.SIZES, *shapes.PLACES}


def test_the_default_sizes_ask_over_200_held_out_questions():
    rng = random.Random(1)
    scenes = [shapes.random_scene(rng) for _ in range(150)]
    assert sum(len(scene.turns) for scene in scenes) > 200
    assert {scene.name for scene in scenes} == set(shapes.SCENES)


def test_no_question_is_asked_twice_in_a_conversation():
    rng = random.Random(2)
    for _ in range(300):
        questions = [question for question, _ in shapes.random_scene(rng, text_only=0.1).turns]
        assert len(set(questions)) == len(questions)


def test_earlier_answers_do_not_give_later_ones_away():
    """With the answers of a scene's other questions known, every answer still takes several values."""
    rng = random.Random(3)
    seen = {}
    for _ in range(30000):
        scene = shapes.random_scene(rng)
        if scene.name == "one":  # the others have too many questions to condition on all of them at once
            known = tuple(sorted(scene.turns, key=lambda turn: turn[0]))
            for turn in known:
                rest = (turn[0], *(other for other in known if other != turn))
                seen.setdefault(rest, set()).add(turn[1])
    crowded = {rest: answers for rest, answers in seen.items()}
    sizes = {
        "What colour is the shape?": 6,
        "What shape is it?": 4,
        "Is it small or large?": 2,
        "Where is it?": 5,
    }
    for question, possible in sizes.items():
        counts = [len(answers) for rest, answers in crowded.items() if rest[0] == question]
        assert min(counts) == possible


@pytest.mark.parametrize("colour", shapes.COLOURS)
@pytest.mark.parametrize("place", shapes.PLACES)
def test_a_drawn_shape_has_its_colour_and_place(colour, place):
    """Measured in the pixels, for every kind and size."""
    for kind, size in itertools.product(shapes.KINDS, shapes.SIZES):
        shape = shapes.Shape(colour, kind, size, place)
        pixels = decode(shapes.draw_picture(random.Random(f"{kind}{size}"), [shape])).astype(float)
        ink = np.abs(pixels - shapes.COLOURS[colour]).max(axis=2) < 40
        rows, columns = np.nonzero(ink)
        right, down = shapes.PLACES[place]
        assert abs(columns.mean() - (32 + right * shapes.OFFSET)) < shapes.JITTER + 2
        # A triangle's middle lies a sixth of its height below the centre of its box.
        assert abs(rows.mean() - (32 + down * shapes.OFFSET)) < shapes.JITTER + 1 + shapes.SIZES[size][1] / 6
        smallest, largest = shapes.SIZES[size]
        middle_rows = (ink.sum(axis=1) > 2).sum()  # a stray noisy pixel is no row of the shape
        assert smallest - 5 <= middle_rows <= largest + 2


def decode(data):
    import io

    return np.asarray(Image.open(io.BytesIO(data)))


def test_the_same_seed_draws_the_same_corpus():
    first, second = (
        shapes.draw_picture(random.Random(5), [shapes.Shape("red", "cross", "large", "top")]) for _ in "ab"
    )
    assert first == second


def test_chance_knows_the_commonest_answer_to_the_same_words():
    scene = lambda *turns: shapes.Scene("one", (), turns)  # noqa: E731
    train = [scene(("Q", "red")), scene(("Q", "red")), scene(("Q", "blue")), scene(("P", "left"))]
    assert (
        shapes.blind_accuracy(train, [scene(("Q", "red"), ("P", "top")), scene(("Q", "blue"), ("R", "x"))])
        == 0.25
    )


def test_photo_conversations_are_accepted_and_their_photographs_ship_with_the_package(tmp_path):
    count = photos.write_corpus(tmp_path)
    items = json.loads((tmp_path / "photos.json").read_text())
    assert count == len(items) >= 10
    for item in items:
        conversation = to_conversation(Record("photos.json", "", item["id"], item))
        assert len(conversation.images) == 1
        assert 2 <= len(conversation.messages) // 2 <= 4
        with Image.open(tmp_path / item["image"]) as image:
            image.load()


def test_boxes_of_photo_answers_lie_inside_the_photograph():
    import re

    boxes = [
        [int(number) for number in box.split()]
        for turns in photos.CONVERSATIONS.values()
        for _, answer in turns
        for box in re.findall(r"<box>(.*?)</box>", answer)
    ]
    assert boxes
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 1000
        assert 0 <= top < bottom <= 1000


def test_example_questions_carry_the_truth_of_the_held_out_records(corpus):
    heldout = records(corpus / "heldout.jsonl")
    for line, record in zip(records(corpus / "questions.jsonl"), heldout, strict=False):
        assert (line["question"], line["truth"]) == turns(record)[0]
        assert [Path(image).name for image in line["image"]] == [Path(i).name for i in record["images"]]
        assert all(Path(image).exists() for image in line["image"])
