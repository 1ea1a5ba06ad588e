"""What the documents of a microbatch are counted under."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny_dataset import build_tiny_dataset

from omnidata import Dataset
from omnidata.loader import PackLoader
from omnidata.schema import IGNORE_INDEX, UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_tiny_dataset(tmp_path_factory.mktemp("groups") / "data", num_samples=40)


def loader(data, **settings) -> PackLoader:
    settings = {"max_tokens": 400, "global_batch": 2, "num_epochs": 1, "decode_images": False} | settings
    return PackLoader(data, **settings)


@pytest.mark.parametrize("by", ["source", "n_images", "dataset"])
def test_documents_and_supervised_tokens_carry_their_group(data, by):
    blend = [{"path": data}, {"path": data, "split": "val"}]
    rows = {row["key"]: row for split in ("train", "val") for row in Dataset(data, split).index.to_pylist()}
    marked, tokens = loader(blend, group_by=by), Counter()
    for microbatch in marked:
        if not microbatch.keys:
            assert microbatch.groups is None  # an empty microbatch has no document
            continue
        names = [marked.group_names[code] for code in microbatch.groups.tolist()]
        if by != "dataset":
            assert names == [str(rows[key][by]) for key in microbatch.keys]
        lengths = torch.diff(microbatch.cu_seqlens).long()
        of_tokens = torch.repeat_interleave(microbatch.groups, lengths)
        assert microbatch.supervised_groups.equal(of_tokens[microbatch.labels != IGNORE_INDEX])
        tokens.update(marked.group_names[code] for code in microbatch.supervised_groups.tolist())
    if by == "dataset":
        assert marked.group_names == (str(data), f"{data} #2")
    else:
        wanted = Counter()
        for row in rows.values():
            wanted[str(row[by])] += row["n_supervised"]
        assert tokens == wanted


def test_without_it_nothing_is_marked_and_the_plan_is_the_same(data):
    plain, marked = loader(data), loader(data, group_by="source")
    assert plain.plan.digest == marked.plan.digest and plain.group_names == ()
    for one, other in zip(plain, marked, strict=True):
        assert one.keys == other.keys and one.groups is None and one.supervised_groups is None


def test_workers_hand_the_groups_on(data):
    alone = [m.groups.tolist() for m in loader(data, group_by="source") if m.keys]
    assert [m.groups.tolist() for m in loader(data, group_by="source", num_workers=1) if m.keys] == alone


def test_rare_values_share_a_group_and_a_sample_left_out_takes_its_own_along(data, monkeypatch, tmp_path):
    monkeypatch.setattr("omnidata.loader.groups.MAX_GROUPS", 3)
    many = loader(data, group_by="n_tokens")
    counts = Counter(Dataset(data, "train").index["n_tokens"].to_pylist())
    ranked = sorted(counts, key=lambda value: (-counts[value], str(value)))
    assert many.group_names == (*map(str, ranked[:2]), "(others)")  # the most common have their own
    broken = build_tiny_dataset(tmp_path / "broken", num_samples=24, num_val=8)
    row = Dataset(broken, "train").row(3)
    with (broken / row["shard"]).open("r+b") as file:
        file.seek(row["offset"])
        file.write(bytes(512))
    sources = {row["key"]: row["source"] for row in Dataset(broken).index.to_pylist()}
    marked = loader(broken, group_by="source", on_error="skip")
    skipped = 0
    for microbatch in marked:
        skipped += microbatch.num_skipped
        if microbatch.keys:
            names = [marked.group_names[code] for code in microbatch.groups.tolist()]
            assert names == [sources[key] for key in microbatch.keys]
    assert skipped == 1


def test_an_unknown_column_is_refused(data):
    with pytest.raises(UserError, match=r"no column 'sauce'.*did you mean source"):
        loader(data, group_by="sauce")
    with pytest.raises(UserError, match="image_sizes is a column of lists"):
        loader(data, group_by="image_sizes")
