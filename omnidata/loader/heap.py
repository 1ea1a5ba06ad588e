"""The heap of a loader worker: what is freed is kept for the next microbatch.

A processor makes the tensors of a pack several times over (resized, cut into patches, joined), each hundreds
of megabytes. Left alone, glibc returns every one to the kernel and fetches zeroed pages for the next, which
takes longer than the arithmetic: with this Qwen3-VL's bytes load 1.4 times as fast, its floats 2.1 times
(benchmarks/families.py). Only in workers: the training process's heap is its owner's.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_NEVER = 2**31 - 1  # bytes at the top of the heap before any are given back


def keep_freed_memory() -> None:
    """Of this process, from now on. Other systems' heaps are left as they are: only speed depends on it."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
