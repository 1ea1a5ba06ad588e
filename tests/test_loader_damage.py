"""What the loader does with samples that cannot be read: it stops and names them, or counts them."""

import json
import shutil

import numpy as np
import pytest
from test_loader import global_batches, loader
from tiny_dataset import build_tiny_dataset

from omnidata import Dataset
from omnidata.loader.reader import LoadError
from omnidata.schema import IGNORE_INDEX, UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """150 training samples of 0-2 images in 10 shards."""
    return build_tiny_dataset(
        tmp_path_factory.mktemp("loader") / "data", num_samples=158, samples_per_shard=15
    )


@pytest.fixture
def own(data, tmp_path):
    """A copy of the data to damage."""
    return shutil.copytree(data, tmp_path / "data")


def damage(own, position: int, change) -> str:
    """Apply ``change(bytearray of the shard, index row)`` to the shard of one sample; return its key."""
    row = Dataset(own, "train").row(position)
    path = own / row["shard"]
    raw = bytearray(path.read_bytes())
    path.write_bytes(change(raw, row))
    return row["key"]


def cut_short(raw, row):
    return raw[: row["offset"] + 700]


def break_header(raw, row):
    raw[row["offset"]] ^= 1
    return raw


def break_picture(raw, row):
    end = row["offset"] + row["nbytes"]
    raw[end - 700 : end] = bytes(700)
    return raw


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("change", [cut_short, break_header, break_picture])
def test_what_cannot_be_read_stops_the_run_and_is_named(own, change, num_workers):
    position = 14 if change is cut_short else 2  # the last of its shard; one with two images
    key = damage(own, position, change)
    with pytest.raises(LoadError, match=key) as caught:
        list(loader(own, tail="pad", num_workers=num_workers))
    assert "train-00000.tar" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [cut_short, break_header, break_picture])
def test_what_cannot_be_read_is_left_out_and_counted_on_request(data, own, change):
    key = damage(own, 14 if change is cut_short else 2, change)
    whole, _ = global_batches(data, tail="pad")
    batches, num_skipped, images = {}, 0, 0
    for microbatch in loader(own, tail="pad", on_error="skip"):
        batches.setdefault(microbatch.step, []).append(microbatch.keys)
        num_skipped += microbatch.num_skipped
        images += len(microbatch.images)
        assert len(microbatch.images) == len(microbatch.image_positions)
    assert num_skipped == 1
    without = {step: [tuple(k for k in pack if k != key) for pack in packs] for step, packs in whole.items()}
    assert {step: sorted(filter(None, packs)) for step, packs in batches.items()} == {
        step: sorted(packs) for step, packs in without.items()
    }


def test_a_missing_shard_stops_the_run(own):
    (own / "shards" / "train-00003.tar").unlink()
    with pytest.raises(LoadError, match=r"train-00003\.tar.*FileNotFoundError"):
        list(loader(own, tail="pad"))


def test_a_flipped_bit_is_found_by_the_checksum(own):
    def flip(raw, row):
        raw[row["offset"] + row["nbytes"] - 600] ^= 1  # inside the last image
        return raw

    key = damage(own, 2, flip)
    with pytest.raises(LoadError, match=f"{key}.*content hash"):
        list(loader(own, tail="pad", checksum=True))


def test_labels_that_the_index_does_not_know_stop_the_run(own):
    def unsupervise(raw, row):
        sample = Dataset(own, "train")[2]
        labels = sample.labels.tobytes()
        at = raw.index(labels, row["offset"])
        raw[at + len(labels) - 4 : at + len(labels)] = np.int32(IGNORE_INDEX).tobytes()
        return raw

    key = damage(own, 2, unsupervise)
    with pytest.raises(LoadError, match=f"{key}.*index says"):
        list(loader(own, tail="pad"))


def test_index_and_manifest_that_disagree_are_refused(own):
    manifest = json.loads((own / "manifest.json").read_text())
    manifest["shards"][0]["num_samples"] -= 1
    manifest["splits"]["train"] -= 1
    (own / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="row groups"):
        loader(own)
