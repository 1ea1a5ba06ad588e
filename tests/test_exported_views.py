"""export: a view and its base become one dataset, byte for byte what a build of the corpus gives."""

import shutil

import pytest
from throwaway import byte_level_tokenizer
from tiny_corpus import digests, killed_at, write_corpus

from omnidata import Dataset, cli, durable
from omnidata.builder.settings import RunOptions
from omnidata.copier.run import copy
from omnidata.copier.settings import CopySettings
from omnidata.schema import BASE, UserError
from omnidata.verify.run import verify

INLINE = RunOptions(executor="inline", quiet=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A corpus, a dataset of it, a view of that by another tokenizer, and a direct build by that one."""
    root = tmp_path_factory.mktemp("exported")
    corpus = write_corpus(root / "c", num_llava=24, num_chat=9, bad=False)
    byte_level_tokenizer("chatml").save_pretrained(root / "chatml")
    settings = {"image_policy": "keep", "samples_per_shard": 8}
    corpus.build(root / "base", options=INLINE, **settings)
    corpus.build(root / "direct", options=INLINE, tokenizer=str(root / "chatml"), num_query=3, **settings)
    other = ("--tokenizer", root / "chatml", "--num-query", 3, "--workers", 1, "--quiet")
    run("render", root / "base", "--out", root / "view", *other)
    return root


def run(*arguments):
    assert cli.run([*map(str, arguments)]) == 0


class Exporting:
    """Something to kill while it works; as tiny_corpus.killed_at takes it."""

    def __init__(self, view):
        self.settings = CopySettings("export", (str(view),), samples_per_shard=8)

    def build(self, out, *, options=INLINE):
        return copy(self.settings, str(out), options)


def files(folder, *names):
    """What two datasets of the same samples have alike: shards, and Energon's index of them."""
    return {name: digest for name, digest in digests(folder).items() if name.startswith(("shards/", *names))}


def test_an_exported_view_is_the_build_of_its_corpus(root, tmp_path):
    run("export", root / "view", "--out", tmp_path / "out", "--samples-per-shard", 8, "--quiet")
    assert files(tmp_path / "out") == files(root / "direct") and len(files(tmp_path / "out")) >= 10
    one, other = Dataset(root / "direct"), Dataset(tmp_path / "out")
    assert one.index.equals(other.index) and other.base is None
    assert one.manifest.num_dialogue_bytes == other.manifest.num_dialogue_bytes > 0
    assert not verify(tmp_path / "out", deep=True, num_workers=1).findings
    view = Dataset(root / "view").manifest
    assert other.manifest.num_records == view.num_records and other.manifest.inputs == view.inputs
    [entry] = other.manifest.origin["inputs"]
    assert entry["digest"] == Dataset(root / "view").content_digest and entry["num_samples"] == len(one)
    run(
        "render",
        tmp_path / "out",
        "--out",
        tmp_path / "again",
        "--tokenizer",
        root / "chatml",
        "--num-query",
        5,
    )


def test_an_export_survives_its_end_at_any_step(root, tmp_path):
    exporting, steps, out = Exporting(root / "view"), [], tmp_path / "c"
    durable.on_step = lambda name, path: steps.append(name)
    exporting.build(tmp_path / "peace")
    durable.on_step = None
    want = digests(tmp_path / "peace")
    for step in (len(steps) // 3, len(steps) // 2, len(steps) - 4, len(steps) - 1):
        assert killed_at(step, exporting, out)
        exporting.build(out)
        assert digests(out) == want
        shutil.rmtree(out)


def test_a_view_whose_base_is_damaged_is_not_exported(root, tmp_path):
    for name in ("base", "view"):
        shutil.copytree(root / name, tmp_path / name)
    (tmp_path / "view" / BASE).write_text('{"path": "../base"}')
    row = next(row for row in Dataset(tmp_path / "view").index.to_pylist() if row["n_images"])
    stored = Dataset(tmp_path / "base").read_range(row["base_shard"], row["base_offset"], row["base_nbytes"])
    for where in (stored.index(b"\xff\xd8") + 30, stored.index(b'"messages"') + 3):  # a picture, KEY.json
        path = tmp_path / "base" / row["base_shard"]
        raw = bytearray(path.read_bytes())
        raw[row["base_offset"] + where] ^= 1
        path.write_bytes(raw)
        with pytest.raises(
            UserError, match=f"base/{row['base_shard']}, sample {row['key']}: .* damage is not copied"
        ):
            Exporting(tmp_path / "view").build(tmp_path / "out")
        raw[row["base_offset"] + where] ^= 1
        path.write_bytes(raw)
    Exporting(tmp_path / "view").build(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "base", "--out", "x"], "base is no view"),
        (["export", "view", "--out", "base", "--overwrite"], "--out base is a dataset that is copied from"),
        (["merge", "base", "view", "--out", "x"], "view is a view: its images are in"),
        (["subset", "view", "--where", "n_images > 0", "--out", "x"], "omnidata export view --out DIR"),
    ],
)
def test_views_and_datasets_are_not_taken_for_each_other(root, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(root)
    assert cli.run(arguments) == 1
    assert message in capsys.readouterr().err and not (root / "x").exists()


@pytest.fixture(autouse=True)
def no_steps():
    yield
    durable.on_step = None
