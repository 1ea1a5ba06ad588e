"""A LightningDataModule over a dataset's packs.

    data = PackModule("data/mix", max_tokens=8192, global_batch=64, num_epochs=2)
    trainer = Trainer(max_epochs=1, accumulate_grad_batches=data.microbatches_per_step(world_size), ...)
    trainer.fit(module, data)                 # module.training_step returns model(**batch).loss

All epochs of the plan are one of Lightning's. Its Trainer takes means over microbatches and ranks; the
batches' ``num_items_in_batch`` is such that these means are the step's loss. The state lies in Lightning's
checkpoints.
"""

from __future__ import annotations

from typing import Any

import lightning

from omnidata.adapters.stream import Stream, open_packs
from omnidata.schema import UserError


class PackModule(lightning.LightningDataModule):
    """This rank's batches for ``training_step``.

    Args:
        data: as PackLoader's.
        model: checked before the first step; see Stream. None: nothing is checked.
        settings: of PackLoader: max_tokens, global_batch, num_epochs, num_workers, ...
    """

    def __init__(self, data: Any, model: Any = None, **settings: Any) -> None:
        super().__init__()
        self._data, self._model, self._settings = data, model, {"num_epochs": 1, **settings}
        self._stream: Stream | None = None

    def microbatches_per_step(self, world_size: int = 1) -> int:
        """What ``accumulate_grad_batches`` must be; ``world_size``: ranks with microbatches of their own."""
        per_microbatch = self._settings.get("packs_per_microbatch", 1)
        return -(-self._settings["global_batch"] // (world_size * per_microbatch))

    def train_dataloader(self) -> Stream:
        """Called by the Trainer."""
        trainer = self.trainer
        # Ranks that share a microbatch, as ModelParallelStrategy's tensor-parallel ones do, count as one.
        replicas = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        world_size = replicas["num_replicas"]
        wanted = self.microbatches_per_step(world_size)
        problems = []
        if trainer.accumulate_grad_batches != wanted:
            problems.append(f"accumulate_grad_batches is {trainer.accumulate_grad_batches}, must be {wanted}")
        if trainer.max_epochs not in (1, None) and trainer.max_epochs > 0:
            problems.append(f"max_epochs is {trainer.max_epochs}, must be 1: num_epochs is PackModule's")
        if problems:
            raise UserError("the Trainer's settings do not fit the packs: " + "; ".join(problems))
        loader = open_packs(self._data, rank=replicas["rank"], world_size=world_size, **self._settings)
        self._stream = Stream(loader, self._model, averaged_over=wanted * world_size)
        return self._stream
