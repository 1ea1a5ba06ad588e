"""The same with TRL's SFTTrainer: packed, masked picture batches, which its own data path refuses.

python examples/trl_sft.py data/qwen Qwen3-VL-4B-Instruct runs/trl [--resume]
"""

import sys

from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from omnidata.adapters.hf import train_dataset

PACKS = {"max_tokens": 8192, "global_batch": 8, "num_epochs": 3}


def main(
    dataset: str, folder: str, run: str, *options: str, packs: dict = PACKS, **settings: object
) -> SFTTrainer:
    """``settings`` are SFTConfig's beside those that the packs ask for."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
    data = train_dataset(dataset, model, **packs)
    settings = {"learning_rate": 1e-5, "save_steps": 100} | settings
    trainer = SFTTrainer(
        model,
        SFTConfig(run, **data.arguments(SFTConfig), **settings),
        train_dataset=data,
        data_collator=data.collator,
        callbacks=[data.callback],
        processing_class=AutoProcessor.from_pretrained(folder),
    )
    trainer.train(resume_from_checkpoint="--resume" in options)
    trainer.save_model(f"{run}/final")
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
