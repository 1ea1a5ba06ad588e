"""Before the first step: proof that a pack's documents cannot see each other in this very model.

OmniLMM's attention is tested in this repository; of any other class the model itself is asked, on its device
and with its dtype, by a few short forwards (omnimodel.isolation).
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from omnidata import Dataset
from omnidata.loader.pixel_source import open_pixels
from omnidata.loader.processor_pixels import ProcessorPixels
from omnidata.schema import Sample, UserError
from omnimodel.isolation import Isolation, Probe, probe, unreached
from omnimodel.packed import is_packed

from .config import Recipe
from .data import to_device_and_known
from .model import BuiltModel
from .parallel import World, compute_dtype

WORDS = "The quick brown fox jumps over the lazy dog, and the dog looks at the fox."


@dataclass(frozen=True)
class Proven:
    """What the probes found of a model that may be trained."""

    isolation: Isolation
    frozen: list[str]  # parameters that take no part in the loss

    def __str__(self) -> str:
        found = self.isolation
        line = (
            f"documents of a pack are apart: {found.packed:.1e} of the largest hidden state, "
            f"{found.joined:.1e} if joined; its own loss {found.own_loss:.5f}, ours {found.our_loss:.5f}"
        )
        if self.frozen:
            line += f"\n{len(self.frozen)} parameters take no part in the loss and stay as they are: "
            line += ", ".join(self.frozen[:4]) + ", …" * (len(self.frozen) > 4)
        return line


def prove_isolation(recipe: Recipe, world: World, built: BuiltModel, dataset: Dataset) -> Proven | None:
    """Nothing for OmniLMM; otherwise what was found. A collective of all ranks.

    Raises:
        UserError: it is not proven, with both differences.
    """
    if not is_packed(built.model):
        return None
    pixels = open_pixels([dataset], raw=False, augment=None, seed=0, with_dummy=True)
    ids = pixels.profile.processor.tokenizer.encode(WORDS, add_special_tokens=False)
    text, picture = _probe(pixels, ids, world, None), _probe(pixels, ids, world, ids[: len(ids) // 2])
    name = type(built.model).__name__
    with refusing(name), compute_dtype(recipe.run, world):
        found = probe(built.model, text, picture)
    for module in built.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # without a backward pass the root would keep its weights gathered
    if found.problem:
        raise UserError(f"{name} cannot be trained on packs: {found.problem}")
    with refusing(name), compute_dtype(recipe.run, world):
        frozen = unreached(built.wrapped, built.model, picture)
    for parameter_name in frozen:
        built.model.get_parameter(parameter_name).requires_grad_(False)
    return Proven(found, frozen)


def _probe(pixels: ProcessorPixels, ids: list[int], world: World, before: list[int] | None) -> Probe:
    """A document of ``ids``; with ``before``: of those, a picture, and ``ids``."""
    dummy = pixels.dummy
    document, images = np.array(ids, np.int32), tuple[bytes, ...]()
    tensors: dict[str, np.ndarray] = {}
    if before is not None:
        document = np.concatenate([np.array(before, np.int32), dummy.sample.input_ids, document])
        tensors, images = pixels.tensors([[_grey_ramp(dummy.side)]]), (b"",)
    sample = Sample("probe", document, document, images)
    positions = pixels.position_ids([sample], tensors)
    if positions is None:
        positions = np.arange(len(document))
    types = np.isin(document, pixels.profile.image_token_ids)
    arrays = (document.astype(np.int64), positions, types.astype(np.int64))
    there = [to_device_and_known(torch.from_numpy(array), world.device) for array in arrays]
    images_there = {
        name: to_device_and_known(torch.from_numpy(array), world.device) for name, array in tensors.items()
    }
    return Probe(there[0], there[1], there[2], images_there)


@contextlib.contextmanager
def refusing(name: str) -> Iterator[None]:
    """What a class raises when it is called as training will call it refuses it; but for a full device."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise UserError(f"{name} cannot be trained on packs: {error} ({_place(error)})") from error


def _place(error: BaseException) -> str:
    """The line of the class's code that raised it, or the last one."""
    frames = traceback.extract_tb(error.__traceback__)
    of_class = [frame for frame in frames if Path(frame.filename).name.startswith("modeling_")]
    frame = (of_class or frames)[-1]
    return f"{type(error).__name__}, {Path(frame.filename).name}:{frame.lineno}"


def _grey_ramp(side: int) -> torch.Tensor:
    """A picture that is not everywhere the same, uint8 ``[3, side, side]``."""
    ramp = torch.arange(side * side) * 255 // (side * side - 1)
    return ramp.view(1, side, side).expand(3, -1, -1).to(torch.uint8).contiguous()
