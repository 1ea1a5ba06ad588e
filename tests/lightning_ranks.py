"""Two ranks of Lightning's ModelParallelStrategy, each of which prints the ids that it would train on.

python tests/lightning_ranks.py DATA DATA_PARALLEL_SIZE TENSOR_PARALLEL_SIZE
"""

import json
import sys

import hosts
import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from omnidata.adapters.lightning import PackModule


class Module(lightning.LightningModule):
    """Trains one number on nothing."""

    def __init__(self, rows):
        super().__init__()
        self.weight, self.rows = torch.nn.Parameter(torch.ones(1)), rows

    def configure_model(self):
        """ModelParallelStrategy wants it."""

    def training_step(self, batch):
        self.rows.append(int(batch["input_ids"].sum()))
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(data, data_parallel, tensor_parallel):
    packs, rows = PackModule(data, **hosts.SETTINGS), []
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(int(data_parallel), int(tensor_parallel)),
        accumulate_grad_batches=packs.microbatches_per_step(int(data_parallel)),
        max_epochs=1,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Module(rows), packs)
    print("\nROWS " + json.dumps(rows) + "\n", end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
