"""The command line: instant help, one clear line for a mistake, exit codes, --config, --dry-run, --json."""

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_corpus import digests, write_corpus

import omnidata
from omnidata import cli
from omnidata.builder.settings import (
    BuildSettings,
    RunOptions,
    parse_limit,
    parse_size,
    parse_split,
    parse_task,
    read_config,
)
from omnidata.dataset import Dataset


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("cli") / "c")


def flags(corpus, out):
    settings = corpus.settings
    return [
        *("build-shards", *settings.source, "--out", str(out), "--tokenizer", settings.tokenizer),
        *("--image-root", settings.image_root, "--num-query", "4", "--image-size", "32"),
        *("--samples-per-shard", "15", "--split", "val=0.1", "--workers", "1"),
    ]


# --- help -------------------------------------------------------------------------------------------------


def test_a_checkout_works_without_being_installed(corpus, tmp_path, monkeypatch, capsys):
    """No command asks for the metadata that only an installation has."""

    def installed_version(name):
        if name == "omnilmm-toolkit":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    found = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", installed_version)
    monkeypatch.setattr("omnidata.builder.identity.version", installed_version)
    out = str(tmp_path / "d")
    assert cli.run([*flags(corpus, out), "--quiet"]) == 0
    commands = (["--version"], ["inspect", out], ["verify", out, "--quiet"], ["plan", out])
    assert [cli.run(command) for command in commands] == [0] * 4
    assert f"version {omnidata.__version__}" in capsys.readouterr().out
    help_text = subprocess.run([sys.executable, "-m", "omnidata", "--help"], capture_output=True, text=True)
    assert "build-shards" in help_text.stdout


def test_version_is_the_package_version(capsys):
    from importlib.metadata import version

    assert cli.run(["--version"]) == 0
    assert version("omnilmm-toolkit") in capsys.readouterr().out


# --- exit codes -------------------------------------------------------------------------------------------


def test_a_build_prints_what_it_came_to(corpus, tmp_path, capsys):
    assert cli.run(flags(corpus, tmp_path / "data")) == 0
    out, errors = capsys.readouterr()
    assert "94 samples (train " in out and "6 of 100 records refused" in out
    assert "no_assistant" in out and "llava.json, item 7: " in out
    assert "Traceback" not in errors
    assert cli.run(flags(corpus, tmp_path / "data")) == 1
    out, errors = capsys.readouterr()
    assert errors.startswith("Error: ") and errors.count("\n") == 1 and "complete dataset" in errors


