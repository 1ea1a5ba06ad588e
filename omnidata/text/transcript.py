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
from itertools import accumulate, pairwise
from typing import Any

from omnidata.schema import REASONING_KEYS, TOOL_ROLES, Message, RejectError
from omnidata.text.chat_template import GENERATION_START, ChatTemplate, mark, split_at, without_marks
from omnidata.text.closings import Closings
from omnidata.text.cuts import Cuts, Reply, Transcript, contents_in
from omnidata.text.data import Hidden, is_printed, leaves, missing_of
from omnidata.text.encoder import Encoder
from omnidata.text.forms import Form, forms_of
from omnidata.text.lines import Line, Slot, slots_of

PARTLY = "have tools of which the chat template does not print all"


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
        of_lines = [list(slots_of(i, line)) for i, line in enumerate(lines)]
        self._slots = [slot for slots in of_lines for slot in slots]
        self._hidden = Hidden(scribe.encoder)
        self._data = [self._data_of(line.message) for line in lines]
        self._shown = [self._hidden.hide(data) for data in self._data]
        self._tools = list(tools) or None
        self._shown_tools = self._hidden.hide(self._tools)
        self._prompts: dict[str, str] = {}  # by kind of turn
        self._headers: dict[str, list[str]] = {}
        self._first_user = next((i for i, line in enumerate(lines) if line.message.role == "user"), 0)
        self._before = [0, *accumulate(map(len, of_lines))]  # texts in front of each turn
        self._marked = self._messages([mark(i) for i in range(len(self._slots))], self._shown)

    def _data_of(self, message: Message) -> dict[str, Any]:
        keys = ("name", "tool_call_id")
        data: dict[str, object] = {key: message.more[key] for key in keys if key in message.more}
        return {**data, "tool_calls": self._form.calls(message)} if "tool_calls" in message.more else data

    # --- printing ----------------------------------------------------------------------------------------

    def _messages(self, texts: Sequence[str], data: Sequence[dict[str, object]]) -> list[dict[str, object]]:
        """The turns as apply_chat_template takes them, with these texts."""
        left, messages = iter(texts), []
        for line, more in zip(self._lines, data, strict=True):
            role = self._form.role_of(line.message)
            keys = [key for key in REASONING_KEYS if key in line.message.more]
            thought = dict.fromkeys(keys, next(left)) if keys else {}
            parts = [next(left) if part else part for part in line.parts if part != ""]
            content = self._form.content(line.message, parts, self._scribe.template)
            messages.append({"role": role, "content": content, **thought, **more})
        return messages

    def _real(self, generation_prompt: bool, tools: object) -> str:
        messages = self._messages([slot.text for slot in self._slots], self._data)
        return without_marks(self._scribe.template.print(messages, generation_prompt, tools))

    def _split(self, generation_prompt: bool) -> list[str]:
        """The whole around its texts, generation marks included."""
        printed = self._scribe.template.print(self._marked, generation_prompt, self._shown_tools)
        marks = [mark(i) for i in range(len(self._slots))]
        for text, slot in zip(marks, self._slots, strict=True):
            if text not in printed:
                raise self._left_out(slot)
        return split_at(printed, marks)

    def _tail(self, lines: Sequence[int], generation_prompt: bool) -> str:
        """What is printed behind the last text of these turns."""
        messages = [self._marked[line] for line in lines]
        printed = self._scribe.template.print(messages, generation_prompt, self._shown_tools)
        ends = [self._before[line + 1] for line in lines if self._before[line + 1] > self._before[line]]
        if ends:
            _, found, printed = printed.rpartition(mark(ends[-1] - 1))
            if not found:
                raise self._left_out(self._slots[ends[-1] - 1])
        return without_marks(printed)

    def _name(self, line: int) -> str:
        return f"turn {line + 1 - self._lines[0].is_default}"  # as the record counts

    def _left_out(self, slot: Slot) -> RejectError:
        message = self._lines[slot.line].message
        what = self._name(slot.line)
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
        split = self._split(generation_prompt)
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
        first, end = self._before[line], self._before[line + 1]
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
                "mask_unproven", f"the chat template prints no control token at the end of {self._name(line)}"
            )
        return start, stop, 0, 0

    def _end_in(self, rest: str, line: int) -> str:
        """What of the text behind a turn's last content is the turn's.

        As the last, a turn may begin with more: Qwen3 prints an empty thought there, and drops it later. All
        turns before it are printed only if it does not end as it does right after the first question.
        """
        for lines in ([*range(min(line, self._first_user + 1)), line], range(line + 1)):
            with contextlib.suppress(RejectError):
                tail = self._tail(lines, False).rstrip()
                at = next((at for at in range(len(tail)) if _is_continued(tail, at, rest)), None)
                if at is not None:
                    return tail[at:]
        raise RejectError(
            "mask_unproven", f"the chat template ends {self._name(line)} otherwise if turns follow"
        )

    def _guarded(self, piece: str) -> str:
        return self._hidden.guard(piece)

    # --- where a reply starts ----------------------------------------------------------------------------

    def _kind(self, line: int) -> str:
        """Turns after a text of one role are of a kind: what is printed in front of them is the same."""
        before = self._lines[line - 1] if line else None
        is_text = before is not None and any(before.parts) and "tool_calls" not in before.message.more
        return before.message.role if before is not None and is_text else f"{line}"

    def _prompt(self, line: int) -> str:
        """What is printed between the text before a turn and what the model writes."""
        key = self._kind(line)
        if key not in self._prompts:
            self._prompts[key] = self._tail(range(line), True) if line else ""
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
                f"the chat template starts {self._name(line)} otherwise than its generation prompt does",
            )
        # A tokenizer may join the last blanks with those that follow.
        rest = piece[len(found) :]
        blanks = rest[: len(rest) - len(rest.lstrip())] if found[-1].isspace() else ""
        return found + blanks

    @cached_property
    def _role_guards(self) -> frozenset[str]:
        """The control tokens of the prompt after a user's turn."""
        roles = [line.message.role for line in self._lines]
        asked = [i for i, pair in enumerate(pairwise(roles), 1) if pair == ("user", "assistant")]
        prompt = self._guarded(self._prompt(asked[0])) if asked else ""
        return frozenset(self._scribe.encoder.control_guard.findall(prompt))

    def _plain_headers(self, line: int) -> list[str]:
        """What is printed before the content of a turn that only has one: the last, and one that is not."""
        key = self._kind(line)
        if key not in self._headers:
            self._headers[key] = list(self._print_headers(line))
        return self._headers[key]

    def _print_headers(self, line: int) -> Iterator[str]:
        count, role = self._before[line], self._lines[line].message.role
        texts = [mark(i) for i in range(count + 2)]
        before = self._marked[:line]
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
            raise _not_printed(f"{missing} in {self._name(reply.line)}")
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


def _is_continued(tail: str, at: int, rest: str) -> bool:
    """Does the rest begin with all of the tail from there on?"""
    return tail.startswith(rest[: min(16, len(tail) - at)], at) and rest.startswith(tail[at:])


def _not_printed(what: str, hint: str = "") -> RejectError:
    return RejectError("not_printed", f"the chat template does not print {what}{hint}")
