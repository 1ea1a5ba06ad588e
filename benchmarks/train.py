"""Training speed of our loop beside Hugging Face's Trainer, on a CPU.

    python benchmarks/train.py [--records 600] [--steps 10] [--json]

The same tiny model from the same weights, on the same samples step by step, so the loss curves must agree.
Texts are as uneven as those of instruction data: one to sixteen rounds, log-normal.

    ours, packed        packs from built shards
    ours, unpacked      the same documents, each a microbatch of its own
    HF Trainer          the step's samples in padded batches at random; a lazy dataset opens, resizes and
                        tokenizes every sample when it is asked for, as MiniCPM-V's own script does

Both loaders have one worker. CPU seconds count the workers too: on a busy machine trust their ratio.
On a GPU see benchmarks/train_gpu.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from corpus import make_photos, write_records
from PIL import Image

from omnidata import Dataset
from omnidata.conversation import to_conversation
from omnidata.loader.microbatch import Microbatch
from omnidata.loader.packs import PackLoader
from omnidata.render import Renderer
from omnidata.schema import IGNORE_INDEX, Record
from omnidata.text.tokenizer import load_tokenizer
from omnimodel import ImageProcessor
from pipelines import train
from pipelines.config import Recipe, parse_recipe
from pipelines.data import model_config
from pipelines.model import build_model
from pipelines.parallel import World

WARMUP_STEPS = 2
ACCUMULATION = 4  # microbatches a step, in every loop
IMAGE_SIZE = 64
MODEL = {
    "mm_vision_tower": "vit_tiny_patch16_224",
    "vision_kwargs": {"depth": 4, "embed_dim": 128, "num_heads": 4, "patch_size": 8, "img_size": IMAGE_SIZE},
    "image_size": IMAGE_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


# --- CPU ----------------------------------------------------------------------------------------------------


def make_corpus(folder: Path, *, records: int) -> Path:
    """Photographs, LLaVA JSON lines and the dataset built from them."""
    photos = make_photos(folder / "photos", min(records, 200))
    write_uneven_records(folder / "records.jsonl", records, photos)
    command = (
        *(sys.executable, "-m", "omnidata.cli", "build-shards", str(folder / "records.jsonl"), "--quiet"),
        *("--out", str(folder / "data"), "--image-root", str(folder / "photos"), "--max-length", "4096"),
        *("--tokenizer", tokenizer_of(folder), "--num-query", "16", "--image-size", str(IMAGE_SIZE)),
    )
    subprocess.run(command, check=True)
    return folder / "data"


def write_uneven_records(path: Path, count: int, photos: list[str]) -> None:
    """LLaVA records of 1 to 16 rounds: the rounds of several even ones joined."""
    write_records(path, 8 * count, photos)
    spare = iter([json.loads(line) for line in path.read_text().splitlines()])
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            record = next(spare)
            rounds = min(16, max(1, round(draw.lognormvariate(0.7, 0.9))))
            while len(record["conversations"]) < 2 * rounds:
                more = next(spare)["conversations"]
                more[0]["value"] = more[0]["value"].removeprefix("<image>\n")
                record["conversations"] += more
            record["conversations"] = record["conversations"][: 2 * rounds]
            file.write(json.dumps(record) + "\n")


def tokenizer_of(folder: Path) -> str:
    """A real Mistral tokenizer, from mistral-common's sentencepiece model."""
    import mistral_common

    from omnidata.text.tokenizer import prepare_tokenizer

    model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    prepare_tokenizer(model, folder / "tokenizer")
    return str(folder / "tokenizer")


def recipe_of(data: Path, run_dir: Path, *, steps: int, tokens: int) -> Recipe:
    """Constant learning rate, no warm-up: the same in both loops."""
    return parse_recipe(
        {
            "run": {"dir": str(run_dir), "device": "cpu"},
            "data": {
                "train": [{"path": str(data)}],
                "max_tokens": tokens,
                "global_batch": ACCUMULATION,
                "num_workers": 1,
            },
            "model": {"config": MODEL},
            "optim": {"lr": 1e-3, "schedule": "constant", "steps": steps},
            "checkpoint": {"every": 0},
            "log": {"every": 10**9, "tensorboard": False, "plot": False},
        }
    )


def run_ours(recipe: Recipe, *, unpacked: bool) -> dict[str, Any]:
    """Train with our loop; figures from its own metrics."""
    original = train.grouped
    if unpacked:
        train.grouped = lambda loader: ([d for m in step for d in documents(m)] for step in original(loader))
    try:
        with _Clock() as clock:
            train.train(recipe)
    finally:
        train.grouped = original
    lines = [json.loads(line) for line in (Path(recipe.run.dir) / "metrics.jsonl").read_text().splitlines()]
    steady = lines[WARMUP_STEPS:]
    seconds = sum(line["seconds"] for line in steady)
    return {
        "samples_per_s": sum(line["samples"] for line in steady) / seconds,
        "data_wait": sum(line["data_wait"] * line["seconds"] for line in steady) / seconds,
        "cpu_seconds": clock.cpu,
        "losses": [line["loss"] for line in lines],
    }


