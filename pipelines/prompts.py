"""Prompts: what a model is asked, as its training data would hold it, and the tensors that generate takes.

    turns + picture files  ──prompt──▶  ids, stored pictures  ──inputs──▶  model.generate(**inputs)

OmniLMM's by its renderer and squares; any other class's by the processor whose files lie beside the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from omnidata import Dataset
from omnidata.conversation import to_conversation, with_grids
from omnidata.images.pixels import decode_rgb, fit_rgb
from omnidata.images.slices import Picture, Slicing, read_picture, slicing_of
from omnidata.loader.processor_pixels import ProcessorPixels
from omnidata.part_renderer import PartRenderer
from omnidata.profiles.folder import load_processor
from omnidata.profiles.processor import ProcessorProfile
from omnidata.render import Renderer
from omnidata.schema import Conversation, Record, RejectError, UserError
from omnidata.text.tokenizer import load_tokenizer
from omnimodel import OmniLMMConfig
from omnimodel.packed import token_types

from .parallel import to_device

PROFILE = "omnidata_profile.json"  # beside an exported model: the manifest's profile, with its arguments
Turns = list[dict[str, str]]  # [{"role": "user", "content": "…"}, …]


def prompts_for(
    model: PreTrainedModel, folder: str | Path, profile: dict[str, Any] | None = None
) -> OmniLMMPrompts | ProcessorPrompts:
    """The prompts of a model whose tokenizer, or processor, lies in ``folder``; ``profile``: a manifest's."""
    if isinstance(model.config, OmniLMMConfig):
        return OmniLMMPrompts(model, load_tokenizer(str(folder)))
    known = Path(folder) / PROFILE
    if profile is None:
        profile = json.loads(known.read_text()) if known.exists() else {"arguments": {}}
    return ProcessorPrompts(model, str(folder), profile["arguments"])


class OmniLMMPrompts:
    """Prompts of an OmniLMM."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        config = model.config
        self.end_tokens = config.end_token_ids
        self.pad = config.pad_token_id if config.pad_token_id is not None else 0
        self.slicing = slicing_of(config.slicing)

    @cached_property
    def _renderer(self) -> Renderer:
        tokens = None if self.slicing is None else self.slicing.slice_tokens
        return Renderer(self.tokenizer, num_query=self.model.config.num_query, slice_tokens=tokens)

    def prompt(self, turns: Turns, images: Sequence[str]) -> tuple[np.ndarray, tuple[bytes, ...]]:
        """Ids int32 ``[T]`` and the stored images of their blocks, both as a dataset would hold them."""
        conversation = prompt_conversation(turns, images)
        pictures = [read_image(image.path or "", slicing=self.slicing) for image in conversation.images]
        conversation = with_grids(conversation, [picture.grid for picture in pictures])
        stored = tuple(image.data for picture in pictures for image in picture.images)
        return self._renderer.render_prompt(conversation), stored

    def runs(self, dataset: Dataset, position: int, prompt: np.ndarray) -> tuple[bytes, ...]:
        """What stands for each stored image in the first ids of a sample: always the same."""
        return (b"",) * int((prompt == self.model.config.im_start_token).sum())

    def inputs(self, prompts: Sequence[np.ndarray], images: Sequence[Sequence[bytes]]) -> dict[str, Any]:
        """What generate takes, on the model's device."""
        config = self.model.config
        squares = [pixels(data, config) for stored in images for data in stored]
        found = padded_inputs(prompts, pad=self.pad, device=self.model.device)
        return found | {
            "pixel_values": to_device(torch.stack(squares), self.model.device) if squares else None
        }


