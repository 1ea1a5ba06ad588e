"""Corpora that are no JSON text: Parquet, TSV and WebDataset tars."""

import base64
import json
import random
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import JPEG, PNG, llava, read_all, tar_of, use_small_units

from omnidata import corpus
from omnidata.conversation import to_conversation
from omnidata.corpus.parquet import Unread
from omnidata.schema import Reject, RejectError, UserError


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    use_small_units(monkeypatch)


# --- Parquet ----------------------------------------------------------------------------------------------


def test_the_cauldron_parquet(tmp_path):
    rows = [
        {
            "images": [{"bytes": JPEG, "path": None}],
            "texts": [
                {"user": f"q{i}", "assistant": f"a{i}", "source": "s"},
                {"user": "q", "assistant": "a", "source": "s"},
            ],
            "unused": [0.5] * 3,
        }
        for i in range(25)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=10)
    [file] = corpus.open_source(str(tmp_path / "a.parquet"))
    units = list(corpus.scan(file))
    assert [(unit.part, unit.start, unit.num_records) for unit in units] == [
        (0, 0, 7), (0, 7, 3), (1, 0, 7), (1, 7, 3), (2, 0, 5),
    ]  # fmt: skip
    for order in (units, units[::-1]):
        read = [record for unit in order for record in corpus.read(file, unit)]
        assert sorted(int(record.locator.split()[1]) for record in read) == list(range(25))
        for record in read:
            row = int(record.locator.split()[1])
            assert record.payload["texts"] == rows[row]["texts"] and record.payload["unused"] == Unread(
                "list<element: double>"
            )
    talk = to_conversation(read[0])
    assert [message.role for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.images[0].data == JPEG


def test_hugging_face_chat_parquet_with_parts(tmp_path):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    row = {
        "image": {"bytes": PNG, "path": "x.png"},
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
        ],
        "texts": [],
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    [record] = read_all(tmp_path / "a.parquet")
    talk = to_conversation(record)
    assert talk.images[0].data == PNG and talk.messages[0].text == "What?"


def test_rlhf_v_parquet_keeps_the_chosen_answer(tmp_path):
    text = json.dumps({"question": "Q?", "chosen": "yes", "rejected": "no"})
    pq.write_table(
        pa.Table.from_pylist([{"text": text, "image": {"bytes": JPEG, "path": "a"}}]), tmp_path / "a"
    )
    [record] = read_all(tmp_path / "a")
    assert [message.text for message in to_conversation(record).messages] == ["\nQ?", "yes"]


def test_a_damaged_parquet_is_refused(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"id": "1", "texts": []}]), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-20])
    with pytest.raises(UserError, match="not a readable Parquet"):
        read_all(tmp_path / "a.parquet")


# --- TSV --------------------------------------------------------------------------------------------------


def tsv_line(text, image=JPEG):
    encoded = base64.b64encode(json.dumps(text).encode()).decode()
    return (
        "\t".join(["unimm-chat", base64.b64encode(image).decode(), encoded, "coco", "train", "17", "1.jpg"])
        + "\n"
    )


