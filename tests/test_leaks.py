"""Decontamination: planted texts and pictures of benchmarks are found, and nothing else."""

from __future__ import annotations

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_near import WORDS, encode, photos
from tiny_dataset import write_tokenizer

from omnidata import Dataset, cli
from omnidata.builder.build import build
from omnidata.builder.settings import BuildSettings, RunOptions
from omnidata.leaks.benchmark import Entry, make_table
from omnidata.leaks.ngrams import ngrams, word_hashes
from omnidata.leaks.search import Searcher
from omnidata.plan import EpochPlan

PROMPT = "Answer with the option's letter from the given choices directly and give nothing else please."


class Corpus:
    """Samples and a benchmark; ``leaks``: sample -> what of the benchmark it holds."""

    def __init__(self, folder) -> None:
        self.folder, self.rng = folder, random.Random(2)
        self.records, self.entries, self.leaks = [], [], {}
        pictures = photos()[:24]
        texts = [self.text(self.rng.randint(20, 40)) for _ in range(20)]
        for number, picture in enumerate(pictures[:12]):
            (folder / f"b{number}.png").write_bytes(encode(picture))
            self.entries.append(
                {"id": f"p{number}", "image": f"b{number}.png", "question": f"What? {PROMPT}"}
            )
        self.entries += [{"id": f"t{number}", "q": [{"text": text}]} for number, text in enumerate(texts)]
        self.entries.append({"id": "short", "q": self.text(9)})
        for number, picture in enumerate(pictures[:12]):
            self.add(f"{PROMPT}", picture.resize((150, 120)), holds=f"p{number}")
        for number, text in enumerate(texts):
            self.add(f"Well, {text.upper()}!", holds=f"t{number}")
            self.add(" ".join(text.split()[:14]) + " " + self.text(20))  # a run, but not half of them
        self.add(f"So {self.entries[-1]['q']}?", holds="short")
        for picture in pictures[12:]:
            self.add(f"{self.text(20)} {PROMPT}", picture)
        write_tokenizer(folder / "tok")
        (folder / "c.json").write_text(json.dumps(self.records))

    def text(self, count: int) -> str:
        return " ".join(self.rng.choices(WORDS, k=count))

    def add(self, question, picture=None, *, holds=None) -> None:
        record = {"id": f"r{len(self.records)}"}
        if picture is not None:
            record["image"] = f"{record['id']}.jpg"
            (self.folder / record["image"]).write_bytes(encode(picture, 60))
            question = f"<image>\n{question}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": self.text(8)}]
        self.records.append(record | {"conversations": turns})
        if holds:
            self.leaks[record["id"]] = holds

    def build(self, name: str, **settings) -> Dataset:
        chosen = BuildSettings(
            (str(self.folder / "c.json"),), tokenizer=str(self.folder / "tok"), image_size=64, **settings
        )
        build(chosen, str(self.folder / name), RunOptions(executor="inline", quiet=True))
        return Dataset(self.folder / name)

    def search(self, *arguments, name: str = "data") -> dict[str, list[str]]:
        out = self.folder / "leaks"
        command = ["decontaminate", str(self.folder / name), *arguments, "--out", str(out), "--workers", "1"]
        assert cli.run(command) == 0
        found: dict[str, list[str]] = {}
        for row in pq.read_table(out / "leaks.parquet").to_pylist():
            found.setdefault(row["id"], []).append(row["of_id"])
        return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    corpus = Corpus(tmp_path_factory.mktemp("leaks"))
    corpus.build("data")
    return corpus


def test_planted_leaks_are_found_in_json_and_parquet_and_nothing_else(corpus, capsys):
    (corpus.folder / "b.jsonl").write_text("\n".join(map(json.dumps, corpus.entries[:20])))
    rows = [
        {"id": entry["id"], "q": json.dumps(entry.get("q")), "image": {"bytes": None, "path": None}}
        for entry in corpus.entries[20:]
    ]
    pq.write_table(pa.Table.from_pylist(rows), corpus.folder / "b.parquet")
    found = corpus.search("--against", str(corpus.folder / "b.jsonl"), str(corpus.folder / "b.parquet"))
    assert {sample: sorted(entries) for sample, entries in found.items()} == {
        sample: [entry] for sample, entry in corpus.leaks.items()
    }
    assert f"{len(corpus.leaks)} of {len(corpus.records)} samples hold" in capsys.readouterr().out


