"""A dataset's packs as torchtitan's BaseDataLoader; resumed at another number of ranks, too.

    config.dataloader = PackDataLoader.Config(dataset_path="data/text", global_batch=64)
    config.training   = TrainingConfig(local_batch_size=1, global_batch_size=64, seq_len=8192, ...)

A row is one pack, padded to ``seq_len``: ``input`` and ``positions`` int64 ``[B, seq_len]``, positions
restarting at every document, and labels that are shifted already. torchtitan's attention ("flex", "varlen")
keeps documents apart by their positions. For its decoders of text: a dataset with pictures is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torchtitan.components.dataloader import BaseDataLoader

from omnidata.loader.loader import PackLoader
from omnidata.loader.microbatch import Microbatch
from omnidata.schema import IGNORE_INDEX, UserError


class PackDataLoader(BaseDataLoader):
    """Built by torchtitan's Trainer from its Config."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """``dataset_path``: the dataset."""

        split: str = "train"
        global_batch: int = 0  # packs per step over all ranks: torchtitan's training.global_batch_size
        num_epochs: int | None = None  # None goes on for ever
        seed: int = 0
        num_workers: int = 0

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        local_batch_size: int,
        tokenizer: Any = None,  # torchtitan's own; nothing is tokenized with it
        snapshot_every_n_steps: int | None = None,  # the state is exact at every step
    ) -> None:
        self._rows, self._seq_len = local_batch_size, seq_len
        global_batch = config.global_batch or local_batch_size * dp_world_size
        self.loader = PackLoader(
            {"path": config.dataset_path, "split": config.split},
            global_batch=global_batch,
            max_tokens=seq_len,
            num_epochs=config.num_epochs,
            rank=dp_rank,
            world_size=dp_world_size,
            seed=config.seed,
            num_workers=config.num_workers,
        )
        if self.loader.microbatches_per_step % local_batch_size or global_batch % dp_world_size:
            raise UserError(
                f"global_batch {global_batch} does not divide by {dp_world_size} ranks of {local_batch_size} "
                "rows"
            )
        dataset = self.loader.plan.sources[0].index.dataset
        if dataset.manifest.num_images:
            raise UserError(f"{dataset.path} has pictures, and torchtitan's decoders take text only")
        size, built = tokenizer and tokenizer.get_vocab_size(), dataset.manifest.vocab_size
        if size not in (None, built):
            raise UserError(
                f"torchtitan's tokenizer has {size} tokens, and {dataset.path} was built with {built}: let "
                f"hf_assets_path be {dataset.path}/tokenizer, or build the dataset with the model's tokenizer"
            )

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for microbatch in self.loader:
            rows.append(self._row(microbatch))
            if len(rows) == self._rows:
                inputs, positions, labels = map(torch.stack, zip(*rows, strict=True))
                rows = []
                yield {"input": inputs, "positions": positions}, labels

    def _row(self, microbatch: Microbatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Padded as one more document, which nothing supervises."""
        positions = microbatch.position_ids
        positions = positions if positions.ndim == 1 else positions[0]
        rest = self._seq_len - len(positions)
        padded = torch.cat([positions, torch.arange(rest)])
        inputs, labels = (0, IGNORE_INDEX)
        return (
            F.pad(microbatch.input_ids, (0, rest), value=inputs),
            padded,
            F.pad(microbatch.labels, (0, rest), value=labels),
        )

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last step that was yielded whole, the same on every rank."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """At any number of ranks. torchtitan gives an empty state where a checkpoint has none."""
        if state:
            self.loader.load_state_dict(state)
