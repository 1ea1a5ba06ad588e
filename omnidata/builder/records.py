"""Records: what happens to one, in stages from a parsed row to a sample or a reject.

    Record ─conversation─▶ Conversation ─render (in batches)─▶ ids + labels ─images─▶ Built
       └──────────────────────── RejectError at any of them ───────────────▶ Reject

With --max-slices or --model a picture's size decides how many tokens it takes, so pictures are read before
the rendering.

Every record that goes in comes out once, as the one or the other, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from omnidata.builder.columns import kinds_of
from omnidata.builder.settings import BuildSettings
from omnidata.conversation import to_conversation, with_grids
from omnidata.dialogue import dialogue_json
from omnidata.durable import Store
from omnidata.images.header import read_header
from omnidata.images.slices import Grid, Picture, read_picture
from omnidata.images.store import ImageStore
from omnidata.near.hashing import near_values
from omnidata.outcomes import caught
from omnidata.part_renderer import PartRenderer
from omnidata.profiles.omnilmm import OmniLMMProfile
from omnidata.render import Renderer
from omnidata.schema import (
    PROCESSOR_DIR,
    TOKENIZER_DIR,
    Conversation,
    EncodedImage,
    ImageRef,
    Record,
    Reject,
    RejectError,
    Rendered,
    Sample,
)
from omnidata.text.prepared import load_prepared
from omnidata.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from omnidata.text.prepared import AnyTokenizer

BATCH_RECORDS = 128  # rendered together: the tokenizer's encode_batch saves most of the per-call cost
BATCH_WITH_PICTURES = 16  # their pictures are held while they are rendered
BATCH_BYTES = 64 << 20  # of image data that travels inside the records of a batch
RAW_CHARACTERS = 2000
MAX_DEPTH = 20  # of a row's values in an excerpt
RESPELLED = "have a picture that was found under another Unicode form (NFC, NFD) of its name"
COUNTS = ("unread_keys", "spelled_tokens", "content_tokens", "notes", "columns")  # counted over samples

Note = Callable[[str], object]
Talk = Conversation | RejectError | Reject  # a record as it was understood, or why it was not
Positioned = tuple[int, Record | Reject]  # position in the whole corpus, and what was read there


@dataclass(frozen=True, slots=True)
class Built:
    """A sample, and what its index row needs besides."""

    sample: Sample
    record: Record
    images: tuple[EncodedImage, ...]
    rendered: Rendered
    grids: tuple[Grid | None, ...] = ()  # of each picture; empty if the build cuts none
    unread_keys: tuple[str, ...] = ()  # of the record, see Conversation
    spelled_tokens: tuple[str, ...] = ()  # control tokens that its replies spell
    content_tokens: tuple[str, ...] = ()  # added tokens that its replies are encoded with
    notes: tuple[str, ...] = ()  # what the report should tell besides
    image_pixels: tuple[int, ...] = ()  # values of each image's pixel tensors
    kept: dict[str, Any] | None = None  # values of the kept columns; None: the build keeps none
    base: dict[str, Any] = field(default_factory=dict)  # of a view: where its base's sample is

    @property
    def columns(self) -> tuple[str, ...]:
        """What is counted of the kept columns."""
        return kinds_of(self.kept or {})


Pictures = tuple[Picture, ...]


@dataclass
class Stages:
    """The stages with everything they need, loaded once per worker."""

    settings: BuildSettings
    renderer: Renderer
    stores: dict[str, ImageStore] = field(default_factory=dict)  # by image root

    def __post_init__(self) -> None:
        self.slicing = self.settings.slicing
        self.reading = self.settings.reading(is_omnilmm=self.renderer.is_omnilmm)
        self.profile = OmniLMMProfile(self.settings.num_query, self.settings.image_size)
        tokens = self.renderer.content_tokens
        ids = self.renderer.tokenizer.convert_tokens_to_ids(list(tokens))
        self.content_ids = dict(zip(ids, tokens, strict=True))
        self.content_array = np.array(ids, dtype=np.int32)

    @classmethod
    def load(cls, settings: BuildSettings, folder: Store) -> Stages:
        """Make the renderer from the ``tokenizer/`` and ``processor/`` of a dataset."""
        renderer = load_renderer(settings, folder)
        if settings.max_slices or settings.model:  # tiles are cut as training resizes
            import torch

            torch.set_num_threads(1)  # the workers are the parallelism
        return cls(settings, renderer)

    def run(self, records: Iterable[Positioned], note: Note = lambda text: None) -> Iterator[Built | Reject]:
        """Carry records through all stages, in order; ``note`` is told what is worked on."""
        num_records = BATCH_RECORDS if not self.settings.model else BATCH_WITH_PICTURES
        for batch in batches(records, note, num_records=num_records):
            note(f"{_place(batch[0][1])} … {_place(batch[-1][1])}")
            talks = [self._converse(record) for _, record in batch]
            cut = [self._look(record, talk, note) for (_, record), talk in zip(batch, talks, strict=True)]
            talks = [talk for talk, _ in cut]
            rendered = iter(self.renderer.render_batch([t for t in talks if isinstance(t, Conversation)]))
            for (position, record), (talk, pictures) in zip(batch, cut, strict=True):
                outcome = next(rendered) if isinstance(talk, Conversation) else talk
                note(_place(record))
                yield self._finish(position, record, talk, outcome, pictures)

    def _converse(self, record: Record | Reject) -> Talk:
        return record if isinstance(record, Reject) else caught(to_conversation, record, self.reading)

    def _look(self, record: Record | Reject, talk: Talk, note: Note) -> tuple[Talk, Pictures | None]:
        """The conversation with its pictures' grids or sizes, and the pictures; None: they can wait."""
        early = self.settings.max_slices or self.settings.model
        if not early or not isinstance(talk, Conversation):
            return talk, None
        note(_place(record))
        pictures = caught(self._pictures, record.source, talk.images)
        if isinstance(pictures, RejectError):
            return pictures, None
        if self.settings.model:
            sizes = tuple((image.width, image.height) for picture in pictures for image in picture.images)
            return replace(talk, image_sizes=sizes), pictures
        return with_grids(talk, [picture.grid for picture in pictures]), pictures

    def _finish(
        self,
        position: int,
        record: Record | Reject,
        talk: Talk,
        outcome: Rendered | RejectError | Reject,
        pictures: Pictures | None,
    ) -> Built | Reject:
        if isinstance(record, Reject):
            return record
        if isinstance(outcome, RejectError):
            return rejected(record, outcome)
        assert isinstance(talk, Conversation) and isinstance(outcome, Rendered), (
            "what is no reject is rendered"
        )
        built = caught(self._build, position, record, talk, outcome, pictures)
        return rejected(record, built) if isinstance(built, RejectError) else built

    def _build(
        self,
        position: int,
        record: Record,
        talk: Conversation,
        outcome: Rendered,
        pictures: Pictures | None,
    ) -> Built:
        if pictures is None:
            pictures = self._pictures(record.source, talk.images[: outcome.num_images])
        dialogue = b""
        if self.settings.conversation:
            dialogue = dialogue_json(talk, [picture.size for picture in pictures])
        pictures = _shown(pictures, outcome.num_images)
        images = tuple(image for picture in pictures for image in picture.images)
        sample = Sample(
            key=self._key(position, record),
            input_ids=outcome.input_ids,
            labels=outcome.labels,
            images=tuple(image.data for image in images),
            image_extensions=tuple(image.extension for image in images),
            dialogue=dialogue,
        )
        grids = tuple(picture.grid for picture in pictures) if self.settings.max_slices else ()
        spelled = tuple(self.renderer.spelled(talk))
        written, notes = self._content_tokens(outcome), (*outcome.notes, *self._notes())
        pixels = outcome.image_pixels or (self.profile.image_pixels,) * len(images)
        return Built(
            *(sample, record, images, outcome, grids, talk.unread_keys, spelled, written, notes),
            image_pixels=pixels,
            kept=self._kept(record, talk, images),
        )

    def _key(self, position: int, record: Record) -> str:
        return f"{position:09d}"

    def _kept(
        self, record: Record, talk: Conversation, images: tuple[EncodedImage, ...]
    ) -> dict[str, Any] | None:
        """Values of the columns that the index keeps besides its own."""
        if self.settings.dedup != "near":
            return talk.columns
        return (talk.columns or {}) | near_values(talk, images)

    def _notes(self) -> tuple[str, ...]:
        """What the report should tell of the sample that was just read."""
        found = sum(store.respelled for store in self.stores.values())
        for store in self.stores.values():
            store.respelled = 0
        return (RESPELLED,) if found else ()

    def _content_tokens(self, rendered: Rendered) -> tuple[str, ...]:
        """The content tokens that are supervised in a sample."""
        if not self.content_ids:
            return ()
        found = self.content_array[np.isin(self.content_array, rendered.labels)]
        return tuple(self.content_ids[token] for token in found.tolist())

    def _pictures(self, source: str, references: Iterable[ImageRef]) -> Pictures:
        store = self._store(self.settings.image_root or os.path.dirname(source) or ".")
        if self.settings.model and self.settings.image_policy == "shrink":
            return self._shrunk([store.read(reference) for reference in references])
        return tuple(self._picture(store.read(reference)) for reference in references)

    def _shrunk(self, files: list[bytes]) -> Pictures:
        """The pictures of one sample at the smallest sizes that are proven to give equal runs."""
        limit = self.settings.max_pixels
        sizes = tuple(read_header(data, max_pixels=limit).upright_size for data in files)
        assert isinstance(self.renderer, PartRenderer), "pictures shrink so for a processor alone"
        smaller = self.renderer.profile.smaller(sizes) if sizes else ()
        return tuple(self._picture(data, size=size) for data, size in zip(files, smaller, strict=True))

    def _picture(self, data: bytes, size: tuple[int, int] | None = None) -> Picture:
        settings = self.settings
        return read_picture(
            data,
            slicing=self.slicing,
            policy="keep" if settings.model else settings.image_policy,
            image_size=settings.image_size,
            size=size,
            check=settings.check_images,
            quality=settings.quality,
            max_pixels=settings.max_pixels,
        )

    def _store(self, root: str) -> ImageStore:
        if root not in self.stores:  # an archive is indexed once, however many sources share it
            self.stores[root] = ImageStore(
                root,
                allow_http=self.settings.allow_http,
                allow_remote=self.settings.allow_remote,
                allow_any_path=self.settings.allow_any_path,
                assumed=self.settings.image_root is None,
            )
        return self.stores[root]


