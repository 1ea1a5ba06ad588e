"""Hugging Face's Trainer on the samples of our steps, for benchmarks/train.py."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import transformers
from PIL import Image
from train_setup import NUM_QUERY, SETUPS, Clock, rate, recipe_of

from omnidata import Dataset
from omnidata.conversation import to_conversation
from omnidata.loader.loader import PackLoader
from omnidata.render import Renderer
from omnidata.schema import IGNORE_INDEX, Record
from omnidata.text.tokenizer import load_tokenizer
from omnimodel import ImageProcessor
from pipelines import train
from pipelines.config import Recipe
from pipelines.data import model_config
from pipelines.model import build_model
from pipelines.parallel import World


class LazyDataset(torch.utils.data.Dataset):
    """JSON lines; images opened, resized and text tokenized sample by sample."""

    def __init__(self, folder: Path, *, image_size: int) -> None:
        self.folder = folder
        self.rows = {}
        for line in (folder / "records.jsonl").read_text().splitlines():
            row = json.loads(line)
            self.rows[row["id"]] = row
        self.renderer = Renderer(load_tokenizer(folder / "tokenizer"), num_query=NUM_QUERY)
        self.process = ImageProcessor(image_size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, id: str) -> dict[str, torch.Tensor]:
        row = self.rows[id]
        rendered = self.renderer.render(to_conversation(Record("", "", row["id"], row)))
        image = self.process(Image.open(self.folder / "photos" / row["image"]))
        ids, labels = (torch.from_numpy(x).long() for x in (rendered.input_ids, rendered.labels))
        return {"input_ids": ids, "labels": labels, "pixel_values": image}


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest."""

    def pad(name: str, value: int) -> torch.Tensor:
        rows = [sample[name] for sample in samples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    ids = pad("input_ids", 0)
    return {
        "input_ids": ids,
        "labels": pad("labels", IGNORE_INDEX),
        "attention_mask": (torch.arange(ids.shape[1])[None] < lengths[:, None]).long(),
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
    }


class _Trainer(transformers.Trainer):
    """Takes its batches as they are given, a step's at a time."""

    steps: list[list[list[str]]]
    workers: int

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        batches = [batch for step in self.steps for batch in step]
        return torch.utils.data.DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
        )


class _StepTimes(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def run_trainer(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train with transformers.Trainer on the same samples."""
    setup = SETUPS[options.device]
    recipe = recipe_of(folder, "trainer", setup, steps=options.steps)
    steps, lengths = samples_of(recipe, folder)
    draw = random.Random(0)
    for step in steps:
        draw.shuffle(step)
    count = max(1, round(np.mean([len(step) for step in steps]) / options.batch))
    batches = [[step[first::count] for first in range(count)] for step in steps]
    model = build_model(
        recipe,
        model_config(recipe.model, Dataset(folder / "data")),
        World(0, 1, torch.device(setup.device), "single"),
    ).model
    times = _StepTimes()
    trainer = _Trainer(
        model=model,
        args=arguments_of(recipe, folder, accumulation=count),
        train_dataset=LazyDataset(folder, image_size=setup.model["image_size"]),
        callbacks=[times],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.steps, trainer.workers = batches, setup.workers
    with Clock() as clock:
        trainer.train()
    padded = sum(len(batch) * max(lengths[id] for id in batch) for step in batches for batch in step)
    return {
        **rate([len(step) for step in steps], times.ends),
        "batch": np.mean([len(batch) for step in batches for batch in step]),
        "padding": 1 - sum(lengths[id] for step in steps for id in step) / padded,
        "cpu_seconds": clock.cpu,
        "losses": [float(line["loss"]) for line in trainer.state.log_history if "loss" in line],
    }


def arguments_of(recipe: Recipe, folder: Path, *, accumulation: int) -> transformers.TrainingArguments:
    """The recipe's optimizer and clipping, in the Trainer's words."""
    return transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=recipe.optim.steps,
        gradient_accumulation_steps=accumulation,
        learning_rate=recipe.optim.lr,
        lr_scheduler_type="constant",
        adam_beta1=recipe.optim.betas[0],
        adam_beta2=recipe.optim.betas[1],
        weight_decay=0.0,
        max_grad_norm=recipe.optim.clip,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=recipe.run.device == "cpu",
        bf16=recipe.run.dtype == "bfloat16",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def samples_of(recipe: Recipe, folder: Path) -> tuple[list[list[str]], dict[str, int]]:
    """Ids of the records of each of our steps, and the number of tokens of every record."""
    columns = (Dataset(folder / "data").index[name].to_pylist() for name in ("key", "id", "n_tokens"))
    rows = list(zip(*columns, strict=True))
    id_of = {key: id for key, id, _ in rows}
    loader = PackLoader(
        [{"path": str(folder / "data"), "split": "train"}],
        global_batch=recipe.data.global_batch,
        max_tokens=recipe.data.max_tokens,
        seed=recipe.run.seed,
    )
    steps = itertools.islice(train.grouped(loader), recipe.optim.steps)
    samples = [[id_of[key] for microbatch in step for key in microbatch.keys] for step in steps]
    return samples, {id: length for _, id, length in rows}