class ProcessorPrompts:
    """Prompts of any other class, by its processor."""

    def __init__(self, model: PreTrainedModel, folder: str, arguments: dict[str, Any]) -> None:
        self.model = model
        self.profile = ProcessorProfile(load_processor(folder), arguments)
        self.tokenizer = self.profile.processor.tokenizer
        self._pixels = ProcessorPixels(
            self.profile, folder, positions="1d"
        )  # generate finds positions itself
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.end_tokens = list(dict.fromkeys([*self._renderer.end_of_turn, *ends]))
        self.pad = (
            self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_tokens[0]
        )

    @cached_property
    def _renderer(self) -> PartRenderer:
        return PartRenderer(self.tokenizer, self.profile)

    def prompt(self, turns: Turns, images: Sequence[str]) -> tuple[np.ndarray, tuple[bytes, ...]]:
        """Ids int32 ``[T]`` and the pictures, both as a dataset would hold them."""
        conversation = prompt_conversation(turns, images)
        pictures = [read_image(image.path or "") for image in conversation.images]
        stored = tuple(image.data for picture in pictures for image in picture.images)
        sizes = tuple(decode_rgb(data).shape[1::-1] for data in stored)
        try:
            return self._renderer.render_prompt(replace(conversation, image_sizes=sizes)), stored
        except RejectError as error:
            raise UserError(f"the question cannot be asked: {error}") from error

    def runs(self, dataset: Dataset, position: int, prompt: np.ndarray) -> tuple[bytes, ...]:
        """What stands for each picture in the first ids of a sample, as bytes of its ids."""
        columns = (dataset.index[name][position].as_py() for name in ("image_starts", "image_tokens"))
        places = zip(*columns, strict=True)
        return tuple(prompt[a : a + length].tobytes() for a, length in places if a < len(prompt))

    def inputs(self, prompts: Sequence[np.ndarray], images: Sequence[Sequence[bytes]]) -> dict[str, Any]:
        """What generate takes, on the model's device."""
        device = self.model.device
        decoded = [[_as_tensor(data) for data in stored] for stored in images]
        tensors = self._pixels.tensors(decoded) if any(decoded) else {}
        found = padded_inputs(prompts, pad=self.pad, device=device)
        ids = torch.tensor(self.profile.image_token_ids, device=device)
        types = torch.isin(found["input_ids"], ids).long()
        found |= token_types(type(self.model.base_model), types)
        return found | {name: to_device(torch.from_numpy(array), device) for name, array in tensors.items()}


def _as_tensor(data: bytes) -> torch.Tensor:
    """A stored picture as the loader decodes it, uint8 ``[3, H, W]``."""
    rgb = np.require(decode_rgb(data), requirements=["C", "W"])
    return torch.from_numpy(rgb).permute(2, 0, 1)


def padded_inputs(
    prompts: Sequence[np.ndarray], *, pad: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """int64 ids ``[B, T]`` that all end in the last column, and the mask of what is no padding."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": to_device(ids, device), "attention_mask": to_device(mask, device)}


def pixels(data: bytes, config: OmniLMMConfig) -> torch.Tensor:
    """An encoded image as OmniLMM's training loader sees it: uint8 ``[3, S, S]``."""
    square = fit_rgb(decode_rgb(data), config.image_size, fit=config.image_fit)
    return torch.from_numpy(square).permute(2, 0, 1).contiguous()


def prompt_conversation(turns: Turns, images: Sequence[str]) -> Conversation:
    """Turns that end with a question, as the data pipeline understands them.

    It wants a reply to learn from, so one is added for it and taken off again.
    """
    payload = {"messages": [*turns, {"role": "assistant", "content": "-"}], "images": list(images)}
    try:
        conversation = to_conversation(Record(source="question", locator="", id="question", payload=payload))
    except RejectError as error:
        raise UserError(f"the question cannot be asked: {error}") from error
    return replace(conversation, messages=conversation.messages[:-1])


def read_image(path: str, *, slicing: Slicing | None = None) -> Picture:
    """A picture file as a shard would hold it."""
    try:
        return read_picture(Path(path).read_bytes(), slicing=slicing, policy="keep")
    except OSError as error:
        raise UserError(f"cannot read the image {path}: {error.strerror}") from error
    except RejectError as error:
        raise UserError(f"image {path}: {error}") from error
