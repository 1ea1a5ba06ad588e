"""The microbatches that a rehearsal plays: the plan's costliest, or full ones of photographs and text.

    datasets are built     the pack of the first epoch with the most tokens and pictures, as it is loaded
    none are there yet     samples of one photograph and TEXT_TOKENS of text, as many as a pack takes; the
                           model's processor says what a photograph is made of (OmniLMM: num_query tokens)

Beside it, for the question whether ranks wait for each other: a pack without pictures, and an empty one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from omnidata import Dataset
from omnidata.loader.loader import State
from omnidata.loader.microbatch import Microbatch, expand, lay_out
from omnidata.loader.processor_pixels import ProcessorPixels
from omnidata.plan.epoch import IMAGE_COST
from omnidata.profiles.folder import load_processor
from omnidata.profiles.positions import kind_of_positions
from omnidata.profiles.processor import ProcessorProfile
from omnidata.schema import IGNORE_INDEX, Sample, UserError
from omnimodel import OmniLMMConfig

from .config import Recipe
from .data import train_loader
from .parallel import World

PHOTOGRAPH = (640, 480)  # width, height
TEXT_TOKENS = 96  # of a sample without its photograph; the second half is the answer
WORDS = "What is this? A cat sleeps on a chair beside the window, and the sun shines on it."


@dataclass(frozen=True)
class Packs:
    """What ranks may have in a step; tensors on the CPU."""

    full: Microbatch
    text_only: Microbatch
    empty: Microbatch
    load: float = 1.0  # what a pack of the epoch weighs on average, in shares of ``full``
    per_epoch: int | None = None  # packs of the first epoch


def packs_of(
    recipe: Recipe, config: PreTrainedConfig, datasets: Sequence[Dataset], *, share: float = 1.0
) -> Packs:
    """The microbatches of a recipe.

    Args:
        recipe: its limits and, with ``datasets``, its data.
        config: the model's configuration.
        datasets: the training datasets; [] if they are not built yet.
        share: of the fullest pack's documents, for a smaller one.

    Raises:
        UserError: no dataset and no processor to ask, or not even one photograph fits a pack.
    """
    if datasets:
        return _of_plan(recipe, config, share)
    tokens, most = recipe.data.max_tokens, recipe.data.max_images
    if isinstance(config, OmniLMMConfig):
        return _of_omnilmm(config, tokens, most, share)
    return _of_processor(recipe.model.path, tokens, most, share)


# --- of datasets ------------------------------------------------------------------------------------------


def _of_plan(recipe: Recipe, config: PreTrainedConfig, share: float) -> Packs:
    """Plans the first epoch: seconds for millions of samples. Reads one pack."""
    loader = train_loader(recipe, World(0, 1, torch.device("cpu"), "single"), config)
    most, documents, total, count = 0.0, [], 0.0, 0
    for step, after, places in loader.steps_from(State()):
        if after.epoch:
            break
        for pack in step.packs:
            weight = pack.num_tokens + IMAGE_COST * pack.image_load
            total, count = total + weight, count + 1
            if weight > most:
                numbers = pack.lengths.supervised.tolist()
                most, documents = weight, list(zip(places.documents(pack), numbers, strict=True))
    full = loader.read_documents(_first(documents, share), State(step=1))
    text = full.input_ids[full.labels != IGNORE_INDEX][:1].tolist() or [0]
    samples = [_sample(np.array(text * full.num_tokens, np.int32), full.num_tokens // 2)]
    return Packs(full, loader.of_samples(samples), loader.of_samples([]), total / (count * most), count)


def _first(documents: list[Any], share: float) -> list[Any]:
    return documents[: max(1, round(len(documents) * share))]


def _sample(ids: np.ndarray, supervised: int, *, images: int = 0) -> Sample:
    """A document whose last tokens are supervised; its pictures are never read."""
    labels = np.full(len(ids), IGNORE_INDEX, np.int32)
    labels[len(ids) - supervised :] = ids[len(ids) - supervised :]
    return Sample("rehearsal", ids.astype(np.int32), labels, (b"",) * images)


def _documents(text: np.ndarray, run: np.ndarray, tokens: int, most: int | None) -> list[Sample]:
    """As many samples as fill a pack; a last one of text for what is left."""
    half = TEXT_TOKENS // 2
    text = np.resize(text, max(TEXT_TOKENS, tokens))
    length = len(run) + TEXT_TOKENS
    images = tokens // length if most is None else min(most, tokens // length)
    if not images and most != 0 and len(run):
        raise UserError(
            f"data.max_tokens {tokens}: not even a photograph of {PHOTOGRAPH[0]} x {PHOTOGRAPH[1]} "
            f"pixels, which is {len(run)} tokens here, and {TEXT_TOKENS} of text fit; raise it"
        )
    ids = np.concatenate([text[:half], run, text[half:TEXT_TOKENS]])
    samples = [_sample(ids, half, images=1)] * images
    left = tokens - images * length
    samples += [_sample(text[:TEXT_TOKENS], half)] * (left // TEXT_TOKENS)
    rest = left % TEXT_TOKENS
    return samples + ([_sample(text[:rest], rest // 2)] if rest > 1 else [])


# --- without datasets -------------------------------------------------------------------------------------


def _of_omnilmm(config: OmniLMMConfig, tokens: int, most: int | None, share: float) -> Packs:
    run = [config.im_start_token, *[config.im_patch_token] * config.num_query, config.im_end_token]
    text = np.array([3], np.int32)
    side = config.image_size

    def made(samples: list[Sample]) -> Microbatch:
        images = np.zeros((sum(len(sample.images) for sample in samples), side, side, 3), np.uint8)
        return _expanded(lay_out(samples, images, im_start=config.im_start_token))

    nothing = np.zeros(0, np.int32)
    full, plain = _documents(text, np.array(run), tokens, most), _documents(text, nothing, tokens, 0)
    return Packs(made(_first(full, share)), made(plain), made([]))


def omnilmm_pack(
    config: OmniLMMConfig, *, tokens: int, images: int, documents: int, supervised: int
) -> Microbatch:
    """Documents of like length with like numbers of blank pictures and supervised tokens."""
    run = np.array([config.im_start_token, *[config.im_patch_token] * config.num_query, config.im_end_token])

    def share(total: int, number: int) -> int:
        return total * (number + 1) // documents - total * number // documents

    samples = []
    for number in range(documents):
        pictures = np.tile(run, share(images, number))
        text = np.full(share(tokens, number) - len(pictures), 3)
        ids = np.concatenate([pictures, text])
        # A document's first label has nothing to its left that could predict it.
        samples.append(_sample(ids, share(supervised, number), images=share(images, number)))
    squares = np.zeros((images, config.image_size, config.image_size, 3), np.uint8)
    return _expanded(lay_out(samples, squares, im_start=config.im_start_token))


def _of_processor(folder: str | None, tokens: int, most: int | None, share: float) -> Packs:
    if folder is None or not Path(folder).is_dir():
        raise UserError(
            "neither the recipe's datasets nor the folder of its model.path are there: one of them is "
            "needed to know the model and what its processor makes of a picture"
        )
    profile = ProcessorProfile(load_processor(folder))
    pixels = ProcessorPixels(profile, folder, kind_of_positions(folder), with_dummy=True)
    [run] = profile.runs((PHOTOGRAPH,))
    text = np.array(profile.processor.tokenizer.encode(WORDS, add_special_tokens=False))
    picture = torch.full((3, *PHOTOGRAPH[::-1]), 128, dtype=torch.uint8)

    def made(samples: list[Sample]) -> Microbatch:
        pictures = [[picture] * len(sample.images) for sample in samples]
        has_dummy = not any(pictures)
        if has_dummy:
            samples, pictures = [*samples, pixels.dummy.sample], [*pictures, [pixels.dummy.picture()]]
        tensors = pixels.tensors(pictures)
        parts = lay_out(
            samples,
            tensors,
            image_token_ids=profile.image_token_ids,
            position_ids=pixels.position_ids(samples, tensors),
            has_dummy=has_dummy,
        )
        return _expanded(replace(parts, num_pixels=run.num_pixels * parts.num_images))

    full = _documents(text, profile.run_ids(run.text), tokens, most)
    plain = _documents(text, np.zeros(0, np.int32), tokens, 0)
    return Packs(made(_first(full, share)), made(plain), made([]))


def _expanded(parts: Any) -> Microbatch:
    supervised = int(np.count_nonzero(parts.labels != IGNORE_INDEX))
    return expand(parts, num_supervised_tokens=max(1, supervised), step=0, epoch=0)
