"""The mean of the weights over the run, each step counting less the longer ago it was (``optim.ema``).

    average <- decay x average + (1 - decay) x weight      after every update; at first average = weight

Kept in float32 beside the float32 masters, of the trained weights only, each rank for its own shards. Source
of the formula: Polyak and Juditsky 1992, in the exponential form of Tan and Le 2019 (decay 0.9999).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """Averages of ``model``'s trained parameters, which must be distributed already and in no forward."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        # FSDP shows gathered weights in their place while it needs them: these are the shards themselves.
        self._weights: dict[str, torch.Tensor] = {
            name: p for name, p in model.named_parameters() if p.requires_grad
        }
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._lerp = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Call after each update of the weights."""
        self._lerp(_local(self._averages), _local(self._weights), 0)

    @torch.no_grad()
    def restart(self) -> None:
        """The averages are the weights: they begin here."""
        for name, weight in self._weights.items():
            self._averages[name].copy_(weight)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameter name -> average: the tensors themselves, for saving and for loading into."""
        return self._averages

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model's weights are the averages; afterwards its own again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for module in self._sharded:  # what is still gathered of a forward would be used again
            module.reshard()
        for weight, average in zip(_local(self._weights), _local(self._averages), strict=True):
            kept = weight.clone()  # one at a time: no third copy of the model
            weight.copy_(average)
            average.copy_(kept)


def _local(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """This rank's parts."""
    return [x.to_local() if isinstance(x, DTensor) else x.data for x in tensors.values()]
