"""Tally: losses summed by group, on the device, while the loss is computed anyway.

    with tallying(sums_G, groups_N):      # groups of the microbatch's supervised labels, in their order
        loss = model(...)                 # sums_G[g] += the losses of group g's labels

Nothing waits for the device: the sums are read when somebody asks for them. A loss computed by anything but
loss.py adds nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_open: list[tuple[torch.Tensor, torch.Tensor]] = []  # at most one: of the forward that runs


@contextlib.contextmanager
def tallying(sums_G: torch.Tensor | None, groups_N: torch.Tensor | None) -> Iterator[None]:
    """Add each supervised label's loss to its group's sum; nothing if either is None.

    Args:
        sums_G: float32, on the loss's device.
        groups_N: int64, on the same.
    """
    if sums_G is None or groups_N is None:
        yield
        return
    _open.append((sums_G, groups_N))
    try:
        yield
    finally:
        _open.pop()


def tally(losses_n: torch.Tensor, start: int) -> None:
    """Losses of the supervised labels from number ``start`` on."""
    if _open:
        sums_G, groups_N = _open[-1]
        sums_G.index_add_(0, groups_N[start : start + len(losses_n)], losses_n.detach().float())
