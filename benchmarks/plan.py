"""What a plan costs and what it saves: time, padding, and the wait of ranks for each other.

    python benchmarks/plan.py [--samples 1000000] [--json]

(1) Time of planning, in CPU seconds of one core; peak memory; a window of a billion made-up samples.
(2) Padding: packs, beside random batches of 8 padded to their longest, and batches of 8 grouped by length.
(3) Ranks that wait for each other: max / mean of the ranks' modelled cost, averaged over steps, beside packs
    of best fit in random order; and how far steps differ in mean pictures per pack (standard deviation).

Lengths are drawn as natural ones look: text log-normal around 200 tokens, 0-4 images of 66 tokens. The
mixture is a third each of those, of captions of one picture, and of text alone (up to 3,500 tokens). Pictures
of any size are a processor's: 32 pixels square a token, at 8,192 tokens per pack.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from omnidata.plan.blend import Source
from omnidata.plan.catalog import IMAGE_PIXELS, Lengths
from omnidata.plan.cost import Assumptions, token_weights
from omnidata.plan.epoch import EpochPlan
from omnidata.plan.forecast import pack_table
from omnidata.plan.packing import best_fit
from omnidata.plan.steps import deal

MAX_TOKENS = 4096
TOWERS = {"frozen": Assumptions(), "trained": Assumptions(frozen=())}
RANKS = (8, 64, 512)
SHARD = 10_000  # samples
Draw = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # tokens, images, pixels (None: all alike)


def natural(count: int, *, seed: int) -> Draw:
    """Conversations about pictures."""
    rng = np.random.default_rng(seed)
    images = rng.choice([0, 1, 1, 1, 1, 1, 1, 2, 3, 4], count)
    text = np.clip(rng.lognormal(5.3, 0.9, count), 20, 2048 - 66 * images).astype(np.int64)
    return text + 66 * images, images, None


def captions(count: int, *, seed: int) -> Draw:
    """One picture and a line."""
    text = np.random.default_rng(seed).lognormal(3.5, 0.5, count)
    return np.clip(text, 8, 300).astype(np.int64) + 66, np.ones(count, np.int64), None


def text_alone(count: int, *, seed: int) -> Draw:
    """Longer texts, no picture."""
    text = np.random.default_rng(seed).lognormal(6.3, 0.8, count)
    return np.clip(text, 30, 3500).astype(np.int64), np.zeros(count, np.int64), None


def any_size(count: int, *, seed: int) -> Draw:
    """A picture of any size in most samples, and a conversation."""
    rng = np.random.default_rng(seed)
    width = np.clip(rng.lognormal(6.5, 0.4, count), 112, 2048)
    height = np.clip(width * rng.lognormal(0, 0.3, count), 112, 2048)
    images = (rng.random(count) < 0.85).astype(np.int64)
    patches = images * (np.ceil(width / 32) * np.ceil(height / 32)).astype(np.int64)
    text = np.clip(rng.lognormal(5.0, 0.9, count), 20, 2000).astype(np.int64)
    return text + patches, images, patches * 3 * 32**2


class MadeUpCatalog:
    """Shards of 10,000 samples, made when they are asked for."""

    def __init__(self, num_samples: int, draw: Callable[..., Draw] = natural) -> None:
        self.shard_sizes = np.full(max(1, num_samples // SHARD), SHARD)
        self.name = self.digest = f"{draw.__name__}-{num_samples}"
        self._draw = draw

    def read(self, shards: Sequence[int]) -> Lengths:
        """The lengths of these shards, a function of their numbers."""
        parts = [self._draw(SHARD, seed=int(shard)) for shard in sorted(shards)]
        rows = np.concatenate([np.arange(SHARD) + SHARD * int(shard) for shard in sorted(shards)])
        columns = list(zip(*parts, strict=True))
        tokens, images = (np.concatenate(column) for column in columns[:2])
        pixels = None if columns[2][0] is None else np.concatenate(columns[2])
        return Lengths(rows, tokens, np.maximum(1, tokens // 3), images, pixels)

    def longest(self) -> tuple[int, int]:
        """Never too long."""
        return MAX_TOKENS, 4


class Remembered(MadeUpCatalog):
    """The same lengths, made beforehand: planning is measured, not drawing random numbers."""

    def __init__(self, num_samples: int, draw: Callable[..., Draw] = natural) -> None:
        super().__init__(num_samples, draw)
        self._all = super().read(range(len(self.shard_sizes)))

    def read(self, shards: Sequence[int]) -> Lengths:
        """A copy of these shards' lengths."""
        return self._all.take(np.concatenate([np.arange(SHARD) + SHARD * s for s in sorted(shards)]))


