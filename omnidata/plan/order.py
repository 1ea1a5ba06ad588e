"""Order: shuffles that are functions of integers alone.

A run may be resumed years later under another numpy, whose generators make no promise about their streams.
So the order of training comes from SplitMix64 (Steele, Lea & Flood 2014), a few lines of wrapping integer
arithmetic, and nothing else.

>>> permutation(6, 0, 1).tolist()                     # key: any integers, say (seed, epoch)
[4, 1, 5, 0, 3, 2]
"""

from __future__ import annotations

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(*key: int) -> int:
    """A 64-bit hash of integers; another key gives an unrelated value."""
    state = 0
    for value in key:
        state = int(_splitmix(np.array([(state + _GOLDEN + value) & _MASK], np.uint64))[0])
    return state


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of ``range(count)``, int64, fixed for ever by ``count`` and ``key``."""
    counter = np.arange(1, count + 1, dtype=np.uint64)
    return np.argsort(_splitmix(np.uint64(mix(*key)) + counter * np.uint64(_GOLDEN)), kind="stable")


def hashes(values: np.ndarray, *key: int) -> np.ndarray:
    """uint64: an unrelated number for each integer, fixed for ever by itself and ``key``."""
    state = np.uint64(mix(*key)) + (values.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    return _splitmix(state)


def _splitmix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, a bijection on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
