"""Sources of very many small files: opened, cut and weighed by runs, with the same result as one by one."""

import json
from collections import Counter

import pytest
import tiny_corpus

from omnidata import Dataset
from omnidata.builder import survey
from omnidata.builder.layout import Stretch
from omnidata.builder.settings import RunOptions
from omnidata.corpus import Unit
from omnidata.schema import UserError

NUM_FILES = 100  # more than the command opens by itself


@pytest.fixture
def corpus(tmp_path):
    """One record a file."""
    corpus = tiny_corpus.write_corpus(tmp_path / "few", num_llava=3, num_chat=1, bad=False)
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(NUM_FILES):
        said = [
            {"from": "human", "value": f"{number}?"},
            {"from": "gpt", "value": "Yes. " * (1 + number % 9)},
        ]
        (folder / f"{number:03d}.json").write_text(json.dumps([{"id": f"r{number}", "conversations": said}]))
    return folder, corpus


def test_many_files_are_built_in_order(corpus, tmp_path, monkeypatch):
    folder, of = corpus
    source = (str(folder / "*.json"),)
    monkeypatch.setattr(survey, "TASKS", 7)  # several files per task
    in_runs = of.build(tmp_path / "runs", source=source, options=RunOptions(workers=2, quiet=True))
    monkeypatch.setattr(survey, "TASKS", 1000)
    one_by_one = of.build(tmp_path / "one", source=source, options=RunOptions(executor="inline", quiet=True))
    assert in_runs.num_samples == one_by_one.num_samples == NUM_FILES
    rows = Dataset(tmp_path / "runs").index.select(["key", "id"]).sort_by("key").to_pylist()
    assert [(int(row["key"]), row["id"]) for row in rows] == [(at, f"r{at}") for at in range(NUM_FILES)]
    for file in ("manifest.json", "index.parquet", "shards/train-00000.tar"):
        assert (tmp_path / "runs" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    inputs = Dataset(tmp_path / "runs").manifest.inputs
    assert [entry["num_records"] for entry in inputs] == [1] * NUM_FILES


def test_the_first_file_that_is_none_is_named(corpus, tmp_path):
    folder, of = corpus
    for name in ("040.json", "070.json"):
        (folder / name).write_text("no JSON")
    with pytest.raises(UserError, match=r"040\.json"):
        of.build(tmp_path / "out", source=(str(folder / "*.json"),))


def test_small_units_are_weighed_together(monkeypatch):
    """As many records of a run of small units as of one large one; few units are weighed one by one."""
    sizes = [1000, *[1] * 2500, 600, 600]
    units = [Stretch(at, Unit(0, 1, 0, size), 0, size, (size,), 1) for at, size in enumerate(sizes)]
    runs = list(survey.weighed_together(units))
    assert [unit for run in runs for unit in run] == units
    assert [sum(unit.num_records for unit in run) for run in runs] == [1000, 1000, 1000, 500, 600, 600]
    assert [len(run) for run in survey.weighed_together(units[:900])] == [1] * 900
    for run, expected in ((runs[0], {0: 4}), (runs[1], {0: 1, 250: 1, 500: 1, 750: 1})):
        task = survey.SurveyTask(0, run, tuple(range(len(run))), read_ids=False, num_probes=4)
        assert Counter({file: count for file, _, count in survey.probes(task)}) == expected
