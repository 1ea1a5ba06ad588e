"""The verdict: ids and labels of a contestant against the characters that may be learned.

Ids are turned back into bytes token by token, so that nothing is normalised on the way; the supervised ones
joined and compared with what the conversation says, turn by turn: the supervised characters, then the token
that ends a turn. Blanks at the borders of a turn are not judged (templates differ in them), nor is the end
of an empty reply. Where a limit cuts into a reply, its beginning may be learned or not.

    right      exactly the replies and their ends
    injected   text of a message became a control token: it can end a turn, open one, or stand for a picture
    leaked     something that is not the assistant's is learned, or a reply without what opens it
    lost       a reply, a part of it, or its end is not learned
    refused    the contestant raised an error of its own that says why
    crashed    anything else that it raised, or no answer
    not run    it does not claim to do this (pictures without a processor)
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from templates import Template

IGNORE_INDEX = -100
VERDICTS = ("right", "injected", "leaked", "lost", "refused", "crashed", "not run")


@dataclass(frozen=True)
class Verdict:
    """What a contestant did with one conversation, and the evidence."""

    verdict: str
    detail: str = ""


@dataclass(frozen=True)
class Turn:
    """What must be learned of one turn, without the blanks at its borders."""

    text: str  # without the token that ends it
    beginning: str | None = None  # of a reply that a limit cuts: this much or less of it may be learned
    may_lack: bool = False  # an empty reply: its end may be learned or not


class Judge:
    """Judges one template; ``tokenizer`` is the folder's, loaded by the benchmark itself."""

    def __init__(self, tokenizer: Any, template: Template, image_tokens: Sequence[str] = ()) -> None:
        self._to_bytes = token_bytes(tokenizer)
        self._template, self._end = template, template.end
        self._end_id = tokenizer.convert_tokens_to_ids(template.end)
        self._image_ids = set(tokenizer.convert_tokens_to_ids(list(image_tokens)))
        self._control_ids = (set(tokenizer.all_special_ids) | {self._end_id}) - self._image_ids
        self._bos_id, self._eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id

    def judge(
        self,
        case: Mapping[str, Any],
        answer: Mapping[str, Any],
        own: Counter[int],
        own_behind_system: Counter[int],
    ) -> Verdict:
        """``own``: how often each control token stands in the template's own text, contents left out.

        Some trainers put a system turn of their own in front; ``own_behind_system`` counts with one.
        """
        if "input_ids" not in answer:
            return Verdict(answer["outcome"], answer.get("detail", "")[:300])
        ids, labels = answer["input_ids"], answer["labels"]
        if len(ids) != len(labels):
            return Verdict("crashed", f"{len(ids)} ids, {len(labels)} labels")
        if any(label not in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True)):
            return Verdict("crashed", "labels are neither the ids nor -100")
        front = self.text(ids[:20]).removeprefix(self._template.bos or "").lstrip()
        if front.startswith(self._template.system) and case["messages"][0]["role"] != "system":
            own = own_behind_system
        injected = self._injected(ids, own)
        if injected:
            return Verdict("injected", injected)
        elsewhere = self._elsewhere(ids, labels)
        if elsewhere:
            return Verdict("leaked", f"learned behind {elsewhere!r}, which opens no reply")
        learned = [token for token, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX]
        return self.compare(case, self.text([token for token in learned if token not in self._image_ids]))

    def _injected(self, ids: Sequence[int], own: Counter[int]) -> str:
        """Control tokens beyond the template's own; one in front and one at the end are nobody's text."""
        body = list(ids)
        if body and body[0] == self._bos_id:
            body = body[1:]
        if len(body) > 1 and body[-1] == self._eos_id and body[-2] == self._end_id:
            body = body[:-1]
        found = Counter(token for token in body if token in self._control_ids)
        found.subtract({token: count for token, count in own.items() if token != self._bos_id})
        many = [(self.text([token]), count) for token, count in found.items() if count > 0]
        return ", ".join(f"{token} {count} too often" for token, count in many)

    def _elsewhere(self, ids: Sequence[int], labels: Sequence[int]) -> str:
        """What stands before the first run of learned tokens that no reply's opening stands before."""
        for place in range(1, len(ids)):
            begins = labels[place] != IGNORE_INDEX and labels[place - 1] == IGNORE_INDEX
            if not begins or ids[place - 1] in self._image_ids:
                continue
            before = self.text(ids[max(0, place - 40) : place]).rstrip()
            before = re.sub(r"<think>\s*(</think>)?$", "", before).rstrip()  # some print an empty thought
            if not before.endswith(self._template.opening):
                return before[-40:]
        return ""

    def compare(self, case: Mapping[str, Any], learned: str) -> Verdict:
        """The text that is learned against what must be."""
        turns, learned = self.turns(case), _calls_alike(_normal(learned))
        if learned.endswith(self._end * 2):  # a closing token behind the last turn's
            learned = learned.removesuffix(self._end)
        if re.fullmatch("".join(map(self._pattern, turns)), learned, re.DOTALL):
            return Verdict("right")
        wanted = "".join(turn.text + self._end for turn in turns if turn.beginning is None)
        extra, missing = _differences(wanted, learned)
        if case["tools"] and self._template.call is None and not extra:
            return Verdict("lost", "the template does not print the tools")
        if extra:
            return Verdict("leaked", f"learned besides: {extra[:200]!r}")
        return Verdict("lost", f"not learned: {missing[:200]!r}")

    def turns(self, case: Mapping[str, Any]) -> list[Turn]:
        """What must be learned, in order."""
        texts: dict[int, str] = {}
        for message, field, start, end in case["supervised"]:
            text = case["messages"][message][field][start:end]
            shape = self._template.thought or "{}" if field == "reasoning_content" else "{}"
            texts[message] = texts.get(message, "") + shape.replace("{}", text.strip())
        for message, turn in enumerate(case["messages"]):
            for call in turn.get("tool_calls", ()):
                text = json.dumps(call["function"], ensure_ascii=False)
                texts[message] = _calls_alike(texts.get(message, "") + text)
        wanted = [
            Turn(_normal(text.replace("<image>", "")), may_lack=not text.strip())
            for _, text in sorted(texts.items())
        ]
        if case["cut_after"] is not None:
            cut = case["messages"][case["cut_after"] + 1]["content"]
            wanted.append(Turn("", beginning=_normal(cut)))
        return wanted

    def _pattern(self, turn: Turn) -> str:
        if turn.beginning is not None:
            pattern = ""
            for char in reversed(turn.beginning):
                pattern = f"(?:{re.escape(char)}{pattern})?"
            whole = rf"{re.escape(turn.beginning)}\s*{re.escape(self._end)}"  # in a terser template it fits
            return rf"\s*(?:{whole}|{pattern})\s*"
        pattern = rf"\s*{re.escape(turn.text)}\s*{re.escape(self._end)}\s*"
        return f"(?:{pattern})?" if turn.may_lack else pattern

    def text(self, ids: Sequence[int]) -> str:
        """What ids stand for, nothing normalised."""
        return b"".join(self._to_bytes(token) for token in ids).decode("utf-8", "replace")


