"""The forecast of an epoch against sums over the plan's own packs and steps, made the slow way."""

import json
import re

import numpy as np
import pytest

from omnidata import Dataset, EpochPlan, cli
from omnidata.plan.cost import Assumptions, token_weights
from omnidata.plan.forecast import Forecast, forecast, padding, rank_balance
from omnidata.plan.window import ATTENTION_COST, IMAGE_COST

MAX_TOKENS, GLOBAL_BATCH, WORLD_SIZE = 120, 3, 2


@pytest.fixture(scope="module")
def plan(tiny_dataset):
    return EpochPlan(str(tiny_dataset), max_tokens=MAX_TOKENS, max_images=3)


@pytest.fixture(scope="module")
def seen(plan):
    return forecast(plan, world_size=WORLD_SIZE, global_batch=GLOBAL_BATCH)


def test_a_pack_that_no_sample_fits_is_one_line(tiny_dataset, capsys):
    assert cli.run(["plan", str(tiny_dataset), "--max-tokens", "3"]) == 1
    assert re.search(
        r"no sample of \S+ fits a pack of 3 tokens; the shortest has \d+", capsys.readouterr().err
    )


def test_an_epoch_of_less_than_a_step_is_foreseen(tiny_dataset, capsys):
    assert cli.run(["plan", str(tiny_dataset), "--max-tokens", "4096", "--world-size", "64", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_steps"] == 0 and report["num_packs_dropped"] == report["num_packs"] > 0


def test_packs_and_tokens_are_those_of_the_plan(plan, seen, tiny_dataset):
    packs = list(plan)
    assert seen.num_packs == len(packs)
    assert seen.num_tokens == sum(pack.num_tokens for pack in packs)
    assert seen.num_images == sum(pack.num_images for pack in packs)
    index = Dataset(tiny_dataset, "train").index
    assert (seen.num_samples, seen.num_tokens) == (16, sum(index["n_tokens"].to_pylist()))
    assert seen.tokens_per_pack.max == max(pack.num_tokens for pack in packs) <= MAX_TOKENS
    assert seen.images_per_pack.max == max(pack.num_images for pack in packs) <= 3
    assert seen.padding_packed == pytest.approx(1 - seen.num_tokens / (len(packs) * MAX_TOKENS))


def test_steps_are_those_of_the_plan(plan, seen):
    steps = list(plan.steps(WORLD_SIZE, global_batch=GLOBAL_BATCH))
    assert seen.num_steps == len(steps) >= 2
    assert seen.num_packs_dropped == seen.num_packs - len(steps) * GLOBAL_BATCH
    supervised = sorted(step.num_supervised for step in steps)
    assert (seen.supervised_per_step.min, seen.supervised_per_step.max) == (supervised[0], supervised[-1])
    assert seen.supervised_per_step.median == np.median(supervised)


def test_balance_is_that_of_the_dealt_steps(plan, seen):
    ratios, waits, works = [], 0.0, 0.0
    for step in plan.steps(WORLD_SIZE, global_batch=GLOBAL_BATCH):
        costs = [
            sum(step.packs[i].cost(seen.image_cost, seen.attention_cost) for i in rank) for rank in step.ranks
        ]
        ratios.append(max(costs) / np.mean(costs))
        waits += WORLD_SIZE * max(costs) - sum(costs)
        works += WORLD_SIZE * max(costs)
    assert seen.balance.cost == pytest.approx(np.mean(ratios)) and seen.balance.idle == pytest.approx(
        waits / works
    )


def test_even_ranks_are_perfectly_balanced():
    same = np.full((4, 8), 100)
    balance = rank_balance(same, np.ones((4, 8)), same + 221.0, 4)
    assert (balance.tokens, balance.images, balance.cost, balance.idle) == (1.0, 1.0, 1.0, 0.0)
    uneven = rank_balance(np.array([[3, 1]]), np.zeros((1, 2)), np.array([[3.0, 1.0]]), 2)
    assert (
        uneven.tokens == pytest.approx(1.5) and uneven.idle == pytest.approx(1 / 3) and uneven.images == 1.0
    )


def test_padding_of_batches():
    assert padding(np.array([2, 4]), 2) == 0.25
    assert padding(np.array([2, 4, 3]), 2) == pytest.approx(1 - 9 / 11)  # the last batch has one sample
    assert padding(np.array([5, 5]), 1) == 0.0 and padding(np.zeros(0, int), 3) == 0.0


def test_an_image_weighs_what_the_model_says(plan, seen):
    trained = forecast(plan, assume=Assumptions(frozen=(), num_gpus=1))
    small = forecast(plan, assume=Assumptions(model="vitl-7b"))
    assert trained.image_cost == pytest.approx(3 * seen.image_cost) and small.image_cost < seen.image_cost
    # OmniLMM-12B at 448 pixels, the tower frozen: the weights by which a plan makes its steps
    assert token_weights(Assumptions()) == pytest.approx((IMAGE_COST, ATTENTION_COST), rel=0.02)


def test_cost_counts_attention_by_document_and_images(plan, seen):
    longer = forecast(plan, assume=Assumptions(frozen=(), num_gpus=1))
    assert longer.cost.image_flops == pytest.approx(3 * seen.cost.image_flops)
    assert longer.cost.token_flops == pytest.approx(seen.cost.token_flops)


def test_samples_that_fit_no_pack_are_counted_not_hidden(tiny_dataset):
    left = forecast(EpochPlan(str(tiny_dataset), max_tokens=50, oversize="leave_out"))
    over = sum(n > 50 for n in Dataset(tiny_dataset, "train").index["n_tokens"].to_pylist())
    assert left.num_left_out == over > 0 and left.num_samples == 16 - over


def test_the_command(tiny_dataset, capsys):
    arguments = ["plan", str(tiny_dataset), "--max-tokens", "120", "--global-batch", "3", "--world-size", "2"]
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    for expected in (
        "16: ",
        "3 packs over 2 ranks",
        "supervised tokens per step",
        "2 × h100",
        "MFU 40%",
        "idle",
    ):
        assert expected in out, expected
    assert cli.run([*arguments, "--json", "--gpus", "64", "--gpu", "a100", "--model", "vitl-7b"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == list(Forecast.__dataclass_fields__)
    assert (report["cost"]["num_gpus"], report["cost"]["gpu"], report["cost"]["model"]) == (
        64,
        "a100",
        "vitl-7b",
    )
    assert cli.run([*arguments, "--oversize", "refuse", "--max-tokens", "30"]) == 1
    assert "raise max_tokens" in capsys.readouterr().err
    assert cli.run(["plan"]) == 2
