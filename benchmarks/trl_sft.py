"""TRL's SFTTrainer on our packs beside TRL alone, on the same pictures and words, at equal loss.

    python benchmarks/trl_sft.py [--records 240] [--batch 8] [--json]

One epoch each, on the CPU, of a tiny Qwen3-VL (tests/hosts.py) under one chat template. TRL alone: a
dataset of messages and pictures, ``assistant_only_loss``, padded batches of ``--batch``. Ours: packs of as
many tokens as such a batch holds on the average, through omnidata.adapters.hf. The learning rate is 0, so
the loss over all supervised tokens of the epoch must be the same number; the build of the shards is timed
by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import hosts
from corpus import WORDS, make_photos
from PIL import Image
from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer

from omnidata import Dataset, cli
from omnidata.adapters.hf import train_dataset

PARTS = (
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    f"{{% generation %}}{PARTS}{{% endgeneration %}}{{% else %}}{PARTS}{{% endif %}}\n{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
SIZE = (160, 120)


class Summing(SFTTrainer):
    """Adds up the loss of every supervised token."""

    total, tokens = 0.0, 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's, noted."""
        found = super().compute_loss(model, inputs, *args, **kwargs)
        count = int((inputs["labels"][:, 1:] != -100).sum())
        divided_by = kwargs.get("num_items_in_batch")
        loss = found[0] if isinstance(found, tuple) else found
        self.total += float(loss.detach()) * float(count if divided_by is None else divided_by)
        self.tokens += count
        return found


def make_records(folder: Path, number: int) -> list[dict[str, Any]]:
    """A photograph, a question, and an answer of log-normal length."""
    draw, photos = random.Random(0), make_photos(folder / "originals", 20)
    (folder / "photos").mkdir()
    for name in photos:
        with Image.open(folder / "originals" / name) as picture:
            picture.convert("RGB").resize(SIZE).save(folder / "photos" / f"{Path(name).stem}.jpg")
    records = []
    for i in range(number):
        length = min(200, max(4, int(draw.lognormvariate(3.2, 0.8))))
        answer = " ".join(draw.choice(WORDS) for _ in range(length))
        turns = [{"role": "user", "content": f"<image>What is in picture {i}?"}]
        turns.append({"role": "assistant", "content": answer})
        picture = f"{Path(photos[i % len(photos)]).stem}.jpg"
        records.append({"id": f"r{i}", "images": [picture], "messages": turns})
    return records


def build(folder: Path, records: list[dict[str, Any]]) -> dict[str, float]:
    """The model's folder and the shards; seconds of the build."""
    hosts.make(folder / "hosts", num_records=6)
    processor = AutoProcessor.from_pretrained(folder / "hosts" / "model", trust_remote_code=False)
    processor.chat_template = PLAIN
    processor.save_pretrained(folder / "hosts" / "model")
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    begun = time.perf_counter()
    command = ["build-shards", folder / "records.jsonl", "--image-root", folder / "photos", "--workers", 1]
    command += ["--model", folder / "hosts" / "model", "--out", folder / "data", "--quiet"]
    if cli.run([str(part) for part in command]):
        raise SystemExit("the build failed")
    return {"build_s": time.perf_counter() - begun}


def run(trainer: Summing, samples: int) -> dict[str, float]:
    """One epoch."""
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    return {
        "samples_per_s": samples / seconds,
        "loss": trainer.total / trainer.tokens,
        "supervised_tokens": trainer.tokens,
        "steps": trainer.state.global_step,
    }


def settings(folder: Path) -> dict[str, Any]:
    """The same for both."""
    return {
        **{"output_dir": str(folder / "run"), "learning_rate": 0.0, "use_cpu": True, "bf16": False},
        **{"activation_checkpointing": False, "save_strategy": "no", "report_to": "none"},
        **{"disable_tqdm": True, "logging_strategy": "no"},
    }


def ours(folder: Path, records: list[dict[str, Any]], batch: int) -> dict[str, float]:
    """SFTTrainer on our packs."""
    manifest, model = Dataset(folder / "data").manifest, hosts.load_model(str(folder / "hosts" / "model"))
    longest = max(row["n_tokens"] for row in Dataset(folder / "data").index.to_pylist())
    tokens = max(longest, batch * manifest.num_tokens // manifest.num_samples)
    data = train_dataset(str(folder / "data"), model, max_tokens=tokens, global_batch=1)
    args = SFTConfig(**settings(folder) | data.arguments(SFTConfig))
    trainer = Summing(
        model,
        args,
        train_dataset=data,
        data_collator=data.collator,
        callbacks=[data.callback],
        processing_class=AutoProcessor.from_pretrained(folder / "hosts" / "model", trust_remote_code=False),
    )
    return run(trainer, len(records))


def alone(folder: Path, records: list[dict[str, Any]], batch: int) -> dict[str, float]:
    """SFTTrainer on messages and pictures."""
    rows = [
        {
            "messages": [
                {**turn, "content": turn["content"].removeprefix("<image>")} for turn in record["messages"]
            ],
            "images": [str(folder / "photos" / name) for name in record["images"]],
        }
        for record in records
    ]
    data = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    processor = AutoProcessor.from_pretrained(folder / "hosts" / "model", trust_remote_code=False)
    processor.chat_template = processor.tokenizer.chat_template = MARKED
    args = SFTConfig(
        **settings(folder),
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        assistant_only_loss=True,
        max_length=None,
    )
    model = hosts.load_model(str(folder / "hosts" / "model"))
    return run(Summing(model, args, train_dataset=data, processing_class=processor), len(records))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=240)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "hosts").mkdir()
        records = make_records(folder, options.records)
        report: dict[str, Any] = build(folder, records)
        report["TRL on our packs"] = ours(folder, records, options.batch)
        report["TRL alone"] = alone(folder, records, options.batch)
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
