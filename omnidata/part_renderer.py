"""Conversation -> ids and labels for models whose processor says what stands for a picture.

As ``render.Renderer``, with two differences. Contents go to the chat template as lists of parts. Where it
prints an image token the picture's run is written, as the profile gives it for the pictures' sizes, with each
stretch of a repeated token written once; when the ids are known the stretches are widened::

    text    … <|vision_start|> <|image_pad|> <|vision_end|> What is this?
    counts                     300
    ids     … 151652           151655 × 300  151653 …

Encoding the run in its place matters: a run may begin or end with line ends that the tokenizer joins with
the text beside it. Texts are supervised part by part, so no token of a run or around one ever is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from omnidata.profiles import Profile, Run
from omnidata.render import Draft, Renderer
from omnidata.schema import (
    CONTENT_TOKENS,
    Conversation,
    Message,
    RejectError,
    Rendered,
    TextPart,
    UserError,
)
from omnidata.text.chat_template import NONCE
from omnidata.text.cuts import Span
from omnidata.text.encoder import refuse_surrogates
from omnidata.text.lines import Line
from omnidata.text.part_template import Layout, PartTemplate, Structure, parts_of, structure_of, texts_of
from omnidata.text.spans import Encoding, interleave, labels_of, refuse_unsupervised, token_at

if TYPE_CHECKING:
    from omnidata.text.prepared import AnyTokenizer

_STRETCH = re.compile(rf"(\ufdd0{NONCE}\d+\ufdd1)\1*")  # a control token's guard, once or again and again


@dataclass(frozen=True, slots=True)
class _Stretches:
    """A run with its stretches written once."""

    text: str  # guarded
    counts: tuple[tuple[str, int], ...]  # (guard, how often) of every stretch, in order


@dataclass(frozen=True, slots=True)
class _Written:
    """A conversation's text before it is said what of it is learned; the names are those of ``Draft``."""

    pieces: list[str]
    starts: list[int]  # characters, of each content
    text: str
    widths: dict[str, tuple[int, ...]]
    places: tuple[tuple[int, int], ...]
    runs: tuple[Run, ...]

    def draft(
        self, spans: tuple[Span, ...], ends: tuple[tuple[int, int], ...], notes: tuple[str, ...] = ()
    ) -> Draft:
        """With what is learned."""
        num_images = len(self.runs)
        return Draft(self.text, spans, num_images, ends, notes, self.widths, self.places, self.runs)


