"""``omnidata render`` of a dataset beside a build from the corpus, for another length and for another model.

    python benchmarks/render_again.py [--records 4000] [--repeats 2] [--folder /dev/shm] [--json]

The base is built for OmniLMM with a throw-away tokenizer, photographs kept as they are. Then it is rendered
for a longer limit, and for a Qwen3-VL with a small vocabulary; beside each, the same dataset is built from
the corpus, photographs checked by their checksums alone, then decoded. One worker. Every command runs on a
quarter of the records and on all of them: records per second, and of CPU, are of the difference, so that the
start, which is printed by itself, is not in them. CPU is of all processes; the smallest of repeats counts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

import corpus
from processors import save_model
from start import PR_SET_CHILD_SUBREAPER, seconds
from throwaway import byte_level_tokenizer

from omnidata.text.preparation import prepare_tokenizer


def make(folder: Path, records: int) -> None:
    """Corpora of all and of a quarter of the records, a tokenizer, a model's processor."""
    photos = corpus.make_photos(folder / "photos", min(400, records))
    for size, number in (("all", records), ("quarter", records // 4)):
        corpus.write_records(folder / f"{size}.jsonl", number, photos, text=corpus.prose())
    byte_level_tokenizer("chatml").save_pretrained(folder / "source")
    prepare_tokenizer(str(folder / "source"), str(folder / "tokenizer"))
    save_model("qwen3_vl", folder / "model")


def build_of(folder: Path, size: str, out: Path, *options: str) -> list[str]:
    """A build from the corpus."""
    words = ["build-shards", str(folder / f"{size}.jsonl"), "--image-root", str(folder / "photos")]
    return [*words, "--image-policy", "keep", "--out", str(out), *options]


def commands(folder: Path, size: str) -> dict[str, list[str]]:
    """Name -> arguments; the first one writes the base that others render."""
    base, out = folder / f"base-{size}", folder / "out"
    tokenizer, model = ["--tokenizer", str(folder / "tokenizer")], ["--model", str(folder / "model")]
    longer, quick = ["--max-length", "8192"], ["--check-images", "quick"]
    render = ["render", str(base), "--out", str(out)]
    made = {
        "base": build_of(folder, size, base, *tokenizer),
        "longer, render": [*render, *longer],
        "longer, build, quick check": build_of(folder, size, out, *tokenizer, *longer, *quick),
        "longer, build": build_of(folder, size, out, *tokenizer, *longer),
        "Qwen3-VL, render": [*render, *model, *longer],
        "Qwen3-VL, build, quick check": build_of(folder, size, out, *model, *longer, *quick),
        "Qwen3-VL, build": build_of(folder, size, out, *model, *longer),
    }
    return {name: [*words, "--workers", "1", "--quiet", "--overwrite"] for name, words in made.items()}


def measure(folder: Path, records: int, repeats: int) -> dict[str, dict[str, float]]:
    """Rates of the difference, and the CPU that the quarter would take without its records."""
    make(folder, records)
    taken: dict[str, dict[str, tuple[float, ...]]] = {}
    for size in ("quarter", "all"):
        for name, words in commands(folder, size).items():
            runs = [seconds(words) for _ in range(repeats)]
            taken.setdefault(name, {})[size] = tuple(min(column) for column in zip(*runs, strict=True))
    report = {}
    for name, by_size in taken.items():
        wall, used = (max(whole - few, 1e-3) for few, whole in zip(*by_size.values(), strict=True))
        more = records - records // 4
        report[name] = {
            "records/s": round(more / wall, 1),
            "records/s of CPU": round(more / used, 1),
            "start, s of CPU": round(by_size["quarter"][1] - used / more * (records // 4), 2),
        }
    return report


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=2, help="the smallest of so many counts")
    parser.add_argument("--folder", help="where to work (4 GB)  [default: a temporary folder]")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report = measure(Path(folder), args.records, args.repeats)
    if args.json:
        print(json.dumps(report, indent=1))
        return
    for name, row in report.items():
        print(f"{name:30} " + "  ".join(f"{value:9,.1f} {unit}" for unit, value in row.items()))


if __name__ == "__main__":
    main()
