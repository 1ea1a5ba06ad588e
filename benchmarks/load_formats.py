"""The samples of benchmarks/load.py in the formats of peers that do not read tars.

python load_formats.py FOLDER          FOLDER/ours -> FOLDER/mds, FOLDER/litdata
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def write_mds(folder: Path) -> None:
    """The same samples as MDS."""
    import streaming

    columns = {"key": "str", "ids": "ndarray:int32", "labels": "ndarray:int32", "image": "bytes"}
    with streaming.MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for sample in _samples(folder):
            writer.write(sample | {name: np.array(sample[name]) for name in ("ids", "labels")})


def write_litdata(folder: Path) -> None:
    """The same samples as litdata chunks (written by its own writer, in this process)."""
    from litdata.streaming.writer import BinaryWriter

    (folder / "litdata").mkdir()
    writer = BinaryWriter(str(folder / "litdata"), chunk_bytes="64MB")
    for number, sample in enumerate(_samples(folder)):
        writer.add_item(number, sample | {name: sample[name].tobytes() for name in ("ids", "labels")})
    writer.done()
    writer.merge()


def _samples(folder: Path) -> Iterator[dict[str, Any]]:
    from omnidata import Dataset

    dataset = Dataset(folder / "ours", "train")
    for number in range(len(dataset)):
        sample = dataset[number]
        image = sample.images[0] if sample.images else b""
        yield {"key": sample.key, "ids": sample.input_ids, "labels": sample.labels, "image": image}


if __name__ == "__main__":
    write_mds(Path(sys.argv[1]))
    write_litdata(Path(sys.argv[1]))