class PartRenderer(Renderer):
    """Renders conversations for one processor.

    Args:
        tokenizer: the processor's, with its chat template.
        profile: answers with the runs.
        max_length: tokens; longer samples are cut after an assistant turn.
        content_tokens: special tokens that content may spell.
        default_system: of a conversation that has no system turn; None for none.
        date: today's for the templates that print it, as YYYY-MM-DD.
    """

    _template: PartTemplate

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        profile: Profile,
        max_length: int | None = None,
        content_tokens: Sequence[str] = CONTENT_TOKENS,
        *,
        default_system: str | None = None,
        date: str | None = None,
    ) -> None:
        self.profile = profile
        self._layout = lru_cache(maxsize=4096)(self._make_layout)
        self._stretches = lru_cache(maxsize=65536)(self._make_stretches)
        super().__init__(
            tokenizer,
            max_length=max_length,
            content_tokens=content_tokens,
            default_system=default_system,
            date=date,
        )

    def _open_template(self, text: str, date: str | None) -> PartTemplate:
        special = self.tokenizer.special_tokens_map
        return PartTemplate(text, special, image_token=self.profile.image_token, date=date)

    def _is_omnilmm(self) -> bool:
        return False

    @cached_property
    def _image_guard(self) -> str:
        return self._encoder.guard(self.profile.image_token)

    # --- step 1: structure -> guarded pieces --------------------------------------------------------------

    def _make_layout(self, structure: Structure, generation_prompt: bool) -> tuple[Layout, tuple[str, ...]]:
        layout = self._template.layout(structure, generation_prompt)
        pieces = [self._encoder.guard(piece) for piece in layout.shape.pieces]
        self._dress(pieces, generation_prompt)
        return layout, tuple(pieces)

    def _dress(self, pieces: list[str], generation_prompt: bool) -> None:
        """As the processor does: BOS in front unless it is printed."""
        if not pieces[0].startswith(self._bos):
            pieces[0] = self._bos + pieces[0]

    def _make_stretches(self, text: str) -> _Stretches:
        counts: list[tuple[str, int]] = []

        def once(match: re.Match[str]) -> str:
            counts.append((match[1], len(match[0]) // len(match[1])))
            return match[1]

        short = _STRETCH.sub(once, self._encoder.guard(text))
        return _Stretches(short, tuple(counts))

    # --- step 2: conversation -> guarded text -------------------------------------------------------------

    def _draft(self, conversation: Conversation, *, generation_prompt: bool = False) -> Draft:
        messages = self._with_system(conversation.messages)
        if not conversation.is_plain:
            return self._draft_spoken(messages, conversation, generation_prompt)
        texts = texts_of(messages)
        for text in texts:
            refuse_surrogates(text)
        layout, pieces = self._layout(structure_of(messages), generation_prompt)
        self._template.prove_messages(layout, messages, generation_prompt=generation_prompt)
        printed = layout.shape.contents(texts)
        written = self._written(conversation, pieces, printed, layout.images)
        filled, starts = written.pieces, written.starts
        spans: list[Span] = []
        ends: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            if message.role == "assistant":
                mine = list(self._spans_of(number, messages, layout, filled, printed, starts))
                spans += mine if message.supervised else ()
                ends += [(number, mine[-1][1])] if mine else ()
        return written.draft(_joined(spans), tuple(ends))

    def _draft_spoken(
        self, messages: Sequence[Message], conversation: Conversation, generation_prompt: bool
    ) -> Draft:
        """A conversation with tools, calls or reasoning."""
        lines = [
            Line(message, tuple(part.text if isinstance(part, TextPart) else None for part in message.parts))
            for message in messages
        ]
        script = self._scribe.write(lines, conversation.tools, generation_prompt=generation_prompt)
        pieces = list(script.pieces)
        self._dress(pieces, generation_prompt)
        images = [piece.count(self._image_guard) for piece in pieces]
        wanted = sum(line.parts.count(None) for line in lines)
        if sum(images) != wanted:
            raise RejectError(
                "mask_unproven", f"the chat template prints {sum(images)} image tokens for {wanted} pictures"
            )
        written = self._written(conversation, pieces, script.contents, images)
        spans, ends = script.places(written.starts, [message.supervised for message in messages])
        return written.draft(_joined(spans), ends, script.notes)

    def _written(
        self,
        conversation: Conversation,
        pieces: Sequence[str],
        printed: Sequence[str],
        images: Sequence[int],
    ) -> _Written:
        """The whole text, with the runs of the pictures in their places."""
        runs = self._runs(conversation, sum(images))
        left = iter([self._stretches(run.text) for run in runs])
        counts: list[tuple[str, int]] = []
        inner: list[tuple[int, int, int]] = []  # piece, and where in it each run is
        filled = [
            self._fill(piece, images[number], left, counts, number, inner)
            for number, piece in enumerate(pieces)
        ]
        starts, text = interleave(filled, printed)
        before = [0, *(start + len(content) for start, content in zip(starts, printed, strict=True))]
        places = tuple((before[piece] + first, before[piece] + end) for piece, first, end in inner)
        return _Written(filled, starts, text, _widths(counts, text), places, runs)

    def _runs(self, conversation: Conversation, number: int) -> tuple[Run, ...]:
        if not number:
            return ()
        assert len(conversation.image_sizes) >= number, "the sizes of the pictures are not known"
        return self.profile.runs(conversation.image_sizes[:number])

    def _fill(
        self,
        piece: str,
        num_images: int,
        written: Iterator[_Stretches],
        counts: list[tuple[str, int]],
        number: int,
        inner: list[tuple[int, int, int]],
    ) -> str:
        """The piece with a run in place of each image token.

        ``counts`` is told what the run's tokens stand for, ``inner`` where in the piece the run is.
        """
        if not num_images:
            return piece
        texts = piece.split(self._image_guard)
        filled = texts[0]
        for text in texts[1:]:
            stretches = next(written)
            counts += stretches.counts
            inner.append((number, len(filled), len(filled) + len(stretches.text)))
            filled += stretches.text + text
        return filled

    def _spans_of(
        self,
        number: int,
        messages: Sequence[Message],
        layout: Layout,
        pieces: Sequence[str],
        printed: Sequence[str],
        starts: Sequence[int],
    ) -> Iterator[Span]:
        """What is learned of one assistant turn: its texts, and the token that closes it."""
        mine = [i for i, owner in enumerate(layout.owners) if owner == number and layout.shape.marked[i]]
        parts = parts_of(messages[number])
        is_last = number + 1 == len(messages)
        for i in mine:
            start, end = starts[i], starts[i] + len(printed[i])
            first = i == mine[0] and isinstance(parts[0], TextPart)
            slack = self._slack_of(messages[:number], layout.shape.pieces[i]) if first else 0
            if i == mine[-1] and isinstance(parts[-1], TextPart):
                yield start, end + self._closings.length(pieces[i + 1], is_last=is_last), slack
                continue
            if end > start:
                yield start, end, slack
            if i == mine[-1] and not (is_last and self._closings.by_role):
                # A picture ends the turn: what closes it stands behind the run.
                yield self._closing_after_run(end, pieces[i + 1])

    def _closing_after_run(self, end: int, piece: str) -> Span:
        places = [(piece.find(guard), guard) for guard in self.end_guards if guard in piece]
        if not places:
            raise RejectError(
                "mask_unproven", "the chat template does not close a turn that ends in a picture"
            )
        at, guard = min(places)
        return end + at, end + at + len(guard), 0

    def _slack_of(self, before: Sequence[Message], header: str) -> int:
        """As ``_slack``, for the turns before a reply."""
        if not before or header == header.rstrip():
            return 0
        layout, _ = self._layout(structure_of(before), True)
        prompt = layout.shape.pieces[-1]
        rest = header.removeprefix(prompt) if header.startswith(prompt) else ""
        return len(rest) if not rest.strip() else 0

    # --- step 4: encoding -> ids and labels ---------------------------------------------------------------

    def _finish(self, conversation: Conversation, draft: Draft, encoding: Encoding) -> Rendered:
        ids = np.array(encoding.ids, dtype=np.int32)
        counts = self._counts(ids, draft)
        length = int(counts.sum())
        if not self._fits(length):
            return self._cut(conversation, draft, encoding, length)
        labels = labels_of(ids, encoding, draft.spans)
        refuse_unsupervised(labels)
        before = np.concatenate(([0], np.cumsum(counts)))
        places = [
            (before[token_at(encoding, first)], before[token_at(encoding, end - 1) + 1])
            for first, end in draft.places
        ]
        return Rendered(
            np.repeat(ids, counts),
            np.repeat(labels, counts),
            num_images=draft.num_images,
            image_starts=tuple(int(first) for first, _ in places),
            image_tokens=tuple(int(end - first) for first, end in places),
            image_pixels=tuple(run.num_pixels for run in draft.runs),
            notes=self._notes(draft),
        )

    def _counts(self, ids: np.ndarray, draft: Draft) -> np.ndarray:
        """How often each id stands in the sample; RejectError if the tokenizer moved a token of a run."""
        counts = np.ones(len(ids), dtype=np.intp)
        for guard, widths in draft.widths.items():
            [token] = self._encoder.ids([guard])
            places = np.flatnonzero(ids == token)
            if len(places) != len(widths):
                raise RejectError(
                    "mask_unproven", "the tokenizer does not encode a picture's run as it is written"
                )
            counts[places] = widths
        return counts

    def _length(self, draft: Draft, encoding: Encoding, stop: int | None = None) -> int:
        return int(self._counts(np.array(encoding.ids), draft)[:stop].sum())

    def render_prompt(self, conversation: Conversation) -> np.ndarray:
        """Ids int32 [L] of a conversation that ends with a user turn, and of the prompt for the reply."""
        draft = self._draft(conversation, generation_prompt=True)
        [encoding] = self._encoder.encode_batch([draft.text])
        ids = np.array(encoding.ids, dtype=np.int32)
        return np.repeat(ids, self._counts(ids, draft))

    # --- facts for the manifest ---------------------------------------------------------------------------

    def _find_end_of_turn(self) -> tuple[int, ...]:
        """Ids of the tokens that close a reply in the plainest conversations.

        Raises:
            UserError: the end of no reply can be proven, so every record would be refused.
        """
        guards: dict[str, None] = {}
        plain: Structure = (("user", "t"), ("assistant", "t"))
        proven, problem = 0, None
        for structure in (plain, plain * 2):
            try:
                closings = list(self._closings_of(structure))
            except RejectError as error:
                problem = error
                continue
            proven += len(closings)
            for closing in closings:
                guards |= dict.fromkeys(self._encoder.control_guard.findall(closing)[-1:])
        if not proven:
            raise UserError(f"the model's chat template cannot be trained with: {problem}")
        self.end_guards = tuple(guards)
        return tuple(self._encoder.ids(self.end_guards))

    def _closings_of(self, structure: Structure) -> Iterator[str]:
        """What closes each reply of a conversation."""
        layout, pieces = self._layout(structure, False)
        for i, owner in enumerate(layout.owners):
            if structure[owner][0] == "assistant":
                after = pieces[i + 1]
                yield after[: self._closings.length(after, is_last=owner + 1 == len(structure))]


def _joined(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Spans that touch are one: a token may lie across the border of two texts of a reply."""
    joined: list[Span] = []
    for start, end, slack in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], end, joined[-1][2]
        else:
            joined.append((start, end, slack))
    return tuple(joined)


def _widths(counts: Sequence[tuple[str, int]], text: str) -> dict[str, tuple[int, ...]]:
    """For every guard that a run repeats: how often each of its occurrences in the text stands in the ids."""
    widths: dict[str, list[int]] = {}
    for guard, number in counts:
        widths.setdefault(guard, []).append(number)
    repeated = {guard: tuple(numbers) for guard, numbers in widths.items() if max(numbers) > 1}
    for guard, numbers in repeated.items():
        if text.count(guard) != len(numbers):
            raise RejectError(
                "mask_unproven", "the chat template itself prints a token of the pictures' runs"
            )
    return repeated