def documents(microbatch: Microbatch) -> Iterator[Microbatch]:
    """Every document of a pack as a microbatch of its own."""
    bounds = microbatch.cu_seqlens.tolist()
    for start, stop, key in zip(bounds, bounds[1:], microbatch.keys, strict=False):
        mine = (microbatch.image_positions >= start) & (microbatch.image_positions < stop)
        yield replace(
            microbatch,
            **{
                name: getattr(microbatch, name)[start:stop]
                for name in ("input_ids", "labels", "position_ids")
            },
            cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32),
            max_seqlen=stop - start,
            images=microbatch.images[mine],
            image_positions=microbatch.image_positions[mine] - start,
            keys=(key,),
        )


class LazyDataset(torch.utils.data.Dataset):
    """JSON lines; images opened, resized and text tokenized sample by sample."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = {}
        for line in (folder / "records.jsonl").read_text().splitlines():
            row = json.loads(line)
            self.rows[row["id"]] = row
        self.renderer = Renderer(load_tokenizer(folder / "tokenizer"), num_query=16)
        self.process = ImageProcessor(IMAGE_SIZE)

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
    """Takes its batches as they are given."""

    batches: list[list[str]]

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=self.batches, collate_fn=collate, num_workers=1
        )


class _StepTimes(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def run_trainer(recipe: Recipe, folder: Path, *, batches: list[list[str]]) -> dict[str, Any]:
    """Train with transformers.Trainer on the same samples."""
    config = model_config(recipe, Dataset(folder / "data").manifest)
    world = World(0, 1, torch.device("cpu"), "single")
    model = build_model(recipe, copy.deepcopy(config), world).model
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=len(batches) // ACCUMULATION,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=recipe.optim.lr,
        lr_scheduler_type="constant",
        adam_beta1=recipe.optim.betas[0],
        adam_beta2=recipe.optim.betas[1],
        weight_decay=0.0,
        max_grad_norm=recipe.optim.clip,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    times = _StepTimes()
    trainer = _Trainer(model=model, args=arguments, train_dataset=LazyDataset(folder), callbacks=[times])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.batches = batches
    with _Clock() as clock:
        trainer.train()
    seconds = times.ends[-1] - times.ends[WARMUP_STEPS]
    return {
        "samples_per_s": sum(len(batch) for batch in batches[WARMUP_STEPS * ACCUMULATION :]) / seconds,
        "cpu_seconds": clock.cpu,
        "losses": [float(line["loss"]) for line in trainer.state.log_history if "loss" in line],
    }


class _Clock:
    """CPU seconds of this process and of children that have ended."""

    def __enter__(self) -> _Clock:
        self.cpu = -self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu += self._now()

    @staticmethod
    def _now() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def batches_of(recipe: Recipe, folder: Path) -> list[list[str]]:
    """Ids of the records of our steps, each step's shuffled and dealt to ACCUMULATION batches."""
    dataset = Dataset(folder / "data")
    columns = (dataset.index[name].to_pylist() for name in ("key", "id"))
    id_of = dict(zip(*columns, strict=True))
    loader = PackLoader(
        [{"path": str(folder / "data"), "split": "train"}],
        global_batch=recipe.data.global_batch,
        max_tokens=recipe.data.max_tokens,
        seed=recipe.run.seed,
    )
    steps = (
        next_step for next_step, _ in zip(train.grouped(loader), range(recipe.optim.steps), strict=False)
    )
    batches, draw = [], random.Random(0)
    for step in steps:
        mine = [id_of[key] for microbatch in step for key in microbatch.keys]
        draw.shuffle(mine)
        batches += [mine[first::ACCUMULATION] for first in range(ACCUMULATION)]
    return batches


def compare_on_cpu(options: argparse.Namespace) -> dict[str, Any]:
    """All contenders, one after the other."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_corpus(folder, records=options.records)
        recipes = {
            run: recipe_of(data, folder / run, steps=options.steps, tokens=options.tokens)
            for run in ("packed", "unpacked")
        }
        results = {
            "ours, packed": run_ours(recipes["packed"], unpacked=False),
            "HF Trainer": run_trainer(
                recipes["packed"], folder, batches=batches_of(recipes["packed"], folder)
            ),
            "ours, unpacked": run_ours(recipes["unpacked"], unpacked=True),
        }
    ours = results["ours, packed"]
    for result in results.values():
        losses = result.pop("losses")
        result["max_loss_difference"] = max(
            abs(a - b) for a, b in zip(losses, ours.get("curve", losses), strict=True)
        )
        result["curve"] = losses
        result["ours_is_faster"] = ours["samples_per_s"] / result["samples_per_s"]
        result["ours_cpu_saving"] = result["cpu_seconds"] / ours["cpu_seconds"]
    for result in results.values():
        result["first_loss"], result["last_loss"] = result["curve"][0], result.pop("curve")[-1]
    return results


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=600)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=4096, help="of a pack")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = compare_on_cpu(options)
    if options.json:
        print(json.dumps(report))
        return
    for name, figures in report.items():
        print(name)
        for key, value in figures.items():
            print(f"    {key:<24} {value:.4g}")


if __name__ == "__main__":
    main()
