"""The short form of `make faults`, and what its mutants must not survive."""

import io
import json
import time
import tracemalloc
import zipfile
from dataclasses import fields, replace

import pytest
from faults.disk import Disk
from faults.table import rows_of, table
from tiny_corpus import write_corpus

from omnidata import locks
from omnidata.builder.identity import what_changed
from omnidata.builder.settings import BuildSettings
from omnidata.durable import Store
from omnidata.images.archives import open_archive
from omnidata.locks import LockedError, locked
from omnidata.schema import RejectError

SLOW = [pytest.param(part, marks=pytest.mark.slow) for part in ("training", "checkpoints", "objects")]


@pytest.mark.parametrize("part", ["power", "kills", "damage", "mutants", "together", "workers", *SLOW])
def test_a_few_of_each_fault(part):
    for row in rows_of(part, short=True):
        assert row.ok, row.failures


def test_what_was_removed_stays_removed_after_a_power_cut(tmp_path):
    (tmp_path / "disk").mkdir()
    store = Store(tmp_path / "disk" / "data")
    with Disk(root=tmp_path / "disk") as disk:
        store.write_bytes("parts/a", b"old")
        store.write_bytes("parts/b", b"old")
        store.remove("parts/a")
        disk.survivors(tmp_path / "survived", "old")
    assert Store(tmp_path / "survived" / "data").names("parts") == ["b"]


def test_the_table_has_a_line_for_each_row():
    row = {"fault": "a", "how": "b", "tried": 3, "lost": 0, "doubled": 0, "not_found": 1, "seconds": 2.0}
    assert table([row]).splitlines()[1].split() == ["a", "b", "3", "0", "0", "1", "2"]


def test_every_setting_decides_whether_a_build_goes_on(tmp_path):
    settings = write_corpus(tmp_path / "c", num_llava=1, num_chat=1, bad=False).settings
    empty = {"tokenizer": {}, "profile": {}, "versions": {}, "inputs": []}
    before = settings.to_json()
    for field in fields(BuildSettings):
        now = before | {field.name: "something else"}
        flag = f"--{field.name.replace('_', '-')} was"
        lines = what_changed(empty | {"settings": before}, empty | {"settings": now})
        assert len(lines) == 1 and lines[0].startswith(flag), field.name
    assert replace(settings, quality=91).to_json() != before


def test_a_lease_is_refreshed_while_it_is_held(monkeypatch, tmp_path):
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.5)
    store = Store(f"memory://{tmp_path.name}")
    with locked(store, "build"):
        time.sleep(1.2)
        with pytest.raises(LockedError), locked(store, "build"):
            pass


def test_of_two_who_take_a_lease_at_once_one_wins(monkeypatch, tmp_path):
    """The other one writes between our write and our second look."""
    store = Store(f"memory://{tmp_path.name}")
    write = store.write_bytes

    def both(path, data):
        write(path, data)
        write(path, json.dumps(json.loads(data) | {"token": "another"}).encode())

    monkeypatch.setattr(store, "write_bytes", both)
    with pytest.raises(LockedError, match="at the same time"), locked(store, "build"):
        pass


def test_a_zip_that_lies_about_its_sizes_is_not_unpacked(tmp_path):
    """A member of 200 MB that the directory says has a thousand bytes."""
    buffer, size = io.BytesIO(), 200_000_000
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(size))
    raw = buffer.getvalue().replace(size.to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    (tmp_path / "a.zip").write_bytes(raw)
    archive = open_archive(str(tmp_path / "a.zip"))
    tracemalloc.start()
    with pytest.raises(RejectError, match="damaged"):
        archive.read("a.jpg", max_bytes=1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
