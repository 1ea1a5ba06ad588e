"""Which samples share a pack."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnidata.plan.exchange import Amount, exchange
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


@pytest.mark.parametrize("max_tokens", [4096, 8192])
def test_packs_hold_as_many_images_as_any_other(max_tokens):
    tokens, images = natural(20_000)
    pack_of, num_packs = pack(tokens, images, max_tokens=max_tokens)
    held = np.bincount(pack_of, images)
    assert held.max() <= np.ceil(held.mean()) + 1 and held.std() < 0.8
    assert tokens.sum() / (num_packs * max_tokens) > 0.99


def test_packs_hold_as_many_pixels_as_any_other_and_a_mixture_s_as_well():
    """Half text alone, half pictures of any size: packs of pictures alone would cost several times more."""
    rng = np.random.default_rng(5)
    images = (np.arange(8000) % 2) * rng.choice([1, 1, 2], 8000)
    seen = rng.integers(64, 1200, 8000) * (images > 0)  # tokens of the pictures of a sample
    tokens = seen + np.clip(rng.lognormal(5.5, 0.8, 8000), 20, 2000).astype(int)
    pack_of, num_packs = pack(tokens, images, max_tokens=8192, pixels=seen * 1024 * 3)
    held = np.bincount(pack_of, seen)
    assert held.max() < 1.05 * held.mean() and tokens.sum() / (num_packs * 8192) > 0.985
    pack_of, _ = best_fit(tokens, images, max_tokens=8192)
    assert np.bincount(pack_of, seen).max() > 1.15 * held.mean()


def test_pack_takes_the_fewest_where_even_packs_are_many_more():
    rng = np.random.default_rng(0)
    tokens, images = rng.integers(1400, 2700, 2000), rng.integers(0, 9, 2000)
    fewest = best_fit(tokens, images, max_tokens=4096)[1]
    assert even_fit(tokens, images, max_tokens=4096)[1] > 1.02 * fewest
    assert pack(tokens, images, max_tokens=4096)[1] == fewest


def test_packs_without_images_are_the_fewest():
    tokens, none = natural(5000)[0], np.zeros(5000, int)
    assert pack(tokens, none, max_tokens=4096)[1] == best_fit(tokens, none, max_tokens=4096)[1]


@given(samples=lengths, seed=st.integers(0, 9))
def test_an_exchange_keeps_every_sample_and_evens_out(samples, seed):
    tokens, images = np.array(samples, np.int64).reshape(-1, 2).T
    num_packs = max(1, len(samples) // 3)
    before = np.random.default_rng(seed).permutation(np.arange(len(samples)) % num_packs)
    amounts = [Amount(tokens, 4.0, 40), Amount(images, 1.0)]
    after = exchange(before, num_packs, amounts)
    assert after.shape == before.shape and set(after.tolist()) <= set(range(num_packs))

    def unevenness(pack_of):
        held = [np.bincount(pack_of, a.values, num_packs) for a in amounts]
        shares = [h / max(h.mean(), 1) for h in held]
        return sum(a.weight * np.square(x).sum() for a, x in zip(amounts, shares, strict=True))

    over = [np.maximum(np.bincount(x, tokens, num_packs) - 40, 0).sum() for x in (before, after)]
    assert unevenness(after) <= unevenness(before) + 1e-9 or over[1] < over[0]


def test_text_fills_packs_that_hold_no_more_images():
    tokens, images = np.array([6, 6, 4, 4]), np.array([1, 1, 0, 0])
    pack_of, num_packs = best_fit(tokens, images, max_tokens=10, max_images=1)
    assert num_packs == 2 and sorted(pack_of[:2]) == sorted(pack_of[2:]) == [0, 1]
