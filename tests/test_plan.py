"""The order, packing and distribution of an epoch."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from catalogs import MadeUpCatalog
from hypothesis import given
from hypothesis import strategies as st

from omnidata.plan.blend import Source, quotas
from omnidata.plan.epoch import EpochPlan
from omnidata.plan.steps import Position, deal
from omnidata.schema import UserError

SIZES = [40, 55, 30, 70, 45, 60]


def plan(**settings) -> EpochPlan:
    settings = {"max_tokens": 1000, "window_samples": 100} | settings
    return EpochPlan(settings.pop("data", None) or MadeUpCatalog(SIZES), **settings)


def rows(packs) -> list[list[int]]:
    return [pack.lengths.rows.tolist() for pack in packs]


# --- packs ------------------------------------------------------------------------------------------------


def test_an_epoch_holds_every_sample_once():
    whole = plan()
    assert whole.num_windows == 3
    assert sorted(itertools.chain(*rows(whole))) == list(range(300))
    for pack in whole:
        assert pack.num_tokens <= 1000
        assert pack.lengths.tokens.tolist() == [50 + row * 7919 % 400 for row in pack.lengths.rows.tolist()]


def test_max_images_holds():
    assert max(pack.num_images for pack in plan(max_images=3)) == 3


def test_equal_numbers_give_equal_plans_and_others_do_not():
    assert rows(plan(seed=1, epoch=2)) == rows(plan(seed=1, epoch=2))
    assert plan(seed=1).digest == plan(seed=1, epoch=2).digest == plan(seed=1, epoch=2).digest
    orders = [rows(plan(seed=seed, epoch=epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(one != other for one, other in itertools.combinations(orders, 2))
    digests = [plan(**change).digest for change in ({}, {"seed": 1}, {"max_tokens": 999}, {"max_images": 9})]
    assert len(set(digests)) == 4


def test_the_order_is_pinned():
    # A saved position means something only while the same integers give the same order.
    assert rows(plan())[:2] == [[71, 72, 93, 11], [237, 233, 22, 234]]
    assert rows(next(plan().steps(global_batch=2)).packs) == [[68, 65, 18, 195], [40, 196, 81, 29]]


def test_digests_are_pinned():
    # A run that was begun by this version goes on under later ones only if its plan has the same digest.
    weights = [Source(MadeUpCatalog(SIZES), weight=3), Source(MadeUpCatalog([10] * 5, shift=3), weight=1)]
    epochs = [Source(MadeUpCatalog(SIZES), epochs=2), Source(MadeUpCatalog([10] * 5, shift=3))]
    assert plan().digest == "0e17ae0653a58ee85955632a0ff54307"
    assert plan(data=weights).digest == "9c99500e2dbb1db56655db68f0aafa3c"
    limits = {"max_images": 3, "oversize": "leave_out"}
    assert plan(data=epochs, **limits).digest == "7384c701c8eaf60e009dcb450e542c20"


def test_a_window_is_made_without_those_before_it():
    catalog = MadeUpCatalog([10] * 1000)
    whole = EpochPlan(catalog, max_tokens=1000, window_samples=500)
    last = whole.window(whole.num_windows - 1)
    assert len(catalog.reads) <= 100  # the window's own shards, and a neighbour's that it shares
    sequential = list(EpochPlan(MadeUpCatalog([10] * 1000), max_tokens=1000, window_samples=500).windows())
    assert np.array_equal(last.lengths.rows, sequential[-1].lengths.rows)
    assert len(sequential) == whole.num_windows == 20


def test_planning_an_epoch_reads_every_shard_once():
    catalog = MadeUpCatalog(SIZES * 10)
    list(EpochPlan(catalog, max_tokens=1000, window_samples=128).windows())
    assert sorted(catalog.reads) == list(range(60))


def test_a_billion_samples():
    catalog = MadeUpCatalog([10_000] * 100_000)
    begin = time.process_time()
    huge = EpochPlan(catalog, seed=3, max_tokens=4096, window_samples=100_000)
    first, middle = huge.window(0), huge.window(huge.num_windows // 2)
    assert time.process_time() - begin < 5
    assert huge.num_windows == 10_000 and len(catalog.reads) <= 40
    assert not set(first.lengths.rows) & set(middle.lengths.rows)


def test_totals_are_the_sums_of_the_packs():
    whole = plan(max_images=6)
    packs = list(whole)
    totals = whole.totals
    assert (totals.num_samples, totals.num_packs) == (300, len(packs))
    assert totals.num_tokens == sum(pack.num_tokens for pack in packs)
    assert totals.num_supervised == sum(pack.num_supervised for pack in packs)
    assert totals.num_images == sum(pack.num_images for pack in packs)
    assert totals.fill == totals.num_tokens / (1000 * len(packs))


# --- steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 16])
def test_global_batches_do_not_depend_on_the_ranks(world_size):
    alone = list(plan().steps(1, global_batch=10, image_cost=0))
    for step in plan().steps(world_size, global_batch=10):
        assert rows(step.packs) == rows(alone[step.number].packs)
        assert sorted(itertools.chain(*step.ranks)) == list(range(10))  # every pack to one rank
        assert len(step.ranks) == world_size
        counts = [len(rank) for rank in step.ranks]
        assert max(counts) - min(counts) <= 1
        assert step.num_supervised == sum(pack.num_supervised for pack in step.packs)


@pytest.mark.parametrize("done", [1, 5, 9, 12])
def test_steps_go_on_from_a_position(done):
    whole = list(plan().steps(2, global_batch=5))
    rest = list(plan().steps(3, global_batch=5, start=whole[done - 1].after))
    assert [rows(step.packs) for step in rest] == [rows(step.packs) for step in whole[done:]]


def test_the_tail_is_dropped_or_kept_by_rule():
    num_packs = plan().totals.num_packs
    assert num_packs % 10
    dropped, kept = (list(plan().steps(4, global_batch=10, tail=tail)) for tail in ("drop", "pad"))
    assert len(dropped) == plan().num_steps(10) == num_packs // 10
    assert len(kept) == plan().num_steps(10, tail="pad") == num_packs // 10 + 1
    assert len(kept[-1].packs) == num_packs % 10
    assert kept[-1].after == Position(2, len(plan().window(2)))


@pytest.mark.parametrize("batch", [1, 3, 4, 7])
def test_every_pack_is_in_one_step(batch):
    """Also those where one window ends and the next begins."""
    steps = list(plan().steps(2, global_batch=batch, tail="pad"))
    assert {len(step.packs) for step in steps[:-1]} == {batch}
    assert sorted(rows(pack for step in steps for pack in step.packs)) == sorted(rows(plan()))


def test_the_packs_of_a_step_cost_alike():
    whole = EpochPlan(MadeUpCatalog([500] * 10), max_tokens=1000, window_samples=2500)
    for batch in (4, 16):
        steps = list(whole.steps(global_batch=batch))
        spread = np.mean([np.ptp([pack.cost() for pack in step.packs]) for step in steps])
        assert spread < 0.4 * np.ptp([pack.cost() for pack in whole])


def test_steps_go_on_with_another_global_batch():
    """What the stretch begun still holds comes first, as it would have come."""
    whole = plan()
    for done, other in itertools.product((1, 4, 8, 11), (1, 2, 5, 7)):
        begun = list(whole.steps(2, global_batch=3))[:done]
        rest = list(whole.steps(2, global_batch=other, start=begun[-1].after, tail="pad"))
        taken = rows(pack for step in [*begun, *rest] for pack in step.packs)
        assert sorted(taken) == sorted(rows(whole))
        # and a stop between is no matter: the position says it all
        again = list(whole.steps(4, global_batch=other, start=rest[0].after, tail="pad"))
        assert [rows(step.packs) for step in again] == [rows(step.packs) for step in rest[1:]]


def test_a_position_is_found_by_counting():
    for step in plan().steps(global_batch=5):
        assert plan().position(5 * (step.number + 1), 5) == step.after
    assert plan().position(0, 5) == Position()


def test_the_order_is_random_though_packs_are_even():
    """Neither cost nor length says anything of the place: of steps, and of samples."""
    whole = EpochPlan(MadeUpCatalog([1000] * 20), max_tokens=1000, window_samples=5000)
    steps = list(whole.steps(global_batch=4))
    costs = np.array([sum(pack.cost() for pack in step.packs) for step in steps])
    packs = [pack for step in steps for pack in step.packs]
    tokens = np.concatenate([pack.lengths.tokens for pack in packs])
    place = np.repeat(np.arange(len(packs)), [len(pack.dataset) for pack in packs])
    assert len(costs) > 1000 and abs(np.corrcoef(costs[1:], costs[:-1])[0, 1]) < 0.2
    assert abs(np.corrcoef(costs, np.arange(len(costs)))[0, 1]) < 0.07
    assert abs(np.corrcoef(tokens, place)[0, 1]) < 0.02


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=64), st.integers(1, 20))
def test_deal_gives_every_pack_to_one_rank_and_even_counts(costs, world_size):
    ranks = deal(np.array(costs), world_size)
    assert sorted(itertools.chain(*ranks)) == list(range(len(costs)))
    assert max(map(len, ranks)) == -(-len(costs) // world_size)
    assert all([costs[i] for i in rank] == sorted((costs[i] for i in rank), reverse=True) for rank in ranks)


def test_deal_evens_out_the_cost():
    costs = np.random.default_rng(0).normal(7500, 1500, (200, 64))
    dealt = np.mean([max(sum(step[i] for i in rank) for rank in deal(step, 8)) for step in costs])
    in_order = costs.reshape(200, 8, 8).sum(2).max(1).mean()
    ideal = costs.sum(1).mean() / 8
    assert dealt < 1.01 * ideal < 1.05 * ideal < in_order


# --- blends -----------------------------------------------------------------------------------------------


def counts_by_dataset(whole: EpochPlan) -> Counter:
    return Counter(itertools.chain(*(pack.dataset.tolist() for pack in whole)))


def test_weights_give_exact_shares_and_exhaust_before_repeating():
    small, large = MadeUpCatalog([50, 70]), MadeUpCatalog([400, 480], shift=5)
    data = [Source(small, weight=0.3), Source(large, weight=0.7)]
    epochs = [plan(data=data, epoch=epoch) for epoch in range(3)]
    for epoch in epochs:
        assert counts_by_dataset(epoch) == {0: 300, 1: 700}
    seen = Counter()
    for epoch in epochs:
        seen.update(row for pack in epoch for row in pack.lengths.rows[pack.dataset == 0].tolist())
    assert set(seen.values()) == {7, 8} and len(seen) == 120  # 900 draws of 120 samples: 7.5 passes


def test_every_window_has_the_same_mixture():
    data = [Source(MadeUpCatalog([1000]), weight=1), Source(MadeUpCatalog([3000]), weight=1)]
    for window in plan(data=data, window_samples=500).windows():
        assert abs((window.dataset == 0).mean() - 0.5) < 0.003


def test_epochs_count_passes_and_may_be_fractions():
    data = [Source(MadeUpCatalog([100]), epochs=2), Source(MadeUpCatalog([101]), epochs=0.5)]
    first, second = plan(data=data), plan(data=data, epoch=1)
    passes = Counter(
        (int(d), int(p)) for pack in first for d, p in zip(pack.dataset, pack.passes, strict=True)
    )
    assert passes == {(0, 0): 100, (0, 1): 100, (1, 0): 50}
    halves = [
        {row for pack in half for row in pack.lengths.rows[pack.dataset == 1].tolist()}
        for half in (first, second)
    ]
    assert halves[0] | halves[1] == set(range(101)) and not halves[0] & halves[1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": 1.0, "epochs": 1.0}, "both"),
        ({"weight": -1.0}, "positive"),
        ({"epochs": float("inf")}, "positive"),
        ({}, "every dataset of a blend"),
    ],
)
def test_bad_blends_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        quotas([Source(MadeUpCatalog([5]), weight=1), Source(MadeUpCatalog([5]), **change)])


# --- oversize samples -------------------------------------------------------------------------------------


def test_an_oversize_sample_is_refused_at_once():
    with pytest.raises(UserError, match=r"449 tokens .* holds 448"):
        plan(max_tokens=448)
    with pytest.raises(UserError, match="2 images"):
        plan(max_images=1)


def test_oversize_samples_are_left_out_and_counted():
    short = plan(max_tokens=200, oversize="leave_out")
    too_long = sum(50 + row * 7919 % 400 > 200 for row in range(300))
    assert short.totals.num_left_out == too_long and short.totals.num_cut == 0
    assert short.totals.num_samples == 300 - too_long


def test_oversize_samples_are_cut_and_what_cannot_be_cut_is_counted():
    short = plan(max_tokens=200, oversize="cut")
    too_long = [row for row in range(300) if 50 + row * 7919 % 400 > 200]
    assert short.totals.num_cut == sum(row % 2 for row in too_long)
    assert short.totals.num_left_out == len(too_long) - short.totals.num_cut
    [cut] = [p.lengths for p in short if too_long[1] in p.lengths.rows or too_long[0] in p.lengths.rows][:1]
    assert cut.tokens.max() <= 200
