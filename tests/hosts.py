"""A dataset of a tiny Qwen3-VL and our own loop, for tests of the adapters in their hosts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import processors
import torch
from PIL import Image

from omnidata import Dataset, cli
from omnidata.adapters.batch import model_inputs
from omnidata.loader import PackLoader

NUM_STEPS, KILLED_AT = 30, 12
SETTINGS = {"max_tokens": 96, "global_batch": 2, "num_epochs": 3, "seed": 3}
FOUR_RANKS = {"global_batch": 4, "seed": 5}  # the second step has packs with and without pictures
LR = 1e-2
TEXT = {
    **{
        "vocab_size": 1024,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 16,
    },
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096},
}
VISION = {
    **{"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32},
    **{"patch_size": 16, "num_position_embeddings": 144, "deepstack_visual_indexes": [0]},
}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0, "mrope_interleaved": True}


def make(root: Path, *, num_records: int = 72, pictures: bool = True) -> tuple[str, str]:
    """(dataset, model's folder with weights) under ``root``."""
    import transformers

    processor = processors.make("qwen3_vl", small=True)
    named = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(processor.tokenizer, name) for name in named}
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE}, vision_config=VISION, **ids
    )
    torch.manual_seed(0)
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    rng = np.random.default_rng(0)
    with (root / "corpus.jsonl").open("w") as file:
        for number in range(num_records):
            file.write(json.dumps(_record(root, number, rng, pictures=pictures)) + "\n")
    command = ("build-shards", root / "corpus.jsonl", "--image-root", root, "--model", root / "model")
    command += ("--out", root / "data", "--workers", 1, "--samples-per-shard", 24, "--quiet")
    assert cli.run([str(part) for part in command]) == 0
    return str(root / "data"), str(root / "model")


def _record(root: Path, number: int, rng: np.random.Generator, *, pictures: bool) -> dict[str, Any]:
    """Every third record has a picture."""
    question, names = f"What is {number}?", []
    if pictures and number % 3 == 0:
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(root / f"{number}.png")
        question, names = f"<image>\n{question}", [f"{number}.png"]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"It is a number, {number} by name."},
    ]
    return {"id": f"r{number}", "images": names, "messages": messages}


def load_model(folder: str) -> Any:
    """The tiny model, always with the same weights."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """What all loops use."""
    return torch.optim.SGD(model.parameters(), lr=LR)


def own_losses(
    data: str, model: Any, *, steps: int = NUM_STEPS, settings: dict[str, Any] = SETTINGS
) -> list[float]:
    """Our own loop in few lines: each step's loss, sums over supervised tokens ÷ their number."""
    loader = PackLoader(data, **settings)
    sgd, losses, total = optimizer(model), [], 0.0
    for number, microbatch in enumerate(loader, 1):
        loss = model(**model_inputs(microbatch, token_types="mm_token_type_ids")).loss
        loss.backward()
        total += float(loss.detach())
        if number % loader.microbatches_per_step == 0:
            sgd.step()
            sgd.zero_grad()
            losses.append(total)
            total = 0.0
            if len(losses) == steps:
                break
    return losses


def losses_alone(data: str, folder: str, steps: list[list[str]]) -> list[float]:
    """The losses of steps over the samples of these keys, every document by itself."""
    loader, dataset = PackLoader(data, **SETTINGS), Dataset(data)
    samples = {sample.key: sample for sample in dataset}
    model = load_model(folder)
    sgd, losses = optimizer(model), []
    for keys in steps:
        documents = [loader.of_samples([samples[key]]) for key in keys]
        number, total = sum(document.num_supervised_tokens for document in documents), 0.0
        for document in documents:
            inputs = model_inputs(document, token_types="mm_token_type_ids") | {"num_items_in_batch": number}
            loss = model(**inputs).loss
            loss.backward()
            total += float(loss.detach())
        sgd.step()
        sgd.zero_grad()
        losses.append(total)
    return losses
