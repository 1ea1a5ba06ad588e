"""Benchmarks run: a figure of the README has a command that prints it."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]


def run_benchmark(name, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_reports():
    report = json.loads(run_benchmark("reports.py", "--samples", "1500", "--repeats", "1", "--json"))
    assert report["samples"] == 1500 and len([name for name in report if name.endswith("(s)")]) == 5


def test_plan():
    report = json.loads(run_benchmark("plan.py", "--samples", "20000", "--json"))
    assert report["samples"] == 20000


def test_start():
    report = json.loads(run_benchmark("start.py", "--repeats", "1", "--vocabularies", "--json"))
    assert set(report) >= {"--help", "build-shards, 8 records", "inspect", "plan", "verify"}


@pytest.mark.slow
def test_scale():
    arguments = ("--samples", "64", "--files", "100", "--loaders", "2", "--json")
    report = json.loads(run_benchmark("scale.py", *arguments))
    assert set(report) == {"build, shrink", "build, keep", "files", "load, 2 workers"}
    assert report["load, 2 workers"]["pictures a microbatch"] > 0


def test_bench_writes_a_table_and_a_figure(tmp_path):
    run_benchmark("bench.py", "--toy", "--only", "plan", "--out", str(tmp_path))
    [table], [figure] = tmp_path.glob("*.md"), tmp_path.glob("*-plan.svg")
    text = table.read_text()
    assert "Toy sizes" in text and "| padding, packs of the plan |" in text and figure.name in text
    bars = ElementTree.fromstring(figure.read_text()).findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 5  # the ground and four ways to pack


@pytest.mark.slow
def test_render():
    report = json.loads(run_benchmark("render.py", "--records", "64", "--json"))
    assert all(figures["render_batch, us"] > 0 for figures in report.values()) and len(report) == 2


@pytest.mark.slow
def test_train():
    """Every contender trains on the same samples: the loss curves agree."""
    report = json.loads(run_benchmark("train.py", "--records", "60", "--steps", "5", "--json"))
    assert set(report) == {"ours, packed", "HF Trainer", "ours, unpacked"}
    assert all(contender["max_loss_difference"] < 1e-3 for contender in report.values())


@pytest.mark.slow
def test_classes():
    arguments = ("--families", "internvl", "gemma3", "--records", "60", "--steps", "4", "--json")
    rows = json.loads(run_benchmark("classes.py", *arguments))
    assert [row["family"] for row in rows] == ["internvl", "gemma3"]
    assert all(row["packed"] <= 1e-6 and row["last_loss"] < row["first_loss"] for row in rows)
    assert all(row["gradients"] <= 1e-4 for row in rows)


@pytest.mark.slow
def test_waits():
    rows = json.loads(run_benchmark("waits.py", "--families", "qwen3_vl", "smolvlm", "--json"))
    assert [(row["plain"] > 0, row["known"] > 0) for row in rows] == [(True, False), (True, True)]


@pytest.mark.slow
def test_qwen_gpu():
    report = json.loads(run_benchmark("qwen_gpu.py", "--toy", "--variants", "frozen_tower", "--json"))
    first, last = report["frozen_tower"]["first_and_last_loss"]
    assert last < first


@pytest.mark.slow
def test_train_processor():
    report = json.loads(
        run_benchmark(
            *("train_processor.py", "--records", "200", "--steps", "8", "--warmup", "2", "--json")
        ).splitlines()[-1]
    )
    losses = report["loss_of_eight_samples"]
    assert abs(losses["padded"] - losses["packed"]) < 1e-4 and report["ratio"] > 0


@pytest.mark.slow
def test_families():
    arguments = ("--records", "120", "--families", "qwen3_vl", "--repeat", "1", "--json")
    [row] = json.loads(run_benchmark("families.py", *arguments))
    assert set(row["build_records_per_second"]) == {"ours, shrink", "ours, keep", "datasets.map + processor"}
    assert set(row["load_pictures_per_second"]) == {"ours", "ours, normalised", "DataLoader + processor"}


@pytest.mark.slow
def test_trl_learns_the_same_from_our_packs():
    report = json.loads(run_benchmark("trl_sft.py", "--records", "24", "--json").splitlines()[-1])
    packs, alone = report["TRL on our packs"], report["TRL alone"]
    assert packs["supervised_tokens"] == alone["supervised_tokens"] > 1000
    assert abs(packs["loss"] - alone["loss"]) < 1e-5
