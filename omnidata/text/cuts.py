"""Cuts: pieces of a rendering, cut where a reply starts or ends, so that spans can name the borders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omnidata.text.data import Hidden, escaped

Span = tuple[int, int, int]  # characters to supervise: first, end, blanks before it


@dataclass(frozen=True, slots=True)
class Reply:
    """An assistant's turn in a transcript."""

    line: int
    spans: tuple[tuple[int, int, int, int], ...]  # first and last content, characters behind it, slack before

    def moved(self, places: dict[int, int]) -> Reply:
        """The same, its contents counted otherwise."""
        spans = ((places[first], places[last], behind, slack) for first, last, behind, slack in self.spans)
        return Reply(self.line, tuple(spans))


@dataclass(frozen=True, slots=True)
class Transcript:
    """What is printed: guarded pieces around contents, some of which are empty and only mark a border."""

    pieces: tuple[str, ...]
    contents: tuple[str, ...]
    replies: tuple[Reply, ...]
    notes: tuple[str, ...]

    def places(
        self, starts: Sequence[int], supervised: Sequence[bool]
    ) -> tuple[tuple[Span, ...], tuple[tuple[int, int], ...]]:
        """Characters to supervise, and (line, characters up to its end) of each reply.

        ``starts``: where each content starts in the text; ``supervised``: is it learned, of each line?
        """
        spans: list[Span] = []
        ends = []
        for reply in self.replies:
            mine = [
                (starts[first], starts[last] + len(self.contents[last]) + closing, slack)
                for first, last, closing, slack in reply.spans
            ]
            spans += mine if supervised[reply.line] else ()
            ends.append((reply.line, mine[-1][1]))
        return tuple(spans), tuple(ends)


class Cuts:
    """Pieces and contents, and borders inside pieces at which they are to be cut."""

    def __init__(self, pieces: Sequence[str], contents: Sequence[str]) -> None:
        self.pieces, self._contents = pieces, contents
        self._borders: list[tuple[int, int]] = []  # (piece, characters); -1 - number is its name

    def at(self, piece: int, offset: int) -> int:
        """A border's name, which stands for a content in spans until ``cut``."""
        self._borders.append((piece, offset))
        return -len(self._borders)

    def cut(self, replies: Sequence[Reply]) -> tuple[list[str], list[str], list[Reply]]:
        """Pieces, contents (empty ones at the borders) and the replies in terms of those."""
        pieces: list[str] = []
        contents: list[str] = []
        places: dict[int, int] = {}  # content or border -> content
        for number, piece in enumerate(self.pieces):
            done = 0
            mine = [(at, -1 - i) for i, (owner, at) in enumerate(self._borders) if owner == number]
            for at, name in sorted(mine, key=lambda pair: pair[0]):
                pieces.append(piece[done:at])
                places[name], done = len(contents), at
                contents.append("")
            pieces.append(piece[done:])
            if number < len(self._contents):
                places[number] = len(contents)
                contents.append(self._contents[number])
        return pieces, contents, [reply.moved(places) for reply in replies]


def contents_in(
    real: str, pieces: Sequence[str], texts: Sequence[str], hidden: Hidden
) -> tuple[list[str], list[str]] | None:
    """The texts as they stand between the pieces, and the hidden strings inside those; None: they don't.

    Texts may lose blanks at their ends, and what a tool answered is printed as JSON by some templates.
    """
    parts = [hidden.parts(piece) for piece in pieces]  # text, string, text, …
    units = [(i, (text, *_trimmed(text), escaped(text)), parts[i][0]) for i, text in enumerate(texts, 1)]
    units += [
        (i, (escaped(text), text), after)
        for i, inside in enumerate(parts)
        for text, after in zip(inside[1::2], inside[2::2], strict=True)
    ]
    units.sort(key=lambda unit: unit[0])  # a piece follows its text
    if not real.startswith(parts[0][0]):
        return None
    position, found = len(parts[0][0]), []
    for _, ways, after in units:
        way = next((way for way in ways if real.startswith(way + after, position)), None)
        if way is None:
            return None
        found.append(way)
        position += len(way) + len(after)
    is_text = [len(ways) > 2 for _, ways, _ in units]
    contents = [way for way, is_content in zip(found, is_text, strict=True) if is_content]
    spelt = [way for way, is_content in zip(found, is_text, strict=True) if not is_content]
    return (contents, spelt) if position == len(real) else None


def _trimmed(text: str) -> tuple[str, ...]:
    lines = (text.rstrip("\n"), text.lstrip("\n"), text.strip("\n"))
    return (*lines, text.rstrip(), text.lstrip(), text.strip())
