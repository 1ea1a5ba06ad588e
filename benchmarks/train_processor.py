"""Training a tiny Qwen3-VL: our packs and loop beside HF's Trainer with the processor in its collator.

    python benchmarks/train_processor.py [--corpora photographs] [--records 1200] [--steps 40] [--json]

Two corpora:

    shapes        one picture of 64×64 and four short turns each: nearly even, so batches hold little padding
    photographs   photographs of 0.3 to 3 megapixels, log-normal lengths around 200 tokens: as
                  benchmarks/train.py's, for this processor

Three contenders, each with one core for the model and one worker for the data, the same random weights,
AdamW, the same records, and as many samples per step on average:

    ours                    packs from built shards
    trainer                 HF's Trainer as it comes: random batches, padded
    trainer, by length      the same with train_sampling_strategy="group_by_length"

The Trainer's collator opens the pictures and calls ``apply_chat_template`` on every batch. Its labels are
those of our dataset, put beside the ids that the processor gives: so all learn the same tokens, and the
losses of eight samples, padded and packed, are compared before anything is timed. Tokens a second count those
of conversations and pictures, no padding: order by length begins with the longest, so samples per second of a
few steps would not do it justice. On a busy machine trust seconds of CPU (of the training process).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from corpus import make_photos, write_uneven_records  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_families import save  # noqa: E402
from transformers.trainer_pt_utils import LengthGroupedSampler  # noqa: E402

from omnidata import Dataset, cli  # noqa: E402
from omnidata.conversation import to_conversation  # noqa: E402
from omnidata.loader import PackLoader  # noqa: E402
from omnidata.schema import ImagePart, Record  # noqa: E402
from omnimodel.packed import class_for, config_of  # noqa: E402
from pipelines.data import model_inputs  # noqa: E402

CPU = torch.device("cpu")
LR = 1e-3
TOKENS_PER_WORD = 5.6  # of the corpus's words by the tiny processor's tokenizer, with the turns' headers
WARMUP = 5  # steps that are not timed
MAX_TOKENS = {"shapes": 2048, "photographs": 4096}  # of a pack: about fourteen samples each


@dataclass(frozen=True)
class Task:
    """What is trained on: one corpus, its dataset and the model, all in one folder."""

    folder: Path
    corpus: str
    steps: int

    @property
    def max_tokens(self) -> int:
        """Of a pack."""
        return MAX_TOKENS[self.corpus]

    @property
    def records(self) -> Path:
        """JSON lines; pictures are named from this file's folder."""
        return self.folder / "raw" / "train.jsonl"

    @property
    def model(self) -> str:
        """The model's folder."""
        return str(self.folder / "model")


def prepare(task: Task, records: int) -> None:
    """Corpus, model and dataset."""
    raw = task.folder / "raw"
    if task.corpus == "shapes":
        shapes = [sys.executable, str(HERE.parent / "pipelines" / "demo" / "shapes.py"), "--out", str(raw)]
        counts = ["--num-train", str(records), "--num-heldout", "10"]
        subprocess.run([*shapes, *counts], check=True, stdout=subprocess.DEVNULL)
    else:
        photos = make_photos(raw, min(records, 200))
        write_uneven_records(task.records, records, photos, tokens_per_word=TOKENS_PER_WORD)
    save("qwen3_vl", task.model)
    arguments = ["build-shards", str(task.records), "--image-root", str(raw), "--model", task.model]
    arguments += ["--out", str(task.folder / "data"), "--max-length", "4096"]
    if cli.run([*arguments, "--workers", "1", "--quiet"]):
        raise SystemExit("the dataset could not be built")


# --- contenders -------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """What each step took: when it ended, and its samples, tokens and seconds of waiting for data."""

    ends: list[float]
    samples: list[int]
    tokens: list[int]
    waits: list[float]
    cpu: list[float]  # seconds of CPU of the training process, its worker's not, at the end of each step

    def end(self) -> None:
        """Of a step."""
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def report(self, losses: Sequence[float]) -> dict[str, float]:
        """Rates of the steps behind the warm-up."""
        timed = slice(WARMUP, None)
        seconds = self.ends[-1] - self.ends[WARMUP - 1]
        return {
            "samples_per_s": sum(self.samples[timed]) / seconds,
            "tokens_per_s": sum(self.tokens[timed]) / seconds,
            "tokens_per_cpu_s": sum(self.tokens[timed]) / (self.cpu[-1] - self.cpu[WARMUP - 1]),
            "waiting_for_data": sum(self.waits[timed]) / seconds,
            "last_loss": losses[-1],
        }


