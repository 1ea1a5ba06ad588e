"""Benchmarks run, with every option: a figure of the README has a command that prints it.

Toy sizes: the figures mean nothing, so what is asserted is what must hold at any size.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
# Run by others of them, and not by themselves: they are named there.
PARTS = {
    "corpus.py": "build.py",
    "gpu_day.py": "gpu_day.sh",
    "gpu_day_needs.py": "gpu_day.sh",
    "load_exact.py": "load.py",
    "load_formats.py": "load.py",
    "load_peers.py": "load.py",
    "peers.py": "build.py",
    "train_peers.py": "train.py",
    "train_setup.py": "train.py",
    "vocabularies.py": "render.py",
}
ELSEWHERE = {  # options that this machine cannot take
    ("bench.py", "--peers-python"): "an environment of its own (benchmarks/peers-requirements.txt)",
    ("load.py", "--peers-python"): "an environment of its own (benchmarks/peers-requirements.txt)",
    ("qwen_gpu.py", "--layers"): "the toy has two, the whole model as many as the device holds",
    ("train.py", "--run"): "from itself to itself",
    ("train_gpu.py", "--compile"): "a compiler for the device",
}


def run_benchmark(name, *arguments):
    """What a benchmark prints; a list of words if it is JSON lines."""
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def report_of(name, *arguments):
    """Its ``--json``: the last line where progress stands before it."""
    printed = run_benchmark(name, *arguments, "--json")
    try:
        return json.loads(printed)
    except json.JSONDecodeError:
        return json.loads(printed.splitlines()[-1])


# --- all of them are here -----------------------------------------------------------------------------------


def strings_by_test():
    """Of each benchmark, the words that some test gives it."""
    found = {}
    for function in ast.parse(Path(__file__).read_text()).body:
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
            strings = {node.value for node in ast.walk(function) if isinstance(node, ast.Constant)}
            calls = [ast.unparse(n.func) for n in ast.walk(function) if isinstance(n, ast.Call)]
            extra = {"--json"} if "report_of" in calls else set()
            for name in strings & {path.name for path in BENCHMARKS.glob("*.*")}:
                found.setdefault(name, set()).update(strings | extra)
    return found


def test_every_benchmark_and_every_option_has_a_test():
    used = strings_by_test()
    for path in sorted(BENCHMARKS.glob("*.py")):
        if path.name in PARTS:
            assert path.stem in (BENCHMARKS / PARTS[path.name]).read_text(), path
            continue
        assert path.name in used, f"{path.name} has no test here"
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".add_argument"):
                option = ast.literal_eval(call.args[0]) if isinstance(call.args[0], ast.Constant) else ""
                if option.startswith("--") and (path.name, option) not in ELSEWHERE:
                    assert option in used[path.name], f"{path.name} {option} is tried by no test"


def test_the_readme_names_benchmarks_that_exist():
    text = (ROOT / "README.md").read_text() + "".join(p.read_text() for p in (ROOT / "docs").glob("*.md"))
    named = {word.strip("`(),;|") for word in text.split() if "benchmarks/" in word}
    scripts = {name for name in named if name.startswith("benchmarks/") and name.endswith((".py", ".sh"))}
    assert len(scripts) > 8 and all((ROOT / name).exists() for name in scripts), scripts


# --- those that take a moment -------------------------------------------------------------------------------


def test_reports():
    report = report_of("reports.py", "--samples", "1500", "--repeats", "1")
    assert report["samples"] == 1500 and len([name for name in report if name.endswith("(s)")]) == 5


def test_plan():
    """Even at toy sizes packs are even and steps are of like cost."""
    report = report_of("plan.py", "--samples", "40000")
    assert report["samples"] == 40000 and report["padding"]["packs of the plan"] < 0.01
    assert set(report["waiting"]) >= {"natural", "mixture", "pictures of any size"}
    for row in report["waiting"]["natural"] + report["waiting"]["mixture"]:
        assert row["slowest / mean"] < 1.05 < row["best fit"] or row["packs per rank"] == 4
        assert row["sd of steps"] < 1 and row["slowest / mean"] < row["best fit"]


@pytest.mark.slow
def test_plan_prints_tables():
    printed = run_benchmark("plan.py", "--samples", "20000")
    assert "ranks that wait: mixture" in printed and printed.count("trained") >= 16


def test_start():
    report = report_of("start.py", "--repeats", "1", "--vocabularies")
    assert set(report) >= {"--help", "build-shards, 8 records", "inspect", "plan", "verify"}


@pytest.mark.slow
def test_start_of_training():
    report = report_of("start.py", "--repeats", "1", "--vocabularies", "--training")
    assert set(report) >= {"build-shards --model", "train.py, 1 step", "generate.py, 1 word"}


# --- building and loading -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_scale():
    sizes = ("--samples", "64", "--files", "100", "--loaders", "2", "--workers", "1")
    report = report_of("scale.py", *sizes, "--vocabulary", "Mistral", "--only", "build", "files", "load")
    assert set(report) == {"build, shrink", "build, keep", "files", "load, 2 workers"}
    assert report["load, 2 workers"]["pictures per microbatch"] > 0


def test_bench_writes_a_table_and_a_figure(tmp_path):
    run_benchmark("bench.py", "--toy", "--only", "plan", "--out", str(tmp_path))
    [table], [figure] = tmp_path.glob("*.md"), tmp_path.glob("*-plan.svg")
    text = table.read_text()
    assert "Toy sizes" in text and "| padding, packs of the plan |" in text and figure.name in text
    bars = ElementTree.fromstring(figure.read_text()).findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 5  # the ground and four ways to pack


@pytest.mark.slow
def test_rehearsal():
    """Memory within 5 % of what an H200 took, seconds within 15 %."""
    rows = report_of("rehearsal.py", "--rows", "5")
    assert len(rows) == 5
    for row in rows:
        assert abs(row["memory_gb"][2] - 1) < 0.05 and abs(row["step_seconds"][2] - 1) < 0.15, row


@pytest.mark.slow
def test_render():
    report = report_of("render.py", "--records", "64")
    assert set(report) == {"Mistral", "Qwen"}
    assert all(figures["render_batch, us"] > 0 for figures in report.values())


@pytest.mark.slow
def test_build(tmp_path):
    common = ("--samples", "48", "--photos", "8", "--workers", "1", "--repeat", "1")
    report = report_of("build.py", *common, "--folder", str(tmp_path))
    assert len(report["rates"]) == 5 and report["mean |difference| to Pillow, of 255"]["worst image"] < 1
    assert all(row["records"] > 0 for row in report["rates"].values()) and not list(tmp_path.iterdir())
    report = report_of("build.py", *common, "--only", "quick", "--vocabulary", "Qwen")
    assert list(report["rates"]) == ["ours, keep, quick check"]
    report = report_of("build.py", *common, "--memory", "8", "40")
    peaks = report["largest process, MB, by records"]
    assert set(peaks) == {"8", "40"} and all(20 < peak < 4000 for peak in peaks.values())
    command = [sys.executable, str(BENCHMARKS / "build.py"), "--peers-python", sys.executable]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1 and "lacks benchmarks/peers-requirements.txt" in refused.stderr


@pytest.mark.slow
def test_load(tmp_path):
    report = report_of(
        *("load.py", "--samples", "64", "--repeat", "1", "--workers", "0", "--folder", str(tmp_path)),
        *("--names", "ours", "webdataset", "--only", "speed", "floor", "restart", "million", "memory"),
        *("--million", "640", "--memory", "640"),
    )
    assert {row["contender"] for row in report["speed"]} == {"ours", "webdataset"}
    assert not any("failed" in row for row in report["speed"]) and len(report["speed"]) == 4
    assert all(rate > 0 for rate in report["floor"].values())
    for case in ("same ranks", "other ranks"):
        ours = report["restart"]["ours"][case]
        assert ours["repeated"] == ours["lost"] == 0, (case, ours)
    assert report["million"]["samples"] >= 640 and report["million"]["steps"] > 0
    assert report["memory"]["samples"] >= 640 and len(report["memory"]["MB at each tenth"]) == 10


@pytest.mark.slow
def test_copies(mistral, tmp_path):
    """Both kinds are copied by all three ways."""
    mistral.save_pretrained(tmp_path / "tokenizer")
    arguments = ("--tokenizer", str(tmp_path / "tokenizer"), "--folder", str(tmp_path))
    printed = run_benchmark("copies.py", *arguments, "--samples", "16", "--repeats", "1")
    assert printed.count("cp") >= 2 and "photographs" in printed and "texts" in printed


@pytest.mark.slow
def test_render_again(tmp_path):
    """Every view and the build beside it."""
    report = report_of("render_again.py", "--records", "16", "--repeats", "1", "--folder", str(tmp_path))
    assert len(report) == 7 and not list(tmp_path.iterdir())
    assert {name.split(", ")[-1] for name in report} == {"base", "render", "build", "quick check"}
    assert all(row["records/s of CPU"] > 0 for row in report.values())


@pytest.mark.slow
def test_families():
    [row] = report_of("families.py", "--records", "120", "--families", "qwen3_vl", "--repeat", "1")
    assert set(row["build_records_per_second"]) == {"ours, shrink", "ours, keep", "datasets.map + processor"}
    assert set(row["load_pictures_per_second"]) == {"ours", "ours, normalised", "DataLoader + processor"}


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train():
    """Every contender trains on the same samples: the loss curves agree."""
    report = report_of(
        *("train.py", "--records", "60", "--steps", "5", "--device", "cpu", "--batch", "4"),
        *("--contenders", "ours, packed", "HF Trainer", "ours, unpacked"),
    )
    assert set(report) == {"ours, packed", "HF Trainer", "ours, unpacked"}
    assert all(contender["max_loss_difference"] < 1e-3 for contender in report.values())


@pytest.mark.slow
def test_classes():
    rows = report_of("classes.py", "--families", "internvl", "gemma3", "--records", "60", "--steps", "4")
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
    both = ("shapes", "photographs")
    report = report_of("train_processor.py", "--corpora", *both, "--records", "200", "--steps", "8")
    assert tuple(report) == both
    for corpus in report.values():
        losses = corpus.pop("loss_of_eight_samples")
        assert abs(losses["padded"] - losses["packed"]) < 1e-4
        assert all(contender["ours_is_faster"] > 0.5 for contender in corpus.values())
    assert report["photographs"]["trainer"]["ours_is_faster"] > 1.5  # padding alone is more


@pytest.mark.slow
def test_trl_learns_the_same_from_our_packs():
    report = report_of("trl_sft.py", "--records", "24", "--batch", "4")
    packs, alone = report["TRL on our packs"], report["TRL alone"]
    assert packs["supervised_tokens"] == alone["supervised_tokens"] > 1000
    assert abs(packs["loss"] - alone["loss"]) < 1e-5


@pytest.mark.slow
def test_memory():
    report = report_of("memory.py", "--steps", "2")
    assert set(report) == {"memory_gb", "seconds", "step_seconds"}
    assert 0.8 < report["memory_gb"]["ratio"] < 1.25  # the times are of toy steps


@pytest.mark.slow
def test_model():
    report = report_of("model.py", "vectors", "loss", "blocks", "compile")
    assert set(report) >= {"vectors", "loss", "blocks", "compile"}
    assert report["compile"]["loss_difference"] < 1e-3


# --- what needs a GPU, at toy sizes on the CPU --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_train_gpu(checkpointing):
    report = report_of(
        *("train_gpu.py", "--toy", "--layers", "2", "--stages", "align", "sft"),
        *("--checkpointing", checkpointing),
    )
    assert set(report) >= {"align", "sft"}


@pytest.mark.slow
def test_model_gpu():
    assert report_of("model_gpu.py", "--toy", "--layers", "1", "--blocks", "1")


@pytest.mark.slow
def test_gpu_day(tmp_path):
    """All of it, with every line that a GPU would run."""
    command = ["bash", str(BENCHMARKS / "gpu_day.sh"), "--toy"]
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    environment |= {"GPU_DAY_FOLDER": str(tmp_path / "work")}
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=ROOT)
    lines = [json.loads(line) for line in (tmp_path / "gpu_day.jsonl").read_text().splitlines()]
    parts = ["data", "resume", "memory", "shards", "trainer", "loader", "answers", "qwen"]
    assert [line["part"] for line in lines if "so_far" not in line] == parts
    assert {line["part"] for line in lines if "so_far" in line} == {"memory", "shards", "qwen"}
    assert "failed" not in json.dumps(lines), lines


def test_gpu_day_names_the_packages_to_carry():
    script = str(BENCHMARKS / "gpu_day_needs.py")
    assert subprocess.run([sys.executable, script], capture_output=True).returncode == 0
    alone = subprocess.run([sys.executable, "-IS", script], capture_output=True, text=True)  # no packages
    assert alone.returncode == 1 and "-d wheels" in alone.stderr and "transformers" in alone.stderr


@pytest.mark.parametrize("name", ["model_gpu.py", "train_gpu.py"])
@pytest.mark.slow
def test_without_a_gpu_it_says_so(name):
    command = [sys.executable, str(BENCHMARKS / name)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and "needs a CUDA device; --toy" in result.stderr
