"""Speed, quality and memory of ``omnidata build-shards``, beside its peers and the floors.

    python benchmarks/build.py [--samples 4000] [--workers 2] [--repeat 3] [--only keep] [--json]
                               [--vocabulary Qwen] [--peers-python .bench/bin/python] [--folder DIR]
    python benchmarks/build.py --memory [--workers 2] [--json]

(1) A corpus: LLaVA JSON lines, real photographs of mixed sizes (benchmarks/corpus.py), a real tokenizer.
(2) Each contender runs as a process of its own on a quarter of its records and on all of them (half of
    ``--samples``, several times as many for the fast ones); its rate is the difference of samples over the
    difference of times, so what it takes to start does not count. Contenders take turns, and the best of
    ``--repeat`` turns counts. CPU time is measured as well: on a machine that is busy with other work, trust
    the ratios of that. A run ends when what it wrote is on the disk, so ``keep`` is as fast as the disk at
    best; a ``--folder`` in memory (/dev/shm) shows the programs without it.
(3) The floors, on one core: what libjpeg-turbo, the tokenizer and the disk take at the least.
(4) Quality: mean |difference| of our decode + resize to Pillow's, in 1/255.
(5) With ``--memory``, instead of all that: the largest process at 1,000, 10,000 and 100,000 records
    that share twenty thumbnails.

What did not help, so that nobody tries it twice: decoding with libjpeg-turbo's fast DCT or fast upsampling
(within noise), into one buffer that is used again (0.04 ms), splitting words inside the tokenizer (no faster:
its cache takes as long as the merges), a larger cache there (no faster, and it grows). What did, for keep
with the quick check: putting texts together from words (omnidata/text/words.py, 0.31 -> 0.07 ms), xxh3 for
the content hash (0.10 -> 0.003 ms), freezing the garbage collector's view of what stays (0.07 ms). What
would, for shrink: shrinking the planes of YCbCr instead of RGB (a quarter of the work), which simplejpeg
cannot decode to.

webdataset's script needs nothing else. The other peers want package versions that exclude ours: give an
environment with benchmarks/peers-requirements.txt by ``--peers-python``; without it they are left out.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from corpus import make_photos, prose, write_records
from PIL import Image
from vocabularies import NAMES as VOCABULARIES
from vocabularies import prepared

HERE = Path(__file__).parent
FEW_TURNS = 2  # enough for a quarter of the records: that is mostly the start, which varies little
PR_SET_CHILD_SUBREAPER = 36
OURS = {
    "ours, shrink": ["--image-policy", "shrink"],
    "ours, keep, quick check": ["--image-policy", "keep", "--check-images", "quick"],
    "ours, keep, full check": ["--image-policy", "keep", "--check-images", "full"],
}
PEERS = {
    "webdataset script, shrink": ("script", "shrink"),
    "webdataset script, keep": ("script", "keep"),
    "MDSWriter, shrink": ("mds", "shrink"),
    "litdata.optimize, shrink": ("litdata", "shrink"),
    "img2dataset, shrink (no text)": ("img2dataset", "shrink"),
}


class Corpus:
    """Photographs, two lists of records and a tokenizer in one folder."""

    def __init__(self, folder: Path, *, samples: int, photos: int, vocabulary: str = "Mistral") -> None:
        self.folder, self.samples = folder, samples
        self.images = folder / "photos"
        self.names = make_photos(self.images, photos)
        self.tokenizer = folder / "tokenizer"
        prepared(vocabulary, self.tokenizer)

    def counts(self, name: str) -> tuple[int, int]:
        """How many records a contender gets: fewer, and more; the fast ones most, or noise would decide."""
        most = self.samples // 2
        if policy_of(name) == "keep":
            most *= 6
        elif name in OURS:
            most *= 4
        return most // 4, most

    def records(self, count: int) -> Path:
        """A file of so many records."""
        path = self.folder / f"{count}.jsonl"
        if not path.exists():
            write_records(path, count, self.names, text=prose())
        return path

    @property
    def photos(self) -> list[bytes]:
        """The files' bytes."""
        return [path.read_bytes() for path in sorted(self.images.iterdir())]


