"""Files for tests of the corpus modules, and how to read them whole."""

import io
import json
import tarfile

from omnidata import corpus
from omnidata.corpus import json_array, json_lines, parquet, webdataset

JPEG = b"\xff\xd8\xff\xe0" + bytes(range(200)) + b"\xff\xd9"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(100, 200))


def llava(number, **more):
    return {
        "id": f"r{number}",
        "conversations": [
            {"from": "human", "value": f'q {number} "quoted" \\ ]}}, {{[ é\n'},
            {"from": "gpt", "value": "\\" * (number % 5) + '"[{'},
        ],
    } | more


def read_all(name, **options):
    return [
        record
        for file in corpus.open_source(str(name), **options)
        for unit in corpus.scan(file)
        for record in corpus.read(file, unit)
    ]


def payloads(name, **options):
    return [record.payload for record in read_all(name, **options)]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def use_small_units(monkeypatch):
    """Several units a file, with few records."""
    for module in (json_array, json_lines, parquet, webdataset):
        monkeypatch.setattr(module, "UNIT_RECORDS", 7)


def tar_of(members, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
