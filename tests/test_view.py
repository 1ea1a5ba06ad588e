"""Views: what a dataset rendered again gives equals, bit for bit, what a build from the corpus gives."""

import json
import shutil

import numpy as np
import pytest
from throwaway import TEMPLATES, byte_level_tokenizer, sentencepiece_tokenizer

from omnidata import Dataset, cli
from omnidata.loader import PackLoader
from omnidata.verify.run import verify

FAMILIES = ("qwen3_vl", "internvl", "smolvlm")


def run(*arguments):
    return cli.run([*map(str, arguments), "--workers", "1", "--quiet"])


@pytest.fixture(scope="module")
def root(ten_records, tmp_path_factory):
    """A corpus of ten records and long talks, two tokenizers, a base with every picture as it was."""
    root = tmp_path_factory.mktemp("views")
    for picture in ten_records.glob("*.jpg"):
        shutil.copy(picture, root)
    records = [json.loads(line) for line in (ten_records / "a.jsonl").read_text().splitlines()]
    for i, length in enumerate((2, 5, 9)):
        messages = []
        for turn in range(length):
            asked = f"{'<image>' if turn == length - 1 else ''}What of {turn}, " + "and so on " * 9
            messages += [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": f"That {turn}."},
            ]
        messages[1]["loss"] = i != 1
        records.append({"id": f"long{i}", "images": [f"{i}.jpg"], "messages": messages})
    (root / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sentencepiece_tokenizer().save_pretrained(root / "mistral")
    byte_level_tokenizer("chatml").save_pretrained(root / "chatml")
    assert (
        build(root, "base", "--tokenizer", root / "mistral", "--max-length", 300, "--split", "val=0.3") == 0
    )
    return root


def build(root, name, *options):
    """A dataset from the corpus."""
    keep = () if "--image-policy" in options else ("--image-policy", "keep")
    kept = ("--keep-column", "score")
    return run(
        "build-shards", root / "a.jsonl", "--image-root", root, "--out", root / name, *options, *keep, *kept
    )


def render(root, name, *options, base="base"):
    """A view of the base."""
    return run("render", root / base, "--out", root / name, *options)


def batches(path, **options):
    options = {
        "global_batch": 2,
        "max_tokens": 4000,
        "num_epochs": 1,
        "seed": 3,
        "image_size": None,
    } | options
    return list(PackLoader(str(path), **options))


def same(one, other):
    """Two datasets that give the same samples and batches."""
    left, right = Dataset(one), Dataset(other)
    assert len(left) == len(right) > 0
    for i in range(len(left)):
        a, b, row, row_b = left[i], right[i], left.row(i), right.row(i)
        assert (a.key, a.images, a.image_extensions) == (b.key, b.images, b.image_extensions)
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_array_equal(a.labels, b.labels)
        own = ("shard", "offset", "nbytes", "content_hash", "dialogue_bytes", "dialogue_hash")
        for name in row:
            if name not in own and not name.startswith("base_"):
                assert row[name] == row_b[name], (a.key, name)
    for x, y in zip(batches(one), batches(other), strict=True):
        for name in ("input_ids", "labels", "position_ids"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name))
        tensors = x.images if isinstance(x.images, dict) else {"images": x.images}
        others = y.images if isinstance(y.images, dict) else {"images": y.images}
        assert tensors.keys() == others.keys()
        for name in tensors:
            np.testing.assert_array_equal(np.asarray(tensors[name]), np.asarray(others[name]))


CASES = {
    "another tokenizer": ("--tokenizer", "chatml", "--num-query", 3),
    "longer": ("--tokenizer", "mistral", "--max-length", 2000),
    "shorter": ("--tokenizer", "mistral", "--max-length", 150),
    "the last turn": ("--tokenizer", "mistral", "--max-length", 2000, "--train-on", "last"),
    "another system prompt": ("--tokenizer", "mistral", "--max-length", 2000, "--system", "Be brief."),
    "none": ("--tokenizer", "mistral", "--max-length", 2000, "--system", ""),
    "another template": (
        "--tokenizer",
        "chatml",
        "--max-length",
        2000,
        "--chat-template",
        TEMPLATES["zephyr"],
    ),
    "another size": ("--tokenizer", "mistral", "--image-size", 64, "--max-length", 2000),
}


@pytest.fixture(scope="module")
def whole(root):
    """A base in which no turn was cut off."""
    assert (
        build(root, "whole", "--tokenizer", root / "mistral", "--max-length", 4000, "--split", "val=0.3") == 0
    )
    return root


@pytest.mark.parametrize("name", CASES)
def test_a_view_is_what_a_build_is(whole, name):
    root, given = whole, list(CASES[name])
    given[1] = root / given[1]
    out = name.replace(" ", "-")
    assert build(root, f"direct-{out}", *given, "--split", "val=0.3") == 0
    assert render(root, f"view-{out}", *given, base="whole") == 0
    same(root / f"view-{out}", root / f"direct-{out}")
    assert verify(root / f"view-{out}", deep=True, num_workers=1).findings == ()
