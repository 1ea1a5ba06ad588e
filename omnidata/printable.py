"""Text of a corpus that is safe to show: ids, names and replies may hold what a terminal obeys.

printable(text)   control characters become visible ones, marks of direction their names
to_json(value)    JSON in which they are escaped, so that a script still gets them exactly
clock(seconds)    how long something took or will take, the same everywhere
"""

from __future__ import annotations

import json
import re
from functools import lru_cache

# Marks that reorder the text around them (UAX #9), so that a line shows something else than it says.
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_UNSAFE = re.compile(f"[\x7f-\x9f\u2028\u2029{BIDI}]")


@lru_cache(maxsize=1)
def _visible() -> dict[int, str]:
    pictures = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
    marks = {ord(mark): f"<U+{ord(mark):04X}>" for mark in BIDI + "\u2028\u2029"}
    return pictures | {0x7F: "␡"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd") | marks


def printable(text: str) -> str:
    """The text with control characters made visible: ``ESC[31m`` becomes ``␛[31m``."""
    return text.translate(_visible())


def to_json(value: object) -> str:
    """Readable JSON, with every character escaped that a terminal would obey."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def clock(seconds: float) -> str:
    """``clock(71)`` -> ``1:11``; ``clock(3723)`` -> ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
