"""Others read it: webdataset, Megatron-Energon and Hugging Face datasets, each the real package, each sample.

The code that is run is the dataset card's own, so the card cannot be wrong.
"""

import json
import pickle
import re
import shutil
import tarfile
from dataclasses import fields, replace

import numpy as np
import processors
import pytest
import yaml
from tiny_corpus import write_corpus

from omnidata import cli
from omnidata.builder.settings import OMNILMM_ONLY, BuildSettings, RunOptions
from omnidata.dataset import Dataset
from omnidata.shards import end_archive, tar_header

READERS = ("omnidata", "webdataset", "Megatron-Energon", "Hugging Face datasets")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """{"mixed": text-only and one- and two-image samples and a val split, "uniform": one image each}."""
    folder = tmp_path_factory.mktemp("interop")
    corpus = write_corpus(folder / "c", num_llava=30, num_chat=10, bad=False)
    options = RunOptions(executor="inline", quiet=True)
    corpus.build(folder / "mixed", options=options)
    records = json.loads((corpus.folder / "llava.json").read_text())
    one_image = [record for record in records if len(record.get("image", [])) == 1]
    (corpus.folder / "one.json").write_text(json.dumps(one_image))
    corpus.build(folder / "uniform", options=options, source=(str(corpus.folder / "one.json"),), split={})
    # The same for a model's processor.
    omnilmm = {name: default(name) for name in OMNILMM_ONLY}
    model = {"model": processors.save("smolvlm", folder / "model", small=True), "tokenizer": ""}
    corpus.build(
        folder / "processor",
        options=options,
        source=(str(corpus.folder / "one.json"),),
        split={},
        image_policy="keep",
        **omnilmm,
        **model,
    )
    merge, subset = ("merge", "uniform", "some", "--out", "merged"), ("subset", "mixed", "--out", "some")
    for command in ((*subset, "--where", "n_images == 1"), (*merge, "--samples-per-shard", 6)):
        places = [
            folder / word if word in ("mixed", "uniform", "some", "merged") else word for word in command
        ]
        assert cli.run([*map(str, places), "--quiet"]) == 0
    render = ("render", folder / "uniform", "--system", "Hm.", "--out", folder / "view")
    assert cli.run([*map(str, render), "--workers", "1", "--quiet"]) == 0
    return {name: folder / name for name in ("mixed", "uniform", "processor", "merged", "view")}


def default(name):
    return next(field.default for field in fields(BuildSettings) if field.name == name)


def card_code(folder, reader):
    """The Python code under the reader's heading in the card."""
    text = (folder / "README.md").read_text()
    return re.search(rf"## {reader}\n\n```python\n(.*?)```", text, re.DOTALL)[1]


def run_card(folder, reader, monkeypatch):
    """Run it from the dataset's folder, as the card says; -> its names, its samples collected."""
    monkeypatch.chdir(folder)
    seen = []
    code = card_code(folder, reader)
    assert "    print(" in code
    code = code.replace("    print(", "    seen.append(sample)\n    print(")
    names = {"seen": seen, "__name__": "card"}
    exec(code, names)
    return names


def by_key(folder, split="train"):
    """The samples as other readers see them: of a view without the images, which are its base's."""
    dataset = Dataset(folder, split=split)
    samples = [dataset[i] for i in range(len(dataset))]
    if dataset.base:
        assert all(sample.images for sample in samples)
        samples = [replace(sample, images=()) for sample in samples]
    return {sample.key: sample for sample in samples}


def same(sample, input_ids, labels, num_images):
    np.testing.assert_array_equal(np.asarray(input_ids), sample.input_ids)
    np.testing.assert_array_equal(np.asarray(labels), sample.labels)
    assert num_images == len(sample.images)


def images_in(sample):
    return sum(name.endswith(("jpg", "png", "webp")) for name in sample)


def test_the_card_opens_the_dataset(datasets, monkeypatch, capsys):
    monkeypatch.chdir(datasets["mixed"])
    exec(card_code(datasets["mixed"], "omnidata"), {})
    assert capsys.readouterr().out.startswith("40 00000000")


@pytest.mark.parametrize("kind", ["mixed", "uniform", "processor", "merged", "view"])
def test_webdataset_reads_every_sample(datasets, kind, monkeypatch):
    expected = by_key(datasets[kind])
    seen = run_card(datasets[kind], "webdataset", monkeypatch)["seen"]
    assert [sample["__key__"] for sample in seen] == list(expected)
    for sample in seen:
        own = expected[sample["__key__"]]
        same(own, sample["input_ids.npy"], sample["labels.npy"], images_in(sample))