def test_muffin_tsv(tmp_path):
    texts = [
        [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
        {"question": "Where?", "answer": "Here."},
        ["Which?", "The chosen.", "The rejected."],
    ]
    (tmp_path / "vqa-3.tsv").write_text("".join(map(tsv_line, texts)) + "just\ttwo\n" + "a\t%%\t%%\n")
    read = read_all(tmp_path / "vqa-3.tsv")
    talks = [to_conversation(record) for record in read[:3]]
    assert [[message.text for message in talk.messages] for talk in talks] == [
        ["\nWhat?", "A cat."], ["\nWhere?", "Here."], ["\nWhich?", "The chosen."],
    ]  # fmt: skip
    assert all(talk.images[0].data == JPEG for talk in talks)
    assert [(reject.reason, reject.locator) for reject in read[3:]] == [
        ("bad_record", "line 4"),
        ("bad_record", "line 5"),
    ]


# --- WebDataset -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_tars(tmp_path, tar_format):
    long = "x" * 120 if tar_format != tarfile.USTAR_FORMAT else "x"
    members = {}
    for i in range(20):
        members[f"d/{long}{i:03}.jpg"] = JPEG + bytes([i])
        members[f"d/{long}{i:03}.json"] = json.dumps(llava(i, image="gone.jpg")).encode()
    (tmp_path / "a.tar").write_bytes(tar_of(members, format=tar_format))
    [file] = corpus.open_source(str(tmp_path / "a.tar"))
    units = list(corpus.scan(file))
    assert [unit.num_records for unit in units] == [7, 7, 6]
    read = [record for unit in reversed(units) for record in corpus.read(file, unit)]
    assert sorted(record.id for record in read) == sorted(f"r{i}" for i in range(20))
    for record in read:
        assert to_conversation(record).images[0].data == JPEG + bytes([int(record.id[1:])])
        assert record.locator == f"member d/{long}{int(record.id[1:]):03}.json"


def test_the_json_s_order_of_pictures_counts_where_it_names_them(tmp_path):
    talk = llava(1, images=["b.jpg", "a.png"])
    members = {
        "1.a.png": PNG,
        "1.b.jpg": JPEG,
        "1.json": json.dumps(talk | {"images": ["1.b.jpg", "1.a.png"]}).encode(),
    }
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    [record] = read_all(tmp_path / "a.tar")
    assert record.payload["images"] == [JPEG, PNG]


def test_a_tar_sample_without_its_json_is_a_reject(tmp_path):
    (tmp_path / "a.tar").write_bytes(
        tar_of({"1.jpg": JPEG, "2.json": json.dumps(llava(2)).encode(), "3.json": b"{"})
    )
    read = read_all(tmp_path / "a.tar")
    assert [getattr(record, "reason", "ok") for record in read] == ["bad_record", "ok", "bad_json"]


def test_a_tar_cut_anywhere_is_refused(tmp_path):
    data = tar_of({f"{i}.json": json.dumps(llava(i)).encode() for i in range(10)})
    end = len(data.rstrip(b"\0"))
    rng = random.Random(0)
    for cut in [512, 1024, 5 * 1024, end] + [rng.randrange(600, end) for _ in range(30)]:
        (tmp_path / "a.tar").write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"cut off|corrupt"):
            read_all(tmp_path / "a.tar")


def test_a_corrupt_tar_header_is_refused(tmp_path):
    data = bytearray(tar_of({f"{i}.json": json.dumps(llava(i)).encode() for i in range(10)}))
    data[4 * 1024 + 3] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match="corrupt tar header at byte 4096"):
        read_all(tmp_path / "a.tar")


def tar_record(tmp_path, **members):
    """What one sample of a tar becomes; ``members``: what follows the key -> content."""
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of({f"1.{name.replace('_', '.')}": data for name, data in members.items()}))
    [record] = read_all(str(path))
    return record


def test_members_of_a_tar_that_nobody_reads_are_keys_of_the_record(tmp_path):
    talk = b'{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A."}]}'
    for members in (
        {"mp4": b"\0\0\0\x18ftypmp42"},
        {"wav": b"RIFF"},
        {"bin": b"\xff\xfe\0"},
        {"pdf": b"%PDF"},
    ):
        with pytest.raises(RejectError) as error:
            to_conversation(tar_record(tmp_path, json=talk, **members))
        assert error.value.reason == "unread_media"
    assert to_conversation(tar_record(tmp_path, json=talk, cls=b"7")).unread_keys == ("member cls",)


def test_pictures_of_a_tar_by_name_by_number_by_content_or_not_at_all(tmp_path):
    def images(names, **members):
        payload = {"images": names} if names else {}
        record = tar_record(tmp_path, json=json.dumps(payload).encode(), **members)
        return record.reason if isinstance(record, Reject) else record.payload["images"]

    one, two = b"\xff\xd8\xff1", b"\xff\xd8\xff2"
    assert images(["b.png", "a.png"], a_png=one, b_png=two) == [two, one]
    assert images(["old/x.png", "old/y.png"], **{"10_png": two, "2_png": one}) == [one, two]
    assert images(None, picture=one) == [one]
    assert images(["x.png", "y.png"], a_png=one, b_png=two) == "placeholder_mismatch"
    assert images(["a.png"], a_png=one, b_png=two) == "unread_media"
