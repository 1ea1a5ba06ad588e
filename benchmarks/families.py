"""Speed of builds and loads for processors, beside the obvious scripts, on one core.

    python benchmarks/families.py [--records 200] [--families qwen3_vl minicpmv4_6 internvl] [--repeat 3]
                                  [--json]

(1) ``--records`` conversations, each with a real photograph of 640×480 (twenty of them, as JPEG files).
(2) build: ours with pictures kept and shrunk, every picture decoded and its mask proven, in this process;
    beside ``datasets.map`` with the processor's ``apply_chat_template(tokenize=True)``, which keeps ids, but
    no mask and no picture. Each runs on a quarter of the records and on all: its rate is the difference.
(3) load: pictures per second, from our shards to the model's tensors, by one worker, once 100 have come:
    PackLoader (packs of 8,192 tokens; raw bytes where the family has them, and normalised); beside a
    DataLoader whose samples are opened by Pillow and given to the processor one by one.
(4) What share of the shards' bytes the arrays take.

Contenders take turns; the best of ``--repeat`` turns counts. The processors are the published ones with a
home-made vocabulary (tests/processors.py).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from corpus import make_photos  # noqa: E402
from PIL import Image  # noqa: E402
from processors import save  # noqa: E402

from omnidata import Dataset  # noqa: E402
from omnidata.builder.build import build  # noqa: E402
from omnidata.builder.settings import BuildSettings, RunOptions  # noqa: E402
from omnidata.loader import PackLoader  # noqa: E402
from omnidata.loader.pixel_source import normalisation_of  # noqa: E402
from omnidata.profiles.folder import load_processor  # noqa: E402
from omnidata.profiles.opening import open_profile  # noqa: E402

PHOTOS, SIZE = 20, (640, 480)
EPOCHS, PICTURES = 4, 400  # of a load
FAMILIES = ["qwen3_vl", "minicpmv4_6", "internvl"]
MAX_TOKENS = 8192


def make_corpus(folder: Path, records: int) -> dict[str, Path]:
    """Photographs of one size, and two lists of records."""
    names = make_photos(folder / "originals", PHOTOS)
    (folder / "photos").mkdir()
    for name in names:
        with Image.open(folder / "originals" / name) as picture:
            picture.convert("RGB").resize(SIZE).save(folder / "photos" / f"{Path(name).stem}.jpg", quality=90)
    stems = [Path(name).stem for name in names]
    files = {}
    for kind, number in (("few", records // 4), ("all", records)):
        lines = []
        for i in range(number):
            question, answer = (
                f"<image>\nWhat is in picture {i}?",
                f"A photo, number {i}, of a person or a thing.",
            )
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            picture = f"{stems[i % len(stems)]}.jpg"
            lines.append(json.dumps({"id": f"r{i}", "images": [picture], "messages": turns}))
        files[kind] = folder / f"{kind}.jsonl"
        files[kind].write_text("\n".join(lines))
    return files


# --- builds -------------------------------------------------------------------------------------------------


def ours(folder: Path, model: str, records: Path, out: Path, *, policy: str) -> None:
    """One build in this process."""
    settings = BuildSettings(
        (str(records),),
        model=model,
        image_root=str(folder / "photos"),
        image_policy=policy,
        samples_per_shard=1000,
    )
    build(settings, str(out), RunOptions(executor="inline", quiet=True, overwrite=True))


def map_script(folder: Path, processor: Any, records: Path) -> int:
    """Ids by ``datasets.map`` and the processor."""
    import datasets

    datasets.disable_progress_bars()

    def render(row: dict[str, Any]) -> dict[str, Any]:
        picture = Image.open(folder / "photos" / row["images"][0])
        question, answer = (turn["content"] for turn in row["messages"])
        parts = [
            {"type": "image", "image": picture},
            {"type": "text", "text": question.removeprefix("<image>")},
        ]
        turns = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        out = processor.apply_chat_template(turns, tokenize=True, return_dict=True)
        return {"input_ids": out["input_ids"][0]}

    rows = [json.loads(line) for line in records.read_text().splitlines()]
    mapped = datasets.Dataset.from_list(rows).map(render, load_from_cache_file=False)
    return len(mapped)


# --- loads --------------------------------------------------------------------------------------------------


def load_ours(path: Path, *, raw: bool) -> float:
    """Pictures a second, one worker."""
    loader = PackLoader(
        path, global_batch=1, max_tokens=MAX_TOKENS, num_epochs=EPOCHS, raw_pixels=raw, num_workers=1
    )
    return steady_rate(len(microbatch.keys) for microbatch in loader)


class Opened(torch.utils.data.Dataset):
    """The same samples, each opened by Pillow and given to the processor."""

    def __init__(self, path: Path, processor: Any) -> None:
        self._dataset, self._processor = Dataset(path), processor

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, position: int) -> dict[str, Any]:
        pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in self._dataset[position].images]
        text = [self._processor.image_token * len(pictures)]
        return dict(self._processor(images=[pictures], text=text, return_tensors="pt"))


def load_script(path: Path, processor: Any) -> float:
    """Pictures a second, one worker of a DataLoader."""
    loader = torch.utils.data.DataLoader(Opened(path, processor), batch_size=None, num_workers=1)
    return steady_rate(1 for _ in loader)


def steady_rate(counts: Iterator[int]) -> float:
    """Pictures a second once a quarter of PICTURES have come, until they all have or the loader ends."""
    seen, since, start = 0, 0, 0.0
    for count in counts:
        seen += count
        if not start and seen >= PICTURES // 4:
            since, start = seen, time.perf_counter()
    return (seen - since) / (time.perf_counter() - start)


# --- the table ----------------------------------------------------------------------------------------------


def rates(contenders: dict[str, Callable[[], float]], repeat: int) -> dict[str, float]:
    """The best rate of each; they take turns."""
    best = dict.fromkeys(contenders, 0.0)
    for _ in range(repeat):
        for name, run in contenders.items():
            best[name] = max(best[name], run())
    return best


def rate_of(run: Callable[[Path], Any], files: dict[str, Path], records: int) -> float:
    """Records a second: the difference of records over the difference of times."""
    took = {}
    for name, file in files.items():
        start = time.perf_counter()
        run(file)
        took[name] = time.perf_counter() - start
    return (records - records // 4) / (took["all"] - took["few"])


def measure(
    family: str, folder: Path, files: dict[str, Path], *, records: int, repeat: int
) -> dict[str, Any]:
    """All figures of one family."""
    model = save(family, folder / family)
    processor, out = load_processor(model), folder / f"{family}-data"
    map_script(folder, processor, files["few"])
    builds = rates(
        {
            "ours, shrink": lambda: rate_of(
                lambda file: ours(folder, model, file, out, policy="shrink"), files, records
            ),
            "datasets.map + processor": lambda: rate_of(
                lambda file: map_script(folder, processor, file), files, records
            ),
            "ours, keep": lambda: rate_of(
                lambda file: ours(folder, model, file, out, policy="keep"), files, records
            ),
        },
        repeat,
    )
    dataset = Dataset(out)
    raw = normalisation_of(open_profile(str(out), dataset.manifest)) is not None
    loads = rates(
        {
            "ours": lambda: load_ours(out, raw=raw),
            "ours, normalised": lambda: load_ours(out, raw=False),
            "DataLoader + processor": lambda: load_script(out, processor),
        },
        repeat,
    )
    arrays = sum(2 * (128 + 4 * tokens) for tokens in dataset.index["n_tokens"].to_pylist())
    return {
        "family": family,
        "tokens_per_picture": dataset.manifest.num_tokens / records,
        "build_records_per_second": builds,
        "load_pictures_per_second": loads,
        "raw_pixels": raw,
        "share_of_arrays": arrays / sum(shard.num_bytes for shard in dataset.manifest.shards),
    }


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="omnidata-bench-") as name:
        folder = Path(name)
        files = make_corpus(folder, options.records)
        rows = [
            measure(family, folder, files, records=options.records, repeat=options.repeat)
            for family in options.families
        ]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['family']}: {row['tokens_per_picture']:.0f} tokens per sample, ", end="")
        print(f"arrays {row['share_of_arrays']:.1%} of the bytes, raw pixels {row['raw_pixels']}")
        for title in ("build_records_per_second", "load_pictures_per_second"):
            figures = ", ".join(f"{name} {rate:.1f}" for name, rate in row[title].items())
            print(f"  {title.replace('_', ' ')}: {figures}")


if __name__ == "__main__":
    main()
