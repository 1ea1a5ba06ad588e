"""Near duplicates: found where planted, on real photographs, and nothing else; listed one by one."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance
from tiny_dataset import write_tokenizer

from omnidata import Dataset, cli
from omnidata.builder import build as building
from omnidata.builder import dedup
from omnidata.builder.interruptions import BuildInterrupted
from omnidata.builder.settings import BuildSettings, RunOptions
from omnidata.near.hashing import (
    IMAGE_WORDS,
    MAX_DISTANCE,
    NUM_NUMBERS,
    distances,
    image_hash,
    minhash,
    normalise,
    parse_image_hashes,
    parse_text_hashes,
    text_hash,
)
from omnidata.near.pairs import MIN_SIMILARITY, Hashes, near_pairs
from omnidata.schema import NEAR, Conversation, Message, RejectError, TextPart

WORDS = [
    f"{first}{last}"
    for first in ("bru", "ka", "sto", "mi", "vel", "dro")
    for last in ("na", "lig", "tor", "sk", "pem")
]


def photos() -> list[Image.Image]:
    """Real ones, and quarters of them: 40 pictures."""
    import skimage.data

    found = []
    for name in ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "page", "brick"):
        picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        w, h = picture.size
        boxes = [
            (x * w // 2, y * h // 2, (x + 1) * w // 2, (y + 1) * h // 2) for x in range(2) for y in range(2)
        ]
        found += [picture, *map(picture.crop, boxes)]
    return found


def encode(picture: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def hashed(*pictures: bytes) -> np.ndarray:
    return parse_image_hashes([image_hash(data) for data in pictures])


# --- hashes -----------------------------------------------------------------------------------------------


def test_a_picture_that_is_changed_a_little_keeps_its_hash_and_others_are_far():
    originals = photos()
    before = hashed(*map(encode, originals))
    changed = {
        "quality": [encode(picture, 40) for picture in originals],
        "size": [encode(picture.resize((picture.width // 2, picture.height // 2))) for picture in originals],
        "square": [encode(picture.resize((224, 224))) for picture in originals],
        "brightness": [encode(ImageEnhance.Brightness(picture).enhance(1.1)) for picture in originals],
    }
    for name, pictures in changed.items():
        assert distances(before, hashed(*pictures)).max() <= MAX_DISTANCE, name
    apart = distances(before[:, None], before[None])[np.triu_indices(len(before), 1)]
    assert apart.min() > 1.5 * MAX_DISTANCE


def drawn(value) -> Image.Image:
    """``value(y, x)`` of 240 × 240 pixels."""
    return Image.fromarray(value(*np.indices((240, 240))).astype(np.uint8)).convert("RGB")


def test_drawings_of_few_frequencies_are_told_by_their_greys():
    boards = [drawn(lambda y, x, n=n: (y * n // 240 + x * n // 240) % 2 * 255) for n in (5, 6, 7, 8)]
    stripes = [drawn(lambda y, x: y // 60 % 2 * 255), drawn(lambda y, x: x // 60 % 2 * 255)]
    plain = [drawn(lambda y, x, grey=grey: 0 * y + grey) for grey in (0, 128, 255)]
    originals = [*boards, *stripes, *plain]
    before = hashed(*map(encode, originals))
    for size, quality in ((160, 50), (120, 75), (448, 75)):
        changed = hashed(*(encode(picture.resize((size, size)), quality) for picture in originals))
        assert distances(before, changed).max() <= MAX_DISTANCE
    apart = distances(before[:, None], before[None])[np.triu_indices(len(before), 1)]
    assert apart.min() > MAX_DISTANCE


def test_what_is_transparent_counts_as_white():
    drawn = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    drawn.paste((0, 0, 0, 255), (10, 10, 40, 20))
    file = io.BytesIO()
    drawn.save(file, "PNG")
    white = Image.new("RGB", (64, 64), "white")
    white.paste((0, 0, 0), (10, 10, 40, 20))
    assert distances(*hashed(file.getvalue(), encode(white, 95))) <= 8
    with pytest.raises(RejectError, match="does not decode"):
        image_hash(b"no picture")


def test_minhash_estimates_what_texts_have_in_common():
    rng = random.Random(0)
    for _ in range(40):
        words = rng.choices(WORDS, k=30)
        other = [rng.choice(WORDS) if rng.random() < 0.15 else word for word in words]
        texts = [normalise(" ".join(each)) for each in (words, other)]
        runs = [{text[at : at + 5] for at in range(len(text) - 4)} for text in texts]
        exact = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
        assert abs((minhash(texts[0]) == minhash(texts[1])).mean() - exact) < 0.25
    assert normalise("  ＡBC—dé!\n1,5 ") == "abc dé 1 5"


def test_calls_and_reasoning_are_part_of_what_is_said():
    def talk(more) -> Conversation:
        asked = Message("user", (TextPart("What is the weather like over there?"),), False)
        return Conversation("7", (asked, Message("assistant", (), True, more)))

    calls = [{"function": {"name": "weather", "arguments": {"city": city}}} for city in ("Oslo", "Lima")]
    hashes = [text_hash(talk({"tool_calls": [call]})) for call in (*calls, calls[0])]
    assert hashes[0] == hashes[2]
    equal, numbers = parse_text_hashes(hashes)
    assert equal[0] != equal[1] or (numbers[0] == numbers[1]).mean() < 1
    assert text_hash(talk({"reasoning_content": "a"})) != text_hash(talk({"reasoning_content": "b"}))


def test_short_replies_must_be_equal():
    def talk(reply: str) -> Conversation:
        asked = Message("user", (TextPart("Is there a dog beside the tree, or is it a cat? " * 4),), False)
        return Conversation("7", (asked, Message("assistant", (TextPart(reply),), True)))

    equal, numbers = parse_text_hashes([text_hash(talk(reply)) for reply in ("A dog.", "A cat.", "a DOG")])
    assert (numbers[0] == numbers[1]).mean() >= MIN_SIMILARITY  # their runs would not tell
    assert equal[0] == equal[2] != equal[1]


# --- pairs ------------------------------------------------------------------------------------------------


def made_up(seed: int, num_samples: int = 120) -> Hashes:
    """Samples with 0 to 2 pictures; many repeat earlier ones, exactly, nearly, or in one of both alone."""
    rng = np.random.default_rng(seed)
    equal, numbers, images = [], [], []
    for number in range(num_samples):
        text = rng.integers(0, 1 << 16, NUM_NUMBERS, np.uint16)
        pictures = rng.integers(0, 1 << 63, (number % 3, IMAGE_WORDS), np.uint64)
        if number and rng.random() < 0.6:
            other = int(rng.integers(number))
            if rng.random() < 0.8:
                text = numbers[other].copy()
                text[rng.random(NUM_NUMBERS) < rng.choice([0, 0.05, 0.5])] ^= 1
            if rng.random() < 0.8:
                flips = rng.choice([0, 7, (1 << 60) - 1]).astype(np.uint64)
                colours = np.arange(IMAGE_WORDS) == 4
                pictures = images[other] ^ np.where(colours, np.uint64(0), flips)
        equal.append(rng.integers(0, 2) if rng.random() < 0.1 else 5)
        numbers.append(text)
        images.append(pictures)
    starts = np.concatenate(([0], np.cumsum([len(each) for each in images])))
    return Hashes(np.array(equal, np.uint64), np.array(numbers), np.concatenate(images), starts)


@pytest.mark.parametrize("seed", range(6))
def test_pairs_are_those_that_comparing_all_with_all_finds(seed):
    hashes = made_up(seed)
    near = {
        (i, j)
        for j in range(len(hashes.equal))
        for i in range(j)
        if hashes.equal[i] == hashes.equal[j]
        and (hashes.numbers[i] == hashes.numbers[j]).mean() >= MIN_SIMILARITY
        and hashes.distance(i, j) is not None
    }
    found = near_pairs(hashes)
    repeats = {pair.second for pair in found}
    assert found and len(repeats) == len(found) and all(pair.first < pair.second for pair in found)
    assert not {pair.first for pair in found} & repeats  # what is repeated stays
    assert all(any((i, j) in near for i in range(j)) for j in repeats)  # no false pair
    stays = set(range(len(hashes.equal))) - repeats
    assert not {(i, j) for i, j in near if i in stays and j in stays}  # none is missed


# --- builds -----------------------------------------------------------------------------------------------


class Planted:
    """A corpus of photographs with captions; ``planted`` are the ids of near duplicates."""

    def __init__(self, folder: Path) -> None:
        rng = random.Random(3)
        self.folder, self.records, self.planted = folder, [], set()
        (folder / "p").mkdir()
        write_tokenizer(folder / "tok")
        originals = [(picture, " ".join(rng.choices(WORDS, k=25))) for picture in photos()]
        for picture, caption in originals:
            self.add(encode(picture), caption)
        for picture, caption in originals[::2]:
            words = caption.upper().split()
            words[rng.randrange(25)] = rng.choice(WORDS)
            self.planted.add(self.add(encode(picture.resize((200, 150)), 60), " ".join(words) + "!"))
        for (picture, caption), (_, other) in pairwise(originals):
            self.add(encode(picture, 70), other[::-1])  # the picture alone comes again
            self.add(encode(picture, 70), f"{caption} 7")  # another number is another fact
        (folder / "c.json").write_text(json.dumps(self.records))

    def add(self, data: bytes, caption: str) -> str:
        number = len(self.records)
        (self.folder / "p" / f"{number}.jpg").write_bytes(data)
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": caption}]
        self.records.append({"id": f"r{number}", "image": f"{number}.jpg", "conversations": turns})
        return f"r{number}"

    @property
    def settings(self) -> BuildSettings:
        return BuildSettings(
            (str(self.folder / "c.json"),),
            tokenizer=str(self.folder / "tok"),
            image_root=str(self.folder / "p"),
            samples_per_shard=30,
            dedup="near",
            image_size=64,
        )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Planted(tmp_path_factory.mktemp("near"))


def build(corpus: Planted, name: str, **changes):
    settings = replace(corpus.settings, **changes)
    return building.build(settings, str(corpus.folder / name), RunOptions(executor="inline", quiet=True))


def test_planted_duplicates_are_refused_and_listed_and_nothing_else(corpus, capsys, monkeypatch):
    report = build(corpus, "data")
    dataset = Dataset(corpus.folder / "data")
    assert report.rejects == {"near_duplicate": len(corpus.planted)} and report.num_samples == len(dataset)
    ledger = pq.read_table(corpus.folder / "data" / NEAR).to_pylist()
    assert {row["id"] for row in ledger} == corpus.planted == set(dataset.rejects["id"].to_pylist())
    for row in ledger:
        assert row["of_id"] == f"r{2 * (int(row['id'][1:]) - 40)}" and row["distance"] <= MAX_DISTANCE
    assert dataset.kept_columns == ["near.images", "near.text"]
    assert cli.run(["verify", str(corpus.folder / "data"), "--deep", "--quiet"]) == 0
    assert cli.run(["inspect", str(corpus.folder / "data"), "--limit", "1"]) == 0
    assert "near.text" not in capsys.readouterr().out  # numbers for machines

    # Stopped while shards are written anew, it goes on with the same pairs.
    written = []

    def die(*arguments, **options):
        written.append(rewrite(*arguments, **options))
        if len(written) == 1:
            raise KeyboardInterrupt
        return written[-1]

    rewrite = dedup.rewrite_shard
    monkeypatch.setattr(dedup, "rewrite_shard", die)
    with pytest.raises(BuildInterrupted):
        build(corpus, "again")
    monkeypatch.setattr(dedup, "rewrite_shard", rewrite)
    build(corpus, "again")
    for name in (NEAR, "index.parquet", "rejects.parquet", "manifest.json"):
        assert (corpus.folder / "again" / name).read_bytes() == (corpus.folder / "data" / name).read_bytes()
