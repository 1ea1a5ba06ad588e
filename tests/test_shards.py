"""Shards: our bytes are the standard library's, other people's readers open them, damage is noticed."""

import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from omnidata.schema import IGNORE_INDEX, Sample
from omnidata.shards import (
    CorruptSampleError,
    content_hash,
    iter_members,
    npy_bytes,
    prefix_names,
    read_npy,
    read_sample,
    tar_header,
    write_shard,
)


def make_sample(key="000", length=5, images=(b"\xff\xd8 one", b"\x89PNG two"), extensions=("jpg", "png")):
    ids = np.arange(length, dtype=np.int32)
    labels = np.where(ids % 2, ids, IGNORE_INDEX).astype(np.int32)
    return Sample(key, ids, labels, tuple(images), tuple(extensions))


def written(samples):
    file = io.BytesIO()
    return write_shard(file, samples), file.getvalue()


@given(
    st.text("abcXYZ019_-.", min_size=1, max_size=100),
    st.integers(0, 8**11 - 1),
)
def test_header_equals_the_standard_librarys(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    assert tar_header(name, size) == info.tobuf(format=tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(("name", "size"), [("x" * 101, 1), ("", 1), ("é.jpg", 1), ("a.jpg", 8**11)], ids=str)
def test_header_refuses_what_would_need_an_extension(name, size):
    with pytest.raises(ValueError):
        tar_header(name, size)


@given(st.lists(st.integers(-100, 2**31 - 1), max_size=300))
def test_npy_bytes_are_numpys_and_come_back(values):
    array = np.array(values, dtype=np.int32)
    raw = npy_bytes(array)
    np.testing.assert_array_equal(np.load(io.BytesIO(raw), allow_pickle=False), array)
    np.testing.assert_array_equal(read_npy(raw), array)


@pytest.mark.parametrize("other", [np.zeros(3, np.int64), np.zeros((2, 2), np.int32), np.zeros(3, ">i4")])
def test_read_npy_refuses_other_arrays(other):
    buffer = io.BytesIO()
    np.save(buffer, other)
    with pytest.raises(CorruptSampleError):
        read_npy(buffer.getvalue())


def test_round_trip_by_the_returned_ranges():
    samples = [
        make_sample("a", 3, (), ()),
        make_sample("b", 700),
        make_sample("c-d_9", 1, (b"x" * 512,), ("webp",)),
    ]
    spans, raw = written(samples)
    assert len(raw) % tarfile.RECORDSIZE == 0
    assert [offset for offset, _ in spans][1:] == [sum(span) for span in spans][:-1]
    for sample, (offset, nbytes) in zip(samples, spans, strict=True):
        back = read_sample(raw[offset : offset + nbytes])
        assert (back.key, back.images, back.image_extensions) == (
            sample.key,
            sample.images,
            sample.image_extensions,
        )
        np.testing.assert_array_equal(back.input_ids, sample.input_ids)
        np.testing.assert_array_equal(back.labels, sample.labels)
        assert content_hash(back) == content_hash(sample)


def test_plain_webdataset_and_tarfile_read_the_shard(tmp_path):
    samples = [make_sample("a", 3), make_sample("b", 9, (), ())]
    path = tmp_path / "train-00000.tar"
    with path.open("wb") as file:
        write_shard(file, samples)
    with tarfile.open(path) as tar:
        assert tar.getnames() == [
            "a.input_ids.npy",
            "a.labels.npy",
            "a.jpg",
            "a.1.png",
            "b.input_ids.npy",
            "b.labels.npy",
        ]
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in tar} == {
            (0, 0, "", 0o644)
        }
        assert not tar.pax_headers
    read = list(wds.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in read] == ["a", "b"]
    np.testing.assert_array_equal(read[0]["labels.npy"], samples[0].labels)
    assert (read[0]["jpg"], read[0]["1.png"]) == samples[0].images
    assert read[1].keys() >= {"input_ids.npy", "labels.npy"} and "jpg" not in read[1]


def test_a_cut_or_damaged_sample_is_noticed():
    spans, raw = written([make_sample("a", 40)])
    whole = raw[: spans[0][1]]
    read_sample(whole)
    for cut in range(1, len(whole), 97):
        with pytest.raises(CorruptSampleError):
            read_sample(whole[:-cut])
    for name, _, _ in iter_members(whole):
        at = whole.index(name.encode())
        with pytest.raises(CorruptSampleError):
            read_sample(whole[:at] + b"Z" + whole[at + 1 :])


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "ü", "a b"])
def test_keys_that_other_readers_would_split_are_refused(key):
    with pytest.raises(ValueError, match="key"):
        written([make_sample(key)])


def test_unequal_lengths_and_unknown_extensions_are_refused():
    with pytest.raises(ValueError, match="labels"):
        written([Sample("a", np.zeros(2, np.int32), np.zeros(3, np.int32))])
    with pytest.raises(ValueError, match="extension"):
        written([make_sample(extensions=("jpg", "gif"))])


def test_content_hash_is_of_the_sample_alone():
    """Swapping two images of one sample changes it; the key does not."""
    ids = np.arange(4, dtype=np.int32)
    one = Sample("a", ids, ids, (b"x", b"y"), ("jpg", "jpg"))
    assert content_hash(one) == content_hash(replace(one, key="b"))
    assert content_hash(one) != content_hash(replace(one, images=(b"y", b"x")))


def test_content_hash_tells_boundaries_apart():
    one = make_sample(images=(b"ab", b"c"), extensions=("jpg", "jpg"))
    other = make_sample(images=(b"a", b"bc"), extensions=("jpg", "jpg"))
    assert content_hash(one) != content_hash(other)


@given(st.text("abc019_-", min_size=1, max_size=30), st.text("abc019_-", max_size=20), st.integers(0, 2))
def test_a_prefix_of_names_makes_what_would_have_been_written(key, prefix, num_images):
    sample = make_sample(
        key, images=(b"\xff\xd8 one", b"x" * 512)[:num_images], extensions=("jpg", "png")[:num_images]
    )
    [(_, nbytes)], raw = written([sample])
    renamed = bytearray(raw[:nbytes])
    prefix_names(memoryview(renamed), prefix)
    assert renamed == written([replace(sample, key=prefix + key)])[1][:nbytes]
