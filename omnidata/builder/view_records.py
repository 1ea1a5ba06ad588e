"""View records: what happens to a sample of the base on its way into a view.

    Record ─KEY.json─▶ Conversation ─render (in batches)─▶ ids + labels ─do the stored images suit?─▶ Built

An image that the base stores smaller than it was suits a model if its run of tokens is the same as the
original's would be. One that does not suit is refused (``image_unsuited``) or, with --refetch, read again
from where its record found it; then all images of that sample lie in the view.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from omnidata.builder.records import Built, Note, Pictures, Stages
from omnidata.conversation import check_order, trained_on
from omnidata.dialogue import Size
from omnidata.outcomes import caught
from omnidata.part_renderer import PartRenderer
from omnidata.schema import (
    INDEX_COLUMNS,
    Conversation,
    EncodedImage,
    Record,
    Reject,
    RejectError,
    Rendered,
    Sample,
)

_OWN = frozenset(column.name for column in INDEX_COLUMNS)
_BASE = {"base_shard": "shard", "base_offset": "offset", "base_nbytes": "nbytes", "base_hash": "content_hash"}


@dataclass
class ViewStages(Stages):
    """The stages of a view; ``refetch``: images that do not suit are read again."""

    refetch: bool = False

    def _converse(self, record: Record | Reject) -> Conversation | RejectError | Reject:
        return record if isinstance(record, Reject) else caught(self._understood, record)

    def _understood(self, record: Record) -> Conversation:
        dialogue = record.payload["dialogue"]
        talk: Conversation = dialogue.conversation
        if self.reading.turn_order == "alternate":
            check_order([message.role for message in talk.messages])
        sizes = () if None in dialogue.sizes else dialogue.sizes
        return replace(talk, messages=trained_on(talk.messages, self.reading.train_on), image_sizes=sizes)

    def _look(self, record: Record | Reject, talk: object, note: Note) -> tuple[Any, Pictures | None]:
        """The conversation with all sizes that a processor asks for; most are known."""
        if isinstance(record, Reject) or not isinstance(talk, Conversation) or not self.settings.model:
            return talk, None
        if len(talk.image_sizes) == len(talk.images):
            return talk, None
        if not self.refetch:
            number = len(talk.images) - 1
            return RejectError("image_unsuited", _not_stored(number)), None
        note(record.id)
        pictures = caught(self._fetched, record, talk, len(talk.images))
        if isinstance(pictures, RejectError):
            return pictures, None
        return replace(talk, image_sizes=tuple(picture.size for picture in pictures)), pictures

    def _build(
        self,
        position: int,
        record: Record,
        talk: Conversation,
        outcome: Rendered,
        pictures: Pictures | None,
    ) -> Built:
        why = self.unsuited(record, outcome.num_images)
        if why and not self.refetch:
            raise RejectError("image_unsuited", f"{why}; --refetch reads it again from its source")
        if why:
            pictures = pictures or self._fetched(record, talk, self._num_pictures(talk, outcome))
            return super()._build(position, record, talk, outcome, pictures)
        row = record.payload["row"]
        sizes = row["image_sizes"][: outcome.num_images]
        images = tuple(EncodedImage(b"", "", width, height) for width, height in sizes)  # the base's
        grids = _grids(talk)[: self._num_pictures(talk, outcome)] if self.settings.max_slices else []
        built = Built(
            Sample(row["key"], outcome.input_ids, outcome.labels),
            *(record, images, outcome),
            grids=tuple(grids),
            spelled_tokens=tuple(self.renderer.spelled(talk)),
            content_tokens=self._content_tokens(outcome),
            notes=outcome.notes,
            image_pixels=outcome.image_pixels or (self.profile.image_pixels,) * len(images),
            kept=self._kept_of(row),
        )
        return replace(built, base={name: row[column] for name, column in _BASE.items()})

    def _key(self, position: int, record: Record) -> str:
        return record.payload["row"]["key"]

    def _kept(self, record: Record, talk: Conversation, images: tuple[EncodedImage, ...]) -> Any:
        return self._kept_of(record.payload["row"])

    @staticmethod
    def _kept_of(row: dict[str, Any]) -> dict[str, Any] | None:
        """The values of the base's kept columns."""
        kept = {name: value for name, value in row.items() if name not in _OWN}
        return {name: value for name, value in kept.items() if value is not None} if kept else None

    # --- images -------------------------------------------------------------------------------------------

    def unsuited(self, record: Record, num_images: int) -> str | None:
        """Why the stored images do not do for the first ``num_images`` of the sample; None: they do."""
        row, sizes = record.payload["row"], record.payload["dialogue"].sizes
        stored = [tuple(size) for size in row["image_sizes"][:num_images]]
        if len(stored) < num_images:
            return _not_stored(len(stored))
        if self.settings.max_slices:  # of the base, too, and then they are cut alike (view.py)
            return None
        if cut := [number for number, grid in enumerate(row["slices"][:num_images]) if any(grid)]:
            return f"image {cut[0]} is stored as an overview and tiles"
        originals = sizes[:num_images]
        for number, (size, original) in enumerate(zip(stored, originals, strict=True)):
            if size != original and not self._does(stored, originals, number):
                return (
                    f"image {number} was {_shown(original)} and is stored at {_shown(size)}, too small for "
                    f"{self._whom}"
                )
        return None

    def _does(self, stored: list[Size], originals: tuple[Size, ...], number: int) -> bool:
        if not self.settings.model:
            return min(stored[number]) >= self.settings.image_size
        try:
            return self._processor.runs(tuple(stored)) == self._processor.runs(originals)
        except RejectError:
            return False

    @property
    def _whom(self) -> str:
        if not self.settings.model:
            return f"--image-size {self.settings.image_size}"
        return f"the tokens that {type(self._processor.processor).__name__} writes for it"

    @property
    def _processor(self) -> Any:
        assert isinstance(self.renderer, PartRenderer), "the view is a processor's"
        return self.renderer.profile

    def _num_pictures(self, talk: Conversation, outcome: Rendered) -> int:
        """Pictures of the first ``num_images`` image blocks."""
        left, number = outcome.num_images, 0
        for grid in _grids(talk):
            left -= 1 if grid is None else 1 + grid[0] * grid[1]
            if left < 0:
                break
            number += 1
        return number

    def _fetched(self, record: Record, talk: Conversation, number: int) -> Pictures:
        """The first pictures, read again from where the record found them; they must be what they were."""
        references, sizes = talk.images[:number], record.payload["dialogue"].sizes
        if inside := [at for at, reference in enumerate(references) if reference.path is None]:
            raise RejectError(
                "image_unsuited",
                f"image {inside[0]} was inside its record: only a build from the corpus can read it again",
            )
        pictures = self._pictures(record.source, references)
        for at, picture in enumerate(pictures):
            if sizes[at] not in (None, picture.size):
                was = f"was {_shown(sizes[at])} and is {_shown(picture.size)} now"
                raise RejectError("image_unsuited", f"image {at}, {references[at].path}, {was}")
        return pictures


def _grids(talk: Conversation) -> list[Size | None]:
    parts = (part for message in talk.messages for part in message.parts)
    return [part.grid for part in parts if not hasattr(part, "text")]


def _not_stored(number: int) -> str:
    return f"the turn of image {number} was cut off by the base's --max-length, so it is not stored"


def _shown(size: Size | None) -> str:
    return "of unknown size" if size is None else f"{size[0]}×{size[1]}"
