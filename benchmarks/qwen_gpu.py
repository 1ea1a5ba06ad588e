"""A training step of transformers' own Qwen3-VL-4B on one GPU, with our attention: speed, memory, waits.

    python -c "from benchmarks.qwen_gpu import measure; print(measure())"

Random weights in bf16, AdamW in bf16, 7,960 tokens in 20 documents with a picture of 448x448 each, the tower
frozen, then trained. The tower's attention runs as ``omnilmm_flash`` where that is registered, which joins
the pictures in one call; ``waits`` counts the places where the host waited for the GPU in one step.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from omnimodel import attention

DOCUMENTS, TEXT = 20, 200  # tokens of text a document; a picture has 196 more, and two marks
TOY = {
    "text_config": {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 151936},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]},
    },
    "vision_config": {
        **{"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 64},
        "deepstack_visual_indexes": [0],
    },
}
FULL = {
    "text_config": {
        **{"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    },
    "vision_config": {
        **{"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16},
        **{"out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17]},
    },
}


def build(device: str, *, toy: bool) -> Qwen3VLForConditionalGeneration:
    """Random weights, made on the device."""
    config = Qwen3VLConfig(**(TOY if toy else FULL))
    kinds = {"text_config": attention.NAME, "vision_config": "sdpa", "": "sdpa"}
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation=kinds)
    model = model.to(torch.float32 if toy else torch.bfloat16).train()
    if "omnilmm_flash" in AttentionInterface().valid_keys():
        model.config.vision_config._attn_implementation_internal = "omnilmm_flash"
        for module in model.model.visual.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation_internal = "omnilmm_flash"
    return model


def pack(model: Qwen3VLForConditionalGeneration, device: str, *, documents: int) -> dict[str, Any]:
    """One row of documents, each a picture and text."""
    config = model.config
    grid = torch.tensor([[1, 28, 28]] * documents)
    marks = [config.vision_start_token_id, *[config.image_token_id] * 196, config.vision_end_token_id]
    document = torch.tensor([*marks, *range(1000, 1000 + TEXT)])
    length = len(document)
    ids = document.repeat(documents)[None]
    types = (ids == config.image_token_id).int()
    rows, _ = model.model.get_rope_index(
        document[None], mm_token_type_ids=types[:, :length], image_grid_thw=grid[:1]
    )
    text = torch.arange(length)[None, None]
    bounds = torch.arange(0, (documents + 1) * length, length, dtype=torch.int32)
    width = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    pixels = torch.randn(documents * 784, width, device=device, dtype=model.dtype)
    return {
        "input_ids": ids.to(device),
        "mm_token_type_ids": types.to(device),
        "position_ids": torch.cat([text, rows]).repeat(1, 1, documents).to(device),
        "pixel_values": pixels,
        "image_grid_thw": grid.to(device),  # the tower derives the indices of its positions from it
        "use_cache": False,
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds.to(device)),
        **dict.fromkeys(("max_length_q", "max_length_k"), length),
        "logits_to_keep": torch.arange(0, ids.shape[1], 3, device=device),
    }


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Any]) -> torch.Tensor:
    """Forward, loss of every third token, backward, update."""
    logits = model(**inputs).logits[0].float()
    targets = inputs["input_ids"][0, inputs["logits_to_keep"]]
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def waits(run: Any) -> dict[str, int]:
    """Files and lines at which the host waited for the GPU while ``run()`` ran."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = (f"{Path(w.filename).name}:{w.lineno}" for w in found if "synchroniz" in str(w.message))
    return dict(Counter(places).most_common())


def measure(*, toy: bool = False) -> dict[str, Any]:
    """Frozen tower, then all trained."""
    device = "cpu" if toy else "cuda"
    model = build(device, toy=toy)
    inputs = pack(model, device, documents=2 if toy else DOCUMENTS)
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    for name, frozen in (("frozen_tower", True), ("all_trained", False)):
        model.model.visual.requires_grad_(not frozen)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
        try:
            figures[name] = timed(model, optimizer, inputs, toy=toy)
        except torch.OutOfMemoryError as error:
            figures[name] = {"failed": str(error)[:160]}
        model.zero_grad()
        del optimizer
    return figures


def timed(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Any], *, toy: bool
) -> dict[str, Any]:
    """Seconds of the fastest of some steps, tokens a second, peak memory, waits of one step."""
    seconds = []
    for _ in range(2 if toy else 6):
        began = time.perf_counter()
        step(model, optimizer, inputs).item()
        seconds.append(time.perf_counter() - began)
    figures: dict[str, Any] = {
        "step_seconds": min(seconds),
        "tokens_per_s": inputs["input_ids"].numel() / min(seconds),
    }
    if not toy:
        figures["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        figures["waits"] = waits(lambda: step(model, optimizer, inputs))
    return figures
