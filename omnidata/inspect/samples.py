"""Samples as people can read them: what the model sees, and what it is trained to say.

    positions   choose_positions(dataset, ...)      which: a key, a number, a source, or an even spread
    samples     read_views(dataset, positions)      one ranged read each; ids cut into runs of one kind
    shown by    omnidata.inspect.terminal (rich), omnidata.inspect.html_report (one HTML file), as_dict (JSON)

A run is text, special tokens or one image block, all of it supervised or none of it::

    ids      1    "<|user|>\\n"   im_start 64×im_patch im_end   "What is this?"  2    …   "A cat."   2
    run      special   text            image 0 (folded)              text        special   text       special
    learned                                                                                ✓          ✓
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from omnidata.near.hashing import COLUMNS as NEAR_COLUMNS
from omnidata.schema import IGNORE_INDEX, INDEX_COLUMNS, TOKENIZER_DIR, UserError
from omnidata.shards import CorruptSampleError
from omnidata.text.vocabulary import TokenText, Vocabulary

if TYPE_CHECKING:
    from omnidata.dataset import Dataset

Kind = Literal["text", "special", "image"]


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of one kind; for an image the pieces are empty and ``image`` counts the images."""

    kind: Kind
    supervised: bool
    num_tokens: int
    pieces: tuple[TokenText, ...] = ()
    image: int | None = None

    @property
    def text(self) -> str:
        """What the tokens say."""
        return "".join(piece.text for piece in self.pieces)


def kept_values(row: dict[str, object]) -> list[tuple[str, str]]:
    """The kept columns of an index row that have a value, as text."""
    own = {*NEAR_COLUMNS, *(column.name for column in INDEX_COLUMNS)}
    pairs = [(name, value) for name, value in row.items() if name not in own and value is not None]
    return [(name, str(value).lower() if isinstance(value, bool) else str(value)) for name, value in pairs]


@dataclass(frozen=True, slots=True, eq=False)
class SampleView:
    """A sample with its index row, cut into runs."""

    position: int  # row of the dataset (of its split when one was chosen)
    row: dict[str, Any]  # index row, keys as schema.INDEX_COLUMNS
    runs: tuple[Run, ...]
    images: tuple[bytes, ...]  # encoded
    image_extensions: tuple[str, ...]
    special_names: re.Pattern[str]  # finds what is spelled like a special token

    def typed(self, run: Run) -> str:
        """A text run's text, a backslash before what only looks like a special token: ``\\</s>``."""
        return self.special_names.sub(lambda name: f"\\{name[0]}", run.text)

    @property
    def slice_names(self) -> list[str]:
        """What each stored image is of its picture: "" (all of it), "3×2 slices" (overview), "slice 1,2"."""
        names: list[str] = []
        for columns, rows in self.row["slices"]:
            names.append(f"{columns}×{rows} slices" if columns else "")
            names += [f"slice {x + 1},{y + 1}" for y in range(rows) for x in range(columns)]
        return names or [""] * len(self.images)

    def as_dict(self) -> dict[str, object]:
        """For JSON: the index row, the position, and the runs with their ids; no image bytes."""
        runs = [
            {
                "kind": run.kind,
                "supervised": run.supervised,
                "num_tokens": run.num_tokens,
                "image": run.image,
                "text": run.text,
                "ids": [token_id for piece in run.pieces for token_id in piece.ids],
            }
            for run in self.runs
        ]
        return {"position": self.position, **self.row, "runs": runs}


# --- which samples ----------------------------------------------------------------------------------------


def choose_positions(
    dataset: Dataset,
    *,
    key: str | None = None,
    sample: int | None = None,
    source: str | None = None,
    limit: int = 3,
) -> list[int]:
    """Positions of the samples to show, ascending.

    Args:
        key: the sample with this key.
        sample: the sample at this position; negative counts from the end.
        source: only samples of this source, as inspect's table names it.
        limit: at most this many, spread evenly, so that they show more than the start of the first file.

    Raises:
        UserError: no such key, position or source.
    """
    if key is not None:
        return [_find(dataset, "key", key)[0]]
    if sample is not None:
        if not -len(dataset) <= sample < len(dataset):
            raise UserError(
                f"there is no sample {sample}: {dataset.path} has {len(dataset):,}, counted from 0"
            )
        return [sample % len(dataset)]
    among = np.arange(len(dataset)) if source is None else np.array(_find(dataset, "source", source))
    return spread(among, limit)


