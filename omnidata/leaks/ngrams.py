"""Runs of words as numbers: 13 words of a text, wherever they stand, have one hash.

Words are letters and digits in lower case; a Chinese, Japanese or Korean character is a word of its own.
"""

from __future__ import annotations

import re

import numpy as np
import xxhash

from omnidata.near.hashing import normalise

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)


def word_hashes(text: str) -> np.ndarray:
    """uint64: a number for each word."""
    words = _WORD.findall(normalise(text))
    return np.array(
        [xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass")) for word in words], np.uint64
    )


def ngrams(words: np.ndarray, length: int) -> np.ndarray:
    """uint64: a number for each run of ``length`` words; none if there are fewer."""
    count = len(words) - length + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for at in range(length):
        total = total * _BASE + words[at : at + count]
    return total
