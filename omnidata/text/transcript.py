"""Transcript: a conversation with tools, calls or reasoning, as its chat template prints it.

The assistant's turn is then more than a content: template text stands inside it, and all of it is what the
model has to write::

    <|im_start|>assistant\\n<think>\\nI must ask.\\n</think>\\n\\n<tool_call>…</tool_call><|im_end|>\\n
                           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^

It starts where the generation prompt after the turns before it ends, and ends where the rendering that stops
with this turn ends, blanks aside. Both are found by printing beginnings of the conversation with marks in
place of its texts (as in chat_template.py), and must stand in the whole as they stand there. A turn without
calls or reasoning is learned as ever: its content, and the token that closes it.

The whole is printed once more as it is and compared: nothing is proven from the template's text alone, since
every template of this kind looks at what it prints. What a template leaves out is refused (``not_printed``).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from omnidata.schema import REASONING_KEYS, TOOL_ROLES, Message, RejectError
from omnidata.text.chat_template import GENERATION_START, ChatTemplate, mark, split_at, without_marks
from omnidata.text.closings import Closings
from omnidata.text.cuts import Cuts, Reply, contents_in
from omnidata.text.data import Hidden, is_printed, leaves, missing_of
from omnidata.text.encoder import Encoder
from omnidata.text.forms import Form, forms_of
from omnidata.text.lines import Line, Slot, slots_of

PARTLY = "have tools of which the chat template does not print all"


@dataclass(frozen=True, slots=True)
class Transcript:
    """What is printed: guarded pieces around contents, some of which are empty and only mark a border."""

    pieces: tuple[str, ...]
    contents: tuple[str, ...]
    replies: tuple[Reply, ...]
    notes: tuple[str, ...]

    def places(self, starts: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
        """(line, spans in characters) of each reply, by where the contents start."""
        for reply in self.replies:
            yield (
                reply.line,
                [
                    (starts[first], starts[last] + len(self.contents[last]) + closing, slack)
                    for first, last, closing, slack in reply.spans
                ],
            )


@dataclass(frozen=True, slots=True)
class Scribe:
    """Writes transcripts for one template."""

    template: ChatTemplate
    encoder: Encoder
    closings: Closings

    def write(
        self, lines: Sequence[Line], tools: Sequence[dict[str, Any]], *, generation_prompt: bool = False
    ) -> Transcript:
        """The transcript in the first form (forms.py) that the template prints whole.

        Raises:
            RejectError: the template refuses the turns, leaves something out or can't be proven.
        """
        errors: list[RejectError] = []
        for form in forms_of([line.message for line in lines]):
            try:
                return _Draft(self, lines, tools, form).transcript(generation_prompt)
            except RejectError as error:
                errors.append(error)
        raise next((error for error in errors if error.reason == "not_printed"), errors[0])


class _Draft:
    """A conversation in one form, while it is taken apart."""

    def __init__(
        self, scribe: Scribe, lines: Sequence[Line], tools: Sequence[dict[str, Any]], form: Form
    ) -> None:
        self._scribe, self._lines, self._form = scribe, lines, form
        self._slots = [slot for i, line in enumerate(lines) for slot in slots_of(i, line)]
        self._hidden = Hidden(scribe.encoder)
        self._data = [self._data_of(line.message) for line in lines]
        self._shown = [self._hidden.hide(data) for data in self._data]
        self._tools = list(tools) or None
        self._shown_tools = self._hidden.hide(self._tools)
        self._prompts: dict[str, str] = {}

    def _data_of(self, message: Message) -> dict[str, Any]:
        data = {key: message.more[key] for key in ("name", "tool_call_id") if key in message.more}
        return {**data, "tool_calls": self._form.calls(message)} if "tool_calls" in message.more else data

    # --- printing ----------------------------------------------------------------------------------------

    def _num_slots(self, upto: int) -> int:
        return sum(slot.line < upto for slot in self._slots)

    def _messages(self, upto: int, texts: Sequence[str], data: Sequence[dict[str, Any]]) -> list[dict]:
        """The first turns as apply_chat_template takes them, with these texts."""
        left, messages = iter(texts), []
        for line, more in zip(self._lines[:upto], data, strict=False):
            role = self._form.role_of(line.message)
            keys = [key for key in REASONING_KEYS if key in line.message.more]
            thought = dict.fromkeys(keys, next(left)) if keys else {}
            parts = [next(left) if part else part for part in line.parts if part != ""]
            content = (
                self._scribe.template.content_of(role, parts) if parts else self._form.empty(line.message)
            )
            messages.append({"role": role, "content": content, **thought, **more})
        return messages

    def _marked(self, upto: int, generation_prompt: bool) -> str:
        texts = [mark(i) for i in range(self._num_slots(upto))]
        messages = self._messages(upto, texts, self._shown)
        return self._scribe.template.print(messages, generation_prompt, self._shown_tools)

    def _real(self, generation_prompt: bool, tools: Any) -> str:
        messages = self._messages(len(self._lines), [slot.text for slot in self._slots], self._data)
        return without_marks(self._scribe.template.print(messages, generation_prompt, tools))

    def _split(self, upto: int, generation_prompt: bool) -> list[str]:
        printed = self._marked(upto, generation_prompt)
        for i, slot in enumerate(self._slots[: self._num_slots(upto)]):
            if mark(i) not in printed:
                raise self._left_out(slot)
        return split_at(printed, [mark(i) for i in range(self._num_slots(upto))])

    def _left_out(self, slot: Slot) -> RejectError:
        message = self._lines[slot.line].message
        what = f"turn {slot.line + 1}"
        if slot.key != "content":
            template = self._scribe.template.text
            read = [key for key in REASONING_KEYS if re.search(rf"\b{key}\b", template)]
            hint = f"; it reads {read[0]!r}" if read else ""
            if slot.key in read:  # as Qwen3's: before the last question reasoning is dropped
                hint = "; it drops that of earlier turns: leave it out there, or make a record of each reply"
            return _not_printed(f"{slot.key!r} of {what}", hint)
        if message.role in TOOL_ROLES:
            return _not_printed(f"{what}, which is the {message.role}'s")
        if "tool_calls" in message.more:
            return _not_printed(f"the content of {what}, which also has 'tool_calls'")
        return RejectError("mask_unproven", f"the chat template does not print {what} once and in order")

    # --- taking apart ------------------------------------------------------------------------------------

    def transcript(self, generation_prompt: bool) -> Transcript:
        """Everything, or RejectError."""
        split = self._split(len(self._lines), generation_prompt)
        pieces = [without_marks(piece) for piece in split]
        marked = self._scribe.template.marked(split)
        real = self._real(generation_prompt, self._tools)
        contents, spelt = self._proven(pieces, real)
        cuts, replies = Cuts(pieces, contents), []
        for i, line in enumerate(self._lines):
            if line.message.role == "assistant":
                replies.append(self._reply(i, cuts, marked, split))
        raw, contents, replies = cuts.cut(replies)
        left = iter(spelt)
        plain = [self._hidden.show(piece, left) for piece in raw]
        for reply in replies:
            self._check_calls(reply, plain, contents)
        note = self._check_tools(real, plain, contents, replies, generation_prompt)
        left = iter(spelt)
        return Transcript(
            tuple(self._hidden.guard(piece, left) for piece in raw),
            tuple(contents),
            tuple(reply for reply in replies if reply.spans),
            (*self._form.notes, *note),
        )

    def _proven(self, pieces: Sequence[str], real: str) -> tuple[list[str], list[str]]:
        """The texts and the hidden strings as they are printed: the proof of the pieces."""
        found = contents_in(real, pieces, [slot.text for slot in self._slots], self._hidden)
        if found is None:
            raise RejectError(
                "mask_unproven",
                "the chat template changes a content, or reacts to one, so its place is unknown",
            )
        return found

    def _reply(self, line: int, cuts: Cuts, marked: Sequence[bool], split: Sequence[str]) -> Reply:
        first, end = self._num_slots(line), self._num_slots(line + 1)
        if None in self._lines[line].parts:
            raise RejectError(
                "mask_unproven",
                "a reply with pictures beside tools or reasoning is not built",
            )
        has_marks = self._scribe.template.has_generation_marks
        if has_marks and not (all(marked[first:end]) if end > first else GENERATION_START in split[first]):
            return Reply(line, ())
        is_last = line + 1 == len(self._lines)
        if not self._lines[line].is_spoken and end > first:
            slack = self._slack(line, cuts.pieces[first])
            return Reply(line, self._content_spans(first, end, cuts, slack, is_last=is_last))
        header = self._header(line, cuts.pieces[first])
        start = cuts.at(first, len(header))
        if "tool_calls" not in self._lines[line].message.more and end > first:
            closing = self._scribe.closings.length(self._guarded(cuts.pieces[end]), is_last=is_last)
            return Reply(line, ((start, end - 1, closing, 0),))
        offset = len(header) if end == first else 0
        return Reply(line, (self._spoken(line, start, (end, offset), cuts, is_last=is_last),))

    def _content_spans(
        self, first: int, end: int, cuts: Cuts, slack: int, *, is_last: bool
    ) -> tuple[tuple[int, int, int, int], ...]:
        closing = self._scribe.closings.length(self._guarded(cuts.pieces[end]), is_last=is_last)
        return tuple(
            (slot, slot, closing if slot == end - 1 else 0, slack if slot == first else 0)
            for slot in range(first, end)
        )

    def _spoken(
        self, line: int, start: int, place: tuple[int, int], cuts: Cuts, *, is_last: bool
    ) -> tuple[int, int, int, int]:
        """A turn that ends in calls, or says nothing: up to where a rendering that stops here ends.

        ``place``: the piece behind the turn's last text, and where in it what the model writes goes on.
        """
        number, offset = place
        rest = cuts.pieces[number][offset:]
        end = self._end_in(rest, line)
        closings, after = self._scribe.closings, self._guarded(rest[len(end) :])
        stop = cuts.at(number, offset + len(end))
        if closings.by_role:
            match = None if is_last else self._scribe.encoder.control_guard.search(after)
            if is_last or (match is not None and not after[: match.start()].strip()):
                return start, stop, match.end() if match else 0, 0
        guarded = self._guarded(end)
        guards = [match.end() for match in self._scribe.encoder.control_guard.finditer(guarded)]
        if guards[-1:] != [len(guarded)] and not (closings.literal and end.endswith(closings.literal)):
            raise RejectError(
                "mask_unproven", f"the chat template prints no control token at the end of turn {line + 1}"
            )
        return start, stop, 0, 0

    def _end_in(self, rest: str, line: int) -> str:
        """What of the text behind a turn's last content is the turn's.

        As the last, a turn may begin with more: Qwen3 prints an empty thought there, and drops it later.
        """
        tail = without_marks(self._split(line + 1, False)[-1]).rstrip()
        for at in range(len(tail)):
            if rest.startswith(tail[at:]):
                return tail[at:]
        raise RejectError(
            "mask_unproven", f"the chat template ends turn {line + 1} otherwise if turns follow"
        )

    def _guarded(self, piece: str) -> str:
        return self._hidden.guard(piece)

    # --- where a reply starts ----------------------------------------------------------------------------

    def _prompt(self, line: int) -> str:
        """What is printed between the text before a turn and what the model writes."""
        before = self._lines[line - 1] if line else None
        is_text = before is not None and any(before.parts) and "tool_calls" not in before.message.more
        key = before.message.role if before is not None and is_text else f"{line}"
        if key not in self._prompts:  # after one role it is always the same; where not, the check below fails
            self._prompts[key] = without_marks(self._split(line, True)[-1]) if line else ""
        return self._prompts[key]

    def _header(self, line: int, piece: str) -> str:
        """What stands before that which the model writes: the prompt, or the header of turns that only speak.

        They differ where the prompt opens the reasoning of a turn that has none, and where a template goes on
        after a tool's turn without a prompt.
        """
        prompt = self._prompt(line)
        fits = bool(prompt) and piece.startswith(prompt)
        found = prompt if fits else ""
        again = self._scribe.encoder.control_guard.match(self._guarded(piece[len(prompt) :].lstrip()))
        if not fits or (again and again[0] in self._role_guards):
            headers = [header for header in self._plain_headers(line) if piece.startswith(header)]
            found = max([found, *headers], key=len)
        if not found:
            raise RejectError(
                "mask_unproven",
                f"the chat template starts turn {line + 1} otherwise than its generation prompt does",
            )
        # A tokenizer may join the last blanks with those that follow.
        blanks = re.match(r"\s*", piece[len(found) :])[0] if found[-1].isspace() else ""
        return found + blanks

    @cached_property
    def _role_guards(self) -> frozenset[str]:
        """The control tokens of the prompt after a user's turn."""
        roles = [line.message.role for line in self._lines]
        asked = [i for i, pair in enumerate(pairwise(roles), 1) if pair == ("user", "assistant")]
        prompt = self._guarded(self._prompt(asked[0])) if asked else ""
        return frozenset(self._scribe.encoder.control_guard.findall(prompt))

    def _plain_headers(self, line: int) -> Iterator[str]:
        """What is printed before the content of a turn that only has one: the last, and one that is not."""
        count, role = self._num_slots(line), self._lines[line].message.role
        texts = [mark(i) for i in range(count + 2)]
        before = self._messages(line, texts, self._shown)
        spoken = [
            {"role": who, "content": self._scribe.template.content_of(who, [text])}
            for who, text in ((role, texts[count]), ("user", texts[count + 1]))
        ]
        for more in (1, 2):
            with contextlib.suppress(RejectError):
                printed = self._scribe.template.print([*before, *spoken[:more]], False, self._shown_tools)
                yield without_marks(split_at(printed, texts[: count + more])[count])

    def _slack(self, line: int, header: str) -> int:
        """Blanks between generation prompt and content, as in ``Renderer._slack``."""
        if not line or header == header.rstrip():
            return 0
        prompt = self._prompt(line)
        rest = header.removeprefix(prompt) if header.startswith(prompt) else ""
        return len(rest) if not rest.strip() else 0

    # --- is everything there -----------------------------------------------------------------------------

    def _check_calls(self, reply: Reply, plain: Sequence[str], contents: Sequence[str]) -> None:
        """Refuse a form in which a call, or a part of it, is not in the turn that makes it."""
        calls = self._data[reply.line].get("tool_calls")
        if not calls or not reply.spans:
            return
        [(first, last, _, _)] = reply.spans
        text = "".join(plain[i + 1] + contents[i + 1] for i in range(first, last))
        if missing := missing_of(calls, text):
            raise _not_printed(f"{missing} in turn {reply.line + 1}")
        is_null = self._form.empty(self._lines[reply.line].message) is None
        if is_null and "None" in text and not any("None" in str(leaf) for leaf in leaves(calls)):
            raise RejectError("mask_unproven", "the chat template prints null as None")

    def _check_tools(
        self,
        real: str,
        plain: Sequence[str],
        contents: Sequence[str],
        replies: Sequence[Reply],
        generation_prompt: bool,
    ) -> tuple[str, ...]:
        """Refuse a template that leaves tools out; a note if it prints only a part of them."""
        if not self._tools:
            return ()
        try:
            without = self._real(generation_prompt, None)
        except RejectError:
            without = None
        inside = {
            i + 1
            for reply in replies
            if self._lines[reply.line].is_spoken
            for first, last, _, _ in reply.spans
            for i in range(first, last)
        }
        text = "\n".join(piece for i, piece in enumerate(plain) if i not in inside)
        for tool in self._tools:
            function = tool["function"] if isinstance(tool.get("function"), dict) else tool
            name = function.get("name")
            if real == without or (isinstance(name, str) and not is_printed(name, text)):
                raise _not_printed(f"the tool {name!r} of the record's 'tools'" if name else "'tools'")
        return () if all(is_printed(leaf, text) for leaf in leaves(self._tools)) else (PARTLY,)


def _not_printed(what: str, hint: str = "") -> RejectError:
    return RejectError("not_printed", f"the chat template does not print {what}{hint}")
