"""The contenders of benchmarks/load.py: each reads the same samples, and yields the keys of each batch.

A contender is a class: ``Contender(folder, workers=, decode=)``, iterated once for one epoch. ``decode=True``
gives int64 tensors and a uint8 448x448 RGB tensor an image; False gives the tensors and the encoded bytes.
``state()`` is what it offers to save in mid-epoch (None: nothing), ``load(state)`` goes on from there.

Peers decode as their documentation shows: Pillow, ``convert("RGB")``, ``resize(BICUBIC)``.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

BATCH = 8
SIZE = 448


def pillow(data: bytes) -> torch.Tensor:
    """Decode and squash, as the peers' examples do."""
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def tensors(key: str, ids: Any, labels: Any, image: bytes | None, *, decode: bool) -> dict[str, Any]:
    """One sample as training takes it."""
    return {
        "key": key,
        "input_ids": torch.from_numpy(np.array(ids, np.int64)),
        "labels": torch.from_numpy(np.array(labels, np.int64)),
        "image": pillow(image) if decode and image else image,
    }


def as_list(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The collate function: samples of different lengths stay a list."""
    return samples


def as_columns(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The same as columns: mosaicml-streaming counts a batch of lists wrongly, and would repeat samples."""
    return {name: [sample[name] for sample in samples] for name in samples[0]}


class Contender:
    """What all have in common."""

    def __init__(self, folder: Path, *, workers: int, decode: bool) -> None:
        self.folder, self.workers, self.decode = folder, workers, decode

    def state(self) -> Any:
        """What it can save in mid-epoch."""
        return None

    def load(self, state: Any) -> None:
        """Go on from ``state``."""

    def __iter__(self) -> Iterator[list[str]]:
        for batch in self.batches():
            yield [sample["key"] for sample in batch]

    def batches(self) -> Any:
        """Lists of samples."""
        raise NotImplementedError


class Ours(Contender):
    """PackLoader, one pack a microbatch."""

    def __init__(self, folder: Path, *, workers: int, decode: bool) -> None:
        super().__init__(folder, workers=workers, decode=decode)
        from omnidata import PackLoader

        self._loader = PackLoader(
            folder / "ours",
            global_batch=1,
            num_epochs=1,
            num_workers=workers,
            decode_images=decode,
            image_size=SIZE,
            tail="pad",
        )

    def __iter__(self) -> Iterator[list[str]]:
        for microbatch in self._loader:
            yield list(microbatch.keys)

    def state(self) -> Any:
        return self._loader.state_dict()

    def load(self, state: Any) -> None:
        self._loader.load_state_dict(state)


class WebDataset(Contender):
    """WebLoader over the same shards, shuffled by shards and a buffer."""

    def batches(self) -> Any:
        import webdataset

        urls = sorted(map(str, (self.folder / "ours" / "shards").glob("train-*.tar")))
        dataset = webdataset.WebDataset(urls, shardshuffle=100, seed=0).shuffle(1000).map(self._sample)
        return webdataset.WebLoader(
            dataset.batched(BATCH, collation_fn=as_list), batch_size=None, num_workers=self.workers
        )

    def _sample(self, raw: dict[str, Any]) -> dict[str, Any]:
        ids, labels = (np.load(io.BytesIO(raw[name])) for name in ("input_ids.npy", "labels.npy"))
        return tensors(raw["__key__"], ids, labels, raw.get("jpg"), decode=self.decode)


class Energon(Contender):
    """Megatron-Energon over the same folder, by its own index files."""

    def batches(self) -> Any:
        from megatron import energon

        decode = self.decode

        @dataclass
        class Training(energon.Sample):
            tensors: dict

        @energon.stateless
        def cook(raw: dict[str, Any]) -> Training:
            ids, labels = (np.load(io.BytesIO(raw[name])) for name in ("input_ids.npy", "labels.npy"))
            sample = tensors(raw["__key__"].split("/")[-1], ids, labels, raw.get("jpg"), decode=decode)
            return Training(**energon.basic_sample_keys(raw), tensors=sample)

        class Encoder(energon.DefaultTaskEncoder):
            decoder = None
            cookers = (energon.Cooker(cook),)

            def batch(self, samples):
                return [sample.tensors for sample in samples]

        dataset = energon.get_train_dataset(
            str(self.folder / "ours"),
            batch_size=BATCH,
            shuffle_buffer_size=1000,
            max_samples_per_sequence=100,
            worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=self.workers),
            task_encoder=Encoder(),
            repeat=False,
        )
        self._loader = energon.get_savable_loader(dataset)
        if getattr(self, "_restored", None):
            self._loader.restore_state_rank(self._restored)
        return self._loader

    def state(self) -> Any:
        return self._loader.save_state_rank()

    def load(self, state: Any) -> None:
        self._restored = state


