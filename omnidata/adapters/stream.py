"""Stream: the plan's microbatches of this rank, one after the other, as a model's forward takes them.

``len()`` counts what is left of all epochs; the state is the loader's, a few integers, exact at any number
of ranks and workers. A host may shard, shuffle or wrap nothing of it: it is dealt to ranks already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omnidata.adapters.batch import model_inputs
from omnidata.loader.packs import PackLoader


class Stream:
    """Iterates over ``model_inputs`` of a loader's microbatches.

    Args:
        loader: of this rank.
        token_types: see ``model_inputs``.
    """

    def __init__(self, loader: PackLoader, *, token_types: str | None = None) -> None:
        self.loader, self._token_types = loader, token_types

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for microbatch in self.loader:
            yield model_inputs(microbatch, token_types=self._token_types)

    def __len__(self) -> int:
        return self.loader.steps_left() * self.loader.microbatches_per_step

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step that was yielded whole."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; UserError if it is of other data or settings."""
        self.loader.load_state_dict(state)
