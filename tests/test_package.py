"""The package as users get it: a wheel in an environment of its own, and what `make clean` leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"omnidata", "omnimodel", "pipelines"}
INSTALLED = {"omnidata", "omnimodel", "omnipipelines"}


def run(*words, **settings):
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, **settings
    )
    assert done.returncode == 0, f"{words}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def test_clean_keeps_data_and_runs(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("data", "runs", "build", ".ruff_cache", "x.egg-info"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    run("make", "clean", cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"Makefile", "data", "runs"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the checkout stays as it is."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in OURS:
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, source)
    [file] = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The commands' folder of an environment with the wheel, and this one's packages behind it."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # a folder on the path, whose own .pth files are not read: an editable install here is not seen there
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    return folder / "bin"


@pytest.mark.slow
def test_the_wheel_holds_our_packages_and_their_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == INSTALLED
    assert {"omnidata/inspect/report/page.html", "omnipipelines/recipes/tiny_cpu.yaml"} <= set(names)
    assert "omnipipelines/cluster/train.slurm.sh" in names


@pytest.mark.slow
def test_the_main_job_outside_of_the_repository(environment, ten_records, tmp_path):
    """Tokenizer, shards, inspect, verify, plan, load, train and ask, with nothing of the checkout."""
    from throwaway import mistral_model

    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def type_in(*words):
        return run(environment / words[0], *words[1:], cwd=tmp_path, env=variables)

    where = type_in(
        "python", "-c", "import omnidata, omnimodel; print(omnidata.__file__, omnimodel.__file__)"
    )
    assert all(path.startswith(str(environment.parent)) for path in where.split())
    type_in(
        "omnidata", "prepare-tokenizer", mistral_model(), "--out", "tokenizer", "--chat-template", "zephyr"
    )
    options = ("--tokenizer", "tokenizer", "--num-query", "16", "--image-size", "64", "--split", "val=0.2")
    corpus = ("build-shards", ten_records / "a.jsonl", "--image-root", ten_records)
    type_in("omnidata", *corpus, *options, "--out", "data", "--quiet")
    type_in("omnidata", "inspect", "data", "--html", "report.html")
    type_in("omnidata", "verify", "data", "--deep", "--quiet")
    assert json.loads(type_in("omnidata", "plan", "data", "--json"))
    loaded = (
        "from omnidata import PackLoader; print(len(next(iter(PackLoader('data', global_batch=1))).keys))"
    )
    assert int(type_in("python", "-c", loaded)) > 0
    code = "import omnipipelines; print(omnipipelines.__path__[0])"
    folder = Path(type_in("python", "-c", code).strip())
    recipe = folder / "recipes" / "tiny_cpu.yaml"
    changes = ("run.dir=run", "optim.steps=2", "eval.num_questions=0", "optim.warmup_steps=0")
    data = ("data.train=[{path: data}]", "data.val=[{path: data, split: val}]")
    type_in("python", "-m", "omnipipelines.train", recipe, *changes, *data)
    asked = ("--model", "run/final", "--question", "Who?", "--greedy", "--max-new-tokens", "2")
    assert "answer" in type_in("python", "-m", "omnipipelines.generate", *asked)
    assert "answer" in type_in("python", folder / "generate.py", *asked)  # as a file, too
