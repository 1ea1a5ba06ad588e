"""A tiny, valid dataset, written by the contract's own writers and no build: for tests of what reads one.

    build_tiny_dataset(tmp_path / "data")                  # 24 samples, 3 shards, 2 sources, 3 rejects
    build_tiny_dataset(tmp_path / "data", num_samples=500, samples_per_shard=100)

Sample i has i % 3 images; its text is made from i, so every test can say what it expects. The tokenizer is
a byte-level BPE trained here in a blink, with Zephyr's markers as ordinary text.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from omnidata.index import idx_bytes, index_schema, index_table, reject_schema, reject_table, write_tables
from omnidata.interop import energon_files
from omnidata.manifest import manifest_to_json
from omnidata.profiles.omnilmm import OmniLMMProfile
from omnidata.schema import (
    CONTENT_TOKENS,
    IGNORE_INDEX,
    IM_START,
    IMAGE_TOKENS,
    INDEX,
    MANIFEST,
    NV_META,
    REJECTS,
    SCHEMA_VERSION,
    TOKENIZER_DIR,
    Manifest,
    Reject,
    Sample,
    ShardInfo,
    shard_name,
)
from omnidata.shards import content_hash, write_shard
from omnidata.text.tokenizer import fingerprint, load_tokenizer, special_token_ids, template_fingerprint

NUM_QUERY = 4
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
ANSWERS = ("A red square.", "Naïve café — 3 £", "<script>alert('x')</script> & more", "猫が二匹います。")
TWO_SOURCES = ("photos.json", "shapes.jsonl")


def build_tiny_dataset(
    root: Path, *, num_samples: int = 24, samples_per_shard: int = 8, num_val: int = 8, image_size: int = 32
) -> Path:
    """Write a complete dataset to ``root`` (the last ``num_val`` samples are its ``val`` split)."""
    tokenizer = write_tokenizer(root / TOKENIZER_DIR)
    samples = [make_sample(i, tokenizer, image_size=image_size) for i in range(num_samples)]
    groups = list(_groups(num_samples, samples_per_shard, num_val))
    tables, shards = [], []
    for name, split, numbers in groups:
        info, rows = _write_one_shard(root, name, split, [(i, samples[i]) for i in numbers])
        shards.append(info)
        tables.append(index_table(rows))
    with (root / INDEX).open("wb") as file:
        write_tables(file, index_schema(), tables)
    _write_rejects(root)
    rows = [row for table in tables for row in table.to_pylist()]
    (root / "README.md").write_text("# Tiny\n")
    manifest = _manifest(root, shards, rows)
    _write_interop(root, manifest)
    (root / MANIFEST).write_bytes(manifest_to_json(manifest))
    return root


def _groups(num_samples: int, per_shard: int, num_val: int) -> Iterator[tuple[str, str, range]]:
    for split, first, last in (
        ("train", 0, num_samples - num_val),
        ("val", num_samples - num_val, num_samples),
    ):
        for number, start in enumerate(range(first, last, per_shard)):
            yield shard_name(split, number), split, range(start, min(start + per_shard, last))


# --- samples ----------------------------------------------------------------------------------------------


def make_sample(i: int, tokenizer: Any, *, image_size: int = 32) -> Sample:
    """Sample ``i``: ``i % 3`` images, a question, an answer, and for every fourth one a second round."""
    specials = {name: tokenizer.token_to_id(name) for name in ("<s>", "</s>", *IMAGE_TOKENS)}
    patch, start, end = (specials[name] for name in IMAGE_TOKENS)
    ids, labels = [specials["<s>"]], [IGNORE_INDEX]

    def add(tokens: list[int], *, supervised: bool = False) -> None:
        ids.extend(tokens)
        labels.extend(tokens if supervised else [IGNORE_INDEX] * len(tokens))

    for turn in range(2 if i % 4 == 0 else 1):
        add(tokenizer.encode("<|user|>\n").ids)
        for _ in range(i % 3 if turn == 0 else 0):
            add([start] + [patch] * NUM_QUERY + [end])
        add(tokenizer.encode(f"Question {i}: what is {'this' if turn == 0 else 'that'}?").ids)
        add([specials["</s>"]])
        add(tokenizer.encode("\n<|assistant|>\n").ids)
        add(tokenizer.encode(ANSWERS[i % len(ANSWERS)] * (1 + i // 8 % 16)).ids, supervised=True)
        add([specials["</s>"]], supervised=True)
    return Sample(
        key=f"sample-{i:06d}",
        input_ids=np.array(ids, np.int32),
        labels=np.array(labels, np.int32),
        images=tuple(make_jpeg(10 * i + n, image_size + 8 * n, image_size) for n in range(i % 3)),
        image_extensions=("jpg",) * (i % 3),
    )


def make_jpeg(number: int, width: int, height: int) -> bytes:
    """A picture that no other number gives."""
    from PIL import Image

    noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_tokenizer(folder: Path) -> Any:
    """Train and save a small byte-level BPE as a Hugging Face folder; return the ``tokenizers`` object."""
    import json

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["<|user|>\nQuestion: what is this?", "<|assistant|>\n", *ANSWERS], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in (*IMAGE_TOKENS, *CONTENT_TOKENS)]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return tokenizer


# --- files ------------------------------------------------------------------------------------------------


def _write_one_shard(root: Path, name: str, split: str, numbered: list[tuple[int, Sample]]):
    path = root / name
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        spans = write_shard(file, (sample for _, sample in numbered))
    Path(f"{path}.idx").write_bytes(idx_bytes(spans))
    start = load_tokenizer(root / TOKENIZER_DIR).convert_tokens_to_ids(IM_START)
    pairs = zip(numbered, spans, strict=True)
    rows = [_row(i, sample, span, name, split) | _runs(sample, start) for (i, sample), span in pairs]
    raw = path.read_bytes()
    info = ShardInfo(
        path=name,
        split=split,
        num_samples=len(rows),
        num_tokens=sum(row["n_tokens"] for row in rows),
        num_bytes=len(raw),
        sha256=hashlib.sha256(raw).hexdigest(),
    )
    return info, rows


def _runs(sample: Sample, start: int) -> dict[str, Any]:
    return {
        "image_starts": np.flatnonzero(sample.input_ids == start).tolist(),
        "image_tokens": [NUM_QUERY + 2] * len(sample.images),
        "image_pixels": [3 * 32**2] * len(sample.images),
    }


def _row(i: int, sample: Sample, span: tuple[int, int], shard: str, split: str) -> dict[str, Any]:
    from PIL import Image

    return {
        "key": sample.key,
        "split": split,
        "shard": shard,
        "offset": span[0],
        "nbytes": span[1],
        "n_tokens": len(sample.input_ids),
        "n_supervised": int((sample.labels != IGNORE_INDEX).sum()),
        "n_images": len(sample.images),
        "image_sizes": [list(Image.open(io.BytesIO(data)).size) for data in sample.images],
        "id": f"record {i}",
        "source": TWO_SOURCES[i % 2],
        "locator": f"item {i}",
        "content_hash": content_hash(sample),
    }


def _write_rejects(root: Path) -> None:
    rejects = [
        Reject(
            "photos.json", "item 90", "record 90", "image_missing", "no file cat.jpg", '{"image": "cat.jpg"}'
        ),
        Reject("photos.json", "item 91", "record 91", "role_order", "two user turns in a row", "<b>raw</b>"),
        Reject("shapes.jsonl", "line 92", "", "bad_json", "not JSON: line 92", "{oops"),
    ]
    rows = [{name: getattr(reject, name) for name in Reject.__dataclass_fields__} for reject in rejects]
    with (root / REJECTS).open("wb") as file:
        write_tables(file, reject_schema(), [reject_table(rows)])


def _write_interop(root: Path, manifest: Manifest) -> None:
    (root / NV_META).mkdir()
    for name, content in energon_files(manifest).items():
        (root / name).write_bytes(content)


def _manifest(root: Path, shards: list[ShardInfo], rows: list[dict[str, Any]]) -> Manifest:
    loaded = load_tokenizer(root / TOKENIZER_DIR)
    splits = [shard.split for shard in shards]
    counts = {
        split: sum(s.num_samples for s in shards if s.split == split) for split in dict.fromkeys(splits)
    }
    num_records = {source: sum(row["source"] == source for row in rows) for source in TWO_SOURCES}
    num_records["photos.json"] += 2
    num_records["shapes.jsonl"] += 1
    return Manifest(
        schema_version=SCHEMA_VERSION,
        versions={"omnilmm-toolkit": "0"},
        settings={"max_length": 2048},
        tokenizer_fingerprint=fingerprint(loaded),
        chat_template_fingerprint=template_fingerprint(loaded),
        special_tokens=special_token_ids(loaded),
        vocab_size=len(loaded),
        profile=OmniLMMProfile(NUM_QUERY, 32).to_json(),
        image_policy="keep",
        resize_backend="none",
        inputs=[
            {"source": source, "format": "llava", "num_bytes": 1, "digest": "0", "num_records": n}
            for source, n in num_records.items()
        ],
        num_records=len(rows) + 3,
        num_samples=len(rows),
        num_rejects=3,
        num_truncated=0,
        num_tokens=sum(row["n_tokens"] for row in rows),
        num_supervised=sum(row["n_supervised"] for row in rows),
        num_images=sum(row["n_images"] for row in rows),
        splits=counts,
        rejects={"image_missing": 1, "role_order": 1, "bad_json": 1},
        end_of_turn=[loaded.eos_token_id],
        content_tokens={},
        unread_keys={"bbox": 2},
        spelled_tokens={},
        notes={},
        shards=shards,
    )
