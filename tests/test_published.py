"""Corpora as they are published: records with the keys of their cards, tables as their library writes them.

Read and turned into conversations; what a file format may hold besides is in test_corpus.py.
"""

import base64
import json

import pytest
from tiny_corpus import jpeg

from omnidata import corpus
from omnidata.conversation import to_conversation
from omnidata.schema import ImagePart, RejectError

PHOTOS = [jpeg(seed) for seed in range(3)]


def read(path):
    """The conversations of a file, in order."""
    [file] = corpus.open_source(str(path))
    return [to_conversation(record) for unit in corpus.scan(file) for record in corpus.read(file, unit)]


def turns(talk):
    """(role, text with ▣ for each image) of each turn."""
    return [
        (message.role, "".join("▣" if isinstance(part, ImagePart) else part.text for part in message.parts))
        for message in talk.messages
    ]


def write_parquet(path, rows, features):
    """As ``datasets`` stores rows on the Hub: images as structs of bytes and path."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows, features=datasets.Features(features(datasets))).to_parquet(path)


# --- Parquet ----------------------------------------------------------------------------------------------


def test_the_cauldron(tmp_path):
    def pair(user, assistant):
        return {"user": user, "assistant": assistant, "source": "TQA"}

    rows = [
        {"images": [{"bytes": PHOTOS[0], "path": None}], "texts": [pair("Q1", "A1"), pair("Q2", "A2")]},
        {"images": [{"bytes": photo, "path": None} for photo in PHOTOS[1:]], "texts": [pair("Q3", "A3")]},
    ]
    write_parquet(
        tmp_path / "train-00000-of-00001.parquet",
        rows,
        lambda d: {
            "images": d.List(d.Image()),
            "texts": d.List({name: d.Value("string") for name in ("user", "assistant", "source")}),
        },
    )
    one, two = read(tmp_path / "train-00000-of-00001.parquet")
    expected = [("user", "▣\nQ1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]
    assert turns(one) == expected
    assert turns(two) == [("user", "▣\n▣\nQ3"), ("assistant", "A3")]
    assert [image.data for talk in (one, two) for image in talk.images] == PHOTOS


def test_rlhf_v_and_rlaif_v(tmp_path):
    about = {"ds_name": "RLHF-V", "origin_dataset": "LCS-558K", "image_path": "llava1.5/0.jpg"}
    about |= {"origin_split": json.dumps({"model": "Muffin", "type": "question answering"})}
    answers = {"question": "Who?", "chosen": "Nobody.", "rejected": "A man."}
    image = {"image": {"bytes": PHOTOS[0], "path": "0.jpg"}}

    def features(d, *texts):
        strings = (*about, *texts)
        return {name: d.Value("string") for name in strings} | {"image": d.Image(), "idx": d.Value("int64")}

    rlhf = [about | image | {"idx": 0, "text": json.dumps(answers)}]
    write_parquet(tmp_path / "RLHF-V-Dataset.parquet", rlhf, lambda d: features(d, "text"))
    rlaif = [about | image | {"idx": 0} | answers]
    write_parquet(tmp_path / "RLAIF-V.parquet", rlaif, lambda d: features(d, *answers))
    for name in ("RLHF-V-Dataset.parquet", "RLAIF-V.parquet"):
        [talk] = read(tmp_path / name)
        assert turns(talk) == [("user", "▣\nWho?"), ("assistant", "Nobody.")], name
        assert talk.images[0].data == PHOTOS[0]


def test_llava_as_the_hub_stores_it(tmp_path):
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    rows = [
        {"id": "1", "image": {"bytes": PHOTOS[0], "path": "1.jpg"}, "conversations": said},
        {"id": "2", "image": None, "conversations": [said[0] | {"value": "Hello?"}, said[1]]},
    ]
    write_parquet(
        tmp_path / "a.parquet",
        rows,
        lambda d: {
            "id": d.Value("string"),
            "image": d.Image(),
            "conversations": d.List({"from": d.Value("string"), "value": d.Value("string")}),
        },
    )
    with_image, without = read(tmp_path / "a.parquet")
    assert turns(with_image)[0] == ("user", "▣\nWhat?") and with_image.images[0].data == PHOTOS[0]
    assert turns(without)[0] == ("user", "Hello?") and without.images == ()


# --- TSV ----------------------------------------------------------------------------------------------------


def test_rlhf_v_tsv(tmp_path):
    answers = ["Who?", "Nobody.", "A man.", [0.1, 0.2], [0.3, 0.4]]
    columns = ["rlhf-v", PHOTOS[0], json.dumps(answers).encode(), "coco", "train", "7", "7.jpg"]
    encoded = [base64.b64encode(c).decode() if isinstance(c, bytes) else c for c in columns]
    (tmp_path / "RLHF-V-1.tsv").write_text("\t".join(encoded) + "\n")
    [talk] = read(tmp_path / "RLHF-V-1.tsv")
    assert turns(talk) == [("user", "▣\nWho?"), ("assistant", "Nobody.")]
    assert talk.images[0].data == PHOTOS[0]


# --- JSON -------------------------------------------------------------------------------------------------


def write_json(path, records):
    path.write_text(json.dumps(records, indent=2))
    return path


def test_sharegpt4v(tmp_path):
    question = "What do you see happening in this image?\n<image>"
    record = {"id": "000000000009", "image": "coco/train2017/000000000009.jpg"}
    record["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": "In the …"}]
    [talk] = read(write_json(tmp_path / "sharegpt4v_instruct_gpt4-vision_cap100k.json", [record]))
    assert turns(talk)[0] == ("user", question.replace("<image>", "▣"))
    assert talk.images[0].path == "coco/train2017/000000000009.jpg"


def test_llava_instruct_mixes_records_without_images(tmp_path):
    said = [{"from": "human", "value": "What are the colors of the bus?\n<image>"}]
    said += [{"from": "gpt", "value": "White and red."}, {"from": "human", "value": "And the sky?"}]
    said += [{"from": "gpt", "value": "Blue."}]
    records = [
        {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": said},
        {
            "id": "wgByO4Y_0",
            "model": "",
            "conversations": [
                {"from": "human", "value": "Write <b>HTML</b>"},
                {"from": "gpt", "value": "<p>"},
            ],
        },
    ]
    mixed, text = read(write_json(tmp_path / "llava_v1_5_mix665k.json", records))
    assert [len(mixed.images), len(text.images)] == [1, 0]
    assert len(turns(mixed)) == 4 and turns(text) == [("user", "Write <b>HTML</b>"), ("assistant", "<p>")]


def test_minicpm_v(tmp_path):
    def talk_of(image, question):
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": "A cat, a dog."}]
        return {"id": "0", "image": image, "conversations": said}

    names = {"<image_00>": "images/cat.jpg", "<image_01>": "images/dog.jpg"}
    records = [
        talk_of("images/cat.jpg", "<image>\nWhat animal is this?"),
        talk_of("images/cat.jpg", "Describe this image."),
        talk_of(names, "Compare <image_01> and <image_00>."),
    ]
    one, unplaced, two = read(write_json(tmp_path / "vl_finetune_data.json", records))
    assert turns(one)[0] == ("user", "▣\nWhat animal is this?")
    assert turns(unplaced)[0] == ("user", "▣\nDescribe this image.")
    assert turns(two)[0] == ("user", "Compare ▣ and ▣.")
    assert [image.path for image in two.images] == ["images/dog.jpg", "images/cat.jpg"]


def test_openai_fine_tuning_lines(tmp_path):
    uri = "data:image/jpeg;base64," + base64.b64encode(PHOTOS[0]).decode()
    pictures = [uri, "https://example.com/7.jpg"]
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}} for url in pictures]
    system = {"role": "system", "content": "You identify uncommon cheeses."}
    question = {"type": "text", "text": "What is this cheese?"}
    answer = {"role": "assistant", "content": "Danbo", "weight": 1}
    together = [system, {"role": "user", "content": [question, *parts]}, answer]
    apart = [system, *({"role": "user", "content": content} for content in ([question], parts)), answer]
    lines = [json.dumps({"messages": messages}) for messages in (together, apart)]
    (tmp_path / "a.jsonl").write_text(lines[0] + "\n")
    [file] = corpus.open_source(str(tmp_path / "a.jsonl"))
    assert file.format == "messages"
    [talk] = read(tmp_path / "a.jsonl")
    assert [role for role, _ in turns(talk)] == ["system", "user", "assistant"]
    assert turns(talk)[1][1] == "What is this cheese?▣▣"
    assert [image.path for image in talk.images] == pictures
    (tmp_path / "b.jsonl").write_text(lines[1] + "\n")
    with pytest.raises(RejectError, match="turns 2 and 3 are both the user's"):  # templates cannot say that
        read(tmp_path / "b.jsonl")
