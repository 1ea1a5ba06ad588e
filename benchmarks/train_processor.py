"""Training a tiny Qwen3-VL: our packs and loop beside HF's Trainer with the processor in its collator.

    python benchmarks/train_processor.py [--records 600] [--steps 40] [--warmup 5] [--json]

Both have one core for the model and one worker for the data, the same random weights, AdamW, the same records
(one picture of 64×64 and four short turns each) and as many samples per step. The Trainer pads a batch of
them; its collator opens the pictures and calls ``apply_chat_template`` on every batch. Its labels are those
of our dataset, put beside the ids that the processor gives: so both learn the same tokens, and the losses of
the first batch are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_families import save  # noqa: E402

from omnidata import Dataset, cli  # noqa: E402
from omnidata.loader import PackLoader  # noqa: E402
from omnimodel.packed import class_for, config_of  # noqa: E402
from pipelines.data import model_inputs  # noqa: E402

CPU = torch.device("cpu")
LR, MAX_TOKENS = 1e-3, 2048


def prepare(folder: Path, records: int) -> None:
    """Corpus, model and dataset."""
    import subprocess

    shapes = [
        sys.executable,
        str(HERE.parent / "pipelines" / "demo" / "shapes.py"),
        "--out",
        str(folder / "raw"),
    ]
    counts = ["--num-train", str(records), "--num-heldout", "10"]
    subprocess.run([*shapes, *counts], check=True, stdout=subprocess.DEVNULL)
    model = save("qwen3_vl", folder / "model")
    arguments = ["build-shards", str(folder / "raw" / "train.jsonl"), "--image-root", str(folder / "raw")]
    arguments += ["--model", model, "--out", str(folder / "data"), "--workers", "1", "--quiet"]
    if cli.run(arguments):
        raise SystemExit("the dataset could not be built")


def run_ours(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Samples a second of packs, and the losses."""
    config = config_of(str(folder / "model"))
    model = (
        class_for(config).from_pretrained(str(folder / "model"), config=config, dtype=torch.float32).train()
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    loader = PackLoader(
        folder / "data", global_batch=1, max_tokens=MAX_TOKENS, num_workers=1, dummy_picture=True
    )
    samples, losses, begin = 0, [], 0.0
    for step, microbatch in enumerate(loader):
        if step == options.warmup:
            samples, begin = 0, time.perf_counter()
        loss = model(**model_inputs(microbatch, CPU)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        samples += len(microbatch.keys)
        if step + 1 == options.steps:
            return {"samples_per_s": samples / (time.perf_counter() - begin), "losses": losses}
    raise SystemExit("the corpus is too small for so many steps")


class Records(torch.utils.data.Dataset):
    """Messages with the paths of their pictures, and the labels of our dataset."""

    def __init__(self, folder: Path) -> None:
        dataset = Dataset(folder / "data")
        self.labels = {sample.key: sample.labels for sample in dataset}
        raw = {row["id"]: row for row in map(json.loads, (folder / "raw" / "train.jsonl").open())}
        ids = dataset.index["id"].to_pylist()
        self.rows = [(key, raw[id]) for key, id in zip(self.labels, ids, strict=True)]
        self.root = folder / "raw"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[list[dict[str, Any]], Any]:
        key, record = self.rows[position]
        pictures = iter([self.root / name for name in record.get("images", [])])
        messages = []
        for turn in record["messages"]:
            parts: list[dict[str, Any]] = []
            for part in _parts(turn["content"]):
                if part["type"] == "image":
                    path = next(pictures) if part.get("image") is None else self.root / part["image"]
                    part = {"type": "image", "image": Image.open(path).convert("RGB")}
                parts.append(part)
            messages.append({"role": turn["role"], "content": parts})
        return messages, self.labels[key]


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``"<image>text"`` as parts."""
    if isinstance(content, list):
        return content
    texts = content.split("<image>")
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        parts += [{"type": "image"}] * (number > 0)
        parts += [{"type": "text", "text": text}] if text else []
    return parts


class Collator:
    """What users write: the processor called on every batch."""

    def __init__(self, folder: Path) -> None:
        self.processor = transformers.AutoProcessor.from_pretrained(folder / "model", trust_remote_code=False)

    def __call__(self, samples: list[tuple[list[dict[str, Any]], Any]]) -> dict[str, torch.Tensor]:
        batch = self.processor.apply_chat_template(
            [messages for messages, _ in samples],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        labels = torch.full_like(batch["input_ids"], -100)
        for row, (_, mine) in enumerate(samples):
            length = int(batch["attention_mask"][row].sum())
            if length != len(mine):
                raise SystemExit(f"the processor gives {length} tokens, the dataset has {len(mine)}")
            labels[row, :length] = torch.from_numpy(mine.copy()).long()
        return dict(batch) | {"labels": labels}


class _Times(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """When each step ended."""
        self.ends.append(time.perf_counter())


def run_trainer(folder: Path, options: argparse.Namespace, *, batch: int) -> dict[str, Any]:
    """Samples a second of padded batches of ``batch`` samples, and the losses."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder / "model", dtype=torch.float32, trust_remote_code=False
    )
    times = _Times()
    trainer = transformers.Trainer(
        model=model,
        train_dataset=Records(folder),
        data_collator=Collator(folder),
        callbacks=[times],
        args=transformers.TrainingArguments(
            output_dir=str(folder / "trainer"),
            per_device_train_batch_size=batch,
            max_steps=options.steps,
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            max_grad_norm=0.0,
            optim="adamw_torch_fused",
            dataloader_num_workers=1,
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
        ),
    )
    trainer.train()
    seconds = times.ends[-1] - times.ends[options.warmup - 1]
    losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    return {"samples_per_s": batch * (options.steps - options.warmup) / seconds, "losses": losses}


def first_losses(folder: Path) -> tuple[float, float]:
    """Of one batch of eight samples: the class's own on the padded batch, and ours on the packed one."""
    records = Records(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder / "model", dtype=torch.float32, trust_remote_code=False
    )
    keys = [records.rows[position][0] for position in range(8)]
    with torch.no_grad():
        padded = model(**Collator(folder)([records[position] for position in range(8)])).loss.item()
        exclude = folder / "others.txt"
        exclude.write_text("".join(f"{key}\n" for key in records.labels if key not in keys))
        source = {"path": folder / "data", "exclude": str(exclude)}
        [pack] = PackLoader(source, global_batch=1, max_tokens=8192, num_epochs=1)
        config = config_of(str(folder / "model"))
        ours = class_for(config).from_pretrained(str(folder / "model"), config=config, dtype=torch.float32)
        packed = ours(**model_inputs(pack, CPU)).loss.item()
    return padded, packed


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, options.records)
        padded, packed = first_losses(folder)
        if abs(padded - packed) > 1e-4 * padded:
            raise SystemExit(f"the same samples lose {padded} padded and {packed} packed")
        ours = run_ours(folder, options)
        dataset = Dataset(folder / "data")
        batch = max(1, round(MAX_TOKENS * len(dataset) / dataset.manifest.num_tokens))
        theirs = run_trainer(folder, options, batch=batch)
    report = {
        "loss_of_eight_samples": {"padded": padded, "packed": packed},
        "batch": batch,
        "ours_samples_per_s": ours["samples_per_s"],
        "trainer_samples_per_s": theirs["samples_per_s"],
        "ratio": ours["samples_per_s"] / theirs["samples_per_s"],
        "last_losses": {"ours": ours["losses"][-1], "trainer": theirs["losses"][-1]},
    }
    print(json.dumps(report, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
