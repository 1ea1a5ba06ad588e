"""Loss, tokens and samples by source: they add up to the step's, and change nothing of it."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_recipe import losses, tiny_recipe
from torch.nn import functional as F

from omnimodel.loss import LossHead
from omnimodel.tally import tallying
from pipelines.config import parse_recipe
from pipelines.train import train

SOURCES = ("photos.json", "shapes.jsonl")


@pytest.fixture(scope="module")
def runs(tiny_dataset, tmp_path_factory):
    """Run folders: with log.by, and without."""
    folders = {}
    for name, by in (("by", "source"), ("plain", None)):
        run_dir = tmp_path_factory.mktemp("groups") / name
        tree = tiny_recipe(
            tiny_dataset, run_dir, optim={"steps": 3, "warmup_steps": 0}, eval={"num_batches": 4}
        )
        tree["data"]["val"] = [{"path": str(tiny_dataset), "split": "val"}]
        tree["log"] |= {"by": by, "plot": True}
        train(parse_recipe(tree))
        folders[name] = run_dir
    return folders


def lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_groups_add_up_to_the_step(runs):
    for line in lines(runs["by"]):
        if "loss" not in line:
            continue
        for name in ("samples", "tokens", "supervised_tokens"):
            assert sum(line[f"{name}/{source}"] for source in SOURCES) == line[name]
        parts = [line[f"loss/{source}"] * line[f"supervised_tokens/{source}"] for source in SOURCES]
        assert sum(parts) / line["supervised_tokens"] == pytest.approx(line["loss"], rel=1e-4)
        assert parts[0] != parts[1]


def test_the_validation_loss_is_told_by_group_too(runs):
    [line] = [line for line in lines(runs["by"]) if "val_loss" in line]
    low, high = sorted(line[f"val_loss/{source}"] for source in SOURCES)
    assert low < line["val_loss"] < high


def test_it_changes_nothing_of_the_run(runs):
    assert losses(runs["by"]) == losses(runs["plain"])
    assert not any("/" in name for line in lines(runs["plain"]) for name in line)
    assert "loss/photos.json" in (runs["by"] / "loss.svg").read_text()


def test_each_label_s_loss_goes_to_its_group():
    torch.manual_seed(0)
    head, hidden = LossHead(8, 11, bias=False), torch.randn(10, 8)
    head.chunk_rows = 4  # groups go on over chunks
    labels, groups = torch.randint(0, 11, (10,)), torch.randint(0, 3, (10,))
    sums = torch.zeros(3)
    with tallying(sums, groups):
        total = head(hidden, labels)
    each = F.cross_entropy(hidden @ head.weight.T, labels, reduction="none")
    wanted = torch.stack([each[groups == group].sum() for group in range(3)])
    assert torch.allclose(sums, wanted, rtol=1e-5) and torch.allclose(total, each.sum(), rtol=1e-5)
    head(hidden, labels)
    assert torch.allclose(sums, wanted, rtol=1e-5)  # nothing is added outside