def test_the_exclusions_leave_them_out_of_a_plan(corpus):
    (corpus.folder / "b.json").write_text(json.dumps(corpus.entries))
    corpus.search("--against", str(corpus.folder / "b.json"))
    entry = {"path": str(corpus.folder / "data"), "exclude": str(corpus.folder / "leaks" / "exclude.txt")}
    ids = Dataset(corpus.folder / "data", "train").index["id"].to_pylist()
    planned = {ids[row] for pack in EpochPlan(entry) for row in pack.lengths.rows.tolist()}
    assert planned == set(ids) - corpus.leaks.keys()


def test_another_dataset_is_a_benchmark_and_kept_hashes_are_used(corpus, monkeypatch):
    corpus.build("hashed", dedup="near")
    monkeypatch.setattr("omnidata.leaks.search.image_hash", None)  # of the samples: the index has them
    found = corpus.search("--against", str(corpus.folder / "data"), name="hashed")
    assert all(sample in entries for sample, entries in found.items())
    pictured = {record["id"] for record in corpus.records if "image" in record}
    assert pictured <= found.keys()


def test_a_benchmark_that_cannot_be_compared_is_an_error(corpus, capsys):
    for entry, message in (
        ({"image": "gone.png", "question": "What is it?"}, "line 1: "),
        ({"question": "What is it?"}, "no picture and no text of 8 words"),
    ):
        (corpus.folder / "bad.jsonl").write_text(json.dumps(entry))
        command = [
            "decontaminate",
            str(corpus.folder / "data"),
            "--against",
            str(corpus.folder / "bad.jsonl"),
        ]
        assert cli.run([*command, "--out", str(corpus.folder / "none")]) == 1
        assert message in capsys.readouterr().err
    assert not (corpus.folder / "none").exists()


def test_many_runs_of_a_long_text_are_enough():
    rng = random.Random(5)
    words = [f"{rng.choice(WORDS)}{number}" for number in range(300)]
    table = make_table([Entry("b", "0", "1", (" ".join(words),), ())])
    for count, is_found in ((61, False), (62, True)):  # 49 and 50 of 288 runs
        found = list(Searcher("", table)._texts(" ".join(words[:count])))
        assert bool(found) == is_found


def test_entries_that_cannot_be_found_are_counted(corpus, capsys):
    entries = [*corpus.entries, {"id": "bare", "question": "What is it?", "answer": "A cat."}]
    (corpus.folder / "b2.json").write_text(json.dumps(entries))
    corpus.search("--against", str(corpus.folder / "b2.json"))
    assert "1 entries were not looked for" in capsys.readouterr().out
    (corpus.folder / "b2.json").write_text(json.dumps(corpus.entries))
    corpus.search("--against", str(corpus.folder / "b2.json"))
    assert "not looked for" not in capsys.readouterr().out


def test_runs_of_words():
    assert len(ngrams(word_hashes("One, two THREE four"), 3)) == 2
    assert ngrams(word_hashes("one two three"), 3)[0] == ngrams(word_hashes("zero One-two: three"), 3)[1]
    assert len(word_hashes("abc漢字かな 12")) == 6  # a character is a word there
    assert len(ngrams(word_hashes("one"), 2)) == 0


def test_runs_that_many_entries_share_do_not_count():
    texts = [
        f"Is the object number {number} of the list larger than a chair? {PROMPT}" for number in range(12)
    ]
    table = make_table([Entry("b", str(number), "", (text,), ()) for number, text in enumerate(texts)])
    shared = len(ngrams(word_hashes(PROMPT), 13))
    assert table.num_common >= shared > 0 and all(size < 20 for size in table.text_sizes.tolist())
