"""Views: what a dataset rendered again gives equals, bit for bit, what a build from the corpus gives."""

import json
import shutil

import numpy as np
import pytest
import tiny_families
from throwaway import TEMPLATES, byte_level_tokenizer, sentencepiece_tokenizer
from tiny_corpus import killed

from omnidata import Dataset, cli
from omnidata.builder.build import build as build_dataset
from omnidata.builder.settings import RunOptions
from omnidata.builder.view import open_view
from omnidata.loader import PackLoader
from omnidata.schema import BASE, MANIFEST, UserError
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


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_view_for_a_processor_is_what_a_build_is(whole, family):
    root, model = whole, tiny_families.save(family, whole / family)
    assert build(root, f"direct-{family}", "--model", model, "--split", "val=0.3") == 0
    assert render(root, f"view-{family}", "--model", model, base="whole") == 0
    same(root / f"view-{family}", root / f"direct-{family}")
    assert verify(root / f"view-{family}", deep=True, num_workers=1).findings == ()


# --- images that do not suit ------------------------------------------------------------------------------


def test_images_of_turns_that_were_cut_off_are_refused_or_fetched(root):
    longer = ("--max-length", 2000)
    assert render(root, "unsuited", *longer) == 0
    dataset = Dataset(root / "unsuited")
    assert (
        dataset.manifest.rejects == {"image_unsuited": 2} and len(dataset) == len(Dataset(root / "base")) - 2
    )
    assert "cut off" in dataset.rejects["detail"][0].as_py()
    assert render(root, "refetched", *longer, "--refetch") == 1, "from where?"
    assert render(root, "refetched", *longer, "--refetch", "--image-root", root) == 0
    assert build(root, "direct-fetched", "--tokenizer", root / "mistral", *longer, "--split", "val=0.3") == 0
    same(root / "refetched", root / "direct-fetched")
    assert verify(root / "refetched", deep=True, num_workers=1).findings == ()


def test_images_that_were_shrunk_too_far_are_refused(root):
    small = ("--image-policy", "shrink", "--image-size", 16)
    assert build(root, "small", "--tokenizer", root / "mistral", *small, "--max-length", 4000) == 0
    assert render(root, "small-16", base="small") == 0 and not Dataset(root / "small-16").manifest.rejects
    assert render(root, "small-32", "--image-size", 32, base="small") == 0
    dataset = Dataset(root / "small-32")
    with_images = sum(row["n_images"] > 0 for row in Dataset(root / "small").index.to_pylist())
    assert dataset.manifest.rejects == {"image_unsuited": with_images}
    assert "stored at" in dataset.rejects["detail"][0].as_py()


# --- the base ---------------------------------------------------------------------------------------------


def test_a_base_that_moved_is_found_again_and_one_that_changed_is_refused(root, tmp_path, capsys):
    base, view = tmp_path / "base", tmp_path / "view"
    shutil.copytree(root / "base", base)
    assert run("render", base, "--out", view, "--train-on", "last") == 0
    digest, before = Dataset(view).digest, [batch.input_ids.tolist() for batch in batches(view)]
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=BASE):
        Dataset(view)
    assert [finding.code for finding in verify(view).findings] == ["base"]
    assert len(Dataset(view, base=tmp_path / "elsewhere")[0].input_ids)
    (view / BASE).write_text(json.dumps({"path": "../elsewhere"}))
    assert Dataset(view).digest == digest
    assert [batch.input_ids.tolist() for batch in batches(view)] == before
    manifest = tmp_path / "elsewhere" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"num_images"', ' "num_images"', 1))
    with pytest.raises(UserError, match="has changed since"):
        Dataset(view)
    assert run("render", view, "--out", tmp_path / "again") == 1


def test_views_of_views_and_of_datasets_without_conversations_are_refused(root, capsys):
    assert render(root, "one", "--train-on", "last") == 0
    assert render(root, "two", base="one") == 1 and "is a view" in capsys.readouterr().err
    assert build(root, "bare", "--tokenizer", root / "mistral", "--no-conversation") == 0
    assert render(root, "three", base="bare") == 1 and "--no-conversation" in capsys.readouterr().err


def test_a_view_is_the_same_bytes_in_parts_and_goes_on_where_it_was(root):
    options = ("--samples-per-shard", 3, "--system", "Hm.")
    assert render(root, "at-once", *options) == 0
    assert render(root, "parts", *options, "--task", "1/3") == 0
    assert not (root / "parts" / MANIFEST).exists()
    with_others = render(root, "parts", "--samples-per-shard", 3, "--system", "Others.")
    assert with_others == 1, "another system prompt is another view"
    assert render(root, "parts", *options) == 0
    for path in sorted((root / "at-once").rglob("*")):
        if path.is_file():
            other = root / "parts" / path.relative_to(root / "at-once")
            assert path.read_bytes() == other.read_bytes(), path


def test_a_view_on_disk_of_a_base_in_an_object_store(root):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(root / "base"), "/bucket/base", recursive=True)
    try:
        assert run("render", "memory://bucket/base", "--out", root / "of-memory", "--train-on", "last") == 0
        assert render(root, "of-disk", "--train-on", "last") == 0
        same(root / "of-memory", root / "of-disk")
    finally:
        memory.rm("/bucket", recursive=True)


def test_killed_at_any_durable_step_the_same_command_completes_the_same_view(root, tmp_path):
    def work():
        view = open_view(str(root / "base"), {"system": "Hm.", "samples_per_shard": 3}, out=str(out))
        return build_dataset(view.settings, str(out), RunOptions(executor="inline", quiet=True), view=view)

    def files():
        return {
            path.relative_to(out): path.read_bytes()
            for path in out.rglob("*")
            if path.is_file() and ".build" not in path.parts
        }

    out = tmp_path / "view"
    work()
    want, step = files(), 3
    while shutil.rmtree(out) is None and killed(step, work):
        assert (out / ".build").exists()
        if not (out / MANIFEST).exists():  # else only .build/ was left to remove
            work()
        assert files() == want, f"killed at step {step}"
        step += 12
    assert step > 60


def test_a_view_beside_its_base_is_loaded_and_goes_on(root):
    assert render(root, "brief", "--system", "Hm.") == 0
    sources = [{"path": str(root / "brief"), "weight": 2.0}, {"path": str(root / "base"), "weight": 1.0}]
    options = {"global_batch": 1, "max_tokens": 400, "num_epochs": 1, "seed": 3, "image_size": 32}
    alone = list(PackLoader(sources, **options))
    first = PackLoader(sources, **options)
    assert next(iter(first)).keys == alone[0].keys and len(alone) > 2
    resumed = PackLoader(sources, num_workers=2, **options)
    resumed.load_state_dict(first.state_dict())
    for mine, theirs in zip(resumed, alone[1:], strict=True):
        assert mine.keys == theirs.keys
        np.testing.assert_array_equal(mine.input_ids, theirs.input_ids)
        np.testing.assert_array_equal(mine.images, theirs.images)
