"""From packs to tensors: exact, elastic, loud when something cannot be read."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import asdict

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_dataset import NUM_QUERY, build_tiny_dataset

import omnidata
from omnidata import Dataset
from omnidata.images.pixels import decode_rgb, resize_rgb
from omnidata.index import write_tables
from omnidata.loader.loader import PackLoader
from omnidata.loader.microbatch import Microbatch
from omnidata.plan.epoch import EpochPlan
from omnidata.schema import IGNORE_INDEX, INDEX, INDEX_COLUMNS, UserError
from pipelines.config import DatasetConfig

SETTINGS = {
    "global_batch": 6,
    "max_tokens": 450,
    "window_samples": 60,
    "image_size": 24,
    "num_epochs": 1,
    "tail": "drop",
}
PLAN = {name: SETTINGS[name] for name in ("max_tokens", "window_samples")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """150 training samples of 0-2 images in 10 shards."""
    folder = tmp_path_factory.mktemp("loader") / "data"
    return build_tiny_dataset(folder, num_samples=158, samples_per_shard=15)


@pytest.fixture
def own(data, tmp_path):
    """A copy of the data to damage."""
    return shutil.copytree(data, tmp_path / "data")


def loader(path, **settings) -> PackLoader:
    return PackLoader(path, **(SETTINGS | settings))


def global_batches(path, *, world_size=1, state=None, num_steps=None, **settings):
    """Keys of each pack by step, over all ranks; and the state that follows."""
    batches: dict[int, list[tuple[str, ...]]] = {}
    for rank in range(world_size):
        one = loader(path, rank=rank, world_size=world_size, **settings)
        if state:
            one.load_state_dict(json.loads(json.dumps(state)))
        count = None if num_steps is None else num_steps * one.microbatches_per_step
        for microbatch in itertools.islice(one, count):
            batches.setdefault(microbatch.step, []).append(microbatch.keys)
    return {step: sorted(filter(None, packs)) for step, packs in batches.items()}, one.state_dict()


# --- what a microbatch holds ------------------------------------------------------------------------------


def test_documents_are_the_samples_with_labels_shifted_once(data):
    dataset = Dataset(data, "train")
    samples = {sample.key: sample for sample in map(dataset.__getitem__, range(len(dataset)))}
    seen = []
    for microbatch in loader(data, global_batch=1):
        assert microbatch.input_ids.dtype == microbatch.labels.dtype == torch.int64
        assert microbatch.cu_seqlens.dtype == torch.int32 and microbatch.cu_seqlens[0] == 0
        assert microbatch.cu_seqlens[-1] == microbatch.num_tokens <= 450
        edges = itertools.pairwise(microbatch.cu_seqlens.tolist())
        for key, (start, stop) in zip(microbatch.keys, edges, strict=True):
            expected = np.append(samples[key].labels[1:], IGNORE_INDEX)
            assert microbatch.input_ids[start:stop].tolist() == samples[key].input_ids.tolist()
            assert microbatch.labels[start:stop].tolist() == expected.tolist()
            assert microbatch.position_ids[start:stop].tolist() == list(range(stop - start))
        assert microbatch.max_seqlen == max(len(samples[key].input_ids) for key in microbatch.keys)
        assert microbatch.num_supervised_tokens == (microbatch.labels != IGNORE_INDEX).sum()
        seen += microbatch.keys
    assert sorted(seen) == sorted(samples)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_come_in_placeholder_order_as_the_model_sees_them(data, num_workers):
    dataset = Dataset(data, "train")
    samples = {sample.key: sample for sample in map(dataset.__getitem__, range(len(dataset)))}
    start, patch = (dataset.manifest.special_tokens[name] for name in ("<im_start>", "<im_patch>"))
    num_images = 0
    for microbatch in loader(data, global_batch=1, num_workers=num_workers):
        images = [image for key in microbatch.keys for image in samples[key].images]
        assert microbatch.images.shape == (len(images), 3, 24, 24) and microbatch.images.dtype == torch.uint8
        for found, expected in zip(microbatch.images, images, strict=True):
            pixels = resize_rgb(decode_rgb(expected), 24, 24)
            assert np.array_equal(found.permute(1, 2, 0).numpy(), pixels)
        for position in microbatch.image_positions.tolist():
            block = microbatch.input_ids[position - 1 : position + NUM_QUERY].tolist()
            assert block == [start] + [patch] * NUM_QUERY
        assert len(microbatch.image_positions) == len(images)
        num_images += len(images)
    assert num_images == sum(len(sample.images) for sample in samples.values())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_undecoded_images_are_the_stored_bytes(data, num_workers):
    dataset = Dataset(data, "train")
    samples = {sample.key: sample for sample in map(dataset.__getitem__, range(len(dataset)))}
    for microbatch in loader(data, decode_images=False, num_workers=num_workers):
        assert microbatch.images == tuple(image for key in microbatch.keys for image in samples[key].images)


def test_the_denominator_counts_all_ranks_of_the_step(data):
    counted, stated = {}, {}
    for rank in range(3):
        for microbatch in loader(data, rank=rank, world_size=3):
            supervised = int((microbatch.labels != IGNORE_INDEX).sum())
            counted[microbatch.step] = counted.get(microbatch.step, 0) + supervised
            stated.setdefault(microbatch.step, set()).add(microbatch.num_supervised_tokens)
    assert stated == {step: {count} for step, count in counted.items()}


# --- exact and elastic ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", range(5))
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_global_batches_are_the_same_for_all_ranks_and_workers(data, world_size, num_workers):
    expected, state = global_batches(data, num_epochs=2)
    found = global_batches(data, num_epochs=2, world_size=world_size, num_workers=num_workers)
    assert found == (expected, state)
    assert len(expected) == sum(EpochPlan(data, epoch=e, **PLAN).num_steps(6) for e in (0, 1))


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_resume_changes_nothing_with_other_ranks_and_workers(data, stop):
    whole, _ = global_batches(data, num_epochs=2)
    begun, state = global_batches(data, num_epochs=2, world_size=2, num_workers=1, num_steps=stop)
    rest, _ = global_batches(data, num_epochs=2, world_size=3, num_workers=2 * (stop == 3), state=state)
    assert begun | rest == whole and len(begun) == stop and not begun.keys() & rest.keys()


def test_every_rank_runs_the_same_number_of_microbatches(data):
    counts, empty = [], 0
    for rank in range(4):
        one = loader(data, rank=rank, world_size=4, packs_per_microbatch=1)
        microbatches = list(one)
        assert len(microbatches) == one.steps_per_epoch() * one.microbatches_per_step
        counts.append(len(microbatches))
        for microbatch in microbatches:
            if not microbatch.keys:
                empty += 1
                assert microbatch.labels.tolist() == [IGNORE_INDEX] and len(microbatch.images) == 0
                assert microbatch.cu_seqlens.tolist() == [0, 1] and microbatch.num_supervised_tokens > 0
    assert len(set(counts)) == 1 and empty == 2 * one.steps_per_epoch()  # 6 packs on 4 ranks, 2 rounds


def test_packs_may_share_a_microbatch(data):
    two = loader(data, packs_per_microbatch=2)
    assert two.microbatches_per_step == 3
    sizes = [microbatch.num_tokens for microbatch in two]
    assert 450 < max(sizes) <= 900
    assert len(sizes) == 3 * two.steps_per_epoch()


def test_a_padded_tail_reaches_every_sample(data):
    for world_size in (1, 4):
        padded, _ = global_batches(data, world_size=world_size, tail="pad")
        keys = list(itertools.chain(*itertools.chain(*padded.values())))
        assert len(keys) == len(set(keys)) == 150


def test_state_is_small_json_and_knows_its_plan(data):
    one = loader(data)
    next(iter(one))
    assert len(json.dumps(one.state_dict())) < 1024
    for other in (loader(data, seed=1), loader(data, max_tokens=1200)):
        with pytest.raises(UserError, match="another plan"):
            other.load_state_dict(one.state_dict())


def test_a_state_of_another_version_is_refused_by_name(data):
    state = loader(data).state_dict() | {"version": 1}
    with pytest.raises(UserError, match=r"version 1, this release reads 2: .* ordered otherwise"):
        loader(data).load_state_dict(state)


def test_state_moves_on_with_the_last_microbatch_of_a_step(data):
    one = loader(data, world_size=2, rank=1)
    for number, _ in enumerate(itertools.islice(one, 7), start=1):
        assert one.state_dict()["step"] == number // one.microbatches_per_step


def test_reading_leaves_the_training_random_state_alone(data):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(loader(data, num_workers=1)))
    assert torch.equal(before, torch.get_rng_state())


# --- blends, exclusions, cuts -----------------------------------------------------------------------------


def test_excluded_keys_are_left_out_without_a_rebuild(data, tmp_path):
    (tmp_path / "bad.txt").write_text("sample-000003\n# a comment\n\nsample-000017  # blurred\n")
    entry = {"path": str(data), "exclude": str(tmp_path / "bad.txt")}
    found, _ = global_batches(entry, tail="pad")
    keys = set(itertools.chain(*itertools.chain(*found.values())))
    expected = set(Dataset(data, "train").index["key"].to_pylist())
    assert keys == expected - {"sample-000003", "sample-000017"}
    with pytest.raises(UserError, match="another plan"):
        loader(data).load_state_dict(loader(entry).state_dict())
    (tmp_path / "bad.txt").write_text("no-such-key\n")
    with pytest.raises(UserError, match="'no-such-key'"):
        loader(entry)


def test_a_blend_reads_each_dataset(data, tmp_path):
    other = build_tiny_dataset(tmp_path / "other", num_samples=28, samples_per_shard=10)
    entries = [{"path": str(data), "weight": 1}, {"path": str(other), "split": "val", "weight": 1}]
    counts = [0, 0]
    val = set(Dataset(other, "val").index["key"].to_pylist())
    for microbatch in loader(entries, tail="pad"):
        counts[1] += sum(key in val for key in microbatch.keys)
        counts[0] += len(microbatch.keys)
    assert counts[0] == 158 and counts[1] >= 79


def test_datasets_without_weights_are_each_read_once_an_epoch(data, tmp_path):
    other = build_tiny_dataset(tmp_path / "other", num_samples=28, samples_per_shard=10)
    configs = [
        DatasetConfig(path=str(data)),
        DatasetConfig(path=str(other), split="val"),
    ]  # as recipes give them
    found, _ = global_batches([asdict(config) for config in configs], tail="pad")
    keys = list(itertools.chain(*itertools.chain(*found.values())))
    assert len(keys) == 158 and sorted(keys) == sorted(
        Dataset(data, "train").index["key"].to_pylist() + Dataset(other, "val").index["key"].to_pylist()
    )
    assert loader(data).plan.digest == loader({"path": str(data), "weight": 2.0}).plan.digest


def test_datasets_of_different_tokenizers_do_not_blend(data, own):
    manifest = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").write_text(json.dumps(manifest | {"tokenizer_fingerprint": "other"}))
    with pytest.raises(UserError, match="differ in tokenizer_fingerprint"):
        loader([{"path": str(data)}, {"path": str(own)}])


def test_oversize_samples_are_cut_after_a_reply(data):
    dataset = Dataset(data, "train")
    samples = {sample.key: sample for sample in map(dataset.__getitem__, range(len(dataset)))}
    shortest = 120
    one = loader(data, max_tokens=shortest, oversize="cut", global_batch=1)
    num_cut = 0
    for microbatch in one:
        for key, (start, stop) in zip(
            microbatch.keys, itertools.pairwise(microbatch.cu_seqlens.tolist()), strict=True
        ):
            sample, length = samples[key], stop - start
            assert microbatch.input_ids[start:stop].tolist() == sample.input_ids[:length].tolist()
            if length < len(sample.input_ids):
                num_cut += 1
                assert sample.labels[length - 1] != IGNORE_INDEX and sample.labels[length] == IGNORE_INDEX
    totals = one.plan.totals
    assert num_cut == totals.num_cut > 0
    assert totals.num_samples + totals.num_left_out == 150 and totals.num_left_out > 0


@pytest.mark.parametrize("data_argument", [[], {"weight": 1}, {"path": "x", "wieght": 1}])
def test_bad_data_is_refused(data_argument):
    with pytest.raises(UserError):
        PackLoader(data_argument, global_batch=1)


def test_an_epoch_smaller_than_a_step_is_refused(data):
    with pytest.raises(UserError, match="fewer packs than one step"):
        list(loader(data, global_batch=10_000))


# --- webdataset -------------------------------------------------------------------------------------------


def test_a_plain_webdataset_pipeline_reads_the_same_samples(data):
    dataset = Dataset(data, "train")
    found = list(omnidata.webdataset_pipeline(data).decode())
    assert [sample["__key__"] for sample in found] == dataset.index["key"].to_pylist()
    assert found[5]["input_ids.npy"].tolist() == dataset[5].input_ids.tolist()
    assert found[5]["1.jpg"] == dataset[5].images[1]


def test_all_that_goes_to_a_gpu_lies_in_page_locked_memory(tiny_dataset, monkeypatch):
    """Whether CUDA locks it only a GPU can tell; here, that nothing is left out."""
    locked = []

    def lock(tensor):
        locked.append(tensor.clone())
        return locked[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)
    microbatch = next(iter(PackLoader(tiny_dataset, global_batch=1, max_tokens=400, pin_memory=True)))
    tensors = [value for name in Microbatch.__slots__ if torch.is_tensor(value := getattr(microbatch, name))]
    addresses = {tensor.data_ptr() for tensor in locked}
    assert len(tensors) == 6 and all(tensor.data_ptr() in addresses for tensor in tensors)


def test_an_index_without_the_columns_that_have_defaults_is_read(data, own):
    """As of datasets that were built before such a column came."""
    missing = [column.name for column in INDEX_COLUMNS if column.default is not None]
    assert "base_shard" in missing
    before = pq.ParquetFile(data / INDEX)
    groups = [before.read_row_group(i).drop_columns(missing) for i in range(before.num_row_groups)]
    with (own / INDEX).open("wb") as file:
        write_tables(file, groups[0].schema, groups)
    assert Dataset(own).index.equals(Dataset(data).index)
    for mine, theirs in zip(PackLoader([own], **SETTINGS), PackLoader([data], **SETTINGS), strict=True):
        assert torch.equal(mine.input_ids, theirs.input_ids) and torch.equal(mine.images, theirs.images)
