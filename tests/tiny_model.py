"""A tiny OmniLMM, batches for it, and the golden vectors of the reference implementation."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from omnimodel import OmniLMMConfig, OmniLMMForCausalLM

GOLDEN = Path(__file__).parent / "golden"
PATCH, START, END = 90, 91, 92
BLOCK = [START, PATCH, PATCH, PATCH, PATCH, END]  # num_query = 4


def tiny_config(**changes):
    """Two layers of 128 channels, a two-block EVA02 tower with rotary positions, 28-pixel images."""
    settings = {
        "vocab_size": 96,
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "sliding_window": None,
        "num_query": 4,
        "image_size": 28,
        "mm_vision_tower": "eva02_tiny_patch14_224",
        "vision_kwargs": {"img_size": 28, "embed_dim": 64, "depth": 3, "num_heads": 2},
        "im_patch_token": PATCH,
        "im_start_token": START,
        "im_end_token": END,
    }
    return OmniLMMConfig(**settings | changes)


def tiny_model(**changes):
    """The same weights every time, in train mode."""
    torch.manual_seed(0)
    return OmniLMMForCausalLM(tiny_config(**changes)).train()


def documents():
    """Token ids of three documents and their images (uint8): two, one and none."""
    rows = [[1, *BLOCK, 5, 6, *BLOCK, 7, 8, 2], [1, 9, *BLOCK, 10, 11, 12, 2], [1, 20, 21, 22, 2]]
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8, generator=generator)
    return [torch.tensor(row) for row in rows], [images[:2], images[2:], images[:0]]


def pack(device="cpu"):
    """The documents as one packed microbatch: keyword arguments of the model's forward."""
    rows, images = documents()
    lengths = [len(row) for row in rows]
    labels = [torch.where(row < PATCH, row, -100) for row in rows]
    shifted = [torch.cat([row[1:], torch.tensor([-100])]) for row in labels]
    count = int((torch.cat(shifted) != -100).sum())
    batch = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        "shift_labels": torch.cat(shifted)[None],
        "pixel_values": torch.cat(images),
    }
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    return moved | {"max_seqlen": max(lengths), "num_supervised_tokens": count, "num_supervised_rows": count}


def gradients(model, batch):
    """Loss and gradients of one microbatch."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def golden_model(name="m_a", **changes):
    """The reference's model, with its weights."""
    index = json.loads((GOLDEN / "model/index.json").read_text())
    reference = index["models"][name]
    config = OmniLMMConfig(
        **reference["config"] | changes,
        num_query=reference["num_query"],
        image_size=reference["image_size"],
        mm_vision_tower="eva02_enormous_patch14_clip_224",
        vision_kwargs=index["vision_kwargs"],
        **index["special_ids"],
    )
    model = OmniLMMForCausalLM(config).eval()
    file = {"m_a": "m_a.safetensors", "m_b": "m_b_language.safetensors"}[name]
    weights = {key: tensor.float() for key, tensor in load_file(GOLDEN / "model" / file).items()}
    missing, unexpected = model.load_state_dict(weights, strict=name == "m_a")
    assert not unexpected and all("vision_tower" in key or "resampler" in key for key in missing)
    return model


def golden_case(case):
    """Inputs and outputs of one case as float32 / int64 tensors; ``images`` is a tensor, a list or None."""
    index = json.loads((GOLDEN / "model/index.json").read_text())["cases"][case]
    with np.load(GOLDEN / "model/io.npz") as arrays:
        fields = {
            name.split("/", 1)[1]: torch.from_numpy(arrays[name])
            for name in arrays.files
            if name.startswith(f"{case}/")
        }
    listed = [
        fields[f"image_{number}"].float()
        for number in range(index.get("n_images", 1))
        if f"image_{number}" in fields
    ]
    images = fields["images"].float() if "images" in fields else (listed or None)
    return fields | {"images": images}
