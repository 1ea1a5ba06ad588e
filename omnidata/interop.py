"""Interop: what other tools need to read a dataset as it is. Functions of the manifest alone.

.nv-meta/.info.json, split.yaml, dataset.yaml   Megatron-Energon (with the .tar.idx beside each shard)
README.md                                       dataset card: totals, and how to load it, four ways
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omnidata.images.slices import slicing_of
from omnidata.origin import describe
from omnidata.schema import BASE, NV_META, Manifest

if TYPE_CHECKING:
    import pyarrow as pa

ENERGON_VERSION = "7.4.1"  # the release that this layout is tested with


def energon_files(manifest: Manifest) -> dict[str, bytes]:
    """Path -> content of the files by which Energon knows a WebDataset.

    Each sample arrives there as a dict of its members (CrudeWebdataset), for the user's cooker.
    """
    info = {
        "energon_version": ENERGON_VERSION,
        "shard_counts": {shard.path: shard.num_samples for shard in manifest.shards},
    }
    paths_of = {
        split: [shard.path for shard in manifest.shards if shard.split == split] for split in manifest.splits
    }
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset", "subflavors": {}}
    return {
        f"{NV_META}/.info.json": (json.dumps(info, indent=2) + "\n").encode(),
        f"{NV_META}/split.yaml": _yaml({"split_parts": paths_of, "exclude": []}),
        f"{NV_META}/dataset.yaml": _yaml(dataset),
    }


def _yaml(content: dict[str, Any]) -> bytes:
    import yaml

    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()


CARD_TEXT = """\
# A vision-language dataset, tokenized and label-masked

{num_samples:,} samples, {num_tokens:,} tokens ({num_supervised:,} supervised) and {num_images:,} images
in {num_shards:,} shards ({num_bytes:,} bytes). {num_rejects:,} of {num_records:,} records were refused,
each with its reason in `rejects.parquet`.

| split | samples | shards |
|---|---|---|
{split_rows}

Sources: {sources}
{origin}
Each shard is a plain WebDataset tar. A sample is

| member | content |
|---|---|
| `KEY.input_ids.npy` | int32 `[L]`; an image is {run} |
| `KEY.labels.npy` | int32 `[L]`, unshifted: the token id where it is supervised, else -100 |
{dialogue}| `KEY.jpg` (`.png`, `.webp`), `KEY.1.jpg`, … | the images, in the order of their blocks |
{slices}
`tokenizer/` is the tokenizer that made the ids{processor}. `index.parquet` has a row per sample with its byte
range; `manifest.json` says what the dataset was built from. The code below is run from this folder.
{columns}
## omnidata

```python
from omnidata import Dataset

dataset = Dataset(".")
sample = dataset[0]
print(len(dataset), sample.key, sample.input_ids.shape, len(sample.images))
```

## webdataset

```python
import glob
import webdataset as wds


def ours(name):  # .decode() unpickles whatever else a stranger put into a shard
    return name.endswith(("input_ids.npy", "labels.npy", ".json", ".jpg", ".png", ".webp"))


shards = sorted(glob.glob("shards/{first_split}-*.tar"))
dataset = wds.WebDataset(shards, shardshuffle=False, select_files=ours).decode("pil")
for sample in dataset:
    print(sample["__key__"], sample["input_ids.npy"].shape, sample["labels.npy"].shape, "jpg" in sample)
```

## Megatron-Energon

```python
from megatron.energon import (
    Cooker, DefaultTaskEncoder, Sample, SampleDecoder, WorkerConfig, basic_sample_keys, edataclass,
    get_loader, get_train_dataset, stateless,
)


class Decoder(SampleDecoder):  # of our members only: it would unpickle what a stranger put into a shard
    def __call__(self, sample):
        ours = ("input_ids.npy", "labels.npy", "json", "jpg", "png", "webp")
        return super().__call__({{k: v for k, v in sample.items() if k.startswith("__") or k.endswith(ours)}})


@edataclass
class Example(Sample):
    input_ids: object  # int32 [L]
    labels: object
    images: list  # decoded, in the order of their blocks


@stateless
def cook(raw):
    images = [raw[name] for name in raw if name.endswith(("jpg", "png", "webp"))]
    arrays = {{"input_ids": raw["input_ids.npy"], "labels": raw["labels.npy"]}}
    return Example(**basic_sample_keys(raw), **arrays, images=images)


class Encoder(DefaultTaskEncoder):
    cookers = [Cooker(cook)]
    decoder = Decoder()


dataset = get_train_dataset(
    ".", split_part="{first_split}", worker_config=WorkerConfig.default_worker_config(num_workers=0),
    task_encoder=Encoder(), batch_size=None, shuffle_buffer_size=None, max_samples_per_sequence=None,
    repeat=False,
)
for sample in get_loader(dataset):
    print(sample.__key__, sample.input_ids.shape, len(sample.images))
```

