"""Conversation -> input_ids + labels: what the model reads, and what it learns to write.

Supervised are each assistant turn's content and the control token that closes it (``</s>``), and nothing
else; with reasoning or calls of tools (text/transcript.py), all that the assistant writes::

    <|user|>\\nHi</s>\\n<|assistant|>\\nHello</s>        (Zephyr)
                                       ^^^^^^^^^ supervised

Step (1) ``_Plan``: what the chat template prints around contents of these roles (text/chat_template.py),
         with its control tokens guarded (omnidata.text.encoder), so that contents are inert text.
Step (2) ``_draft``: the guarded text of one conversation, and where in it, in characters, each assistant
         turn starts and ends.
Step (3) one ``encode_batch`` for all drafts.
Step (4) ``_finish``: characters -> tokens by the tokenizer's offsets; images widened to their block; too long
         ones cut after an assistant turn.

OmniLMM's format differs from what ``apply_chat_template`` gives in three ways: a default system turn unless
one is given, BOS in front, and no newline after the last ``</s>``. It is used if the template prints
Zephyr's turns and the tokenizer has the image tokens (``Renderer.is_omnilmm``). For every other tokenizer the
ids are exactly those of ``apply_chat_template(messages)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from omnidata.outcomes import caught
from omnidata.profiles import Run
from omnidata.schema import (
    CONTENT_TOKENS,
    IGNORE_INDEX,
    Conversation,
    ImagePart,
    Message,
    RejectError,
    Rendered,
    TextPart,
    UserError,
)
from omnidata.text.chat_template import ChatTemplate, TurnShape, prints_zephyr
from omnidata.text.closings import Closings
from omnidata.text.cuts import Span
from omnidata.text.encoder import IMAGE_GUARD, encoder_of, refuse_surrogates
from omnidata.text.guarding import added_tokens
from omnidata.text.lines import Line, written_texts
from omnidata.text.prepared import AnyTokenizer
from omnidata.text.spans import Encoding, interleave, labels_of, refuse_unsupervised, widened
from omnidata.text.token_roles import content_tokens_of
from omnidata.text.tokenizer import template_text
from omnidata.text.transcript import Scribe

SURE = 8  # tokens by which a beginning, rendered alone, may be shorter than where it stands in the whole
DEFAULT_SYSTEM = (
    "You are an artificial intelligence assistant, which gives helpful, detailed, "
    "and polite answers to the human's questions."
)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How conversations of one sequence of roles are written: guarded pieces and the turns to supervise."""

    shape: TurnShape  # as the template prints it, for the proof
    pieces: tuple[str, ...]  # guarded, one before each content and one after the last
    turns: tuple[_Turn, ...]


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant turn to supervise."""

    message: int  # position in the conversation
    closing: int  # characters of the piece after the content up to and including the closing control token
    slack: int  # blanks before the content that the model writes, because the generation prompt lacks them


@dataclass(frozen=True, slots=True)
class Draft:
    """One conversation before it is encoded."""

    text: str  # guarded
    spans: tuple[Span, ...]
    num_images: int
    ends: tuple[tuple[int, int], ...] = ()  # (message, characters up to its end) of each assistant turn
    notes: tuple[str, ...] = ()  # what the report should tell besides
    # Of a processor's pictures alone: widths by guard, of each occurrence; characters of the runs; the runs.
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    places: tuple[tuple[int, int], ...] = ()
    runs: tuple[Run, ...] = ()


class Renderer:
    """Renders conversations for one tokenizer; see the module's docstring for what is supervised.

    ``default_system`` is put in front of a conversation that has no system turn: None for none, "auto" for
    OmniLMM's if the tokenizer is OmniLMM's. ``slice_tokens`` stand around the tiles of pictures that are
    cut (ImagePart.grid); the tokenizer must have them. ``date`` (YYYY-MM-DD) is today's for the templates
    that print it.
    """

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        num_query: int = 64,
        max_length: int | None = 2048,
        content_tokens: Sequence[str] = CONTENT_TOKENS,
        *,
        default_system: str | None = "auto",
        slice_tokens: Sequence[str] | None = None,
        date: str | None = None,
    ) -> None:
        text = template_text(tokenizer)
        if not text:
            raise UserError(
                "the tokenizer has no chat template; name one: omnidata prepare-tokenizer SOURCE --out DIR "
                "--chat-template zephyr (or a Jinja file)"
            )
        self.tokenizer = tokenizer
        self.num_query = num_query
        self.max_length = max_length
        self._template = self._open_template(text, date)
        self.content_tokens = self._find_content_tokens(content_tokens)  # that the tokenizer has
        self._encoder = encoder_of(tokenizer, content_tokens=(*content_tokens, *self.content_tokens))
        self._closings = Closings(self._template, self._encoder)
        self._scribe = Scribe(self._template, self._encoder, self._closings)
        self._slice_guards = None if slice_tokens is None else self._encoder.require(slice_tokens)
        self.is_omnilmm = self._is_omnilmm()
        own = DEFAULT_SYSTEM if self.is_omnilmm else None
        self.default_system = own if default_system == "auto" else default_system
        self._system = Message("system", (TextPart(self.default_system or ""),))
        self._bos = self._find_bos()
        self._plan = lru_cache(maxsize=4096)(self._make_plan)
        self.end_of_turn = self._find_end_of_turn()  # ids of the tokens that close an assistant's turn

    def _open_template(self, text: str, date: str | None) -> ChatTemplate:
        return ChatTemplate(text, self.tokenizer.special_tokens_map, date=date)

    def _is_omnilmm(self) -> bool:
        return self._encoder.image_ids is not None and prints_zephyr(self._template, self.tokenizer.eos_token)

    # --- what users call ----------------------------------------------------------------------------------

    def render(self, conversation: Conversation) -> Rendered:
        """Ids and labels of one conversation; RejectError if that is not possible."""
        [result] = self.render_batch([conversation])
        if isinstance(result, RejectError):
            raise result
        return result

    def render_batch(self, conversations: Iterable[Conversation]) -> list[Rendered | RejectError]:
        """The same for many, with one call of the tokenizer; a refused one is a RejectError in its place."""
        conversations = list(conversations)
        drafts = [caught(self._draft, conversation) for conversation in conversations]
        encodings = iter(self._encode([draft.text for draft in drafts if not isinstance(draft, RejectError)]))
        return [
            draft
            if isinstance(draft, RejectError)
            else caught(self._finish_or_refuse, conversation, draft, next(encodings))
            for conversation, draft in zip(conversations, drafts, strict=True)
        ]

    def _encode(self, texts: list[str]) -> Sequence[Encoding | RejectError]:
        """Encodings; if the tokenizer fails on all at once, a RejectError for each that is to blame."""
        encodings = caught(self._encoder.encode_batch, texts)
        if not isinstance(encodings, RejectError):
            return encodings
        alone = [caught(self._encoder.encode_batch, [text]) for text in texts]
        return [each if isinstance(each, RejectError) else each[0] for each in alone]

    def _finish_or_refuse(self, talk: Conversation, draft: Draft, found: Encoding | RejectError) -> Rendered:
        if isinstance(found, RejectError):
            raise found
        return self._finish(talk, draft, found)

    def render_prompt(self, conversation: Conversation) -> np.ndarray:
        """Ids int32 [L] of a conversation that ends with a user turn, and of the prompt for the reply."""
        draft = self._draft(conversation, generation_prompt=True)
        [encoding] = self._encoder.encode_batch([draft.text])
        ids = np.array(encoding.ids, dtype=np.int32)
        return self._widen(ids, np.full_like(ids, IGNORE_INDEX))[0]

    # --- step 1: roles -> pieces ----------------------------------------------------------------------------

    def _make_plan(self, roles: tuple[str, ...], generation_prompt: bool) -> _Plan:
        shape = self._template.shape(roles, generation_prompt)
        pieces = [self._encoder.guard(piece) for piece in shape.pieces]
        self._dress(pieces, generation_prompt)
        turns, slacks = [], {}  # what one header begins with, it always does: a template is asked once
        for i, role in enumerate(roles):
            if role == "assistant" and shape.marked[i]:
                header = shape.pieces[i]
                if header not in slacks:
                    slacks[header] = self._slack(roles[:i], header)
                closing = self._closings.length(pieces[i + 1], is_last=i + 1 == len(roles))
                turns.append(_Turn(i, closing, slacks[header]))
        return _Plan(shape, tuple(pieces), tuple(turns))

    def _dress(self, pieces: list[str], generation_prompt: bool) -> None:
        """OmniLMM's beginning and end."""
        if self.is_omnilmm:
            pieces[0] = self._bos + pieces[0]
            pieces[-1] = pieces[-1] if generation_prompt else pieces[-1].removesuffix("\n")

    def _slack(self, roles: tuple[str, ...], header: str) -> int:
        """Blanks that the template prints between the generation prompt and the content.

        Mistral's ``[/INST] Hello``: the prompt ends at ``[/INST]``, so the model writes ``▁Hello``.
        """
        blanks = len(header) - len(header.rstrip())
        if not (roles and blanks):
            return 0
        prompt = self._template.shape(roles, True).pieces[-1]
        rest = header.removeprefix(prompt) if header.startswith(prompt) else ""
        return len(rest) if not rest.strip() else 0

    # --- step 2: conversation -> guarded text ---------------------------------------------------------------

    def _draft(self, conversation: Conversation, *, generation_prompt: bool = False) -> Draft:
        messages = self._with_system(conversation.messages)
        if not conversation.is_plain:
            return self._draft_transcript(messages, conversation.tools, generation_prompt)
        roles = tuple(message.role for message in messages)
        contents = [self._content(message) for message in messages]
        plan = self._plan(roles, generation_prompt)
        self._template.prove(plan.shape, roles, contents, generation_prompt=generation_prompt)
        printed = plan.shape.contents(contents)
        num_images = self._num_images(messages)
        starts, text = interleave(plan.pieces, printed)
        ends = tuple(
            (turn.message, starts[turn.message] + len(printed[turn.message]) + turn.closing)
            for turn in plan.turns
        )
        spans = tuple(
            (starts[turn.message], end, turn.slack)
            for turn, (_, end) in zip(plan.turns, ends, strict=True)
            if messages[turn.message].supervised
        )
        return Draft(text, spans, num_images, ends)

    def _draft_transcript(
        self, messages: Sequence[Message], tools: Sequence[Any], generation_prompt: bool
    ) -> Draft:
        """A conversation with tools, calls or reasoning."""
        lines = [
            Line(message, (self._content(message),), is_default=message is self._system)
            for message in messages
        ]
        script = self._scribe.write(lines, tools, generation_prompt=generation_prompt)
        pieces = list(script.pieces)
        self._dress(pieces, generation_prompt)
        starts, text = interleave(pieces, script.contents)
        spans, ends = script.places(starts, [message.supervised for message in messages])
        return Draft(text, spans, self._num_images(messages), ends, script.notes)

    def _num_images(self, messages: Sequence[Message]) -> int:
        """Image blocks."""
        images = [part for message in messages for part in message.parts if isinstance(part, ImagePart)]
        if images and self._encoder.image_ids is None:
            raise UserError(
                "the tokenizer lacks <im_patch>, <im_start> or <im_end>; run omnidata prepare-tokenizer"
            )
        return sum(part.num_blocks for part in images)

    def _content(self, message: Message) -> str:
        texts = [part.text if isinstance(part, TextPart) else self._picture(part) for part in message.parts]
        text = "".join(texts)
        refuse_surrogates(text)
        return text

    def _picture(self, part: ImagePart) -> str:
        """A picture's guards: its block and, if it is cut, ``<slice>`` tiles row by row ``</slice>``."""
        if part.grid is None:
            return IMAGE_GUARD
        assert self._slice_guards is not None, "pictures are cut, so the renderer needs slice_tokens"
        start, end = self._slice_guards
        columns, rows = part.grid
        return IMAGE_GUARD + start + "\n".join([IMAGE_GUARD * columns] * rows) + end

    def _with_system(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        if self.default_system is None or (messages and messages[0].role == "system"):
            return tuple(messages)
        return (self._system, *messages)

    # --- step 4: encoding -> ids and labels -----------------------------------------------------------------

    def _finish(self, conversation: Conversation, draft: Draft, encoding: Encoding) -> Rendered:
        ids = np.array(encoding.ids, dtype=np.int32)
        length = self._length(draft, encoding)
        if not self._fits(length):
            return self._cut(conversation, draft, encoding, length)
        labels = labels_of(ids, encoding, draft.spans)
        starts: tuple[int, ...] = ()
        if draft.num_images and self._encoder.image_ids:
            self._ignore_tiles(ids, labels)
            ids, labels = self._widen(ids, labels)
            starts = tuple(np.flatnonzero(ids == self._encoder.image_ids[0]).tolist())
        refuse_unsupervised(labels)
        return Rendered(
            *(ids, labels),
            num_images=draft.num_images,
            image_starts=starts,
            image_tokens=(self.num_query + 2,) * len(starts),
            notes=self._notes(draft),
        )

    def _fits(self, length: int) -> bool:
        return self.max_length is None or length <= self.max_length

    def _notes(self, draft: Draft) -> tuple[str, ...]:
        return (*self._closings.notes(draft.text, [end for _, end in draft.ends]), *draft.notes)

    def _length(self, draft: Draft, encoding: Encoding, stop: int | None = None) -> int:
        """Tokens of the sample, or of what stands before token ``stop`` of the encoding, images widened."""
        ids = np.array(encoding.ids[:stop])
        return len(ids) + int(np.count_nonzero(ids == self._encoder.image_id)) * (self.num_query + 1)

    def _ignore_tiles(self, ids: np.ndarray, labels: np.ndarray) -> None:
        """A reply that shows a cut picture learns nothing from ``<slice>`` to ``</slice>``."""
        if self._slice_guards is None:
            return
        first, last = (np.flatnonzero(ids == token_id) for token_id in self._encoder.ids(self._slice_guards))
        for start, end in zip(first, last, strict=True):
            labels[start : end + 1] = IGNORE_INDEX

    def _widen(self, ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._encoder.image_ids is None:
            return ids, labels
        return widened(ids, labels, self._encoder.image_id, self._encoder.image_ids, self.num_query)

    def _cut(self, conversation: Conversation, draft: Draft, encoding: Encoding, length: int) -> Rendered:
        """Cut whole turns from the end, down to an assistant turn after which everything fits.

        The whole conversation's encoding says about how long each beginning of it is, so that, however many
        turns there are, only one or two beginnings are rendered to be sure.
        """
        total = len(conversation.messages)
        for keep in self._beginnings(conversation, draft, encoding):
            shorter = replace(conversation, messages=conversation.messages[:keep])
            draft = self._draft(shorter)
            [encoding] = self._encoder.encode_batch([draft.text])
            if self._fits(self._length(draft, encoding)):
                return replace(self._finish(shorter, draft, encoding), num_truncated_messages=total - keep)
        raise RejectError(
            "too_long",
            f"{length} tokens, over max_length {self.max_length}, and no assistant turn ends before that",
        )

    def _beginnings(self, conversation: Conversation, draft: Draft, encoding: Encoding) -> Iterator[int]:
        """Numbers of messages that end with an assistant turn and may fit, the most first."""
        shift = len(conversation.messages) - len(self._with_system(conversation.messages))
        for message, end in reversed(draft.ends):
            token = encoding.char_to_token(end - 1)
            keep = message + 1 + shift
            if token is None or not 0 < keep < len(conversation.messages):
                continue
            if self._fits(self._length(draft, encoding, token + 1) - SURE):
                yield keep

    # --- facts for the manifest -----------------------------------------------------------------------------

    def _find_content_tokens(self, given: Sequence[str]) -> tuple[str, ...]:
        added = added_tokens(self.tokenizer.backend_tokenizer)
        of_model = content_tokens_of(self._template, added)
        wanted = {*given, *of_model}
        return tuple(token["content"] for token in added if token["content"] in wanted)

    def _find_end_of_turn(self) -> tuple[int, ...]:
        guards: dict[str, None] = {}
        for roles in (("user", "assistant"), ("user", "assistant") * 2, ("assistant",)):
            try:
                plan = self._plan(roles, False)
            except RejectError:
                continue
            for turn in plan.turns:
                closing = plan.pieces[turn.message + 1][: turn.closing]
                guards |= dict.fromkeys(self._encoder.control_guard.findall(closing)[-1:])
        return tuple(self._encoder.ids(list(guards)))

    def spelled(self, conversation: Conversation) -> list[str]:
        """Control tokens that the assistant's turns spell; they are learned as text, not as tokens."""
        found: dict[str, None] = {}
        for message in conversation.messages:
            if message.role == "assistant" and message.supervised:
                for text in written_texts(message):
                    found |= dict.fromkeys(self._encoder.spelled(text))
        return list(found)

    # --- what kind of tokenizer -----------------------------------------------------------------------------

    def _find_bos(self) -> str:
        """The guard of BOS if the tokenizer itself puts BOS in front, else nothing."""
        bos = self.tokenizer.bos_token
        ids = self.tokenizer.backend_tokenizer.encode("a").ids
        return self._encoder.guard(bos) if bos and ids[:1] == [self.tokenizer.bos_token_id] else ""
