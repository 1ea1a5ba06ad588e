"""Which samples share a pack."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnidata.plan.packing import best_fit, even_fit, pack

lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 4)), max_size=60)


def natural(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Conversations about 0-4 images of 66 tokens each."""
    rng = np.random.default_rng(seed)
    images = rng.choice([0, 1, 1, 1, 1, 1, 1, 2, 3, 4], count)
    text = np.clip(rng.lognormal(5.3, 0.9, count), 20, 2048 - 66 * images).astype(np.int64)
    return text + 66 * images, images


@pytest.mark.parametrize("method", [best_fit, even_fit, pack])
@given(samples=lengths, max_images=st.none() | st.integers(4, 6))
def test_every_sample_in_one_pack_within_the_limits(method, samples, max_images):
    tokens, images = np.array(samples, np.int64).reshape(-1, 2).T
    pack_of, num_packs = method(tokens, images, max_tokens=40, max_images=max_images)
    assert len(pack_of) == len(samples)
    assert sorted(set(pack_of.tolist())) == list(range(num_packs))  # no empty pack
    assert np.bincount(pack_of, tokens).max(initial=0) <= 40
    assert max_images is None or np.bincount(pack_of, images).max(initial=0) <= max_images


def slow_best_fit(tokens: list[int], max_tokens: int) -> int:
    """Packs of textbook best-fit decreasing."""
    free: list[int] = []
    for length in sorted(tokens, reverse=True):
        fitting = [room for room in free if room >= length]
        if fitting:
            free.remove(min(fitting))
        free.append((min(fitting) if fitting else max_tokens) - length)
    return len(free)


@given(st.lists(st.integers(1, 30), max_size=80))
def test_best_fit_is_textbook_best_fit(tokens):
    _, num_packs = best_fit(np.array(tokens, np.int64), np.zeros(len(tokens), int), max_tokens=30)
    assert num_packs == slow_best_fit(tokens, 30)


@pytest.mark.parametrize("max_images", [None, 24, 18])
def test_natural_lengths_leave_almost_no_padding(max_images):
    tokens, images = natural(100_000)
    _, num_packs = pack(tokens, images, max_tokens=4096, max_images=max_images)
    assert tokens.sum() / (num_packs * 4096) >= 0.985


@pytest.mark.parametrize("max_images, fill", [(17, 0.97), (16, 0.95), (14, 0.86)])
def test_packs_are_well_filled_where_images_bind_as_much_as_tokens(max_images, fill):
    """The mean full pack has 15.5 images; no packing at 14 reaches more than 0.90."""
    tokens, images = natural(100_000)
    _, num_packs = pack(tokens, images, max_tokens=4096, max_images=max_images)
    assert tokens.sum() / (num_packs * 4096) >= fill


def test_even_packs_cost_alike():
    tokens, images = natural(50_000)

    def spread(method) -> float:
        pack_of, _ = method(tokens, images, max_tokens=4096)
        cost = np.bincount(pack_of, tokens + 221 * images)
        return cost.std() / cost.mean()

    assert spread(even_fit) < 0.6 * spread(best_fit)


def test_pack_takes_the_fewest_where_even_packs_are_many_more():
    tokens = np.clip(np.random.default_rng(0).lognormal(6.8, 0.7, 2000), 64, 4096).astype(int)
    none = np.zeros(2000, int)
    fewest = best_fit(tokens, none, max_tokens=4096)[1]
    assert even_fit(tokens, none, max_tokens=4096)[1] > 1.01 * fewest
    assert pack(tokens, none, max_tokens=4096)[1] == fewest


def test_text_fills_packs_that_hold_no_more_images():
    tokens, images = np.array([6, 6, 4, 4]), np.array([1, 1, 0, 0])
    pack_of, num_packs = best_fit(tokens, images, max_tokens=10, max_images=1)
    assert num_packs == 2 and sorted(pack_of[:2]) == sorted(pack_of[2:]) == [0, 1]
