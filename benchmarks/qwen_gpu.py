"""Training steps of a Qwen3-VL-4B on one GPU, as train.py takes them: MFU, tokens/s, memory, waits.

    python benchmarks/qwen_gpu.py [--layers 36] [--variants frozen_tower all_trained compiled] [--json]
    python benchmarks/qwen_gpu.py --toy       the same code at toy sizes on the CPU, to run every line once

Random weights of the published widths, FSDP on one rank (bf16 compute, fp32 masters), AdamW, 7,960 tokens in
20 documents with a picture of 448x448 each, sent as bytes. ``waits`` are the places at which the host waited
for the GPU in one forward and backward: there must be none. The fp32 masters and moments of 36 layers take
71 GB; on a GPU of less than 100 GB fewer layers are measured, whose MFU is nearly the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import Qwen3VLConfig, Qwen3VLModel

from omnidata.loader.microbatch import Microbatch
from omnidata.profiles.tensors import Affine, Normalisation
from pipelines.config import Recipe, parse_recipe
from pipelines.data import model_inputs
from pipelines.flops import peak_flops
from pipelines.model import build_model
from pipelines.optim import build_optimizer, clip_gradients
from pipelines.parallel import start

DOCUMENTS, TEXT = 20, 200  # tokens of text per document; a picture has 196 more, and two marks
GRID = (1, 28, 28)  # patches of a picture; four of them are one token
TEXT_CONFIG = {"rope_type": "default", "rope_theta": 5e6}
TOY = {
    "text_config": {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 151936},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        "rope_parameters": {**TEXT_CONFIG, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
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
        "rope_parameters": {**TEXT_CONFIG, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    },
    "vision_config": {
        **{"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16},
        **{"out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17]},
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "frozen_tower": {"freeze": ["vision_tower"]},
    "compiled": {"freeze": ["vision_tower"], "compile": True},
    "all_trained": {},
}


def recipe_of(variant: str, *, toy: bool) -> Recipe:
    """A variant as a recipe with random weights."""
    checkpointing = {"activation_checkpointing": "selective"}
    return parse_recipe(
        {
            "run": {"dir": "unused", "dtype": "bfloat16", "device": "cpu" if toy else "cuda"},
            "data": {"train": [{"path": "unused"}]},
            "model": {"config": {}, **checkpointing, **VARIANTS[variant]},
            "optim": {"steps": 1, "lr": 1e-5},
            "parallel": {"strategy": "fsdp"},
        }
    )


def pack(config: Qwen3VLConfig, *, documents: int) -> Microbatch:
    """One microbatch of documents, each a picture and text of which the second half is learned."""
    tokens_of_picture = GRID[1] * GRID[2] // config.vision_config.spatial_merge_size**2
    picture = [config.image_token_id] * tokens_of_picture
    marked = [config.vision_start_token_id, *picture, config.vision_end_token_id]
    ids = torch.tensor([*marked, *range(1000, 1000 + TEXT)])
    labels = torch.full_like(ids, -100)
    labels[-TEXT // 2 : -1] = ids[-TEXT // 2 + 1 :]
    types, grid = (ids == config.image_token_id).long(), torch.tensor([GRID])
    bare = object.__new__(Qwen3VLModel)  # positions need its configuration alone
    bare.__dict__["config"] = config
    rows, _ = bare.get_rope_index(ids[None], mm_token_type_ids=types[None].int(), image_grid_thw=grid)
    width = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    pixels = torch.randint(256, (documents * GRID[1] * GRID[2], width), dtype=torch.uint8)
    scale, shift = torch.full((1, 1), 1 / 127.5), torch.full((1, 1), -1.0)
    return Microbatch(
        input_ids=ids.repeat(documents),
        labels=labels.repeat(documents),
        position_ids=torch.cat([torch.arange(len(ids))[None], rows[:, 0]]).repeat(1, documents),
        cu_seqlens=torch.arange(documents + 1, dtype=torch.int32) * len(ids),
        max_seqlen=len(ids),
        images={"pixel_values": pixels, "image_grid_thw": grid.repeat(documents, 1)},
        image_positions=torch.zeros(0, dtype=torch.int64),
        num_supervised_tokens=int((labels != -100).sum()) * documents,
        keys=tuple(map(str, range(documents))),
        step=0,
        epoch=0,
        token_type_ids=types.repeat(documents),
        num_images=documents,
        num_pixels=pixels.numel(),
        normalise=Normalisation({"pixel_values": Affine(scale, shift)}),
    )


def measure(
    *, toy: bool = False, layers: int | None = None, variants: list[str] | None = None
) -> dict[str, Any]:
    """A row for each variant; one without enough memory says so."""
    config = Qwen3VLConfig(**(TOY if toy else FULL))
    if not toy:
        large = torch.cuda.get_device_properties(0).total_memory > 100e9
        config.text_config.num_hidden_layers = layers or (36 if large else 18)
    figures: dict[str, Any] = {"layers": config.text_config.num_hidden_layers}
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    os.environ.setdefault("MASTER_PORT", "29513")
    for variant in variants or list(VARIANTS):
        try:
            figures[variant] = measured(recipe_of(variant, toy=toy), config, toy=toy)
        except torch.OutOfMemoryError as error:
            figures[variant] = {"failed": str(error)[:160]}
        print(json.dumps({variant: figures[variant]}), file=sys.stderr, flush=True)
        if not toy:
            torch.cuda.empty_cache()
    return figures


def measured(recipe: Recipe, config: Qwen3VLConfig, *, toy: bool) -> dict[str, Any]:
    """Median of some steps behind the first ones, peak memory, and the waits of one forward and backward."""
    with start(recipe) as world:
        if not toy:
            torch.cuda.reset_peak_memory_stats()
        built = build_model(recipe, config, world)
        optimizer = build_optimizer(built.model, recipe.optim)
        microbatch = pack(config, documents=2 if toy else DOCUMENTS)
        trainable = [p for p in built.model.parameters() if p.requires_grad]

        def forward_and_backward() -> torch.Tensor:
            loss = built.wrapped(**model_inputs(microbatch, world.device)).loss
            loss.backward()
            return loss.detach()

        seconds, losses = [], []
        for _ in range(3 if toy else 12):
            began = time.perf_counter()
            loss = forward_and_backward()
            clip_gradients(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - began)
        typical = statistics.median(seconds[len(seconds) // 3 :])
        figures: dict[str, Any] = {
            "parameters": sum(p.numel() for p in built.model.parameters()),
            "step_seconds": typical,
            "tokens_per_s": microbatch.num_tokens / typical,
            "first_and_last_loss": [losses[0], losses[-1]],
        }
        if not toy:
            flops = built.flop_count.microbatch(microbatch)
            figures["mfu"] = flops / typical / (peak_flops(world.device) or float("nan"))
            figures["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            figures["waits"] = waits(forward_and_backward)
        return figures


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


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, help="of the language model")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU, to run every line once")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; --toy runs its code at toy sizes on the CPU")
    figures = measure(toy=options.toy, layers=options.layers, variants=options.variants)
    print(json.dumps(figures, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
