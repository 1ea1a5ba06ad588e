"""Columns that --keep-column takes from records into the index: their values, types, and what shows them."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_dataset import write_tokenizer

from omnidata import Dataset, cli
from omnidata.builder.build import build
from omnidata.builder.settings import BuildSettings, RunOptions
from omnidata.conversation import Reading, to_conversation
from omnidata.corpus.columns import column_value
from omnidata.inspect.columns import number_distribution
from omnidata.inspect.summary import summarize
from omnidata.plan import EpochPlan
from omnidata.schema import INDEX, Record, RejectError, UserError

INLINE = RunOptions(executor="inline", quiet=True)
NAMES = ("relevance_min", "task", "meta.lang", "source", "mixed", "half", "is_correct", "typo")


def record(number: int) -> dict:
    """Record ``number``; every fourth has no meta."""
    more = {} if number % 4 == 0 else {"meta": {"lang": "en" if number % 3 else "de", "w": 3}}
    return more | {
        "id": f"r{number}",
        "messages": [
            {"role": "user", "content": f"Q {number}"},
            {"role": "assistant", "content": "A " * (1 + number % 17)},
        ],
        "relevance_min": number % 6,
        "task": ("vqa", "caption")[number % 2],
        "source": "ocr.json" if number % 5 == 0 else "coco.json",
        "mixed": (number, f"t{number}", True, 2.5)[number % 4],
        "half": number if number % 2 else number / 4,
        "is_correct": number % 10 != 0,
        "bbox": [1, 2, 3, 4],
    }


class Corpus:
    def __init__(self, folder) -> None:
        self.folder, self.tokenizer = folder, str(folder / "tok")
        write_tokenizer(folder / "tok")

    def build(self, name: str, records: list[dict], **settings) -> Dataset:
        (self.folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
        settings = {"samples_per_shard": 16} | settings
        source = (str(self.folder / f"{name}.jsonl"),)
        build(BuildSettings(source, tokenizer=self.tokenizer, **settings), str(self.folder / name), INLINE)
        return Dataset(self.folder / name)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus(tmp_path_factory.mktemp("columns"))


@pytest.fixture(scope="module")
def kept(corpus):
    return corpus.build("kept", [record(i) for i in range(60)], keep_column=NAMES)


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kept_as"),
    [
        (3, 3),
        (True, True),
        (0.5, 0.5),
        ("", ""),
        ("x" * 256, "x" * 256),
        ("x" * 257, None),
        (None, None),
        ([1], None),
        ({}, None),
        (b"a", None),
        (float("nan"), None),
        (float("inf"), None),
        (1 << 63, str(1 << 63)),  # beyond a column's range: its digits
        (-(1 << 63), -(1 << 63)),
        (decimal.Decimal("1.5"), 1.5),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        ("\ud800", None),
    ],
)
def test_what_a_column_holds(value, kept_as):
    assert column_value(value) == kept_as and type(column_value(value)) is type(kept_as)


def converse(*names: str, **payload):
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    return to_conversation(
        Record("x", "item 0", "7", {"messages": messages} | payload), Reading(keep_column=names)
    )


def test_a_key_that_is_kept_is_a_value_and_no_verdict_or_picture():
    with pytest.raises(RejectError, match="--keep-column is_correct"):
        converse("all", is_correct=False)
    assert converse("is_correct", is_correct=False).columns == {"is_correct": False}
    assert converse("image_path", image_path="a/7.jpg").columns == {"image_path": "a/7.jpg"}
    with pytest.raises(RejectError):  # a value that no column holds is looked at as ever
        converse("image_paths", image_paths=["7.jpg"])


def test_all_takes_what_nothing_else_reads():
    talk = converse(
        "all", "meta.lang", task="vqa", source="s", bbox=[1], long="x" * 999, meta={"lang": "en", "w": 1}
    )
    assert talk.columns == {"meta.lang": "en", "task": "vqa", "record.source": "s"}
    assert sorted(talk.unread_keys) == ["bbox", "long", "meta"]
    assert converse("meta.lang", meta={"lang": "en"}).unread_keys == ()
    assert converse().columns is None


def test_names_that_cannot_be_columns_are_refused():
    for names in (("",), ("a\nb",), ("source", "record.source")):
        with pytest.raises(UserError, match="--keep-column"):
            BuildSettings(("x",), tokenizer="t", keep_column=names)


# --- the index --------------------------------------------------------------------------------------------


def test_every_row_has_its_record_s_values_in_typed_columns(kept):
    types = {name: str(kept.index.schema.field(name).type) for name in kept.kept_columns}
    assert types == {
        "half": "double",
        "is_correct": "bool",
        "meta.lang": "string",
        "mixed": "string",
        "record.source": "string",
        "relevance_min": "int64",
        "task": "string",
        "typo": "string",
    }
    for row in kept.table.to_pylist():
        want = record(int(row["id"][1:]))
        assert row["relevance_min"] == want["relevance_min"] and row["task"] == want["task"]
        assert row["meta.lang"] == want.get("meta", {}).get("lang") and row["typo"] is None
        assert row["record.source"] == want["source"] and row["source"].endswith("kept.jsonl")
        assert row["half"] == want["half"] and row["is_correct"] is want["is_correct"]
        assert row["mixed"] == (
            want["mixed"] if isinstance(want["mixed"], str) else json.dumps(want["mixed"])
        )


def test_the_report_names_what_is_not_kept_and_a_key_that_no_record_has(kept):
    assert kept.manifest.unread_keys == {"bbox": 60, "meta": 45}
    assert kept.manifest.notes == {"have the key of the column 'typo' (--keep-column)": 0}
    assert "| `relevance_min` | int64 |" in Path(kept.path, "README.md").read_text()


def test_a_build_without_columns_is_what_it_was(corpus):
    plain = corpus.build("plain", [record(i) for i in range(60) if i % 10])
    assert "keep_column" not in plain.manifest.settings and plain.kept_columns == []


def test_a_shard_that_loses_its_repeats_keeps_its_columns(corpus):
    rows = [record(i) for i in range(20)]
    twice = corpus.build("twice", rows + rows, keep_column=("relevance_min", "is_correct"), dedup="exact")
    assert twice.index["relevance_min"].to_pylist() == [i % 6 for i in range(20)]


def test_all_is_limited_to_the_most_common(corpus, monkeypatch):
    monkeypatch.setattr("omnidata.builder.columns.MAX_COLUMNS", 2)
    rows = [record(i) | {"b": 1, "a": 2} | ({"c": 3} if i else {}) for i in range(1, 4)]
    for row in rows:
        for key in ("relevance_min", "task", "source", "mixed", "half", "is_correct"):
            del row[key]
    rows[0].pop("b")
    built = corpus.build("many", rows, keep_column=("all",))
    assert built.kept_columns == ["a", "c"]
    assert list(built.manifest.notes.values()) == [2] and "'b'" in next(iter(built.manifest.notes))


def test_verify_and_repair_know_the_columns(corpus, capsys):
    built = corpus.build("repaired", [record(i) for i in range(1, 10)], keep_column=("relevance_min",))
    before = built.index
    path = corpus.folder / "repaired"
    (path / "shards" / "train-00000.tar.idx").unlink()
    (path / "README.md").unlink()
    assert cli.run(["verify", str(path), "--repair", "--quiet"]) == 0
    assert Dataset(path).index.equals(before) and "relevance_min" in (path / "README.md").read_text()
    (path / INDEX).unlink()
    assert cli.run(["verify", str(path), "--repair", "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "lost: the columns of --keep-column relevance_min" in out
    assert "lacks the column 'relevance_min', which the build kept" in out


# --- choosing by them -------------------------------------------------------------------------------------

CONDITION = 'relevance_min >= 4 and n_images <= 8 and record.source != "ocr.json"'


def test_a_condition_equals_a_rebuild_of_the_filtered_corpus(corpus, kept):
    rows = [record(i) for i in range(60)]
    chosen = [row for row in rows if row["relevance_min"] >= 4 and row["source"] != "ocr.json"]
    rebuilt = corpus.build("rebuilt", chosen, keep_column=NAMES)
    part = Dataset(kept.path, where=CONDITION)
    same = ["id", "content_hash", "n_tokens", "n_supervised", *kept.kept_columns]
    assert part.index.select(same).to_pylist() == rebuilt.index.select(same).to_pylist()
    plans = [
        EpochPlan(data, max_tokens=10_000) for data in ({"path": kept.path, "where": CONDITION}, rebuilt.path)
    ]
    assert plans[0].totals == plans[1].totals
    ids = [Dataset(data, "train").index["id"].to_pylist() for data in (kept.path, rebuilt.path)]
    packs = [
        [sorted(names[row] for row in pack.lengths.rows.tolist()) for pack in plan]
        for plan, names in zip(plans, ids, strict=True)
    ]
    assert packs[0] == packs[1]  # one pack holds them all: equal batches, whatever the order inside


# --- inspect ----------------------------------------------------------------------------------------------


def test_inspect_has_a_histogram_or_a_table_of_each(kept, capsys):
    columns = {column.name: column for column in summarize(kept).columns}
    assert sorted(columns) == kept.kept_columns
    relevance = columns["relevance_min"].distribution
    assert [(bar.first, bar.last, bar.count) for bar in relevance.histogram] == [(i, i, 10) for i in range(6)]
    assert [(item.value, item.count) for item in columns["is_correct"].values] == [("true", 54), ("false", 6)]
    assert columns["meta.lang"].num_missing == 15 and columns["typo"].num_missing == 60
    assert cli.run(["inspect", kept.path, "--sample", "3"]) == 0
    assert "relevance_min 3, task caption" in " ".join(capsys.readouterr().out.split())
    assert cli.run(["inspect", kept.path, "--where", "n_tokens < 0", "--json"]) == 0  # no value at all
    assert cli.run(["inspect", kept.path]) == 0
    assert "coco.json 48, ocr.json 12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "low", "median", "high", "num_bins"),
    [
        (np.array([0.5, 1.5, 1.0]), 0.5, 1.0, 1.5, 16),
        (np.array([-5, 7, 7]), -5, 7, 7, 13),
        (np.array([1_700_000_000, 5, 9]), 5, 9, 1_700_000_000, 16),  # no million bins
        (np.array([2.0]), 2, 2, 2, 1),
        (np.zeros(0), 0, 0, 0, 0),
    ],
)
def test_distributions_of_any_numbers(values, low, median, high, num_bins):
    found = number_distribution(values)
    assert (found.min, found.median, found.max, len(found.histogram)) == (low, median, high, num_bins)
    assert sum(bar.count for bar in found.histogram) == len(values)