def test_json_is_for_scripts(corpus, tmp_path, capsys):
    assert cli.run([*flags(corpus, tmp_path / "data"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_samples"] == 94 and report["num_rejects"] == 6 == sum(report["rejects"].values())
    assert report["complete"] is True and report["splits"].keys() == {"train", "val"}


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--source", "x"], 2, "No such option"),
        (["--image-policy", "stretch"], 2, "stretch"),
        (["--workers", "0"], 2, "--workers"),
        (["--samples-per-shard", "many"], 2, "--samples-per-shard"),
        (["--tokenizer", "no/such/tokenizer"], 1, "no/such/tokenizer"),
        (["--image-root", "no/such/folder"], 1, "no/such/folder"),
        (["--shard-bytes", "1MB"], 1, "exclude each other"),
        (["--split", "val=2"], 1, "val=0.01"),
        (["--split", "val=0.1"], 1, "given twice"),
        (["--max-rejects", "few"], 1, "5%"),
        (["--task", "9/8"], 1, "I/N"),
        (["--config", "no.yaml"], 1, "no.yaml"),
        (["no/such/corpus.json"], 1, "no/such/corpus.json"),
    ],
)
def test_mistakes(corpus, tmp_path, capsys, change, code, message):
    assert cli.run([*flags(corpus, tmp_path / "data"), *change]) == code
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors
    assert not (tmp_path / "data").exists()


def test_what_is_missing_is_named(capsys):
    assert cli.run(["build-shards", "x.json"]) == 2
    assert "--model or --tokenizer, --out" in capsys.readouterr().err
    assert cli.run(["build-shards", "--out", "x", "--tokenizer", "y"]) == 2
    assert "source" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error(corpus, tmp_path):
    command = [sys.executable, "-m", "omnidata.cli", "build-shards", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait()


# --- --config ---------------------------------------------------------------------------------------------


def test_a_config_file_says_the_same_as_flags(corpus, tmp_path, capsys):
    settings = corpus.settings
    config = {
        "source": list(settings.source),
        "tokenizer": settings.tokenizer,
        "image-root": settings.image_root,
        "num-query": 4,
        "image_size": 32,
        "samples-per-shard": 15,
        "split": {"val": 0.1},
        "workers": 1,
    }
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(config))
    options = ["build-shards", "--config", str(tmp_path / "build.yaml"), "--quiet"]
    assert cli.run([*options, "--out", str(tmp_path / "a")]) == 0
    corpus.build(tmp_path / "b", options=RunOptions(executor="inline", quiet=True))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert cli.run([*options, "--out", str(tmp_path / "c"), "--samples-per-shard", "50"]) == 0
    assert Dataset(tmp_path / "c").manifest.settings["samples_per_shard"] == 50, "a flag wins"
    capsys.readouterr()
    (tmp_path / "build.yaml").write_text("sauce: x\n")
    assert cli.run(options) == 1
    assert "no flag is named sauce" in capsys.readouterr().err


def test_read_config_takes_scalars_lists_and_maps(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("source: a.json\nsplit: [val=0.1, test=0.2]\n")
    assert read_config(str(file), names={"source", "split"}) == {
        "source": ["a.json"],
        "split": ["val=0.1", "test=0.2"],
    }


# --- --dry-run --------------------------------------------------------------------------------------------


def test_a_dry_run_shows_what_would_come_and_writes_nothing(corpus, tmp_path, capsys):
    assert cli.run([*flags(corpus, tmp_path / "data"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "100 records (train " in out and "llava " in out and "messages " in out
    assert "about 8 shards" in out and "6 refused" in out and "item 7" in out
    assert "«No. " in out, "supervised text is marked"
    assert not (tmp_path / "data").exists()
    assert cli.run([*flags(corpus, tmp_path / "data"), "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_records"] == 100 and len(report["samples"]) == 10
    corpus.build(tmp_path / "real", options=RunOptions(executor="inline", quiet=True))
    real = sum(shard.num_bytes for shard in Dataset(tmp_path / "real").manifest.shards)
    assert 0.5 * real < report["estimated_bytes"] < 2 * real


# --- paths that cannot be ----------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nope", "x" * 300])
def test_an_out_that_cannot_be_written_is_one_line(corpus, tmp_path, capsys, out):
    (tmp_path / "file").write_text("")
    assert cli.run(flags(corpus, str(tmp_path / out))) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and error.count("\n") == 1 and "Traceback" not in error


# --- notations --------------------------------------------------------------------------------------------


def test_notations():
    sizes = {"512MB": 512_000_000, "1GiB": 2**30, "4096": 4096, "1.5 kb": 1500, "2T": 2 * 10**12}
    assert {text: parse_size(text) for text in sizes} == sizes
    assert parse_split("val=0.01") == parse_split("val=1%") == ("val", 0.01)
    assert parse_limit("5%") == 0.05 and parse_limit("200") == 200
    assert parse_limit("0") == parse_limit("0%") == 0 and parse_limit("100%") == math.inf
    assert parse_task("0/8") == parse_task("8/8") == (0, 8) and parse_task("3/8") == (3, 8)
    assert BuildSettings(("a",), "t", split={"val": 0.1}).splits == ("train", "val")


# --- cluster files ----------------------------------------------------------------------------------------

CLUSTER = Path(__file__).parents[1] / "pipelines" / "cluster"


def test_the_cluster_files_build_a_dataset(corpus, tmp_path):
    """The commands of the Slurm array and the Kubernetes job, each task as its scheduler would start it."""
    config = {
        "source": list(corpus.settings.source),
        "tokenizer": corpus.settings.tokenizer,
        "image-root": corpus.settings.image_root,
        "num-query": 4,
        "image-size": 32,
        "samples-per-shard": 50,
        "split": "val=0.1",
        "out": str(tmp_path / "data"),
    }
    file = tmp_path / "build.yaml"
    file.write_text(yaml.safe_dump(config))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "1"}
    script = ["bash", str(CLUSTER / "build-shards.slurm.sh"), str(file)]
    subprocess.run(script, env=os.environ | {"PATH": path} | slurm, check=True, capture_output=True)
    assert not (tmp_path / "data" / "manifest.json").exists()

    job = yaml.safe_load((CLUSTER / "build-shards.kubernetes.yaml").read_text())["spec"]
    pod = job["template"]["spec"]["containers"][0]
    assert {entry["name"]: entry["value"] for entry in pod["env"]} == {"TASKS": str(job["completions"])}
    command = [*pod["command"], pod["args"][0].replace("/config/build.yaml", str(file))]
    kubernetes = {"JOB_COMPLETION_INDEX": "1", "TASKS": "2"}
    subprocess.run(command, env=os.environ | {"PATH": path} | kubernetes, check=True, capture_output=True)
    assert len(Dataset(tmp_path / "data")) == 94
