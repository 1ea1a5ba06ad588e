"""A text dataset in torchtitan's Trainer: torchrun --nproc-per-node 4 examples/torchtitan_job.py DATA RUN

Start it again with another number of ranks that divides PACKS, and it goes on from the last checkpoint.
"""

import sys

from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.config import TrainingConfig
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

from omnidata.adapters.torchtitan import PackDataLoader

PACKS, SEQ_LEN = 64, 2048  # packs per step, tokens of a pack


def job(dataset: str, run: str, steps: int = 1000) -> Trainer.Config:
    config = llama3_debugmodel()
    config.dump_folder = run
    config.hf_assets_path = f"{dataset}/tokenizer"
    config.dataloader = PackDataLoader.Config(dataset_path=dataset, global_batch=PACKS)
    config.training = TrainingConfig(
        local_batch_size=1, global_batch_size=PACKS, seq_len=SEQ_LEN, steps=steps
    )
    config.checkpoint = CheckpointManager.Config(enable=True, interval=100)
    config.validator.enable = False
    return config


if __name__ == "__main__":
    trainer = job(*sys.argv[1:3]).build()
    trainer.train()
    trainer.close()
