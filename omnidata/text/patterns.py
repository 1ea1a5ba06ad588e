r"""Patterns of pre-tokenizers: may text be cut before a blank without changing what a pattern finds?

Byte-level tokenizers (GPT-2, Llama 3, Qwen, and most of today's) cut texts by a regular expression first::

    (?i:'s|'t|...)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+

Everything that it finds is either white as a whole, or has a blank in front only. So nothing that it finds
goes on over a blank that follows other text, and since there is no looking back, what comes after such a
blank is found as it would be at the start of a text. ``cuts_before_blanks`` decides whether this holds for a
pattern, from its own syntax. Each part of it is described by the kinds of text that it can match:

    EMPTY    nothing                        BLANK    white space, a blank (U+0020) in front only
    WHITE    white space without a blank    BLANKS   white space, blanks anywhere
    SOLID    no blank, not all white        LED      not all white, a blank in front only

and by TORN, a blank after something that is not white, which must not come out for the whole. What this
syntax tree does not know (looking back, anchors, references, unlisted properties) is never proven.
"""

from __future__ import annotations

from enum import Enum, auto
from functools import lru_cache
from itertools import product


class TextKind(Enum):
    """A kind of text; the module's docstring says what each is."""

    EMPTY = auto()
    WHITE = auto()
    BLANK = auto()
    BLANKS = auto()
    SOLID = auto()
    LED = auto()
    TORN = auto()


EMPTY, WHITE, BLANK, BLANKS, SOLID, LED, TORN = TextKind
Kinds = frozenset[TextKind]