class Mosaic(Contender):
    """mosaicml-streaming's MDS, with its default shuffle."""

    def __iter__(self) -> Iterator[list[str]]:
        for batch in self.batches():
            yield batch["key"]

    def batches(self) -> Any:
        import streaming

        decode = self.decode

        class Samples(streaming.StreamingDataset):
            def __getitem__(self, at):
                raw = super().__getitem__(at)
                return tensors(raw["key"], raw["ids"], raw["labels"], raw["image"] or None, decode=decode)

        streaming.base.util.clean_stale_shared_memory()
        self._dataset = Samples(local=str(self.folder / "mds"), shuffle=True, batch_size=BATCH)
        self._loader = streaming.StreamingDataLoader(
            self._dataset, batch_size=BATCH, num_workers=self.workers, collate_fn=as_columns
        )
        if getattr(self, "_restored", None):
            self._loader.load_state_dict(self._restored)
        return self._loader

    def state(self) -> Any:
        return self._loader.state_dict()

    def load(self, state: Any) -> None:
        self._restored = state


class LitData(Contender):
    """litdata's StreamingDataset."""

    def batches(self) -> Any:
        import litdata

        decode = self.decode

        class Samples(litdata.StreamingDataset):
            def __getitem__(self, at):
                raw = super().__getitem__(at)
                arrays = [np.frombuffer(raw[name], np.int32) for name in ("ids", "labels")]
                return tensors(raw["key"], *arrays, raw["image"] or None, decode=decode)

        dataset = Samples(str(self.folder / "litdata"), shuffle=True)
        self._loader = litdata.StreamingDataLoader(
            dataset, batch_size=BATCH, num_workers=self.workers, collate_fn=as_list
        )
        if getattr(self, "_restored", None):
            self._loader.load_state_dict(self._restored)
        return self._loader

    def state(self) -> Any:
        return self._loader.state_dict()

    def load(self, state: Any) -> None:
        self._restored = state


class HFDatasets(Contender):
    """datasets, streaming the same shards, with a shuffle buffer."""

    def batches(self) -> Any:
        import datasets

        urls = sorted(map(str, (self.folder / "ours" / "shards").glob("train-*.tar")))
        stream = datasets.load_dataset(
            "webdataset", data_files={"train": urls}, streaming=True, split="train"
        )
        stream = stream.cast_column("jpg", datasets.Image(decode=False))
        self._stream = stream.shuffle(seed=0, buffer_size=1000)
        if getattr(self, "_restored", None):
            self._stream.load_state_dict(self._restored)
        return DataLoader(
            _Stream(self._stream, self.decode),
            batch_size=BATCH,
            num_workers=self.workers,
            collate_fn=as_list,
        )

    def state(self) -> Any:
        return self._stream.state_dict() if not self.workers else None  # a worker's copy has the position

    def load(self, state: Any) -> None:
        self._restored = state


