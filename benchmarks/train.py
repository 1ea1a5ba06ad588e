"""Training speed of our loop beside Hugging Face's Trainer: samples/s at equal loss curves.

    python benchmarks/train.py [--steps 18] [--batch 8] [--device cuda] [--json]

One tiny model in the proportions of stage 2 of the 12B (images through a frozen tower, a language model
that learns), the same weights, and step by step the same samples, so the loss curves must agree:

    ours, packed        packs from built shards
    HF Trainer          the step's samples in padded batches of --batch, in random order; a lazy dataset
                        opens, resizes and tokenizes every sample when it is asked for, as MiniCPM-V's own
                        finetune.py does (which takes batches of 2 and no worker; LLaVA's takes 16)
    ours, unpacked      the same documents, each a microbatch of its own

Texts are as long as in benchmarks/plan.py: log-normal, around 200 tokens. Every contender runs in
a process of its own, with as many loader workers and torch's own number of threads. CPU seconds count the
workers too: on a busy machine trust their ratio. On a GPU the model is one of 1.1 billion parameters, packs
have 8,192 tokens and a step four of them. See also benchmarks/train_gpu.py.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import transformers
from corpus import WORDS, make_photos, write_uneven_records
from PIL import Image

from omnidata import Dataset
from omnidata.conversation import to_conversation
from omnidata.loader.microbatch import Microbatch
from omnidata.loader.packs import PackLoader
from omnidata.render import Renderer
from omnidata.schema import IGNORE_INDEX, Record
from omnidata.text.tokenizer import load_tokenizer, prepare_tokenizer
from omnimodel import ImageProcessor
from pipelines import train
from pipelines.config import Recipe, parse_recipe
from pipelines.data import model_config
from pipelines.model import build_model
from pipelines.parallel import World

WARMUP_STEPS = 3
TOKENS_PER_WORD = 1.9  # of the corpus's WORDS by the tokenizer below, with the turns' headers
NUM_QUERY = 64
# In proportion: the frozen tower takes about a third of a sample's FLOPs, as in the 12B at 400 tokens.
TINY = {
    "mm_vision_tower": "vit_tiny_patch16_224",
    "vision_kwargs": {"depth": 8, "embed_dim": 192, "num_heads": 3, "patch_size": 14, "img_size": 224},
    "image_size": 224,
    "resampler_heads": 4,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BILLION = {  # 1.1 with its tower
    "mm_vision_tower": "vit_large_patch14_clip_224",
    "vision_kwargs": {"img_size": 448},
    "image_size": 448,
    "vocab_size": 32009,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}


@dataclass(frozen=True)
class Setup:
    """What trains, on what."""

    device: str
    dtype: str
    model: dict[str, Any]
    max_tokens: int  # of a pack
    packs: int  # a step
    workers: int


SETUPS = {
    "cpu": Setup("cpu", "float32", TINY, max_tokens=4096, packs=2, workers=1),
    "cuda": Setup("cuda", "bfloat16", BILLION, max_tokens=8192, packs=4, workers=14),
}


# --- the data ---------------------------------------------------------------------------------------------


def make_corpus(folder: Path, *, records: int, image_size: int, options: Sequence[str] = ()) -> None:
    """Photographs, LLaVA JSON lines and the dataset built from them."""
    photos = make_photos(folder / "photos", min(records, 200))
    write_uneven_records(folder / "records.jsonl", records, photos, tokens_per_word=TOKENS_PER_WORD)
    make_tokenizer(folder)
    command = (
        *(sys.executable, "-m", "omnidata.cli", "build-shards", str(folder / "records.jsonl"), "--quiet"),
        *("--out", str(folder / "data"), "--image-root", str(folder / "photos"), "--max-length", "2048"),
        *("--tokenizer", str(folder / "tokenizer"), "--num-query", str(NUM_QUERY)),
        *("--image-size", str(image_size), *options),
    )
    subprocess.run(command, check=True, stdout=sys.stderr)


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of about a thousand words: a real one's vocabulary would dwarf this model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS), " ".join(WORDS).title()], trainer)
    tokenizer = transformers.TokenizersBackend(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "plain")
    prepare_tokenizer(folder / "plain", folder / "tokenizer", chat_template="zephyr")


def recipe_of(folder: Path, name: str, setup: Setup, *, steps: int) -> Recipe:
    """Constant learning rate, no warm-up: the same in both loops."""
    return parse_recipe(
        {
            "run": {"dir": str(folder / name), "device": setup.device, "dtype": setup.dtype},
            "data": {
                "train": [{"path": str(folder / "data")}],
                "max_tokens": setup.max_tokens,
                "global_batch": setup.packs,
                "num_workers": setup.workers,
            },
            "model": {"config": setup.model, "freeze": ["vision_tower"]},
            "optim": {"lr": 1e-3, "schedule": "constant", "steps": steps},
            "checkpoint": {"every": 0},
            "log": {"every": 10**9, "tensorboard": False, "plot": False},
        }
    )


# --- ours -------------------------------------------------------------------------------------------------


def run_ours(folder: Path, options: argparse.Namespace, *, unpacked: bool) -> dict[str, Any]:
    """Train with our loop, which asks for the next step's microbatches when a step has ended."""
    recipe = recipe_of(folder, f"ours-{unpacked}", SETUPS[options.device], steps=options.steps)
    original, ends = train.grouped, []

    def timed(loader: PackLoader) -> Iterator[list[Microbatch]]:
        for step in original(loader):
            yield [d for m in step for d in documents(m)] if unpacked else step
            ends.append(time.perf_counter())

    train.grouped = timed
    with _Clock() as clock:
        train.train(recipe)
    lines = [json.loads(line) for line in (Path(recipe.run.dir) / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(line["seconds"] for line in lines[WARMUP_STEPS:])
    return {
        **rate([line["samples"] for line in lines], ends),
        "data_wait": sum(line["data_wait"] * line["seconds"] for line in lines[WARMUP_STEPS:]) / seconds,
        "padding": 0.0,
        "cpu_seconds": clock.cpu,
        "losses": [line["loss"] for line in lines],
    }


def rate(samples: list[int], ends: list[float]) -> dict[str, float]:
    """Samples a second of the steps between the warm-up and the last one, whose end nobody notes."""
    timed = samples[WARMUP_STEPS : len(samples) - 1]
    seconds = ends[len(samples) - 2] - ends[WARMUP_STEPS - 1]
    return {"samples_per_s": sum(timed) / seconds, "timed_steps": len(timed)}


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


# --- Hugging Face's Trainer -------------------------------------------------------------------------------


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
        model_config(recipe, Dataset(folder / "data").manifest),
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
    with _Clock() as clock:
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
    steps = (step for step, _ in zip(train.grouped(loader), range(recipe.optim.steps), strict=False))
    samples = [[id_of[key] for microbatch in step for key in microbatch.keys] for step in steps]
    return samples, {id: length for _, id, length in rows}


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


# --- side by side -----------------------------------------------------------------------------------------

CONTENDERS = {
    "ours, packed": lambda folder, options: run_ours(folder, options, unpacked=False),
    "HF Trainer": run_trainer,
    "ours, unpacked": lambda folder, options: run_ours(folder, options, unpacked=True),
}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All contenders, one after the other, and what ours gains over each."""
    with tempfile.TemporaryDirectory() as name:
        image_size = SETUPS[options.device].model["image_size"]
        make_corpus(Path(name), records=options.records, image_size=image_size)
        results = {contender: in_a_process(contender, Path(name)) for contender in options.contenders}
    ours = next(iter(results.values()))
    curve = np.array(ours["losses"])
    for result in results.values():
        losses = np.array(result.pop("losses"))
        result["first_loss"], result["last_loss"] = losses[0], losses[-1]
        result["mean_loss_difference"] = np.abs(losses - curve).mean()
        result["max_loss_difference"] = np.abs(losses - curve).max()
        result["ours_is_faster"] = ours["samples_per_s"] / result["samples_per_s"]
        result["ours_cpu_saving"] = result["cpu_seconds"] / ours["cpu_seconds"]
    return results


def in_a_process(contender: str, folder: Path) -> dict[str, Any]:
    """Denormals, allocator and threads of one are no concern of the next."""
    command = [sys.executable, __file__, *sys.argv[1:], "--run", contender, str(folder)]
    print(contender, "...", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads((folder / "result.json").read_text())


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=400)
    parser.add_argument("--steps", type=int, default=WARMUP_STEPS + 16)
    parser.add_argument("--device", choices=list(SETUPS), default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="of the Trainer, about")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        contender, folder = options.run[0], Path(options.run[1])
        (folder / "result.json").write_text(json.dumps(CONTENDERS[contender](folder, options)))
        return
    report = compare(options)
    if options.json:
        print(json.dumps(report))
        return
    for name, figures in report.items():
        print(name)
        for key, value in figures.items():
            print(f"    {key:<24} {value:.4g}")


if __name__ == "__main__":
    main()
