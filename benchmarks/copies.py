"""Copy rates of ``omnidata merge`` and ``subset`` beside ``cp``, in one run, on photographs and on texts.

    python benchmarks/copies.py --tokenizer DIR [--folder /dev/shm]

``merge`` of a dataset with itself has to put a number before every key; ``subset`` copies whole byte ranges.
All three read and write the same bytes. Seconds of CPU are of all processes; on a busy machine they say more.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import corpus

from omnidata import cli
from omnidata.dataset import Dataset

OMNIDATA = (sys.executable, "-m", "omnidata")


def build(root: Path, kind: str, num_samples: int, tokenizer: str) -> Path:
    """A dataset of this many photographs with talks, or of talks alone."""
    photos = corpus.make_photos(root / "photos", min(400, num_samples)) if kind == "photographs" else []
    corpus.write_records(root / f"{kind}.jsonl", num_samples, photos, text=corpus.prose())
    arguments = [f"{root / kind}.jsonl", "--tokenizer", tokenizer, "--out", root / kind, "--image-root"]
    arguments += [root / "photos", "--image-policy", "keep", "--max-length", 8192, "--quiet"]
    assert cli.run(["build-shards", *map(str, arguments)]) == 0
    return root / kind


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds of a command, by the clock and of CPU (its children's too)."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def measure(data: Path, *, repeats: int) -> dict[str, float]:
    """The best of so many runs of each, taken in turn."""
    out, num_bytes = data.parent / "out", sum(shard.num_bytes for shard in Dataset(data).manifest.shards)
    commands = {
        "cp": ["sh", "-c", f"mkdir {out} && cp -r {data} {out}/a && cp -r {data} {out}/b"],
        "merge": [*OMNIDATA, "merge", str(data), str(data), "--out", str(out), "--quiet", "--workers", "1"],
        "subset": [*OMNIDATA, "subset", str(data), "--where", "n_tokens > 0", "--out", str(out), "--quiet"],
    }
    commands["subset"] += ["--workers", "1"]
    best = dict.fromkeys(commands, (float("inf"), float("inf")))
    for _ in range(repeats):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            best[name] = tuple(map(min, best[name], timed(command)))
    megabytes = {name: num_bytes / 1e6 * (1 if name == "subset" else 2) for name in commands}
    return {"megabytes": num_bytes / 1e6, "samples": len(Dataset(data))} | {
        f"{name}, MB a second{of}": megabytes[name] / best[name][at]
        for name in commands
        for at, of in enumerate(("", " of CPU"))
    }


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="a folder that `omnidata prepare-tokenizer` wrote")
    parser.add_argument("--samples", type=int, default=4000, help="texts: ten times as many")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where to work (2 GB)  [default: a temporary folder]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for kind, count in (("photographs", args.samples), ("texts", 10 * args.samples)):
            report = measure(build(Path(folder), kind, count, args.tokenizer), repeats=args.repeats)
            print(kind)
            for name, value in report.items():
                print(f"  {value:12,.0f}  {name}")


if __name__ == "__main__":
    main()
