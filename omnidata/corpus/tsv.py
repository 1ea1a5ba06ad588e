"""TSV of Muffin and RLHF-V: one record a line, seven columns, no header.

dataset  image  text  origin_dataset  origin_split  origin_index  image_path
         ^      ^ base64 of JSON: [{"from", "value"}, ...], {"question", "answer"} or
         |        [question, chosen, rejected, ...] (the chosen answer is the one to learn)
         base64 of the picture
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator

from omnidata.corpus import json_lines
from omnidata.corpus.source import SourceFile, Unit
from omnidata.corpus.streams import open_at
from omnidata.images.references import looks_like_base64
from omnidata.schema import Record, Reject

FORMATS = ("tsv",)
IMAGE, TEXT = 1, 2  # columns

scan = json_lines.scan  # lines are lines


def sniff(name: str, head: bytes) -> bool:
    """Three columns or more, the second of them a picture."""
    columns = head.split(b"\n", 1)[0].split(b"\t")
    return len(columns) > IMAGE and looks_like_base64(columns[IMAGE][:64].decode("ascii", "replace"))


def read(file: SourceFile, unit: Unit) -> Iterator[Record | Reject]:
    """The records of a unit."""
    with open_at(file, unit.start) as stream:
        for locator, line in json_lines.lines(file, stream, unit):
            yield line if isinstance(line, Reject) else _parse(file, locator, line)


def _parse(file: SourceFile, locator: str, line: bytes) -> Record | Reject:
    columns = line.rstrip(b"\r\n").split(b"\t")
    if len(columns) <= TEXT:
        return _bad(file, locator, columns, f"{len(columns)} columns; dataset, image and text are the least")
    try:
        payload: dict[str, object] = {
            "text": base64.b64decode(columns[TEXT], validate=True).decode("utf-8"),
            "image": base64.b64decode(columns[IMAGE].strip(), validate=True),
        }
    except (binascii.Error, UnicodeDecodeError) as error:
        return _bad(file, locator, columns, f"image or text is not base64 (of UTF-8): {error}")
    return file.record(locator, payload)


def _bad(file: SourceFile, locator: str, columns: list[bytes], detail: str) -> Reject:
    raw = "\t".join(column[:200].decode("utf-8", "replace") for column in columns)[:2000]
    return Reject(file.source, locator, file.place(locator), "bad_record", detail, raw)
