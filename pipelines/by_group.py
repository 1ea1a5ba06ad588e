"""Loss, tokens and samples of a step by group (log.by): per source, per task, per dataset of the blend.

    {"step": 40, "loss": 1.92, …, "loss/ocr.json": 2.31, "samples/ocr.json": 3, "tokens/ocr.json": 900, …}

Losses are summed on the device and read where the step's loss is read, so the step waits for nothing more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch

from omnidata.loader.microbatch import Microbatch
from omnimodel.tally import tallying

from .parallel import World, to_device


class GroupCounts:
    """What this rank did in one step, or one evaluation, for each group; nothing without names."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = names
        self._losses = torch.zeros(len(names), dtype=torch.float32, device=device) if names else None
        self._counts = np.zeros((3, len(names)))  # samples, tokens, supervised tokens

    def watching(self, microbatch: Microbatch) -> contextlib.AbstractContextManager[None]:
        """Around the forward of a microbatch: its losses are added to its groups' sums."""
        if self._losses is None or microbatch.groups is None or microbatch.supervised_groups is None:
            return contextlib.nullcontext()
        groups, num_groups = microbatch.groups.numpy(), len(self._names)
        lengths = np.diff(microbatch.cu_seqlens.numpy())[: len(groups)]  # a dummy is nobody's
        supervised = np.bincount(microbatch.supervised_groups.numpy(), minlength=num_groups)
        self._counts += [
            np.bincount(groups, minlength=num_groups),
            np.bincount(groups, weights=lengths, minlength=num_groups),
            supervised,
        ]
        return tallying(self._losses, to_device(microbatch.supervised_groups, self._losses.device))

    def line(self, world: World, *, prefix: str = "") -> dict[str, float]:
        """Figures over all ranks, of groups that had any. Call on every rank, where the loss is read."""
        if self._losses is None:
            return {}
        totals = world.sum([*self._counts.ravel().tolist(), *self._losses.tolist()])
        samples, tokens, supervised, losses = np.array(totals).reshape(4, -1).tolist()
        line: dict[str, float] = {}
        was_tallied = any(losses)  # not by a head that is none of omnimodel/loss.py's
        for number, name in enumerate(self._names):
            if supervised[number] and was_tallied:
                line[f"{prefix}loss/{name}"] = losses[number] / supervised[number]
            if samples[number] and not prefix:
                line[f"samples/{name}"] = samples[number]
                line[f"tokens/{name}"] = tokens[number]
                line[f"supervised_tokens/{name}"] = supervised[number]
        return line