class _Stream(torch.utils.data.IterableDataset):
    def __init__(self, stream: Any, decode: bool) -> None:
        self._stream, self._decode = stream, decode

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for raw in self._stream:
            ids, labels, image = raw["input_ids.npy"], raw["labels.npy"], raw["jpg"]["bytes"]
            yield tensors(raw["__key__"], ids, labels, image, decode=self._decode)


class LazyJSON(Contender):
    """What LLaVA does: the whole JSON in memory; tokenize and open the image when a sample is asked for."""

    def batches(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(
            _Lazy(self.folder, self.decode),
            batch_size=BATCH,
            shuffle=True,
            num_workers=self.workers,
            collate_fn=as_list,
            generator=generator,
        )


class _Lazy(torch.utils.data.Dataset):
    def __init__(self, folder: Path, decode: bool) -> None:
        from transformers import AutoTokenizer

        self._folder, self._decode = folder, decode
        self._records = [json.loads(line) for line in (folder / "corpus" / "whole.jsonl").open()]
        self._tokenizer = AutoTokenizer.from_pretrained(str(folder / "corpus" / "tokenizer"))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, at: int) -> dict[str, Any]:
        record = self._records[at]
        turns = [
            {"role": "user" if turn["from"] == "human" else "assistant", "content": turn["value"]}
            for turn in record["conversations"]
        ]
        text = self._tokenizer.apply_chat_template(turns, tokenize=False)
        ids = self._tokenizer(text)["input_ids"]
        image = (self._folder / "corpus" / "photos" / record["image"]).read_bytes()
        return tensors(record["id"], ids, ids, image, decode=self._decode)


CONTENDERS = {
    "ours": Ours,
    "webdataset": WebDataset,
    "energon": Energon,
    "mosaicml-streaming": Mosaic,
    "litdata": LitData,
    "datasets": HFDatasets,
    "lazy JSON": LazyJSON,
}


def run(name: str, folder: Path, *, workers: int, decode: bool) -> dict[str, float]:
    """One epoch: samples/s after the first batch, and the time to that batch."""
    begin = time.perf_counter()
    count, first, first_count = 0, None, 0
    for keys in CONTENDERS[name](folder, workers=workers, decode=decode):
        count += len(keys)
        if first is None:
            first, first_count, cpu = time.perf_counter() - begin, count, time.process_time()
    seconds = time.perf_counter() - begin - first
    return {
        "samples": count,
        "samples/s": (count - first_count) / seconds,
        "samples/CPU s of this process": (count - first_count) / max(time.process_time() - cpu, 1e-9),
        "first batch, s": first,
    }


def restart(name: str, folder: Path) -> dict[str, Any]:
    """Stop in the middle of an epoch, start anew from what was saved, run to the end."""
    workers = 0 if name == "datasets" else 1  # datasets can only save what runs in this process
    whole = [key for keys in CONTENDERS[name](folder, workers=workers, decode=False) for key in keys]
    first = CONTENDERS[name](folder, workers=workers, decode=False)
    seen: list[str] = []
    for keys in first:
        seen += keys
        if len(seen) >= len(whole) // 2:
            state = first.state()
            break
    second = CONTENDERS[name](folder, workers=workers, decode=False)
    if state is not None:
        second.load(state)
    after = [key for keys in second for key in keys]
    return {
        "samples": len(set(whole)),
        "saves a state": state is not None,
        "repeated": len(seen) + len(after) - len(set(seen) | set(after)),
        "lost": len(set(whole) - set(seen) - set(after)),
        "same order as unbroken": seen + after == whole,
    }


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


def main() -> None:
    """One measurement, as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "restart", "write_mds", "write_litdata"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", choices=CONTENDERS)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--decode", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "run":
        result = run(args.name, args.folder, workers=args.workers, decode=args.decode)
    elif args.what == "restart":
        result = restart(args.name, args.folder)
    else:
        result = globals()[args.what](args.folder)
    print(json.dumps(result))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
