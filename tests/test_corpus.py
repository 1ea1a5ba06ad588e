"""Corpora: every source shape gives every record once, in order, with its place; damage is seen."""

import gzip
import io
import json
import pickle
import random
import tracemalloc

import fsspec
import pytest
import zstandard
from corpus_files import llava, payloads, read_all, tar_of, use_small_units, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from omnidata import corpus
from omnidata.corpus import json_array, source
from omnidata.schema import Record, Reject, UserError


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    use_small_units(monkeypatch)


# --- JSON -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_gives_its_items_in_order(tmp_path, indent):
    records = [llava(i) for i in range(30)]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=indent))
    read = read_all(tmp_path / "a.json")
    assert [record.payload for record in read] == records
    assert [record.locator for record in read][:2] == ["item 0", "item 1"]
    assert {record.source for record in read} == {str(tmp_path / "a.json")}


def test_json_lines_give_line_numbers_that_count_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n" + json.dumps(llava(1)) + "\n  \n" + json.dumps(llava(2)))
    assert [record.locator for record in read_all(tmp_path / "a.jsonl")] == ["line 3", "line 5"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.tsv", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("blank", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
def test_an_empty_part_of_a_corpus_holds_no_records(tmp_path, name, blank):
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(pack(blank) if blank or "gz" in name else b"")
    assert read_all(tmp_path / name) == []


@pytest.mark.parametrize("name", ["a.parquet", "a.tar", "a"])
def test_an_empty_file_of_another_kind_is_damage(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}: the file is empty"):
        corpus.open_source(str(tmp_path / name))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='a"\\[]{},: é\n', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text('ab"\\', max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(
    items=st.lists(json_values, max_size=12), block=st.integers(1, 40), indent=st.sampled_from([None, 0, 3])
)
def test_any_array_is_cut_into_its_items_whatever_the_blocks(items, block, indent):
    text = json.dumps(items, indent=indent, ensure_ascii=False).encode()
    try:
        json_array.BLOCK, before = block, json_array.BLOCK
        found = list(json_array.items(io.BytesIO(text), 0, inside=False, name="x"))
    finally:
        json_array.BLOCK = before
    assert [json.loads(item) for _, item in found] == items
    assert all(text[start : start + len(item)] == item for start, item in found)


def test_a_broken_item_is_one_reject_and_the_others_stay(tmp_path):
    lines = [json.dumps(llava(1)), "{broken", json.dumps([1]), json.dumps(llava(2)), '{"id": "\\ud800"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text("[" + ",".join([lines[0], '{"a": tru}', "7", lines[3], lines[4]]) + "]")
    for name, place in (("a.jsonl", "line 2"), ("a.json", "item 1")):
        read = read_all(tmp_path / name)
        assert [type(record) for record in read] == [Record, Reject, Reject, Record, Reject]
        assert {record.reason for record in read if isinstance(record, Reject)} == {"bad_json"}
        assert read[1].locator == place and read[1].raw


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1}, {"id": "2', "does not end"),
        ('[{"id": 1},', "does not end"),
        ('[{"id": 1}]\n[{"id": 2}]', "after the end of the array"),
    ],
)
def test_a_damaged_array_is_refused_and_not_read_short(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_all(tmp_path / "a.json")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("key", ["data", "samples"])
def test_an_array_that_an_object_wraps_is_unwrapped(tmp_path, indent, key):
    records = [llava(i) for i in range(30)]
    whole = {"version": "1.0", "count": 30, key: records, "license": "CC-BY"}
    (tmp_path / "a.json").write_text(json.dumps(whole, indent=indent), encoding="utf-8-sig")
    assert payloads(tmp_path / "a.json") == records
    (tmp_path / "b.json").write_text(json.dumps({"data": records, "test": records}))
    with pytest.raises(UserError, match="more arrays after the end"):
        payloads(tmp_path / "b.json")
    (tmp_path / "c.json").write_text(json.dumps({"train": records}, indent=2))
    with pytest.raises(UserError, match="under 'data' in an object"):
        payloads(tmp_path / "c.json")


def test_a_byte_order_mark_is_no_content(tmp_path):
    for name, text in (("a.json", json.dumps([llava(1)])), ("a.jsonl", json.dumps(llava(1)))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert payloads(tmp_path / name) == [llava(1)]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(json_array, "BLOCK", 256 << 10)
    record = json.dumps(llava(1, note="x" * 2000))
    file = tmp_path / f"a.{kind}"
    file.write_text("[" + ",\n".join([record] * 8000) + "]" if kind == "json" else (record + "\n") * 8000)
    assert file.stat().st_size > 16e6
    tracemalloc.start()
    [opened] = corpus.open_source(str(file))
    count = sum(1 for unit in corpus.scan(opened) for _ in corpus.read(opened, unit))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8000
    assert peak < 4e6  # blocks of 256 KiB, and numpy's arrays over one


# --- compression, globs, URLs -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "tar"])
def test_compressed_files_are_read_through_in_any_order(tmp_path, suffix, kind):
    records = [llava(i) for i in range(40)]
    plain = {
        "json": json.dumps(records).encode(),
        "jsonl": "\n".join(map(json.dumps, records)).encode(),
        "tar": tar_of({f"{i:03}.json": json.dumps(record).encode() for i, record in enumerate(records)}),
    }[kind]
    pack = gzip.compress if suffix == ".gz" else zstandard.compress
    path = tmp_path / f"a.{kind}{suffix}"
    path.write_bytes(pack(plain[: len(plain) // 2]) + pack(plain[len(plain) // 2 :]))  # two members / frames
    [file] = corpus.open_source(str(path))
    units = list(corpus.scan(file))
    assert len(units) > 3
    for order in (units, units[::-1]):
        read = {unit: [record.payload for record in corpus.read(file, unit)] for unit in order}
        assert [payload for unit in units for payload in read[unit]] == records


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_cut_off_compressed_file_is_refused(tmp_path, pack):
    data = pack(random.Random(0).randbytes(200000).hex().encode() + b"\n")
    data = pack(json.dumps(llava(1)).encode() + b"\n") + data
    for cut in (len(data) // 2, len(data) - 3):
        (tmp_path / "a.jsonl").write_bytes(data[:cut])
        with pytest.raises(UserError, match="broken or cut off"):
            read_all(tmp_path / "a.jsonl")


def test_units_read_alone_in_any_order_and_half_way(tmp_path):
    write_lines(tmp_path / "a.jsonl", [llava(i) for i in range(30)])
    [file] = pickle.loads(pickle.dumps(corpus.open_source(str(tmp_path / "a.jsonl"))))
    units = list(corpus.scan(file))
    assert [unit.num_records for unit in units] == [7, 7, 7, 7, 2]
    half = corpus.read(file, units[1])
    assert next(half).id == "r7"
    half.close()
    assert [record.id for record in corpus.read(file, units[4])] == ["r28", "r29"]
    assert [record.id for record in corpus.read(file, units[1])] == [f"r{i}" for i in range(7, 14)]


def test_globs_give_their_files_sorted_and_urls_work(tmp_path):
    for i in (2, 1):
        write_lines(tmp_path / f"part-{i}.jsonl", [llava(i)])
        fsspec.filesystem("memory").pipe(f"/corpus/part-{i}.jsonl", json.dumps(llava(i)).encode())
    assert [record.id for record in read_all(tmp_path / "part-*.jsonl")] == ["r1", "r2"]
    assert [record.id for record in read_all("memory://corpus/part-*.jsonl")] == ["r1", "r2"]
    [file] = corpus.open_source("memory://corpus/part-1.jsonl")
    assert file.source == "memory://corpus/part-1.jsonl" and len(file.digest()) == 32


@pytest.mark.parametrize("name", ["missing.json", "missing-*.json", "memory://missing.json", "nosuch://x"])
def test_what_is_not_there_is_one_clear_error(tmp_path, name):
    with pytest.raises(UserError, match=r"missing|nosuch"):
        corpus.open_source(name if "://" in name else str(tmp_path / name))


def test_unknown_bytes_folders_and_formats_are_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x00\x01\x02")
    for name, options, message in (
        (tmp_path / "a.bin", {}, "known format"),
        (tmp_path, {}, "is a folder"),
        (tmp_path / "a.bin", {"format": "csv"}, "unknown"),
    ):
        with pytest.raises(UserError, match=message):
            corpus.open_source(str(name), **options)


def test_formats_are_detected_by_content(tmp_path):
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    write_lines(tmp_path / "a", [llava(1)])
    write_lines(tmp_path / "b", [chat])
    assert [file.format for name in "ab" for file in corpus.open_source(str(tmp_path / name))] == [
        "llava",
        "messages",
    ]
    [forced] = corpus.open_source(str(tmp_path / "a"), format="messages")
    assert forced.format == "messages"
    with pytest.raises(UserError, match="not those of --format parquet"):
        corpus.open_source(str(tmp_path / "a"), format="parquet")


def test_the_digest_follows_the_content(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    digests = set()
    for text in ("{}\n", "{} \n", "[]\n"):
        file.write_text(text)
        digests.add(source.SourceFile(str(file), "llava", "json_lines", len(text)).digest())
    assert len(digests) == 3
    monkeypatch.setattr(source, "_WHOLE", 10)
    monkeypatch.setattr(source, "_SAMPLE", 4)
    sampled = set()
    for last in "ab":
        file.write_text("x" * 5000 + last)
        sampled.add(source.SourceFile(str(file), "llava", "json_lines", 5001).digest())
    assert len(sampled) == 2


def test_records_without_an_id_get_one_from_their_place(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"id": 7}, {"id": None}, {"id": ""}, {}])
    name = str(tmp_path / "a.jsonl")
    assert [r.id for r in read_all(name)] == ["7", "a.jsonl#line 2", "a.jsonl#line 3", "a.jsonl#line 4"]