def load_renderer(settings: BuildSettings, folder: Store) -> Renderer:
    """The renderer, from the ``tokenizer/`` and ``processor/`` of a dataset."""
    if not settings.model:
        tokenizer = folder.local_copy(TOKENIZER_DIR)
        return renderer_of(settings, load_prepared(tokenizer) or load_tokenizer(tokenizer))
    return load_part_renderer(settings, folder)


def load_part_renderer(settings: BuildSettings, folder: Store) -> PartRenderer:
    """The same of a processor's dataset."""
    from omnidata.profiles.folder import chat_template, load_processor
    from omnidata.profiles.processor import ProcessorProfile

    processor = load_processor(folder.local_copy(PROCESSOR_DIR))
    processor.tokenizer.chat_template = chat_template(processor)
    return PartRenderer(
        processor.tokenizer,
        ProcessorProfile(processor, settings.arguments),
        max_length=settings.max_length,
        content_tokens=settings.content_tokens,
        default_system=settings.system or None,
        date=settings.date,
    )


def renderer_of(settings: BuildSettings, tokenizer: AnyTokenizer) -> Renderer:
    """The renderer of OmniLMM's profile."""
    return Renderer(
        tokenizer,
        num_query=settings.num_query,
        max_length=settings.max_length,
        content_tokens=settings.content_tokens,
        default_system="auto" if settings.system is None else settings.system or None,
        slice_tokens=settings.slice_tokens if settings.max_slices else None,
        date=settings.date,
    )


