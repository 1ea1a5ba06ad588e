"""Questions of a built dataset, answered by generation and compared with what the dataset says.

    labels   - - - - - - [the answer </s>] - - - - [another </s>]
                         ▲ every supervised span is a question: its prompt is all ids before the span

The prompt's ids are the ones that were trained on, so nothing can differ between training and asking.
Prompts are padded on the left, answered greedily with a KV cache, and cut at the end token.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from omnidata import Dataset
from omnidata.images.pixels import decode_rgb, fit_rgb
from omnidata.schema import IGNORE_INDEX, UserError
from omnimodel import OmniLMMConfig, OmniLMMForCausalLM
from pipelines.parallel import World, to_device

SLACK = 4  # tokens that an answer may be longer than the truth: blanks, or other words for the same thing


@dataclass(frozen=True, eq=False)
class Question:
    """One supervised span."""

    key: str  # the sample's
    prompt: np.ndarray  # ids before the span
    answer: np.ndarray  # ids of the span, without the end token
    images: tuple[bytes, ...]  # of the prompt, encoded


@dataclass(frozen=True)
class Answer:
    """What the model said."""

    question: Question
    text: str
    truth: str

    @property
    def is_exact(self) -> bool:
        """Equal but for blanks at the ends."""
        return self.text.strip() == self.truth.strip()

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall over words."""
        said, truth = collections.Counter(self.text.split()), collections.Counter(self.truth.split())
        common = sum((said & truth).values())
        return 2 * common / (said.total() + truth.total()) if said.total() + truth.total() else 1.0


def questions_of(
    dataset: Dataset, *, end_tokens: Sequence[int], start_token: int, with_text_only: bool = False
) -> Iterator[Question]:
    """Every question of the dataset, in its order; ``start_token`` is <im_start>'s id.

    Questions without any image before them say nothing about seeing and are left out, unless asked for.
    """
    for position in range(len(dataset)):
        sample = dataset[position]
        for start, stop in supervised_spans(sample.labels):
            prompt = sample.input_ids[:start]
            num_images = int((prompt == start_token).sum())
            if not num_images and not with_text_only:
                continue
            answer = sample.input_ids[start:stop]
            if answer[-1] in end_tokens:
                answer = answer[:-1]
            yield Question(sample.key, prompt, answer, sample.images[:num_images])


def supervised_spans(labels: np.ndarray) -> list[tuple[int, int]]:
    """``[-100 -100 5 2 -100 7 2]`` -> ``[(2, 4), (5, 7)]``."""
    supervised = np.concatenate(([False], labels != IGNORE_INDEX, [False]))
    edges = np.flatnonzero(supervised[1:] != supervised[:-1])
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def with_swapped_images(questions: Sequence[Question]) -> list[Question]:
    """The same questions, every picture replaced by the one half-way down the list of all pictures."""
    pictures = list(dict.fromkeys(image for question in questions for image in question.images))
    if len(pictures) < 2:
        raise UserError("swapping images needs at least two different pictures")
    shift = len(pictures) // 2
    other = {picture: pictures[(i + shift) % len(pictures)] for i, picture in enumerate(pictures)}
    return [
        replace(question, images=tuple(other[image] for image in question.images)) for question in questions
    ]


def answer_questions(
    model: OmniLMMForCausalLM, tokenizer: Any, questions: Sequence[Question], *, batch_size: int = 64
) -> list[Answer]:
    """Greedy answers, in the order of the questions.

    Each answer ends at most SLACK tokens after its truth: one that goes on is wrong already. So it is the
    same in any batch.
    """
    order = by_length(questions)
    answers = _answers(model, tokenizer, [questions[i] for i in order], batch_size=batch_size)
    in_order = dict(zip(order, answers, strict=True))
    return [in_order[number] for number in range(len(questions))]


def answer_share(
    model: OmniLMMForCausalLM,
    tokenizer: Any,
    questions: Sequence[Question],
    world: World,
    *,
    batch_size: int = 64,
) -> list[Answer]:
    """This rank's part of the answers; all ranks' parts together are those of ``answer_questions``.

    Ranks take turns in the order of length, so that at any time all of them work on answers of one length.
    Ranks that share weights (``world.is_sharded``) meet in every forward: each has as many batches, if need
    be of a question whose answer nobody wants, and generates for as long as any of them does.
    """
    if not questions:
        return []
    ordered = [questions[number] for number in by_length(questions)]
    mine = ordered[world.rank :: world.size]
    if not world.is_sharded or world.size == 1:
        return _answers(model, tokenizer, mine, batch_size=batch_size)
    largest_share = -(-len(ordered) // world.size)
    num_batches = -(-largest_share // batch_size)
    missing = num_batches - -(-len(mine) // batch_size)
    asked = mine + [ordered[-1]] * missing  # shares differ by one question: then all batches before are full
    answers = _answers(model, tokenizer, asked, batch_size=batch_size, together=True)
    return answers[: len(mine)]


def by_length(questions: Sequence[Question]) -> list[int]:
    """Numbers of the questions, longest answers first: a batch then waits for nobody's long answer."""
    lengths = [(len(question.answer), len(question.prompt)) for question in questions]
    return sorted(range(len(questions)), key=lengths.__getitem__, reverse=True)


@torch.no_grad()
def _answers(
    model: OmniLMMForCausalLM,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    batch_size: int,
    together: bool = False,
) -> list[Answer]:
    """The questions batch by batch, as they come; ``together``: a collective of all ranks."""
    was_training = model.training
    model.eval()
    answers: list[Answer] = []
    # Every length of a cache would be compiled anew, for each block, to be used once.
    with torch.compiler.set_stance("force_eager"):
        for first in range(0, len(questions), batch_size):
            batch = questions[first : first + batch_size]
            for question, ids in zip(batch, _generate(model, batch, together=together), strict=True):
                answers.append(Answer(question, tokenizer.decode(ids), tokenizer.decode(question.answer)))
    model.train(was_training)
    return answers


def _generate(model: OmniLMMForCausalLM, batch: Sequence[Question], *, together: bool) -> list[list[int]]:
    """New ids for each question, cut at the end token or after what its truth allows."""
    config = model.config
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    input_ids, mask = left_padded([question.prompt for question in batch], pad=pad)
    images = [pixels(image, config) for question in batch for image in question.images]
    limits = [len(question.answer) + SLACK for question in batch]
    output = model.generate(
        input_ids=to_device(input_ids, model.device),
        attention_mask=to_device(mask, model.device),
        pixel_values=to_device(torch.stack(images), model.device) if images else None,
        max_new_tokens=max(limits),
        do_sample=False,
        eos_token_id=config.end_token_ids,
        pad_token_id=pad,
        synced_gpus=together,
    )
    rows = output[:, input_ids.shape[1] :].tolist()
    return [until(row[:limit], config.end_token_ids) for row, limit in zip(rows, limits, strict=True)]


def left_padded(prompts: Sequence[np.ndarray], *, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 ids ``[B, T]`` that all end in the last column, and the mask of what is no padding."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def pixels(data: bytes, config: OmniLMMConfig) -> torch.Tensor:
    """An encoded image as the training loader sees it: uint8 ``[3, S, S]``."""
    square = fit_rgb(decode_rgb(data), config.image_size, fit=config.image_fit)
    return torch.from_numpy(square).permute(2, 0, 1).contiguous()


def until(ids: list[int], end_tokens: Sequence[int]) -> list[int]:
    """The ids before the first end token."""
    ends = (position for position, token in enumerate(ids) if token in end_tokens)
    return ids[: next(ends, len(ids))]
