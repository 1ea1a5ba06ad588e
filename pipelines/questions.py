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

import numpy as np
import torch

from omnidata import Dataset
from omnidata.schema import IGNORE_INDEX, UserError

from .parallel import World
from .prompts import OmniLMMPrompts, ProcessorPrompts

Prompts = OmniLMMPrompts | ProcessorPrompts
SLACK = 4  # tokens that an answer may be longer than the truth: blanks, or other words for the same thing


@dataclass(frozen=True, eq=False)
class Question:
    """One supervised span."""

    key: str  # the sample's
    prompt: np.ndarray  # ids before the span
    answer: np.ndarray  # ids of the span, without the end token
    images: tuple[bytes, ...]  # of the prompt, encoded
    runs: tuple[bytes, ...]  # what stands for each of them in the prompt


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


def questions_of(dataset: Dataset, prompts: Prompts, *, with_text_only: bool = False) -> Iterator[Question]:
    """Every question of the dataset, in its order.

    Questions without any image before them say nothing about seeing and are left out, unless asked for.
    """
    for position in range(len(dataset)):
        sample = dataset[position]
        for start, stop in supervised_spans(sample.labels):
            prompt = sample.input_ids[:start]
            runs = prompts.runs(dataset, position, prompt)
            if not runs and not with_text_only:
                continue
            answer = sample.input_ids[start:stop]
            if answer[-1] in prompts.end_tokens:
                answer = answer[:-1]
            yield Question(sample.key, prompt, answer, sample.images[: len(runs)], runs)


def supervised_spans(labels: np.ndarray) -> list[tuple[int, int]]:
    """``[-100 -100 5 2 -100 7 2]`` -> ``[(2, 4), (5, 7)]``."""
    supervised = np.concatenate(([False], labels != IGNORE_INDEX, [False]))
    edges = np.flatnonzero(supervised[1:] != supervised[:-1])
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def with_swapped_images(questions: Sequence[Question]) -> list[Question]:
    """The same questions, every picture replaced by the one half-way down the list of all pictures.

    Only pictures for which the same stands in the text can take each other's place; questions with one that
    has no such other are left out, and the caller sees fewer.
    """
    alike: dict[bytes, dict[bytes, None]] = {}
    for question in questions:
        for run, image in zip(question.runs, question.images, strict=True):
            alike.setdefault(run, {})[image] = None
    other: dict[tuple[bytes, bytes], bytes] = {}
    for run, group in alike.items():
        pictures = list(group)
        if len(pictures) > 1:
            shifted = pictures[len(pictures) // 2 :] + pictures[: len(pictures) // 2]
            other |= {(run, mine): its for mine, its in zip(pictures, shifted, strict=True)}
    swapped = [
        replace(q, images=tuple(other[pair] for pair in zip(q.runs, q.images, strict=True)))
        for q in questions
        if all(pair in other for pair in zip(q.runs, q.images, strict=True))
    ]
    if not any(question.images for question in swapped):
        raise UserError("swapping images needs at least two different pictures with the same tokens")
    return swapped


def answer_questions(
    prompts: Prompts, questions: Sequence[Question], *, batch_size: int = 64
) -> list[Answer]:
    """Greedy answers, in the order of the questions.

    Each answer ends at most SLACK tokens after its truth: one that goes on is wrong already. So it is the
    same in any batch.
    """
    order = by_length(questions)
    answers = _answers(prompts, [questions[i] for i in order], batch_size=batch_size)
    in_order = dict(zip(order, answers, strict=True))
    return [in_order[number] for number in range(len(questions))]


def answer_share(
    prompts: Prompts,
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
        return _answers(prompts, mine, batch_size=batch_size)
    largest_share = -(-len(ordered) // world.size)
    num_batches = -(-largest_share // batch_size)
    missing = num_batches - -(-len(mine) // batch_size)
    asked = mine + [ordered[-1]] * missing  # shares differ by one question: then all batches before are full
    answers = _answers(prompts, asked, batch_size=batch_size, together=True)
    return answers[: len(mine)]


def by_length(questions: Sequence[Question]) -> list[int]:
    """Numbers of the questions, longest answers first: a batch then waits for nobody's long answer."""
    lengths = [(len(question.answer), len(question.prompt)) for question in questions]
    return sorted(range(len(questions)), key=lengths.__getitem__, reverse=True)


@torch.no_grad()
def _answers(
    prompts: Prompts, questions: Sequence[Question], *, batch_size: int, together: bool = False
) -> list[Answer]:
    """The questions batch by batch, as they come; ``together``: a collective of all ranks."""
    model, tokenizer = prompts.model, prompts.tokenizer
    was_training = model.training
    model.eval()
    answers: list[Answer] = []
    # Every length of a cache would be compiled anew, for each block, to be used once.
    with torch.compiler.set_stance("force_eager"):
        for first in range(0, len(questions), batch_size):
            batch = questions[first : first + batch_size]
            for question, ids in zip(batch, _generate(prompts, batch, together=together), strict=True):
                answers.append(Answer(question, tokenizer.decode(ids), tokenizer.decode(question.answer)))
    model.train(was_training)
    return answers


def _generate(prompts: Prompts, batch: Sequence[Question], *, together: bool) -> list[list[int]]:
    """New ids for each question, cut at the end token or after what its truth allows."""
    inputs = prompts.inputs([q.prompt for q in batch], [q.images for q in batch])
    limits = [len(question.answer) + SLACK for question in batch]
    output = prompts.model.generate(
        **inputs,
        max_new_tokens=max(limits),
        do_sample=False,
        eos_token_id=prompts.end_tokens,
        pad_token_id=prompts.pad,
        synced_gpus=together,
    )
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [until(row[:limit], prompts.end_tokens) for row, limit in zip(rows, limits, strict=True)]


def until(ids: list[int], end_tokens: Sequence[int]) -> list[int]:
    """The ids before the first end token."""
    ends = (position for position, token in enumerate(ids) if token in end_tokens)
    return ids[: next(ends, len(ids))]