## Hugging Face datasets

```python
from datasets import load_dataset

dataset = load_dataset("webdataset", data_files="shards/{first_split}-*.tar", split="train", streaming=True)
for sample in dataset:
    print(sample["__key__"], len(sample["input_ids.npy"]))
```

{uniform_note}
"""


DIALOGUE_ROW = (
    "| `KEY.json` | the conversation: `messages` and `tools` as `apply_chat_template` takes them, where its "
    "pictures came from, kept columns |\n"
)


def _base_text(manifest: Manifest) -> str:
    if not manifest.base:
        return ""
    return (
        f"\nThis is a view of the dataset {manifest.base['name']}; `{BASE}` says where that is. It has\n"
        "ids and labels made anew; the images lie there, in the samples of the same keys. `omnidata` reads\n"
        "both. The others find ids and labels alone.\n"
    )


def _run_text(manifest: Manifest) -> str:
    if manifest.is_omnilmm:
        return f"`<im_start>` + {manifest.num_query} × `<im_patch>` + `<im_end>`"
    return f"the run of tokens that `{manifest.profile['processor']}` (in `processor/`) writes for its size"


def _slices_text(manifest: Manifest) -> str:
    slicing = slicing_of(manifest.settings)
    if slicing is None:
        return ""
    start, end = slicing.slice_tokens
    return (
        f"\nLarge pictures are cut into up to {slicing.max_slices} tiles of {slicing.slice_size} pixels:\n"
        f"the overview, then `{start}`, the tiles row by row, `{end}`. `slices` in the index has the grids.\n"
    )


def _columns_text(kept: Sequence[pa.Field]) -> str:
    if not kept:
        return ""
    names = [field.name.replace("|", "\\|") for field in kept]
    rows = "\n".join(f"| `{name}` | {field.type} |" for name, field in zip(names, kept, strict=True))
    return (
        "\n`index.parquet` also has values of the records, to choose samples by (`where` in recipes,\n"
        f"`omnidata plan` and `inspect`):\n\n| column | type |\n|---|---|\n{rows}\n"
    )


def dataset_card(manifest: Manifest, kept: Sequence[pa.Field] = ()) -> str:
    """README.md of the dataset; ``kept``: the index's columns of --keep-column."""
    shards_of = {split: sum(shard.split == split for shard in manifest.shards) for split in manifest.splits}
    rows = [f"| {split} | {count:,} | {shards_of[split]:,} |" for split, count in manifest.splits.items()]
    sources = [f"`{entry['source']}` ({entry['num_records']:,} records)" for entry in manifest.inputs[:20]]
    if len(manifest.inputs) > 20:
        sources.append(f"and {len(manifest.inputs) - 20:,} more in `manifest.json`")
    return CARD_TEXT.format(
        num_samples=manifest.num_samples,
        num_tokens=manifest.num_tokens,
        num_supervised=manifest.num_supervised,
        num_images=manifest.num_images,
        dialogue=DIALOGUE_ROW if manifest.num_dialogue_bytes else "",
        slices=_slices_text(manifest) + _base_text(manifest),
        columns=_columns_text(kept),
        num_shards=len(manifest.shards),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        num_rejects=manifest.num_rejects,
        num_records=manifest.num_records,
        run=_run_text(manifest),
        processor="" if manifest.is_omnilmm else ", `processor/` the model's processor",
        split_rows="\n".join(rows),
        sources=", ".join(sources) + ".",
        origin=f"\nCopied by `omnidata`: {origin}.\n" if (origin := describe(manifest.origin)) else "",
        first_split=next(iter(manifest.splits)),
        uniform_note=UNIFORM_NOTE,
    )


UNIFORM_NOTE = """\
This last reader insists that the first five samples have the same members: where text-only samples, or
samples with several images, are among them it raises; of `KEY.json` it shows the keys that those five have.
The other three take any mixture.
"""
