"""The running mean of the weights: formula, checkpoints, evaluation and export, on 1 and 2 ranks."""

import json

import pytest
import torch
from ranks import run_on_ranks
from safetensors.torch import load_file
from tiny_recipe import losses, tiny_recipe, write_recipe

from omnidata.schema import UserError
from pipelines import export
from pipelines.config import load_recipe, parse_recipe
from pipelines.data import model_config, open_datasets
from pipelines.evaluate import Evaluation
from pipelines.model import build_model
from pipelines.parallel import start
from pipelines.train import train

DECAY, STEPS = 0.7, 4


def recipe_for(dataset, run_dir, **sections):
    sections = {
        "data": {
            "train": [{"path": str(dataset)}],
            "val": [{"path": str(dataset), "split": "val"}],
            "max_tokens": 192,
            "global_batch": 4,
            "num_workers": 0,
        },
        "optim": {"steps": STEPS, "ema": DECAY},
        "checkpoint": {"every": 1, "keep_last": 9},
        "eval": {"every": 2, "num_batches": 2, "keep_best": False},
    } | sections
    return write_recipe(run_dir.with_suffix(".yaml"), tiny_recipe(dataset, run_dir, **sections))


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory):
    """A run of one process that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("ema") / "run"
    train(load_recipe(recipe_for(tiny_dataset, run_dir)))
    return run_dir


def weights(folder):
    return load_file(folder / "model.safetensors")


def figures(run_dir, name):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def at_step(run_dir, step, *, is_mean):
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    recipe = load_recipe(folder / "recipe.yaml")
    model = export.restore(folder, recipe, open_datasets(recipe.data.train), is_mean=is_mean)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_every_checkpoint_has_the_mean_that_the_formula_gives(run, tiny_dataset):
    recipe = load_recipe(run.with_suffix(".yaml"))
    with start(recipe) as world:
        config = model_config(recipe.model, open_datasets(recipe.data.train)[0])
        mean = {n: x.clone() for n, x in build_model(recipe, config, world).model.state_dict().items()}
    for step in range(1, STEPS + 1):
        plain = at_step(run, step, is_mean=False)
        mean = {name: DECAY * mean[name] + (1 - DECAY) * plain[name] for name in mean}
        kept = at_step(run, step, is_mean=True)
        for name, tensor in mean.items():
            torch.testing.assert_close(kept[name], tensor, rtol=0, atol=1e-6, msg=f"{name}, step {step}")
    moved = max((kept[name] - plain[name]).abs().max() for name in plain)
    assert moved > 1e-4, "the mean must differ from the weights"


def test_final_folders_hold_what_their_cards_say(run, tmp_path):
    for folder, options in (("final", []), ("final-ema", ["--ema"])):
        assert export.main([str(run), *options, "--out", str(tmp_path / folder)]) == 0
        ours, theirs = weights(tmp_path / folder), weights(run / folder)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert (tmp_path / folder / "README.md").read_text() == (run / folder / "README.md").read_text()
    assert "These are the weights themselves" in (run / "final" / "README.md").read_text()
    card = (run / "final-ema" / "README.md").read_text()
    assert "These are the running mean" in card and "of the weights themselves" in card


def test_the_mean_is_evaluated_beside_the_weights(run, tiny_dataset):
    for name, folder in (("val_loss", "final"), ("val_loss_ema", "final-ema")):
        recipe = load_recipe(run.with_suffix(".yaml"), [f"model.path={run / folder}", "model.config=null"])
        with start(recipe) as world:
            config = model_config(recipe.model, open_datasets(recipe.data.train)[0])
            loss = Evaluation(recipe, world, build_model(recipe, config, world)).run()["val_loss"]
        assert figures(run, name)[-1] == pytest.approx(loss, abs=1e-6)
    assert figures(run, "val_loss") != figures(run, "val_loss_ema")
    assert len(figures(run, "val_loss")) == len(figures(run, "val_loss_ema")) == STEPS // 2


def test_it_changes_nothing_of_the_training(run, tiny_dataset, tmp_path):
    train(load_recipe(recipe_for(tiny_dataset, tmp_path / "run"), ["optim.ema=null"]))
    assert losses(tmp_path / "run") == losses(run)
    ours, theirs = weights(tmp_path / "run" / "final"), weights(run / "final")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (tmp_path / "run" / "final-ema").exists() and not figures(tmp_path / "run", "val_loss_ema")


def test_resumed_equals_undisturbed(run, tiny_dataset, tmp_path):
    recipe = recipe_for(tiny_dataset, tmp_path / "run")
    train(load_recipe(recipe, ["run.stop_after=3"]))
    train(load_recipe(recipe))
    for folder in ("final", "final-ema"):
        ours, theirs = weights(tmp_path / "run" / folder), weights(run / folder)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert figures(tmp_path / "run", "val_loss_ema") == figures(run, "val_loss_ema")


def on_two_ranks(dataset, folder, strategy, *, more=()):
    """``folder``: stopped after step 3 and gone on with, on two ranks, after the recipes of ``more``."""
    recipe = recipe_for(dataset, folder, parallel={"strategy": strategy})
    first = folder.with_name("first.yaml")
    first.write_text(recipe.read_text().replace("run:\n", "run:\n  stop_after: 3\n"))
    run_on_ranks(2, [*more, first, recipe])


def assert_same_figures(ours, theirs):
    for name in ("val_loss", "val_loss_ema"):
        assert figures(ours, name) == pytest.approx(figures(theirs, name), abs=1e-5)


def test_two_ranks_resume_the_mean_that_one_rank_has(run, tiny_dataset, tmp_path):
    on_two_ranks(tiny_dataset, tmp_path / "run", "fsdp")
    assert_same_figures(tmp_path / "run", run)
    ours, theirs = weights(tmp_path / "run/final-ema"), weights(run / "final-ema")
    assert max((ours[name] - theirs[name]).abs().mean() for name in theirs) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_two_ranks_resumed_equal_two_undisturbed(run, tiny_dataset, tmp_path, strategy):
    whole = recipe_for(tiny_dataset, tmp_path / "whole", parallel={"strategy": strategy})
    on_two_ranks(tiny_dataset, tmp_path / "run", strategy, more=[whole])
    ours, theirs = weights(tmp_path / "run/final-ema"), weights(tmp_path / "whole/final-ema")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert figures(tmp_path / "run", "val_loss_ema") == figures(tmp_path / "whole", "val_loss_ema")
    assert_same_figures(tmp_path / "whole", run)


def test_switched_on_and_off_between_restarts(tiny_dataset, tmp_path, capsys):
    recipe = recipe_for(tiny_dataset, tmp_path / "run", eval={"every": 0})
    train(load_recipe(recipe, ["optim.ema=null", "run.stop_after=1"]))
    assert export.main([str(tmp_path / "run"), "--ema"]) == 1
    assert "has no running mean of the weights" in capsys.readouterr().err
    train(load_recipe(recipe, ["run.stop_after=2"]))
    assert "optim.ema: None -> 0.7" in capsys.readouterr().out
    before, after = (at_step(tmp_path / "run", step, is_mean=False) for step in (1, 2))
    mean = at_step(tmp_path / "run", 2, is_mean=True)
    for name in mean:  # it begins with the weights at which it was switched on
        torch.testing.assert_close(
            mean[name], DECAY * before[name] + (1 - DECAY) * after[name], rtol=0, atol=1e-6
        )
    train(load_recipe(recipe, ["optim.ema=null"]))
    assert (tmp_path / "run" / "final").exists() and not (tmp_path / "run" / "final-ema").exists()


@pytest.mark.parametrize("decay", [0, 1, -0.1, 1.5])
def test_a_decay_is_between_0_and_1(tmp_path, decay):
    with pytest.raises(UserError, match=r"optim\.ema: a decay between 0 and 1"):
        parse_recipe(tiny_recipe(tmp_path, tmp_path / "run", optim={"ema": decay}))
