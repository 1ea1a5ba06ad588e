"""The contenders of benchmarks/load.py: each reads the same samples, and yields the keys of each batch.

A contender is a class: ``Contender(folder, workers=, decode=)``, iterated once for one epoch. ``decode=True``
gives int64 tensors and a uint8 448x448 RGB tensor an image; False gives the tensors and the encoded bytes.
``state()`` is what it offers to save in mid-epoch (None: nothing), ``load(state)`` goes on from there. Rank
and world size are torchrun's, from the environment: benchmarks/load_exact.py restarts contenders.

    python load_peers.py FOLDER --name litdata --workers 2 --decode

Peers decode as their documentation shows: Pillow, ``convert("RGB")``, ``resize(BICUBIC)``.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

BATCH = 8
SIZE = 448
RECORDS = "corpus/whole.jsonl"


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

    restored: Any = None  # what to go on from

    def __init__(self, folder: Path, *, workers: int, decode: bool) -> None:
        self.folder, self.workers, self.decode = folder, workers, decode
        self.rank, self.world_size = (
            int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1))
        )

    def state(self) -> Any:
        """What it can save in mid-epoch."""
        return None

    def load(self, state: Any) -> None:
        """Go on from ``state``."""
        self.restored = state

    def __iter__(self) -> Iterator[list[str]]:
        for batch in self.batches():
            yield [sample["key"] for sample in batch]

    def batches(self) -> Any:
        """Lists of samples."""
        raise NotImplementedError


class StatefulLoader(Contender):
    """A peer whose own loader has ``state_dict``."""

    loader: Any

    def batches(self) -> Any:
        self.loader = self.make_loader()
        if self.restored is not None:
            self.loader.load_state_dict(self.restored)
        return self.loader

    def state(self) -> Any:
        return self.loader.state_dict()

    def make_loader(self) -> Any:
        """Of one epoch."""
        raise NotImplementedError


class Ours(Contender):
    """PackLoader, one pack a microbatch."""

    checksum = True

    def __init__(self, folder: Path, *, workers: int, decode: bool) -> None:
        super().__init__(folder, workers=workers, decode=decode)
        from omnidata import PackLoader

        self.loader = PackLoader(
            folder / "ours",
            global_batch=self.world_size,
            rank=self.rank,
            world_size=self.world_size,
            num_epochs=1,
            num_workers=workers,
            decode_images=decode,
            image_size=SIZE,
            tail="pad",
            checksum=self.checksum,
        )

    def __iter__(self) -> Iterator[list[str]]:
        for microbatch in self.loader:
            yield list(microbatch.keys)

    def state(self) -> Any:
        return self.loader.state_dict()

    def load(self, state: Any) -> None:
        self.loader.load_state_dict(state)


class WebDataset(Contender):
    """WebLoader over the same shards, shuffled by shards and a buffer."""

    def batches(self) -> Any:
        import webdataset

        urls = sorted(map(str, (self.folder / "ours" / "shards").glob("train-*.tar")))
        dataset = webdataset.WebDataset(
            urls, shardshuffle=100, seed=0, nodesplitter=webdataset.split_by_node, empty_check=False
        )
        dataset = dataset.shuffle(1000).map(self._sample)
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
            worker_config=energon.WorkerConfig(
                rank=self.rank, world_size=self.world_size, num_workers=self.workers
            ),
            task_encoder=Encoder(),
            repeat=False,
        )
        self._loader = energon.get_savable_loader(dataset)
        if self.restored is not None:
            self._loader.restore_state_rank(self.restored)
        return self._loader

    def state(self) -> Any:
        return self._loader.save_state_rank()


class Mosaic(StatefulLoader):
    """mosaicml-streaming's MDS, with its default shuffle."""

    def __iter__(self) -> Iterator[list[str]]:
        for batch in self.batches():
            yield batch["key"]

    def make_loader(self) -> Any:
        import streaming

        decode = self.decode

        class Samples(streaming.StreamingDataset):
            def __getitem__(self, at):
                raw = super().__getitem__(at)
                return tensors(raw["key"], raw["ids"], raw["labels"], raw["image"] or None, decode=decode)

        if self.world_size == 1:  # ranks would clean up what the others have just made
            streaming.base.util.clean_stale_shared_memory()
        dataset = Samples(local=str(self.folder / "mds"), shuffle=True, batch_size=BATCH)
        return streaming.StreamingDataLoader(
            dataset, batch_size=BATCH, num_workers=self.workers, collate_fn=as_columns
        )