def _normal(text: str) -> str:
    """Tokenizers may compose characters; a picture leaves blanks around its place."""
    return re.sub(r" +", " ", unicodedata.normalize("NFC", text)).strip()


def _calls_alike(text: str) -> str:
    """Calls of tools as bare JSON: templates wrap them in tokens of their own, Llama's says "parameters"."""
    text = re.sub(r"<tool_call>\s*|\s*</tool_call>|<\|python_tag\|>", "", text)
    return text.replace('"parameters": {', '"arguments": {')


def _differences(want: str, have: str) -> tuple[str, str]:
    """What is too much and what is missing."""
    extra, missing = "", ""
    for tag, i, j, k, m in SequenceMatcher(None, want, have, autojunk=False).get_opcodes():
        if tag in ("replace", "insert"):
            extra += have[k:m]
        if tag in ("replace", "delete"):
            missing += want[i:j]
    return extra.strip(), missing.strip()


def token_bytes(tokenizer: Any) -> Callable[[int], bytes]:
    """id -> the bytes that the token stands for, for byte-level and sentencepiece vocabularies."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    added = tokenizer.added_tokens_decoder
    decode = {char: byte for byte, char in bytes_to_unicode().items()}
    is_byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)

    @cache
    def one(token: int) -> bytes:
        if token in added:
            return str(added[token]).encode()
        piece = tokenizer.convert_ids_to_tokens(token)
        if is_byte_level:
            return bytes(decode[char] for char in piece)
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    return one
