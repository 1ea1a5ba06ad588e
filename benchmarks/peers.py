"""What ``omnidata build-shards`` is measured against: the same corpus, the same two workers.

    python benchmarks/peers.py NAME --records FILE --images DIR --tokenizer DIR --out DIR
                               [--workers 2] [--policy keep|shrink]

``script``       an afternoon's work: apply_chat_template, a mask by search, Pillow, webdataset's ShardWriter
``mds``          MDSWriter of mosaicml-streaming, given the same function of a record
``litdata``      litdata.optimize, given the same function of a record
``img2dataset``  resizes the same files into WebDataset tars, without tokenizing (shrink only)

None of them checks an image that it keeps, proves its mask, writes an index, or survives being killed.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NUM_QUERY, IMAGE_SIZE, QUALITY = 64, 448, 90
SYSTEM = "You are an artificial intelligence assistant, which gives helpful, detailed, and polite answers."
SPAN = re.compile(r"<\|assistant\|>\n(.*?</s>)", re.DOTALL)


@cache
def tokenizer_at(path: str) -> Any:
    """The tokenizer, loaded once per process."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    tokenizer.add_tokens(["<im_patch>", "<im_start>", "<im_end>"], special_tokens=True)
    return tokenizer


def text_of(record: dict, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """ids and labels: one rendering, one tokenization with offsets, the replies found by search."""
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": "system", "content": SYSTEM}]
    messages += [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    text = text.replace("<image>", "<im_start>" + "<im_patch>" * NUM_QUERY + "<im_end>")
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = np.array(encoded["input_ids"], np.int32), np.array(encoded["offset_mapping"])
    labels = np.full_like(ids, -100)
    for span in SPAN.finditer(text):
        inside = (offsets[:, 0] >= span.start(1)) & (offsets[:, 1] <= span.end(1)) & (offsets[:, 1] > 0)
        labels[inside] = ids[inside]
    return ids, labels


def image_of(path: Path, policy: str) -> bytes:
    """The file as it is, or shrunk by Pillow."""
    if policy == "keep":
        return path.read_bytes()
    image = Image.open(path).convert("RGB")
    scale = IMAGE_SIZE / min(image.size)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def sample_of(line: str, args: argparse.Namespace) -> dict[str, Any]:
    """One record, ready to write."""
    record = json.loads(line)
    ids, labels = text_of(record, tokenizer_at(args.tokenizer))
    return {"ids": ids, "labels": labels, "jpg": image_of(Path(args.images) / record["image"], args.policy)}


def parts(args: argparse.Namespace) -> list[list[str]]:
    """The lines, dealt to the workers in runs."""
    lines = Path(args.records).read_text().splitlines()
    size = -(-len(lines) // args.workers)
    return [lines[start : start + size] for start in range(0, len(lines), size)]


def in_workers(write: Any, args: argparse.Namespace) -> None:
    """Run ``write(number, lines, args)`` in each worker."""
    with multiprocessing.Pool(args.workers) as pool:
        pool.starmap(write, [(number, lines, args) for number, lines in enumerate(parts(args))])


def write_webdataset(number: int, lines: list[str], args: argparse.Namespace) -> None:
    """The script's worker."""
    import webdataset

    with webdataset.ShardWriter(f"{args.out}/{number}-%05d.tar", maxsize=256e6, verbose=0) as writer:
        for position, line in enumerate(lines):
            sample = sample_of(line, args)
            key = f"{number}-{position:08d}"
            arrays = {"input_ids.npy": sample["ids"], "labels.npy": sample["labels"]}
            writer.write({"__key__": key, **arrays, "jpg": sample["jpg"]})


def write_mds(number: int, lines: list[str], args: argparse.Namespace) -> None:
    """MDSWriter's worker."""
    from streaming import MDSWriter

    columns = {"ids": "ndarray:int32", "labels": "ndarray:int32", "jpg": "bytes"}
    with MDSWriter(out=f"{args.out}/{number}", columns=columns, size_limit=256_000_000) as writer:
        for line in lines:
            writer.write(sample_of(line, args))


def run_litdata(args: argparse.Namespace) -> None:
    """litdata.optimize over the lines."""
    import functools

    import litdata

    lines = Path(args.records).read_text().splitlines()
    litdata.optimize(
        functools.partial(sample_of, args=args),
        lines,
        output_dir=args.out,
        num_workers=args.workers,
        chunk_bytes="256MB",
        verbose=False,
    )


def run_img2dataset(args: argparse.Namespace) -> None:
    """img2dataset over ``file://`` URLs."""
    from img2dataset import download

    urls = Path(args.out).parent / f"{Path(args.out).name}-urls.txt"
    names = [json.loads(line)["image"] for line in Path(args.records).read_text().splitlines()]
    urls.write_text("".join(f"file://{Path(args.images, name).resolve()}\n" for name in names))
    download(
        url_list=str(urls),
        output_folder=args.out,
        output_format="webdataset",
        processes_count=args.workers,
        thread_count=16,
        image_size=IMAGE_SIZE,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        encode_quality=QUALITY,
        number_sample_per_shard=max(1, len(names) // (4 * args.workers)),
    )


RUNS = {
    "script": lambda args: in_workers(write_webdataset, args),
    "mds": lambda args: in_workers(write_mds, args),
    "litdata": run_litdata,
    "img2dataset": run_img2dataset,
}


def main() -> None:
    """Run one peer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=RUNS)
    for flag in ("--records", "--images", "--tokenizer", "--out"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--policy", choices=["keep", "shrink"], default="shrink")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.makedirs(args.out, exist_ok=True)
    RUNS[args.name](args)


if __name__ == "__main__":
    main()
