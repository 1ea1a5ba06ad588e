"""The tail of an epoch: trained by default, said in numbers if it is not; no run of no steps."""

import pytest
import torch
from tiny_recipe import losses, tiny_recipe

from omnidata.loader import PackLoader
from omnidata.schema import UserError
from omnimodel import OmniLMMConfig
from pipelines.config import parse_recipe
from pipelines.data import refuse_empty_epochs, tail_of_epoch, train_loader
from pipelines.parallel import World
from pipelines.train import train

WORLD = World(0, 1, torch.device("cpu"), "single")


def recipe_of(tiny_dataset, run_dir, **data):
    return parse_recipe(
        tiny_recipe(
            tiny_dataset,
            run_dir,
            data={"train": [{"path": str(tiny_dataset)}], "num_workers": 0, **data},
            optim={"steps": None, "epochs": 1, "warmup_steps": 0},
        )
    )


@pytest.mark.parametrize("global_batch", [3, 5, 7])
def test_every_sample_is_read_in_every_epoch(tiny_dataset, global_batch):
    loader = PackLoader(tiny_dataset, global_batch=global_batch, max_tokens=256, num_epochs=2)
    seen: dict[int, list[str]] = {0: [], 1: []}
    for microbatch in loader:
        seen[microbatch.epoch] += microbatch.keys
    assert (
        sorted(seen[0]) == sorted(seen[1])
        and len(set(seen[0])) == len(seen[0]) == loader.plan.totals.num_samples
    )


def test_the_last_step_is_divided_by_its_own_tokens(tiny_dataset):
    loader = PackLoader(tiny_dataset, global_batch=5, max_tokens=256, num_epochs=1)
    supervised: dict[int, int] = {}
    said: dict[int, int] = {}
    for microbatch in loader:
        found = int((microbatch.labels != -100).sum())
        supervised[microbatch.step] = supervised.get(microbatch.step, 0) + found
        said[microbatch.step] = microbatch.num_supervised_tokens
    assert supervised == said and len(said) == -(-loader.plan.totals.num_packs // 5)


def test_a_run_of_no_steps_is_refused_with_the_numbers(tiny_dataset, tmp_path):
    recipe = recipe_of(tiny_dataset, tmp_path, global_batch=1000, tail="drop")
    loader = train_loader(recipe, WORLD, OmniLMMConfig(image_size=32))
    with pytest.raises(UserError, match=rf"{loader.plan.totals.num_packs} packs .* a step takes 1000"):
        refuse_empty_epochs(recipe.data, loader)
    with pytest.raises(UserError, match="no step to train"):
        train(recipe)
    assert not (tmp_path / "final").exists()


def test_one_step_of_fewer_packs_than_global_batch_trains(tiny_dataset, tmp_path):
    train(recipe_of(tiny_dataset, tmp_path / "run", global_batch=30))
    assert len(losses(tmp_path / "run")) == 1


def test_what_becomes_of_the_tail_is_said(tiny_dataset, tmp_path):
    pad, drop = (recipe_of(tiny_dataset, tmp_path, global_batch=4, tail=tail) for tail in ("pad", "drop"))
    assert "3 of 4 packs" in next(tail_of_epoch(pad.data, WORLD, 11))
    assert "leaves out 3 of 11 packs" in next(tail_of_epoch(drop.data, WORLD, 11))
    assert not list(tail_of_epoch(drop.data, WORLD, 12))
    many = World(0, 6, torch.device("cpu"), "ddp")
    assert "2 ranks have no pack" in next(iter(tail_of_epoch(pad.data, many, 12)))