# --- (2) contenders -----------------------------------------------------------------------------------------


def command(name: str, corpus: Corpus, records: Path, out: Path, args: argparse.Namespace) -> list[str]:
    """The command line of one contender."""
    common = ["--out", str(out), "--tokenizer", str(corpus.tokenizer), "--workers", str(args.workers)]
    if name in OURS:
        main = [sys.executable, "-m", "omnidata.cli", "build-shards", str(records)]
        return [*main, "--image-root", str(corpus.images), *common, *OURS[name], "--quiet"]
    peer, policy = PEERS[name]
    python = sys.executable if peer == "script" else args.peers_python
    main = [python, str(HERE / "peers.py"), peer, "--records", str(records), "--images", str(corpus.images)]
    return [*main, *common, "--policy", policy]


@dataclass(frozen=True)
class Usage:
    """What one run took."""

    seconds: float
    cpu_seconds: float  # of all its processes
    peak_bytes: int  # of the largest one


def run(command: list[str], out: Path) -> Usage:
    """Run to the end, and until all of it is on the disk; the output is removed."""
    os.sync()
    quiet = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=os.environ | quiet, stdout=log, stderr=log)
        usages = dict(reap())
        os.sync()  # ours has been waiting for it all along
        seconds = time.perf_counter() - started
        process.returncode = usages[process.pid][0]
        if process.returncode:
            log.seek(0)
            raise SystemExit(
                f"{' '.join(command)}\nexited with {process.returncode}:\n{log.read().decode()[-3000:]}"
            )
    shutil.rmtree(out, ignore_errors=True)
    used = [usage for _, usage in usages.values()]
    cpu_seconds = sum(usage.ru_utime + usage.ru_stime for usage in used)
    return Usage(seconds, cpu_seconds, max(usage.ru_maxrss for usage in used) * 1024)


