"""What a rehearsal says beside what one H200 took: memory and seconds of a step.

    python benchmarks/rehearsal.py [--json]        no GPU is needed; seconds for each row

Measured with torch 2.11, whose kernel takes a key and a value for each query head; peak of the allocator.
OmniLMM-12B's widths by ``benchmarks/train_gpu.py``: FSDP on one rank; 8,192 tokens in 20 documents, 24
pictures, 2,400 supervised tokens. Qwen3-VL-4B as transformers has it: weights, gradients and moments are
bfloat16, 7,960 tokens in 20 documents with a picture each, logits of every third token in float32; its tower
waited for the GPU 72 times a step, which no rehearsed second knows.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from qwen_gpu import DOCUMENTS, FULL, pack
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from omnimodel import OmniLMMConfig, attention
from pipelines.config import Recipe, parse_recipe
from pipelines.packs import Packs, omnilmm_pack
from pipelines.planning import PUBLISHED
from pipelines.playback import Playback
from pipelines.rehearsal import make_moments, moments_of, rehearse, watch
from pipelines.roofline import roofline

Figures = dict[str, Any]


def recipe(**model: Any) -> Recipe:
    """One microbatch a step on one H200."""
    return parse_recipe(
        {
            "run": {"dir": "unused", "dtype": "bfloat16"},
            "data": {"train": [{"path": "unused"}], "global_batch": 1},
            "model": {"config": {}, **model},
            "optim": {"steps": 1},
            "parallel": {"strategy": "fsdp"},
        }
    )


def omnilmm(*, layers: int, mode: str = "none", compiled: bool = False, align: bool = False) -> Figures:
    """The rehearsal of train_gpu.py's step."""
    frozen = ["vision_tower", "language_model"] if align else ["vision_tower"]
    ours = recipe(freeze=frozen, compile=compiled, activation_checkpointing=mode)
    config = OmniLMMConfig(**PUBLISHED, num_hidden_layers=layers)
    full = omnilmm_pack(config, tokens=8192, images=24, documents=20, supervised=2400)
    return rehearse(ours, config, Packs(full, full, full), gpus=1, gpu="h200")


def qwen3_vl(*, frozen: bool) -> Figures:
    """transformers' own class and a loop of a few lines, as they were measured."""
    config = Qwen3VLConfig(**FULL)
    kinds = {"text_config": attention.NAME, "vision_config": "sdpa", "": "sdpa"}
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation=kinds)
    model = model.to(torch.bfloat16).train()
    model.model.visual.requires_grad_(not frozen)
    playback, inputs = Playback(), inputs_of(config)
    targets = inputs["input_ids"][0, inputs["logits_to_keep"]]
    with FakeTensorMode(allow_non_fake_inputs=True), attention.as_on_gpu():
        model.to_empty(device="cpu")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        watch(model, playback)
        with playback.values, playback:
            playback.assign("parameters", [*model.parameters(), *model.buffers()])
            make_moments(optimizer)
            playback.assign("optimizer", moments_of(optimizer, optimizer.state))
            playback.restart()
            with playback.values.calls:
                playback.place = playback.part = "forward of microbatch 1"
                # Passed on as it is, and ignored: documents are told by cu_seq_lens.
                mask = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16)
                logits = model(**inputs, attention_mask=mask).logits[0].float()
                loss = torch.nn.functional.cross_entropy(logits, targets)
                playback.place = playback.part = "backward of microbatch 1"
                loss.backward()
                playback.place = playback.part = "update"
                optimizer.step()
                optimizer.zero_grad()
    seconds = roofline(recipe(), playback, gpus=1, gpu="h200", microbatches=1)
    return {"memory_gb": sum(playback.peak.values()) / 1e9, **seconds}


def inputs_of(config: Qwen3VLConfig) -> dict[str, Any]:
    """Of a forward; every third token's logits."""
    full = pack(config, documents=DOCUMENTS)
    pixels = full.images["pixel_values"]
    bounds = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), full.cu_seqlens)
    return {
        "input_ids": full.input_ids[None],
        "mm_token_type_ids": full.token_type_ids[None].int(),
        "position_ids": full.position_ids[:, None],
        "pixel_values": torch.empty(pixels.shape, dtype=torch.bfloat16),
        "image_grid_thw": full.images["image_grid_thw"],
        "logits_to_keep": torch.arange(0, full.num_tokens, 3),
        "use_cache": False,
        **bounds,
        **dict.fromkeys(("max_length_q", "max_length_k"), full.max_seqlen),
    }


# What was run, its rehearsal, GB, seconds
MEASURED = [
    ("sft, 16 layers, none", functools.partial(omnilmm, layers=16), 86.2, 0.855),
    ("sft, 16 layers, selective", functools.partial(omnilmm, layers=16, mode="selective"), 73.9, 0.897),
    ("sft, 16 layers, compiled", functools.partial(omnilmm, layers=16, compiled=True), 78.3, 0.804),
    ("sft, 24 layers, selective", functools.partial(omnilmm, layers=24, mode="selective"), 101.8, 1.127),
    # 84.0 GB when the frozen 6.98 billion weights were float32; now they are bfloat16
    ("align, 32 layers, none", functools.partial(omnilmm, layers=32, align=True), 84.0 - 2 * 6.98, 1.003),
    ("Qwen3-VL-4B, frozen tower", functools.partial(qwen3_vl, frozen=True), 85.7, 7960 / 13336),
    ("Qwen3-VL-4B, all trained", functools.partial(qwen3_vl, frozen=False), 102.6, 7960 / 11262),
]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=len(MEASURED), help="only the first ones")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    attention.KERNEL_GROUPS_HEADS = False  # as in torch 2.11, whatever torch rehearses
    rows = []
    for name, rehearsed, gigabytes, seconds in MEASURED[: options.rows]:
        figures = rehearsed()
        row = {"run": name}
        for key, measured in (("memory_gb", gigabytes), ("step_seconds", seconds)):
            row[key] = (figures[key], measured, figures[key] / measured)
        rows.append(row)
        if not options.json:
            memory, time = row["memory_gb"], row["step_seconds"]
            print(
                f"{name:<28} {memory[0]:6.1f} of {memory[1]:6.1f} GB ({memory[2]:.3f})   "
                f"{time[0]:.3f} of {time[1]:.3f} s ({time[2]:.3f})",
                flush=True,
            )
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