def run_ours(task: Task) -> dict[str, float]:
    """Packs."""
    config = config_of(task.model)
    model = class_for(config).from_pretrained(task.model, config=config, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    data = {"max_tokens": task.max_tokens, "global_batch": 1}
    loader = iter(PackLoader(task.folder / "data", **data, num_workers=1, dummy_picture=True))
    steps, losses = Steps([], [], [], [], []), []
    for _ in range(task.steps):
        begin = time.perf_counter()
        microbatch = next(loader)
        steps.waits.append(time.perf_counter() - begin)
        loss = model(**model_inputs(microbatch, CPU)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        steps.samples.append(len(microbatch.keys))
        steps.tokens.append(int(microbatch.cu_seqlens[len(microbatch.keys)]))
        steps.end()
    return steps.report(losses)


class Records(torch.utils.data.Dataset):
    """Messages with their pictures, and the labels of our dataset."""

    def __init__(self, task: Task) -> None:
        dataset = Dataset(task.folder / "data")
        self.labels = {sample.key: sample.labels for sample in dataset}
        raw = {row["id"]: row for row in map(json.loads, task.records.open())}
        ids = dataset.index["id"].to_pylist()
        self.rows = [(key, raw[id]) for key, id in zip(self.labels, ids, strict=True)]
        self.lengths = [len(labels) for labels in self.labels.values()]
        self.root = task.records.parent

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[list[dict[str, Any]], Any]:
        key, record = self.rows[position]
        conversation = to_conversation(Record("", "", record["id"], record))
        pictures = [Image.open(self.root / image.path).convert("RGB") for image in conversation.images]
        messages = []
        for message in conversation.messages:
            parts = [
                {"type": "image", "image": pictures[part.image]}
                if isinstance(part, ImagePart)
                else {"type": "text", "text": part.text}
                for part in message.parts
            ]
            messages.append({"role": message.role, "content": parts})
        return messages, self.labels[key]


class Collator:
    """What users write: the processor called on every batch."""

    def __init__(self, task: Task) -> None:
        self.processor = transformers.AutoProcessor.from_pretrained(task.model, trust_remote_code=False)

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


class _Trainer(transformers.Trainer):
    """As it comes, with the lengths that order by length needs, and a watch."""

    taken: Steps

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy == "group_by_length":
            return LengthGroupedSampler(self.args.train_batch_size, lengths=self.train_dataset.lengths)
        return super()._get_train_sampler(train_dataset)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.taken.waits.append(time.perf_counter() - begin)
        self.taken.samples.append(sum(len(batch["input_ids"]) for batch in batches))
        self.taken.tokens.append(sum(int(batch["attention_mask"].sum()) for batch in batches))
        return batches, count


class _Ends(transformers.TrainerCallback):
    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.end()


def run_trainer(task: Task, *, order: str) -> dict[str, float]:
    """Padded batches of as many samples as our packs hold on average."""
    dataset = Dataset(task.folder / "data")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        task.model, dtype=torch.float32, trust_remote_code=False
    )
    taken = Steps([], [], [], [], [])
    trainer = _Trainer(
        model=model,
        train_dataset=Records(task),
        data_collator=Collator(task),
        callbacks=[_Ends(taken)],
        args=transformers.TrainingArguments(
            output_dir=str(task.folder / "trainer"),
            per_device_train_batch_size=max(
                1, round(task.max_tokens * len(dataset) / dataset.manifest.num_tokens)
            ),
            train_sampling_strategy=order,
            max_steps=task.steps,
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
    trainer.taken = taken
    trainer.train()
    return taken.report([float(row["loss"]) for row in trainer.state.log_history if "loss" in row])


CONTENDERS = {
    "ours": run_ours,
    "trainer": lambda task: run_trainer(task, order="random"),
    "trainer, by length": lambda task: run_trainer(task, order="group_by_length"),
}

# --- side by side -----------------------------------------------------------------------------------------


def first_losses(task: Task) -> dict[str, float]:
    """Of one batch of eight samples: the class's own on the padded batch, and ours on the packed one."""
    records = Records(task)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        task.model, dtype=torch.float32, trust_remote_code=False
    )
    keys = [records.rows[position][0] for position in range(8)]
    with torch.no_grad():
        padded = model(**Collator(task)([records[position] for position in range(8)])).loss.item()
        exclude = task.folder / "others.txt"
        exclude.write_text("".join(f"{key}\n" for key in records.labels if key not in keys))
        source = {"path": task.folder / "data", "exclude": str(exclude)}
        [pack] = PackLoader(source, global_batch=1, max_tokens=8 * 4096, num_epochs=1)
        config = config_of(task.model)
        ours = class_for(config).from_pretrained(task.model, config=config, dtype=torch.float32)
        packed = ours(**model_inputs(pack, CPU)).loss.item()
    if abs(padded - packed) > 1e-4 * padded:
        raise SystemExit(f"the same samples lose {padded} padded and {packed} packed")
    return {"padded": padded, "packed": packed}


def compare(task: Task, records: int) -> dict[str, Any]:
    """All contenders on one corpus, one after the other."""
    prepare(task, records)
    report: dict[str, Any] = {"loss_of_eight_samples": first_losses(task)}
    for name, run in CONTENDERS.items():
        print(f"{task.corpus}: {name} ...", file=sys.stderr, flush=True)
        report[name] = run(task)
        for rate, gain in (("tokens_per_s", "ours_is_faster"), ("tokens_per_cpu_s", "ours_cpu_saving")):
            report[name][gain] = report["ours"][rate] / report[name][rate]
    return report


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpora", nargs="+", choices=list(MAX_TOKENS), default=list(MAX_TOKENS))
    parser.add_argument("--records", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    report = {}
    for corpus in options.corpora:
        with tempfile.TemporaryDirectory() as folder:
            report[corpus] = compare(Task(Path(folder), corpus, options.steps), options.records)
    print(json.dumps(report, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
