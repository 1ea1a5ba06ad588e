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
from omnidata.plan.epoch import EpochPlan, Position, deal
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
    assert rows(plan())[:2] == [[201, 28, 196, 8, 43, 29], [21, 234, 16]]


def test_the_digests_of_old_recipes_are_pinned():
    # A run that was begun by an earlier version goes on only if its plan has the same digest.
    weights = [Source(MadeUpCatalog(SIZES), weight=3), Source(MadeUpCatalog([10] * 5, shift=3), weight=1)]
    epochs = [Source(MadeUpCatalog(SIZES), epochs=2), Source(MadeUpCatalog([10] * 5, shift=3))]
    assert plan().digest == "4b4f3fe09061ecc9ef8e4e2b4d66935c"
    assert plan(data=weights).digest == "ff17c9a79565a9ef6d8cbbdeb077dac0"
    limits = {"max_images": 3, "oversize": "leave_out"}
    assert plan(data=epochs, **limits).digest == "c51053c970314806a5e67e489e4287db"


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
    packs = rows(plan())
    for step in plan().steps(world_size, global_batch=10):
        assert rows(step.packs) == packs[10 * step.number : 10 * step.number + 10]
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
    assert kept[-1].after.pack == len(plan().window(2))


def test_positions_name_the_next_pack():
    packs = list(plan().packs())
    assert packs[0][1] == Position(0, 1)
    assert rows(pack for pack, _ in plan().packs(packs[7][1])) == rows(pack for pack, _ in packs[8:])


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
