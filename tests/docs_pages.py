"""Pages of the documentation, taken apart: links, anchors, blocks of commands, spans of code.

A block's language says what it is: ``sh`` commands and ``python`` snippets are run, ``yaml`` is a recipe,
``json`` is parsed, ``text`` is what a command printed. A comment before it changes that::

    <!-- parsed: needs 8 GPUs -->     never run; options, files and recipe keys are checked all the same
    <!-- slow: trains for a minute -->   run by `make slow` only
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
# In the order in which a reader goes: later pages use what earlier ones wrote.
ORDER = ("first_hour", "your_corpus", "which_models", "shard_format", "training", "cluster", "omnilmm_12b")
_MARK = re.compile(r"<!--\s*(parsed|slow):\s*\S.*?-->")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int  # in the page, from 1
    language: str
    text: str
    mark: str  # "", "parsed" or "slow"

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """README, then docs/, in reading order."""
    first = [ROOT / "docs" / f"{name}.md" for name in ORDER]
    others = [path for path in sorted((ROOT / "docs").glob("*.md")) if path not in first]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *first, *others]


@cache
def _tokens(page: Path) -> list:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, with the marks before them."""
    found, mark = [], ""
    for token in _tokens(page):
        if token.type == "fence":
            assert token.info, f"{page}:{token.map[0] + 1}: a block without a language"
            found.append(Block(page, token.map[0] + 1, token.info, token.content, mark))
        match = _MARK.search(token.content) if token.type == "html_block" else None
        mark = match[1] if match else ""
    return found


def _inline(page: Path) -> Iterator[tuple[int, list]]:
    line = 0
    for token in _tokens(page):
        line = token.map[0] + 1 if token.map else line
        if token.type == "inline":
            yield line, token.children


def links(page: Path) -> list[tuple[int, str]]:
    """(line, target) of every link and picture."""
    return [
        (line, child.attrs.get("href") or child.attrs["src"])
        for line, children in _inline(page)
        for child in children
        if child.type in ("link_open", "image")
    ]


def code_spans(page: Path) -> list[tuple[int, str]]:
    """(line, text) of everything in backquotes."""
    return [
        (line, child.content)
        for line, children in _inline(page)
        for child in children
        if child.type == "code_inline"
    ]


def anchors(page: Path) -> set[str]:
    """What ``#…`` may be: GitHub's names of the headings."""
    tokens = _tokens(page)
    titles = [
        "".join(child.content for child in body.children)
        for head, body in pairwise(tokens)
        if head.type == "heading_open"
    ]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def first_column_lines(page: Path) -> set[int]:
    """Lines of tables: pages about other projects put those projects' names in the first column."""
    return {token.map[0] + 1 for token in _tokens(page) if token.type == "tr_open" and token.map}


def steps(text: str) -> Iterator[list[str] | tuple[str, str]]:
    """A ``sh`` block in order: the words of each command, or (path, content) of a file that ``cat`` writes.

    What goes behind a pipe is left out.
    """
    lines = iter(text.replace("\\\n", " ").splitlines())
    for line in lines:
        if match := re.fullmatch(r"cat > (\S+) <<'EOF'", line):
            yield match[1], "".join(f"{inner}\n" for inner in iter(lambda: next(lines), "EOF"))
            continue
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("|", ">", ">>", "&&")), len(words))
            yield words[:end]
            words = words[end + 1 :] if words[end : end + 1] == ["&&"] else []


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a ``sh`` block as words."""
    return (step for step in steps(text) if isinstance(step, list))