def _shown(pictures: Pictures, num_images: int) -> Pictures:
    """The pictures of the first ``num_images`` blocks: those of turns that were cut off are not stored."""
    shown: list[Picture] = []
    for picture in pictures:
        num_images -= len(picture.images)
        if num_images < 0:
            break
        shown.append(picture)
    return tuple(shown)


def _place(record: Record | Reject) -> str:
    return f"{record.source}, {record.locator} (id {record.id!r})"


def batches(
    records: Iterable[Positioned], note: Note = lambda text: None, *, num_records: int = BATCH_RECORDS
) -> Iterator[list[Positioned]]:
    """Records in lists that are worth a batch and still fit in memory when they carry their images."""
    batch: list[Positioned] = []
    held = 0
    for position, record in records:
        batch.append((position, record))
        note(f"what follows {_place(record)}")
        held += carried_bytes(record.payload) if isinstance(record, Record) else 0
        if len(batch) == num_records or held >= BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def carried_bytes(value: object) -> int:
    """Bytes and characters of what a parsed row holds, nested values included."""
    total, left = 0, [value]
    while left:
        value = left.pop()
        if isinstance(value, bytes | str):
            total += len(value)
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
    return total


# --- rejects ----------------------------------------------------------------------------------------------


def rejected(record: Record, error: RejectError) -> Reject:
    """The reject of a record that a stage refused."""
    return Reject(
        source=record.source,
        locator=record.locator,
        id=record.id,
        reason=error.reason,
        detail=error.detail,
        raw=raw_excerpt(record.payload),
    )


def raw_excerpt(payload: object) -> str:
    """The start of a row as JSON, for people: ``{"id": "7", "image": "<81234 bytes>", …``."""
    try:
        text = orjson.dumps(_shortened(payload), default=str).decode()
    except TypeError as error:  # e.g. a lone surrogate, an integer over 64 bits
        text = f"{error}: {_shortened(payload)!r}"
    return text[:RAW_CHARACTERS].encode("utf-8", "replace").decode()


def _shortened(value: object, depth: int = 0) -> object:
    if depth > MAX_DEPTH:
        return "…"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, str):
        return value[: RAW_CHARACTERS + 1]
    if isinstance(value, dict):
        return {str(key): _shortened(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(inner, depth + 1) for inner in value]
    return value