_ANY = Kinds({BLANK, WHITE, SOLID})  # of one character that may be any
_IS_WHITE = {EMPTY, WHITE, BLANK, BLANKS}
_HAS_BLANK = {BLANK, BLANKS, LED}
_SOLID_CLASSES = {"L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "Mn", "Mc", "Me", "N", "Nd", "Nl", "No", "P", "Pc"}
_SOLID_CLASSES |= {"Pd", "Ps", "Pe", "Pi", "Pf", "Po", "S", "Sm", "Sc", "Sk", "So"}
_SOLID_SCRIPTS = {"Han", "Hiragana", "Katakana", "Hangul", "Latin", "Greek", "Cyrillic", "Arabic", "Hebrew"}
_CONTROLS = {"r": "\r", "n": "\n", "t": "\t", "f": "\f", "v": "\v"}


class NotProven(Exception):
    """The pattern has something that is not understood here."""


@lru_cache(maxsize=64)
def cuts_before_blanks(pattern: str) -> bool:
    """Whether the pattern finds in ``text`` what it finds before and after a blank that follows a character
    that is not white, taken apart, and always begins anew at such a blank. For Oniguruma's syntax.

    Example: True for ``\\p{L}+|\\s+``, False for ``.+`` and for ``\\p{L}+`` (which leaves blanks in between).
    """
    try:
        return _Parser(pattern).whole() == (True, True)
    except NotProven:
        return False


@lru_cache(maxsize=64)
def finds_no_blank_inside(pattern: str) -> bool:
    """The same, but that blanks may be left in between: another pattern has to begin at them."""
    try:
        return _Parser(pattern).whole()[0]
    except NotProven:
        return False


def _joined(left: TextKind, right: TextKind) -> TextKind:
    """The kind of a text of one kind and then another."""
    if EMPTY in (left, right):
        return right if left is EMPTY else left
    if TORN in (left, right):
        return TORN
    if left in _IS_WHITE and right in _IS_WHITE:
        return BLANKS if right in _HAS_BLANK else left if left is not WHITE else WHITE
    if right in _HAS_BLANK or left is BLANKS:
        return TORN
    return LED if left in _HAS_BLANK else SOLID


def _in_a_row(*parts: Kinds) -> Kinds:
    kinds = Kinds({EMPTY})
    for part in parts:
        kinds = Kinds(_joined(left, right) for left, right in product(kinds, part))
    return kinds


def _repeated(part: Kinds, fewest: int, most: int | None) -> Kinds:
    kinds = part if fewest else part | {EMPTY}
    while most != 1:
        more = kinds | _in_a_row(kinds, part)
        if more == kinds:
            break
        kinds = more
    return kinds


class _Parser:
    """Recursive descent over a pattern."""

    def __init__(self, pattern: str) -> None:
        self.text, self.at = pattern, 0

    def whole(self) -> tuple[bool, bool]:
        """(finds no blank inside, always matches at a blank)."""
        kinds, matches_a_blank = self.alternatives()
        if self.at < len(self.text):
            raise NotProven
        return not {TORN, EMPTY} & kinds, matches_a_blank

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self, wanted: str) -> bool:
        found = self.text.startswith(wanted, self.at)
        self.at += len(wanted) * found
        return found

    def next(self) -> str:
        if not (character := self.peek()):
            raise NotProven
        self.at += 1
        return character

    def alternatives(self) -> tuple[Kinds, bool]:
        """The kinds of all, and whether one matches a lone blank whatever comes after it."""
        kinds, matches = self.sequence()
        while self.take("|"):
            more, matches_too = self.sequence()
            kinds, matches = kinds | more, matches or matches_too
        return kinds, matches

    def sequence(self) -> tuple[Kinds, bool]:
        kinds, matches, is_first = Kinds({EMPTY}), False, True
        while self.peek() not in ("", "|", ")"):
            part, holds_a_blank, looks = self.part()
            fewest, most = self.quantifier()
            if looks and (fewest, most) != (1, 1):
                raise NotProven
            matches = holds_a_blank and fewest <= 1 if is_first else matches and fewest == 0
            kinds, is_first = _in_a_row(kinds, _repeated(part, fewest, most)), False
        return kinds, matches

    def part(self) -> tuple[Kinds, bool, bool]:
        """(kinds, certainly matches a blank, only looks)."""
        if self.take("(?!"):
            if not (self.take(r"\S)") or self.take(r"[^\s])")):
                raise NotProven
            return Kinds({EMPTY}), False, True
        if self.take("("):
            if self.peek() == "?" and not (self.take("?:") or self.take("?i:")):
                raise NotProven
            kinds, matches = self.alternatives()
            if not self.take(")"):
                raise NotProven
            return kinds, matches, False
        if self.take("["):
            return *self.character_class(), False
        character = self.next()
        if character == "\\":
            return *self.escape(), False
        if character in "^$*+?{})]":
            raise NotProven
        if character == ".":
            return _ANY, True, False
        return *_of_character(character), False

    def quantifier(self) -> tuple[int, int | None]:
        sign = self.peek()
        if sign not in ("?", "*", "+", "{"):
            return 1, 1
        self.at += 1
        fewest, most = (int(sign == "+"), 1 if sign == "?" else None) if sign != "{" else self.counts()
        if self.peek() in ("?", "+", "*", "{"):  # lazy, possessive, or a quantifier of a quantifier
            if sign == "{" or self.next() not in ("?", "+"):
                raise NotProven
            if self.peek() in ("?", "+", "*", "{"):
                raise NotProven
        return fewest, most

    def counts(self) -> tuple[int, int | None]:
        inside, found, rest = self.text[self.at :].partition("}")
        fewest, comma, most = inside.partition(",")
        if not found or not all(part.isascii() and part.isdigit() for part in (fewest, most or "0")):
            raise NotProven
        self.at = len(self.text) - len(rest)
        return int(fewest), int(most) if most else None if comma else int(fewest)

    def escape(self) -> tuple[Kinds, bool]:
        """What follows a backslash."""
        character = self.next()
        if character in "pP":
            return self.property(negated=character == "P")
        if character in _CONTROLS:
            return _of_character(_CONTROLS[character])
        if character in "sS":
            return (Kinds({BLANK, WHITE}), True) if character == "s" else (Kinds({SOLID}), False)
        if character in "dw":
            return Kinds({SOLID}), False
        if character.isalnum():
            raise NotProven
        return _of_character(character)

    def property(self, *, negated: bool) -> tuple[Kinds, bool]:
        inside, found, rest = self.text[self.at :].partition("}")
        if not found or not inside.startswith("{"):
            raise NotProven
        self.at = len(self.text) - len(rest)
        if inside[1:] not in _SOLID_CLASSES | _SOLID_SCRIPTS:
            raise NotProven
        return (_ANY, True) if negated else (Kinds({SOLID}), False)

    def character_class(self) -> tuple[Kinds, bool]:
        """Up to the closing bracket."""
        negated, kinds, has_blank, has_all_white = self.take("^"), Kinds(), False, False
        while not self.take("]"):
            character = self.next()
            if character == "[" or (character == "&" and self.peek() == "&"):
                raise NotProven  # a class in a class
            start = self.at
            found, blank = self.escape() if character == "\\" else _of_character(character)
            has_all_white |= self.text[start - 1 : self.at] == r"\s"
            if self.peek() == "-" and self.text[self.at + 1 : self.at + 2] != "]":
                found, blank = self.range(self.text[start - 1 : self.at])
            kinds, has_blank = kinds | found, has_blank or blank
        if not kinds:
            raise NotProven
        if not negated:
            return kinds, has_blank
        rest = {SOLID} | (set() if has_blank else {BLANK}) | (set() if has_all_white else {WHITE})
        return Kinds(rest), not has_blank and BLANK not in kinds

    def range(self, first: str) -> tuple[Kinds, bool]:
        self.at += 1
        last = self.next()
        if len(first) != 1 or last == "\\" or ord(first) > ord(last):
            raise NotProven
        if first > "\u3000" or (first.isascii() and "!" <= first <= last <= "~"):
            return Kinds({SOLID}), False  # U+3000 is the last white one
        return _ANY, first <= " " <= last


def _of_character(character: str) -> tuple[Kinds, bool]:
    if character == " ":
        return Kinds({BLANK}), True
    return Kinds({WHITE if character.isspace() else SOLID}), False
