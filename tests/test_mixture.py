"""What an epoch is mixed from: caps, orders, weights that change. All pure functions, all resumable."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from catalogs import MadeUpCatalog
from hypothesis import given
from hypothesis import strategies as st
from tiny_dataset import build_tiny_dataset

from omnidata import Dataset
from omnidata.loader import PackLoader
from omnidata.plan.blend import Source
from omnidata.plan.cap import Cap
from omnidata.plan.epoch import EpochPlan
from omnidata.plan.phases import Schedule, parse_phases
from omnidata.schema import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_tiny_dataset(tmp_path_factory.mktemp("mixture") / "data", num_samples=72, num_val=12)


def rows_of(plan: EpochPlan, dataset: int = 0) -> list[int]:
    return [row for pack in plan for row in pack.lengths.rows[pack.dataset == dataset].tolist()]


def plan_of(data, *, epoch: int = 0, **entry) -> EpochPlan:
    return EpochPlan({"path": data, **entry}, max_tokens=600, epoch=epoch)


# --- caps -------------------------------------------------------------------------------------------------


@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    limit=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_a_pass_takes_the_limit_of_each_value_and_passes_share_nothing_until_a_value_is_used_up(
    counts, limit, seed
):
    codes = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    rows = np.arange(len(codes)) * 3
    cap = Cap(limit, rows, codes, key=(seed,))
    taken = [cap.rows_of(number) for number in range(4)]
    of_code = dict(zip(rows.tolist(), codes.tolist(), strict=True))
    for pass_rows in taken:
        assert len(np.unique(pass_rows)) == len(pass_rows) == cap.size
        assert Counter(of_code[row] for row in pass_rows.tolist()) == {
            code: min(limit, count) for code, count in enumerate(counts)
        }
    for code, count in enumerate(counts):
        fresh = min(count // min(limit, count), 4)
        seen = [row for pass_rows in taken[:fresh] for row in pass_rows.tolist() if of_code[row] == code]
        assert len(set(seen)) == len(seen)
    assert np.array_equal(Cap(limit, rows, codes, key=(seed,)).rows_of(3), taken[3])


def test_what_a_cap_takes_is_pinned():
    # A saved position means something only while the same integers give the same samples.
    cap = Cap(2, np.arange(8), np.array([0, 0, 0, 0, 0, 1, 1, 1]), key=(5, 0))
    assert [cap.rows_of(number).tolist() for number in range(3)] == [[1, 2, 5, 6], [3, 4, 6, 7], [2, 4, 5, 7]]


def test_a_capped_dataset_gives_so_many_samples_an_epoch_others_in_the_next(data):
    epochs = [rows_of(plan_of(data, cap=20, epoch=epoch)) for epoch in range(3)]
    assert [len(set(rows)) for rows in epochs] == [20, 20, 20]
    assert len(set(itertools.chain(*epochs))) == 60  # all of them, before any comes again
    assert len(rows_of(plan_of(data, cap=1000))) == 60
    assert len(rows_of(plan_of(data, cap=20, epochs=2))) == 40


def test_a_cap_of_each_value_and_a_condition(data):
    entry = {"cap": 3, "cap_by": "n_images", "where": 'source == "photos.json"'}
    index = Dataset(data, "train").index.to_pylist()
    for epoch in range(3):
        rows = rows_of(plan_of(data, epoch=epoch, **entry))
        assert Counter(index[row]["n_images"] for row in rows) == {0: 3, 1: 3, 2: 3}
        assert {index[row]["source"] for row in rows} == {"photos.json"}


# --- orders -----------------------------------------------------------------------------------------------


def test_an_order_shows_from_window_to_window(monkeypatch, data):
    monkeypatch.setattr("omnidata.plan.epoch.ORDERED_SAMPLES", 10)
    tokens = Dataset(data, "train").index["n_tokens"].to_numpy()
    for order, sign in (("length", 1), ("-length", -1)):
        plan = plan_of(data, order=order)
        windows = [sorted(sign * tokens[window.lengths.rows]) for window in plan.windows()]
        assert [len(window) for window in windows] == [10] * 6
        assert list(itertools.chain(*windows)) == sorted(sign * tokens)
    images = Dataset(data, "train").index["n_images"].to_numpy()
    planned = [images[window.lengths.rows] for window in plan_of(data, order="-n_images").windows()]
    assert [window.tolist() for window in planned] == [
        [2] * 10,
        [2] * 10,
        [1] * 10,
        [1] * 10,
        [0] * 10,
        [0] * 10,
    ]


def test_ties_are_shuffled_anew_in_every_epoch(data):
    first, second = (rows_of(plan_of(data, order="n_images", epoch=epoch)) for epoch in (0, 1))
    assert first != second and sorted(first) == sorted(second) == list(range(60))


def test_an_order_among_shuffled_datasets_keeps_the_mixture(monkeypatch):
    monkeypatch.setattr("omnidata.plan.epoch.ORDERED_SAMPLES", 30)
    blend = [Source(MadeUpCatalog([20] * 10), order="length"), Source(MadeUpCatalog([10] * 10, shift=7))]
    plan = EpochPlan(blend, max_tokens=1000, window_samples=100)
    counts = [Counter(window.dataset.tolist()) for window in plan.windows()]
    assert plan.windows_a_read == 3 and counts == [{0: 20, 1: 10}] * 10


# --- weights that change ----------------------------------------------------------------------------------


def phased(*, epoch: int = 0, seed: int = 0) -> EpochPlan:
    first = parse_phases([{"until": 0.5, "weight": 3}, {"until": 1.25, "weight": 0}, {"weight": 1}], name="a")
    second = parse_phases([{"weight": 1}], name="b")
    blend = [
        Source(MadeUpCatalog([20] * 10), weights=first),
        Source(MadeUpCatalog([20] * 10, shift=7), weights=second),
    ]
    return EpochPlan(blend, max_tokens=1000, window_samples=100, epoch=epoch, seed=seed)


def test_each_phase_has_its_own_mixture():
    counts = [
        [Counter(window.dataset.tolist()) for window in phased(epoch=epoch).windows()] for epoch in range(3)
    ]
    assert counts[0] == [{0: 75, 1: 25}, {0: 75, 1: 25}, {1: 100}, {1: 100}]
    assert counts[1] == [{1: 100}, *[{0: 50, 1: 50}] * 3]
    assert counts[2] == [{0: 50, 1: 50}] * 4


def test_streams_go_on_where_the_phase_before_left_them():
    rows = Counter()
    for epoch in range(2):
        rows.update(rows_of(phased(epoch=epoch), 0))
    assert sum(rows.values()) == 300 and set(rows.values()) == {1, 2}  # exhausted before it repeats


def test_a_change_ends_a_window_even_in_a_small_epoch():
    a = parse_phases([{"until": "1/3", "weight": 1}, {"weight": 0}], name="a")
    b = parse_phases([{"until": "1/3", "weight": 0}, {"weight": 1}], name="b")
    blend = [Source(MadeUpCatalog([30]), weights=a), Source(MadeUpCatalog([30], shift=7), weights=b)]
    plan = EpochPlan(blend, max_tokens=1000)
    assert [Counter(window.dataset.tolist()) for window in plan.windows()] == [{0: 20}, {1: 40}]


@given(st.integers(0, 40), st.integers(1, 50))
def test_a_schedule_gives_every_sample_of_an_epoch(numerator, denominator):
    phases = [
        parse_phases([{"until": 0.3, "weight": 2}, {"until": 2, "weight": 0.1}, {"weight": 5}], name="a"),
        parse_phases([{"until": 1, "weight": 1}, {"weight": 1.7}], name="b"),
    ]
    schedule = Schedule(phases, total=1000, names=["a", "b"])
    time = parse_phases([{"until": f"{numerator + 1}/{denominator}", "weight": 1}], name="t")[0].until
    given_so_far = [schedule.given(number, time) for number in range(2)]
    assert abs(sum(given_so_far) - 1000 * time) <= 2
    assert all(value <= schedule.given(number, time + 1) for number, value in enumerate(given_so_far))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"cap": 0}, "`cap` is 0"),
        ({"cap_by": "source"}, "`cap` is None"),
        ({"cap": 3, "cap_by": "n_image"}, "no column 'n_image' (did you mean n_images?)"),
        ({"order": "source"}, "order 'source' is a column of string"),
        ({"order": "lenght"}, "no column 'lenght'"),
        ({"weight": 1, "weights": [{"weight": 1}]}, "both `weight` and `weights`"),
        ({"weights": [{"weight": 0}]}, "must be 0 or more, and one of them more"),
        ({"weights": [{"until": 2, "weight": 1}, {"until": 1, "weight": 1}]}, "must rise"),
        ({"weights": [{"weight": 1}, {"weight": 2}]}, "must rise"),
        ({"weights": [{"till": 2, "weight": 1}]}, "each is {until: EPOCHS, weight: W}"),
        ({"weights": [{"weight": "much"}]}, "no number"),
        ({"weights": {"weight": 1}}, "not a list"),
        ({"weight": "3"}, "`weight` is '3', it must be a positive number"),
        ({"epochs": True}, "`epochs` is True"),
        ({"where": 3}, "a condition is a text"),
        ({"weights": [{"until": 1, "weight": 1}, {"weight": 0}]}, "has a weight after 1 epochs"),
    ],
)
def test_what_is_no_mixture_is_refused(data, entry, message):
    with pytest.raises(UserError) as error:
        list(plan_of(data, **entry))
    assert message in str(error.value)


def test_a_cap_beyond_the_dataset_takes_all_of_it(data):
    assert plan_of(data, cap=10**20).totals == plan_of(data).totals


# --- all of it --------------------------------------------------------------------------------------------

ALL = {"where": "n_images <= 1", "cap": 11, "cap_by": "source", "order": "-length"}


def test_each_of_them_is_part_of_the_digest(data):
    entries = [
        {},
        *({name: value} for name, value in ALL.items() if name != "cap_by"),
        {"cap": 11, "cap_by": "source"},
    ]
    entries += [{"weights": [{"until": until, "weight": 1}, {"weight": 2}]} for until in (1, 2)]
    digests = [plan_of(data, **entry).digest for entry in entries]
    assert len(set(digests)) == len(digests)
    assert plan_of(data, order="shuffled", weights=[], cap=None).digest == digests[0]


@pytest.mark.parametrize("seed", [0, 7])
def test_a_run_with_all_of_them_resumes_at_every_step_at_any_number_of_ranks(monkeypatch, data, seed):
    monkeypatch.setattr("omnidata.plan.epoch.ORDERED_SAMPLES", 8)
    phases = [{"until": 0.5, "weight": 1}, {"until": 1.5, "weight": 4}, {"weight": 2}]
    blend = [
        {"path": data, "weights": phases, **ALL},
        {"path": data, "split": "val", "weights": phases[::-1][:1]},
    ]

    def loader(**ranks) -> PackLoader:
        settings = {"max_tokens": 400, "global_batch": 2, "num_epochs": 3, "seed": seed}
        return PackLoader(blend, decode_images=False, window_samples=64, **settings, **ranks)

    def keys_by_step(parts) -> dict[int, list[str]]:
        steps: dict[int, list[str]] = {}
        for microbatch in itertools.chain(*parts):
            steps[microbatch.step] = sorted([*steps.get(microbatch.step, []), *microbatch.keys])
        return steps

    whole = keys_by_step([loader()])
    assert keys_by_step([loader(rank=rank, world_size=2) for rank in range(2)]) == whole
    assert len(whole) == sum(loader().steps_per_epoch(epoch) for epoch in range(3)) == loader().steps_left()
    running, resumes = loader(), 0
    for microbatch in running:
        if microbatch.step in (3, 8) and running.state_dict()["step"] == microbatch.step + 1:
            resumed, resumes = loader(), resumes + 1
            resumed.load_state_dict(running.state_dict())
            assert keys_by_step([resumed]) == {
                step: keys for step, keys in whole.items() if step > microbatch.step
            }
    assert resumes == 2
