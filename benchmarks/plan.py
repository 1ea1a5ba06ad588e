"""What a plan costs and what it saves: time, padding, and the wait of ranks for each other.

    python benchmarks/plan.py [--samples 1000000] [--json]

(1) Time of planning, in CPU seconds of one core; peak memory; a window of a billion made-up samples.
(2) Padding: packs, beside random batches of 8 padded to their longest, and batches of 8 grouped by length.
(3) Imbalance: max / mean of the ranks' modelled cost (tokens + c x images), averaged over steps, at 8, 64 and
    512 ranks: packs by best fit in order; even packs in order; even packs dealt by cost.

Lengths are drawn as natural ones look: text log-normal around 200 tokens, 0-4 images of 66 tokens.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from omnidata.plan.catalog import Lengths
from omnidata.plan.epoch import EpochPlan, deal
from omnidata.plan.packing import best_fit, even_fit

MAX_TOKENS = 4096
IMAGE_COSTS = {"frozen tower": 221.0, "trained tower": 663.0}
RANKS = (8, 64, 512)


class NaturalCatalog:
    """Shards of 10,000 samples with natural lengths, made when they are asked for."""

    def __init__(self, num_samples: int) -> None:
        self.shard_sizes = np.full(num_samples // 10_000, 10_000)
        self.name, self.digest = "natural", f"natural-{num_samples}"

    def read(self, shards: Sequence[int]) -> Lengths:
        """The lengths of these shards, a function of their numbers."""
        parts = [natural(10_000, seed=int(shard)) for shard in sorted(shards)]
        rows = np.concatenate([np.arange(10_000) + 10_000 * int(shard) for shard in sorted(shards)])
        tokens, images = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Lengths(rows, tokens, (tokens - 66 * images) // 2, images)

    def longest(self) -> tuple[int, int]:
        """Never too long."""
        return 2048, 4


def natural(count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and images of ``count`` samples."""
    rng = np.random.default_rng(seed)
    images = rng.choice([0, 1, 1, 1, 1, 1, 1, 2, 3, 4], count)
    text = np.clip(rng.lognormal(5.3, 0.9, count), 20, 2048 - 66 * images).astype(np.int64)
    return text + 66 * images, images


# --- (1) time ---------------------------------------------------------------------------------------------


def cpu_seconds(function) -> float:
    """CPU time of one call."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def measure_time(num_samples: int) -> dict[str, float]:
    """Seconds to plan, to pack alone, and to make one window of a billion samples."""
    plan = EpochPlan(Remembered(num_samples), max_tokens=MAX_TOKENS)
    huge = EpochPlan(NaturalCatalog(10**9), max_tokens=MAX_TOKENS)
    tokens, images = natural(num_samples, seed=0)
    return {
        "plan, s": cpu_seconds(lambda: plan.totals),
        "best fit alone, s": cpu_seconds(lambda: best_fit(tokens, images, max_tokens=MAX_TOKENS)),
        "even fit alone, s": cpu_seconds(lambda: even_fit(tokens, images, max_tokens=MAX_TOKENS)),
        "a window in the middle of a billion, s": cpu_seconds(lambda: huge.window(huge.num_windows // 2)),
        "windows of a billion": huge.num_windows,
        "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


class Remembered(NaturalCatalog):
    """The same lengths, made beforehand: planning is measured, not drawing random numbers."""

    def __init__(self, num_samples: int) -> None:
        super().__init__(num_samples)
        self._all = super().read(range(len(self.shard_sizes)))

    def read(self, shards: Sequence[int]) -> Lengths:
        """A copy of these shards' lengths."""
        return self._all.take(np.concatenate([np.arange(10_000) + 10_000 * s for s in sorted(shards)]))


# --- (2) padding ------------------------------------------------------------------------------------------


def measure_padding(num_samples: int) -> dict[str, float]:
    """Share of positions that hold no token."""
    tokens, images = natural(num_samples, seed=0)

    def batches_of_8(order: np.ndarray) -> float:
        batches = tokens[order][: len(order) // 8 * 8].reshape(-1, 8)
        return 1 - batches.sum() / (8 * batches.max(1)).sum()

    def packs(method) -> float:
        return 1 - tokens.sum() / (method(tokens, images, max_tokens=MAX_TOKENS)[1] * MAX_TOKENS)

    rng = np.random.default_rng(0)
    shuffled = rng.permutation(num_samples)
    # As usual: sorted within shuffled runs of 50 batches, so that batches keep some randomness.
    grouped = np.concatenate(
        [run[np.argsort(tokens[run])] for run in np.array_split(shuffled, num_samples // 400)]
    )
    return {
        "packs of the plan": 1 - EpochPlan(Remembered(num_samples), max_tokens=MAX_TOKENS).totals.fill,
        "best fit over everything": packs(best_fit),
        "batches of 8, grouped by length": batches_of_8(grouped),
        "batches of 8, random": batches_of_8(shuffled),
    }


# --- (3) imbalance ----------------------------------------------------------------------------------------


def measure_imbalance(num_samples: int, *, max_images: int | None) -> list[dict[str, float]]:
    """One row for each number of ranks, packs a rank, and cost of an image."""
    tokens, images = natural(num_samples, seed=0)
    columns = {}
    for name, method in (("best fit", best_fit), ("even", even_fit)):
        pack_of, num_packs = method(tokens, images, max_tokens=MAX_TOKENS, max_images=max_images)
        order = np.random.default_rng(1).permutation(num_packs)
        columns[name] = [np.bincount(pack_of, column)[order] for column in (tokens, images)]
    rows = []
    for cost_name, image_cost in IMAGE_COSTS.items():
        costs = {name: column[0] + image_cost * column[1] for name, column in columns.items()}
        for ranks in RANKS:
            for each in (1, 4):
                rows.append({"image cost": cost_name, "ranks": ranks, "packs a rank": each})
                rows[-1] |= {
                    "best fit, in order": imbalance(costs["best fit"], ranks, each, dealt=False),
                    "best fit, dealt": imbalance(costs["best fit"], ranks, each, dealt=True),
                    "even, in order": imbalance(costs["even"], ranks, each, dealt=False),
                    "even, dealt (ours)": imbalance(costs["even"], ranks, each, dealt=True),
                }
    return rows


def imbalance(costs: np.ndarray, ranks: int, each: int, *, dealt: bool) -> float:
    """Mean over steps of the costliest rank's cost by the mean rank's."""
    steps = costs[: len(costs) // (ranks * each) * ranks * each].reshape(-1, ranks * each)[:200]
    ratios = []
    for step in steps:
        if dealt:
            loads = [step[rank].sum() for rank in deal(step, ranks)]
        else:
            loads = step.reshape(ranks, each).sum(1)
        ratios.append(np.max(loads) / np.mean(loads))
    return float(np.mean(ratios))


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
        "imbalance": measure_imbalance(args.samples, max_images=None),
        "imbalance, at most 20 images a pack": measure_imbalance(args.samples, max_images=20),
    }
    if args.json:
        print(json.dumps(results))
        return
    for title, values in results.items():
        print(f"\n{title}")
        for row in values if isinstance(values, list) else [values]:
            if isinstance(row, dict):
                print(
                    "  "
                    + "   ".join(
                        f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items()
                    )
                )
            else:
                print(f"  {row}")


if __name__ == "__main__":
    main()