class LitData(StatefulLoader):
    """litdata's StreamingDataset."""

    def make_loader(self) -> Any:
        import litdata

        decode = self.decode

        class Samples(litdata.StreamingDataset):
            def __getitem__(self, at):
                raw = super().__getitem__(at)
                arrays = [np.frombuffer(raw[name], np.int32) for name in ("ids", "labels")]
                return tensors(raw["key"], *arrays, raw["image"] or None, decode=decode)

        dataset = Samples(str(self.folder / "litdata"), shuffle=True)
        return litdata.StreamingDataLoader(
            dataset, batch_size=BATCH, num_workers=self.workers, collate_fn=as_list
        )


class HFDatasets(Contender):
    """datasets, streaming the same shards, with a shuffle buffer."""

    def batches(self) -> Any:
        import datasets

        urls = sorted(map(str, (self.folder / "ours" / "shards").glob("train-*.tar")))
        stream = datasets.load_dataset(
            "webdataset", data_files={"train": urls}, streaming=True, split="train"
        )
        stream = stream.cast_column("jpg", datasets.Image(decode=False))
        stream = stream.shuffle(seed=0, buffer_size=1000)
        if self.world_size > 1:
            from datasets.distributed import split_dataset_by_node

            stream = split_dataset_by_node(stream, self.rank, self.world_size)
        self._stream = stream
        if self.restored is not None:
            stream.load_state_dict(self.restored)
        return DataLoader(
            _Stream(stream, self.decode), batch_size=BATCH, num_workers=self.workers, collate_fn=as_list
        )

    def state(self) -> Any:
        return self._stream.state_dict() if not self.workers else None  # a worker's copy has the position


class _Stream(torch.utils.data.IterableDataset):
    def __init__(self, stream: Any, decode: bool) -> None:
        self._stream, self._decode = stream, decode

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for raw in self._stream:
            ids, labels, image = raw["input_ids.npy"], raw["labels.npy"], raw["jpg"]["bytes"]
            yield tensors(raw["__key__"], ids, labels, image, decode=self._decode)


class LazyJSON(Contender):
    """What LLaVA does: the whole JSON in memory; tokenize and open the image when a sample is asked for.

    It goes on as its Trainer does: it reads as many batches as were done, and throws them away.
    """

    _done = 0

    def batches(self) -> Any:
        dataset = _Lazy(self.folder, self.decode)
        sampler = DistributedSampler(dataset, self.world_size, self.rank, shuffle=True, seed=0)
        loader = DataLoader(
            dataset, batch_size=BATCH, sampler=sampler, num_workers=self.workers, collate_fn=as_list
        )
        for self._done, batch in enumerate(loader, start=1):
            if self._done > (self.restored or 0):
                yield batch

    def state(self) -> Any:
        return self._done


class _Lazy(torch.utils.data.Dataset):
    def __init__(self, folder: Path, decode: bool) -> None:
        from transformers import AutoTokenizer

        self._folder, self._decode = folder, decode
        self._records = [json.loads(line) for line in (folder / RECORDS).open()]
        self._tokenizer = AutoTokenizer.from_pretrained(
            str(folder / "corpus" / "tokenizer"), trust_remote_code=False
        )

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


class OursUnchecked(Ours):
    """The same without hashing what is read: what the checksums cost."""

    checksum = False


CONTENDERS = {
    "ours": Ours,
    "ours, no checksum": OursUnchecked,
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
            first, first_count, cpu = time.perf_counter() - begin, count, cpu_seconds()
    seconds = time.perf_counter() - begin - first
    gc.collect()  # ends the workers: their CPU time counts from then on
    return {
        "samples": count,
        "samples/s": (count - first_count) / seconds,
        "samples/CPU s, workers included": (count - first_count) / (cpu_seconds() - cpu),
        "first batch, s": first,
    }


def cpu_seconds() -> float:
    """Of this process and the children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main() -> None:
    """One measurement, as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", choices=CONTENDERS, required=True)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--decode", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(run(args.name, args.folder, workers=args.workers, decode=args.decode)))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