def reap() -> Iterator[tuple[int, tuple[int, Any]]]:
    """(pid, (exit code, rusage)) of every child until none is left, orphans of children included.

    Workers may belong to a fork server, whose parent ends without waiting for it.
    """
    while True:
        try:
            pid, status, usage = os.wait4(-1, 0)
        except ChildProcessError:
            return
        yield pid, (os.waitstatus_to_exitcode(status), usage)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def race(corpus: Corpus, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """name -> samples/s and samples/CPU second, both without the start; seconds of the whole run."""
    names = [*OURS, *(name for name, (peer, _) in PEERS.items() if peer == "script" or args.peers_python)]
    names = [name for name in names if args.only in name]
    usages = {name: {count: [] for count in corpus.counts(name)} for name in names}
    out = corpus.folder / "out"
    for turn in range(args.repeat):
        for name in names:
            for count, taken in usages[name].items():
                if turn >= FEW_TURNS and count == min(usages[name]):
                    continue
                taken.append(run(command(name, corpus, corpus.records(count), out, args), out))
            print(f"turn {turn + 1}: {name}, {taken[-1].seconds:.1f} s", file=sys.stderr)
    return {name: rates_of(*taken.items()) for name, taken in usages.items()}


def policy_of(name: str) -> str:
    """What a contender does to pictures."""
    return "keep" if "keep" in name else "shrink"


def rates_of(fewer: tuple[int, list[Usage]], more: tuple[int, list[Usage]]) -> dict[str, float]:
    """Rates between two numbers of records, from the best run of each."""
    row = {"records": float(more[0]), "seconds": min(usage.seconds for usage in more[1])}
    for rate, field in (("samples_per_second", "seconds"), ("samples_per_cpu_second", "cpu_seconds")):
        best = [min(getattr(usage, field) for usage in usages) for _, usages in (fewer, more)]
        row[rate] = (more[0] - fewer[0]) / (best[1] - best[0])
    return row


# --- (3) floors ---------------------------------------------------------------------------------------------


def milliseconds(function: Callable[[Any], object], inputs: list[Any], *, rounds: int = 3) -> float:
    """Mean over the inputs of the best of the rounds."""
    best = [float("inf")] * len(inputs)
    for _ in range(rounds):
        for position, value in enumerate(inputs):
            started = time.process_time()
            function(value)
            best[position] = min(best[position], time.process_time() - started)
    return 1000 * sum(best) / len(best)


def floors(corpus: Corpus) -> dict[str, float]:
    """Milliseconds a sample on one core, of what no builder can do without."""
    import simplejpeg
    import torch

    from omnidata.images.pixels import resize_rgb

    torch.set_num_threads(1)
    photos = corpus.photos[:200]
    decoded = [simplejpeg.decode_jpeg(data) for data in photos]
    shrunk = [resize_rgb(rgb, *small_size(rgb)) for rgb in decoded]
    encode = lambda rgb: simplejpeg.encode_jpeg(rgb, 90, "RGB", "420")  # noqa: E731
    target = corpus.folder / "copy"
    return {
        "decode (libjpeg-turbo)": milliseconds(simplejpeg.decode_jpeg, photos),
        "resize (torch)": milliseconds(lambda rgb: resize_rgb(rgb, *small_size(rgb)), decoded),
        "encode (libjpeg-turbo)": milliseconds(encode, shrunk),
        "tokenize (encode_batch)": tokenizing(corpus),
        "copy (read + write the file)": milliseconds(
            lambda path: target.write_bytes(path.read_bytes()), sorted(corpus.images.iterdir())
        ),
    }


def small_size(rgb: np.ndarray) -> tuple[int, int]:
    """(width, height) with the shorter side at 448."""
    scale = 448 / min(rgb.shape[:2])
    return round(rgb.shape[1] * scale), round(rgb.shape[0] * scale)


def tokenizing(corpus: Corpus) -> float:
    """``encode_batch`` of the bare tokenizer on the records' text, one thread."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer / "tokenizer.json"))
    lines = corpus.records(1024).read_text().splitlines()
    texts = ["\n".join(turn["value"] for turn in json.loads(line)["conversations"]) for line in lines]
    batches = [texts[start : start + 128] for start in range(0, len(texts), 128)]
    return milliseconds(tokenizer.encode_batch, batches) / 128


# --- (4) quality, (5) memory --------------------------------------------------------------------------------


def quality(corpus: Corpus) -> dict[str, float]:
    """Mean |difference| of decode + resize to Pillow's decode + bicubic: of all photographs, of the worst."""
    from omnidata.images.pixels import decode_resized

    differences = []
    for data in corpus.photos[:200]:
        theirs = Image.open(io.BytesIO(data)).convert("RGB")
        size = small_size(np.asarray(theirs))
        theirs = np.asarray(theirs.resize(size, Image.Resampling.BICUBIC), int)
        differences.append(np.abs(decode_resized(data, *size) - theirs).mean())
    return {"mean": float(np.mean(differences)), "worst image": float(np.max(differences))}


def memory(corpus: Corpus, args: argparse.Namespace) -> dict[int, float]:
    """Number of records -> MB of the largest process."""
    names = thumbnails(corpus.images, corpus.names[:20])
    peaks = {}
    for count in args.memory:
        records, out = corpus.folder / f"memory-{count}.jsonl", corpus.folder / "out"
        write_records(records, count, names, text=prose())
        usage = run(command("ours, keep, quick check", corpus, records, out, args), out)
        print(f"memory: {count} records, {usage.seconds:.1f} s", file=sys.stderr)
        peaks[count] = usage.peak_bytes / 1e6
    return peaks


def thumbnails(folder: Path, names: list[str]) -> list[str]:
    """Small copies, so that 100,000 records make half a gigabyte and not ten; their names."""
    for name in names:
        image = Image.open(folder / name)
        image.thumbnail((160, 160))
        image.save(folder / f"small-{name}")
    return [f"small-{name}" for name in names]


# --- report -------------------------------------------------------------------------------------------------


def ratios(rate: dict[str, float], floor: dict[str, float]) -> dict[str, float]:
    """What the targets are about, from the samples/s of one core."""
    shrink, quick, full = OURS
    script = "webdataset script, keep"
    decode, copy = floor["decode (libjpeg-turbo)"], floor["copy (read + write the file)"]
    rows = [(f"ours / {name}", shrink, rate.get(name)) for name in PEERS if name != script]
    rows += [
        ("keep, quick check: ours / webdataset script", quick, rate.get(script)),
        ("keep, full check: ours / webdataset script, which checks nothing", full, rate.get(script)),
    ]
    found = {title: rate[name] / other for title, name, other in rows if name in rate and other}
    rows = [
        ("keep, full check: time / libjpeg-turbo's decoding time", full, decode),
        ("shrink: time / floor (decode, resize, encode, tokenize)", shrink, sum(floor.values()) - copy),
        ("keep, quick: time / floor (tokenize, copy)", quick, floor["tokenize (encode_batch)"] + copy),
    ]
    return found | {title: 1000 / rate[name] / least for title, name, least in rows if name in rate}


def show(report: dict[str, Any]) -> None:
    """The report as plain text."""
    print(f"{report['samples']} samples, {report['workers']} workers, best of {report['repeat']}")
    print(report["versions"])
    if report["rates"]:
        print(f"\n{'':32} samples/s   a core   a CPU second   whole run")
    for name, row in report["rates"].items():
        rate, cpu = row["samples_per_second"], row["samples_per_cpu_second"]
        whole = f"{row['seconds']:9.1f} s of {row['records']:.0f}"
        print(f"{name:32} {rate:9.0f} {rate / report['workers']:8.0f} {cpu:14.0f} {whole}")
    for title in TABLES:
        if title in report:
            print(f"\n{title}")
        for name, value in report.get(title, {}).items():
            print(f"  {name!s:66} {value:8.3f}")


TABLES = (
    "floors, ms per sample on one core",
    "ratios",
    "ratios by CPU time",
    "mean |difference| to Pillow, of 255",
    "largest process, MB, by records",
)


def measure(corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """Everything, or with --memory the memory alone, as JSON values."""
    from omnidata.images.pixels import backend

    report = {"samples": args.samples, "workers": args.workers, "repeat": args.repeat, "versions": backend()}
    if args.memory:
        return report | {"rates": {}, TABLES[-1]: memory(corpus, args)}
    rates, floor = race(corpus, args), floors(corpus)
    per_core = {name: row["samples_per_second"] / args.workers for name, row in rates.items()}
    per_cpu = {name: row["samples_per_cpu_second"] for name, row in rates.items()}
    results = (floor, ratios(per_core, floor), ratios(per_cpu, floor), quality(corpus))
    return report | {"rates": rates} | dict(zip(TABLES, results, strict=False))


def check_peers(python: str) -> None:
    """Stop now rather than after an hour, if a peer cannot be imported."""
    imports = (
        "from streaming import MDSWriter; from litdata import optimize; from img2dataset import download"
    )
    answer = subprocess.run([python, "-c", imports], cwd=HERE, capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(f"{python} lacks benchmarks/peers-requirements.txt:\n{answer.stderr[-1000:]}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--photos", type=int, default=400, help="different image files")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--vocabulary", choices=VOCABULARIES, default="Mistral")
    parser.add_argument("--only", default="", help='contenders with this in their names, such as "keep"')
    parser.add_argument("--peers-python", help="interpreter that has benchmarks/peers-requirements.txt")
    parser.add_argument(
        "--memory",
        type=int,
        nargs="*",
        metavar="RECORDS",
        help="build so many records, one build each, and nothing else  [1000 10000 100000]",
    )
    parser.add_argument("--folder", help="where to work (several hundred MB)  [default: a temporary folder]")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.memory == []:
        args.memory = [1_000, 10_000, 100_000]
    if args.peers_python:
        check_peers(args.peers_python)
    adopt_orphans()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        corpus = Corpus(Path(folder), samples=args.samples, photos=args.photos, vocabulary=args.vocabulary)
        report = measure(corpus, args)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)


if __name__ == "__main__":
    main()