# --- (1) time ---------------------------------------------------------------------------------------------


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU time of one call."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def measure_time(num_samples: int) -> dict[str, float]:
    """Seconds to plan, to pack alone, and to make one window of a billion samples."""
    plan = EpochPlan(Remembered(num_samples), max_tokens=MAX_TOKENS)
    huge = EpochPlan(MadeUpCatalog(10**9), max_tokens=MAX_TOKENS)
    tokens, images, _ = natural(num_samples, seed=0)
    return {
        "plan, s": cpu_seconds(lambda: plan.totals),
        "best fit alone, s": cpu_seconds(lambda: best_fit(tokens, images, max_tokens=MAX_TOKENS)),
        "a window in the middle of a billion, s": cpu_seconds(lambda: huge.window(huge.num_windows // 2)),
        "windows of a billion": huge.num_windows,
        "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


# --- (2) padding ------------------------------------------------------------------------------------------


def measure_padding(num_samples: int) -> dict[str, float]:
    """Share of positions that hold no token."""
    tokens, images, _ = natural(num_samples, seed=0)

    def batches_of_8(order: np.ndarray) -> float:
        batches = tokens[order][: len(order) // 8 * 8].reshape(-1, 8)
        return 1 - batches.sum() / (8 * batches.max(1)).sum()

    rng = np.random.default_rng(0)
    shuffled = rng.permutation(num_samples)
    # As usual: sorted within shuffled runs of 50 batches, so that batches keep some randomness.
    grouped = np.concatenate(
        [run[np.argsort(tokens[run])] for run in np.array_split(shuffled, num_samples // 400)]
    )
    fewest = best_fit(tokens, images, max_tokens=MAX_TOKENS)[1]
    return {
        "packs of the plan": 1 - EpochPlan(Remembered(num_samples), max_tokens=MAX_TOKENS).totals.fill,
        "best fit over everything": 1 - tokens.sum() / (fewest * MAX_TOKENS),
        "batches of 8, grouped by length": batches_of_8(grouped),
        "batches of 8, random": batches_of_8(shuffled),
    }


# --- (3) ranks that wait for each other -------------------------------------------------------------------


def plans(num_samples: int) -> dict[str, EpochPlan]:
    """What is planned, by name."""
    third = max(SHARD, num_samples // 3)
    mixture = [Source(Remembered(third, draw)) for draw in (natural, captions, text_alone)]
    return {
        "natural": EpochPlan(Remembered(num_samples), max_tokens=MAX_TOKENS),
        "natural, at most 20 images per pack": EpochPlan(
            Remembered(num_samples), max_tokens=MAX_TOKENS, max_images=20
        ),
        "mixture": EpochPlan(mixture, max_tokens=MAX_TOKENS),
        "pictures of any size": EpochPlan(Remembered(num_samples, any_size), max_tokens=8192),
    }


def measure_waiting(plan: EpochPlan) -> list[dict[str, object]]:
    """One row for each tower, number of ranks and packs per rank."""
    windows = list(plan.windows())
    firsts = np.cumsum([0, *map(len, windows)])
    ours = pack_table(windows)
    lengths = [window.lengths for window in windows]
    tokens, images, pixels = (
        np.concatenate([getattr(each, name) for each in lengths]) for name in ("tokens", "images", "pixels")
    )
    pack_of, _ = best_fit(tokens, images, max_tokens=plan.max_tokens, max_images=plan.max_images)
    fewest = {
        name: np.bincount(pack_of, values)
        for name, values in (("tokens", tokens), ("squares", tokens**2), ("pixels", pixels))
    }
    random = np.random.default_rng(1).permutation(len(fewest["tokens"]))
    rows: list[dict[str, object]] = []
    for tower, assume in TOWERS.items():
        for ranks in RANKS:
            for each in (1, 4):
                taken = plan.runs(ranks * each, windows=windows)
                order = np.concatenate([firsts[run.window.number] + run.order for run in taken])
                steps = _steps(order, ranks * each)
                if not len(steps):
                    continue
                loads = (ours["pixels"] / IMAGE_PIXELS)[steps].mean(axis=1)
                rows.append(
                    {
                        "tower": tower,
                        "ranks": ranks,
                        "packs per rank": each,
                        "slowest / mean": waiting(_costs(ours, assume)[steps], ranks),
                        "best fit": waiting(_costs(fewest, assume)[_steps(random, ranks * each)], ranks),
                        "mean pictures": float(loads.mean()),
                        "sd of steps": float(loads.std()),
                        "padding": 1 - tokens.sum() / (len(ours["tokens"]) * plan.max_tokens),
                    }
                )
    return rows


def _steps(order: np.ndarray, batch: int) -> np.ndarray:
    return order[: len(order) // batch * batch].reshape(-1, batch)


def _costs(packs: dict[str, np.ndarray], assume: Assumptions) -> np.ndarray:
    image, attention = token_weights(assume)
    return packs["tokens"] + image * (packs["pixels"] / IMAGE_PIXELS) + attention * packs["squares"]


def waiting(costs: np.ndarray, ranks: int) -> float:
    """Mean over steps ``[S, packs]`` of the costliest rank's cost by the mean rank's."""
    loads = [[step[rank].sum() for rank in deal(step, ranks)] for step in costs[:1000]]
    return float(np.mean(np.max(loads, axis=1) / np.mean(loads, axis=1))) if loads else float("nan")


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = {
        "samples": args.samples,
        "time": measure_time(args.samples),
        "padding": measure_padding(args.samples),
        "waiting": {name: measure_waiting(plan) for name, plan in plans(args.samples).items()},
    }
    if args.json:
        print(json.dumps(results))
        return
    print(f"{args.samples:,} samples")
    for title in ("time", "padding"):
        print(f"\n{title}")
        for name, value in results[title].items():
            print(f"  {name:40} {value:10.4g}")
    for title, rows in results["waiting"].items():
        print(f"\nranks that wait: {title}")
        print("  " + "  ".join(f"{name:>14}" for name in rows[0]))
        for row in rows:
            cells = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()]
            print("  " + "  ".join(f"{c:>{max(14, len(n))}}" for c, n in zip(cells, row, strict=True)))


if __name__ == "__main__":
    main()