def spread(values: np.ndarray, limit: int) -> list[int]:
    """At most ``limit`` of the values, evenly spaced, the first and last included: 0…9, 4 -> 0, 3, 6, 9."""
    if limit >= len(values):
        return values.tolist()
    return values[np.linspace(0, len(values) - 1, max(limit, 0)).round().astype(int)].tolist()


def _find(dataset: Dataset, column: str, value: str) -> list[int]:
    import pyarrow.compute as pc

    names = dataset.index_columns([column])[column]
    found = np.flatnonzero(pc.equal(names, value).to_numpy())
    if len(found) == 0:
        example = f"; there is {names[0].as_py()!r}, for one" if len(names) else ""
        raise UserError(f"no sample of {dataset.path} has the {column} {value!r}{example}")
    return found.tolist()


# --- reading them -----------------------------------------------------------------------------------------


def read_views(dataset: Dataset, positions: Sequence[int]) -> Iterator[SampleView]:
    """The samples at ``positions``, each by one ranged read.

    Raises:
        UserError: a sample's bytes are damaged; `omnidata verify --deep` lists all that are.
    """
    reader = TokenReader(dataset)
    for position, row in zip(positions, dataset.rows(positions), strict=True):
        try:
            sample = dataset.read_row(row)
        except CorruptSampleError as error:
            raise UserError(
                f"sample {position} ({row['key']}) of {dataset.path} cannot be read: {error}. "
                f"`omnidata verify {dataset.path} --deep` lists all damage."
            ) from error
        runs = tuple(reader.runs(sample.input_ids, sample.labels, row))
        yield SampleView(
            position, row, runs, sample.images, sample.image_extensions, reader.vocabulary.special_names
        )


class TokenReader:
    """Cuts ids and labels into runs with the dataset's own vocabulary and image tokens."""

    def __init__(self, dataset: Dataset) -> None:
        path = f"{TOKENIZER_DIR}/tokenizer.json"
        try:
            raw = dataset.read_file(path)
        except FileNotFoundError:
            raise UserError(f"{dataset.path} has no {path}: its token ids cannot be shown as text") from None
        self.vocabulary = Vocabulary(raw, where=f"{dataset.path}/{path}")

    def runs(self, input_ids: np.ndarray, labels: np.ndarray, row: Mapping[str, Any]) -> Iterator[Run]:
        """The sample's runs in order; images where its index row says that they are."""
        images = np.full(len(input_ids), -1)
        for number, place in enumerate(zip(row["image_starts"], row["image_tokens"], strict=False)):
            images[place[0] : place[0] + place[1]] = number
        supervised = labels != IGNORE_INDEX
        is_special = np.array([self.vocabulary.is_special(token) for token in input_ids.tolist()], bool)
        state = np.stack([images, supervised, is_special & (images < 0)])
        starts = np.flatnonzero((np.diff(state, axis=1) != 0).any(axis=0)) + 1
        for ids, image, learned, special in zip(
            np.split(input_ids, starts),
            images[[0, *starts]].tolist(),
            supervised[[0, *starts]].tolist(),
            state[2][[0, *starts]].tolist(),
            strict=True,
        ):
            if image >= 0:
                yield Run("image", learned, len(ids), image=image)
            else:
                kind: Kind = "special" if special else "text"
                yield Run(kind, learned, len(ids), tuple(self.vocabulary.pieces(ids.tolist())))


def rejects_of(dataset: Dataset, *, source: str | None = None) -> list[dict[str, str]]:
    """The refused records, in the order of the sources."""
    import pyarrow.compute as pc

    table = dataset.rejects
    if source is not None:
        table = table.filter(pc.equal(table["source"], source))
    return table.to_pylist()