@pytest.mark.parametrize("kind", ["mixed", "uniform", "processor", "merged", "view"])
def test_energon_reads_every_sample(datasets, kind, monkeypatch):
    pytest.importorskip("megatron.energon")
    expected = by_key(datasets[kind])
    seen = run_card(datasets[kind], "Megatron-Energon", monkeypatch)["seen"]
    assert sorted(sample.__key__ for sample in seen) == sorted(expected), "each exactly once"
    for sample in seen:
        same(expected[sample.__key__], sample.input_ids, sample.labels, len(sample.images))


def test_energon_reads_a_split_by_its_name(datasets):
    energon = pytest.importorskip("megatron.energon")
    metadata = pytest.importorskip("megatron.energon.flavors.webdataset.metadata")
    path = energon.epathlib.EPath(str(datasets["mixed"]))
    for split in ("train", "val"):
        meta = metadata.WebdatasetMeta.from_config(path, split_part=split)
        assert sum(shard.count for shard in meta.shards) == len(Dataset(datasets["mixed"], split=split))


@pytest.mark.parametrize("kind", ["uniform", "processor", "merged", "view"])
def test_hugging_face_datasets_reads_every_sample(datasets, kind, monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    expected = by_key(datasets[kind])
    seen = run_card(datasets[kind], "Hugging Face datasets", monkeypatch)["seen"]
    assert [sample["__key__"] for sample in seen] == list(expected)
    for sample in seen:
        own = expected[sample["__key__"]]
        same(own, sample["input_ids.npy"], sample["labels.npy"], images_in(sample))


def test_the_card_says_what_hugging_face_datasets_refuses(datasets, monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert "the first five samples have the same members" in (datasets["mixed"] / "README.md").read_text()
    with pytest.raises(ValueError, match=r"same number of files|same"):
        run_card(datasets["mixed"], "Hugging Face datasets", monkeypatch)


def test_the_metadata_name_every_shard_with_its_samples(datasets):
    manifest = Dataset(datasets["mixed"]).manifest
    meta = datasets["mixed"] / ".nv-meta"
    counts = json.loads((meta / ".info.json").read_text())["shard_counts"]
    assert counts == {shard.path: shard.num_samples for shard in manifest.shards} and 0 not in counts.values()
    parts = yaml.safe_load((meta / "split.yaml").read_text())["split_parts"]
    assert [path for split in parts.values() for path in split] == list(counts)
    card = (datasets["mixed"] / "README.md").read_text()
    assert f"{manifest.num_samples:,} samples" in card and "| val |" in card


class _Planted:
    """Its pickle writes a file when somebody loads it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def tampered(datasets, tmp_path):
    """A copy whose shards hold pickles beside every sample's own members, with Energon's offsets to match."""
    data, marker = shutil.copytree(datasets["uniform"], tmp_path / "data"), tmp_path / "ran"
    payload = pickle.dumps(_Planted(marker))
    for shard in sorted((data / "shards").glob("*.tar")):
        with tarfile.open(shard) as archive:
            members = [(info.name, archive.extractfile(info).read()) for info in archive]
        starts, position, seen = [], 0, set()
        with shard.open("wb") as file:
            for name, content in members:
                more = [(name, content)]
                if (key := name.partition(".")[0]) not in seen:
                    seen.add(key)
                    starts.append(position)
                    more += [(f"{key}.{x}", payload) for x in ("pickle", "pyd", "pth", "pkl", "extra.pickle")]
                for member, data_of in more:
                    file.write(tar_header(member, len(data_of)) + data_of + bytes(-len(data_of) % 512))
                    position += 512 + len(data_of) + -len(data_of) % 512
            end_archive(file, position)
        shard.with_suffix(".tar.idx").write_bytes(np.array([*starts, position], "<u8").tobytes())
    return data, marker


@pytest.mark.parametrize("reader", ["webdataset", "Megatron-Energon", "Hugging Face datasets", "pipeline"])
def test_no_reader_unpickles_what_a_stranger_put_in(tampered, reader, monkeypatch, tmp_path):
    data, marker = tampered
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    if reader == "pipeline":
        from omnidata.loader.wds import webdataset_pipeline

        seen = list(webdataset_pipeline(data).decode("pil"))
    else:
        pytest.importorskip({"Megatron-Energon": "megatron.energon"}.get(reader, "webdataset"))
        if reader == "Hugging Face datasets":  # loads .pth as weights only, which refuses any other object
            with pytest.raises((UserWarning, pickle.UnpicklingError)):
                run_card(data, reader, monkeypatch)
            assert not marker.exists()
            return
        seen = run_card(data, reader, monkeypatch)["seen"]
    assert len(seen) == len(Dataset(data, "train")) and not marker.exists()
