"""Recipes are strict: every mistake is named, all in one message, and a resolved recipe round-trips."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from omnidata.schema import UserError
from pipelines.command import add_recipe, parse
from pipelines.config import load_recipe, parse_recipe, to_dict, to_yaml

MINIMAL = {
    "run": {"dir": "runs/x"},
    "data": {"train": [{"path": "data/x"}]},
    "model": {"config": {"hidden_size": 64}},
    "optim": {"steps": 10},
}


def write(tmp_path: Path, tree: dict) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_defaults_and_round_trip(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.optim.schedule == "cosine" and recipe.data.train[0].split == "train"
    assert parse_recipe(to_dict(recipe)) == recipe
    assert parse_recipe(yaml.safe_load(to_yaml(recipe))) == recipe


def test_overrides_stand_before_between_and_behind_options():
    parser = argparse.ArgumentParser()
    add_recipe(parser)
    parser.add_argument("--gpus", type=int, nargs="+")
    parser.add_argument("--gpu")
    words = ["run.seed=1", "a.yaml", "--gpus", "1", "8", "optim.lr=3e-4", "--gpu=h100", "model.config={a: 1}"]
    options = parse(parser, words)
    assert (options.recipe, options.gpus, options.gpu) == ("a.yaml", [1, 8], "h100")
    assert options.overrides == ["run.seed=1", "optim.lr=3e-4", "model.config={a: 1}"]


def test_overrides_reach_sections_lists_and_absent_keys(tmp_path):
    overrides = [
        "optim.lr=1e-3",
        "data.train.0.split=val",
        "model.lora.rank=4",
        "optim.component_lr.resampler=2e-4",
    ]
    recipe = load_recipe(write(tmp_path, MINIMAL), overrides)
    assert recipe.optim.lr == 1e-3  # YAML itself reads 1e-3 as a string
    assert recipe.data.train[0].split == "val"
    assert recipe.model.lora.rank == 4
    assert recipe.optim.component_lr == {"resampler": 2e-4}


def test_every_mistake_in_one_message(tmp_path):
    tree = {**MINIMAL, "optim": {"step": 10, "lr": "fast", "schedule": "linear"}, "nonsense": 1}
    with pytest.raises(UserError) as error:
        load_recipe(write(tmp_path, tree))
    message = str(error.value)
    for expected in (
        "optim.step: unknown key; did you mean steps?",
        "optim.lr: expected float, got 'fast'",
        "optim.schedule: expected 'cosine' | 'wsd' | 'constant'",
        "nonsense: unknown key",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.path=somewhere", "exactly one of path"),
        ("optim.epochs=1", "exactly one of steps and epochs"),
        ("optim.schedule=wsd", "decay_steps"),
        ("parallel.strategy=hsdp", "shard_size"),
        ("model.freeze=[tower]", "unknown component ['tower']"),
        ("run.seed=true", "run.seed: expected int"),  # a bool is an int in Python, not in a recipe
        ("run.dir=null", "run.dir: expected str"),
        ("data.train.1.path=x", "no place inside"),
        ("data.global_batch=0", "data.global_batch: at least 1"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last: at least 1"),
        ("optim.clip=-1", "optim.clip: a positive norm"),
        ("data.train.0.where=n_images = 3", "data.train.0.where: cannot read '= 3': equality is =="),
        ("nonsense", "must look like section.key=value"),
    ],
)
def test_contradictions_are_refused(tmp_path, override, expected):
    with pytest.raises(UserError) as error:
        load_recipe(write(tmp_path, MINIMAL), [override])
    assert expected in str(error.value)


def test_missing_file_and_missing_key(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match=r"run\.dir: required"):
        load_recipe(write(tmp_path, {**MINIMAL, "run": {}}))


RECIPES = sorted((Path(__file__).parents[1] / "pipelines" / "recipes").glob("*.yaml"))
assert RECIPES, "no recipe is tested"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse(path):
    load_recipe(path)


def test_what_is_wrong_with_the_command_is_told_without_torch(tmp_path):
    script = Path(__file__).parents[1] / "pipelines" / "train.py"
    code = f"""
import runpy, sys
try:
    runpy.run_path({str(script)!r}, run_name="__main__")
except SystemExit as end:
    print(end.code, "torch" in sys.modules)
"""
    for code_wanted, told, *arguments in (
        (0, "", "--help"),
        (1, "none.yaml does not exist", tmp_path / "none.yaml"),
        (2, "RECIPE.yaml"),
    ):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.stdout.split()[-2:] == [str(code_wanted), "False"], result.stderr
        assert told in result.stderr
