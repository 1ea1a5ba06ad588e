"""Train a vision-language model on a dataset's packs with Hugging Face's Trainer.

python examples/hf_trainer.py data/qwen Qwen3-VL-4B-Instruct runs/hf [--resume]
torchrun --nproc-per-node 8 examples/hf_trainer.py data/qwen Qwen3-VL-4B-Instruct runs/hf
"""

import sys

from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from omnidata.adapters.hf import train_dataset

PACKS = {"max_tokens": 8192, "global_batch": 8, "num_epochs": 3}


def main(
    dataset: str, folder: str, run: str, *options: str, packs: dict = PACKS, **settings: object
) -> Trainer:
    """``settings`` are TrainingArguments beside those that the packs ask for."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
    data = train_dataset(dataset, model, **packs)
    settings = {"learning_rate": 1e-5, "save_steps": 100} | settings
    trainer = Trainer(
        model,
        TrainingArguments(run, **data.arguments(), **settings),
        train_dataset=data,
        data_collator=data.collator,
        callbacks=[data.callback],
    )
    trainer.train(resume_from_checkpoint="--resume" in options)
    trainer.save_model(f"{run}/final")
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
