"""PackLoader: packs -> microbatches (interface first; the implementation follows)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from omnidata.microbatch import Microbatch


class PackLoader:
    """Yields ``microbatches_per_step`` Microbatch objects a step, on every rank.

    Args:
        data: a path, a Dataset, ``{"path", "split", "weight" | "epochs", "exclude"}``, or a list of those.
        global_batch: packs a step, over all ranks.
        max_tokens, max_images, seed, oversize, window_samples: as EpochPlan's.
        num_epochs: None goes on for ever.
        tail: what happens to the packs of an epoch's last, incomplete step.
    """

    def __init__(
        self,
        data: Any,
        *,
        global_batch: int,
        max_tokens: int = 4096,
        max_images: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        num_epochs: int | None = None,
        packs_per_microbatch: int = 1,
        image_cost: float = 221.0,
        tail: Literal["drop", "pad"] = "drop",
        oversize: Literal["refuse", "cut", "leave_out"] = "refuse",
        image_size: int | None = None,  # None: the manifest's
        decode_images: bool = True,
        augment: Any = None,
        on_error: Literal["raise", "skip"] = "raise",
        pin_memory: bool = False,
        **reading: Any,  # cache_dir, cache_bytes, checksum, retries, prefetch ...
    ) -> None:
        raise NotImplementedError

    microbatches_per_step: int  # ceil(global_batch / (world_size * packs_per_microbatch)), on every rank

    def __iter__(self) -> Iterator[Microbatch]:
        """From the current position to the end of the last epoch."""
        raise NotImplementedError

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Plans the whole epoch: about a second for a million samples."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """A few integers and the plan's digest: the position after the last step that was yielded whole."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, at any world size and number of workers."""
        raise NotImplementedError
