"""Damaged checkpoints: each file of the newest flipped, cut, emptied, removed; three restarts after each.

The damaged one is set aside with a line that names it, the one before is taken, the damaged step is passed
and written again, and the run ends as if nothing had been: losses and weights of an undisturbed run, bit for
bit.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

from tiny_dataset import build_tiny_dataset
from tiny_recipe import losses, tiny_recipe, write_recipe

from faults.table import Row
from pipelines.checksums import verify
from pipelines.config import load_recipe
from pipelines.train import train

FILES = ("__0_0.distcp", ".metadata", "trainer.json", "recipe.yaml", "sha256sums", "COMPLETE")
WAYS = ("flipped", "cut", "empty", "missing")
STEPS, STOPPED, EVERY = 8, 5, 2  # so there are checkpoints of steps 2, 4 and 5


def rows(folder: Path, short: bool) -> Iterator[Row]:
    """A row for each way of damage, every file in turn."""
    data = build_tiny_dataset(folder / "data")
    run_recipe(data, folder / "whole")
    stopped = run_recipe(data, folder / "stopped", f"run.stop_after={STOPPED}")
    for way in WAYS[:1] if short else WAYS:
        with Row("damaged checkpoint", way).timed() as row:
            for name in FILES[:2] if short else FILES:
                row.tried += 1
                _try(row, data, stopped, folder / f"{way}-{row.tried}", name, way)
        yield row


def run_recipe(data: Path, run: Path, *overrides: str) -> Path:
    """Train there; the run's folder."""
    tree = tiny_recipe(
        data, run, optim={"steps": STEPS, "ema": 0.9}, checkpoint={"every": EVERY, "keep_last": 3}
    )
    with contextlib.redirect_stdout(io.StringIO()):
        train(load_recipe(write_recipe(run.with_suffix(".yaml"), tree), overrides))
    return run


def damage(path: Path, way: str) -> None:
    """Make a file something else, or nothing."""
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    changed = {"flipped": bytes(data), "cut": bytes(data[: len(data) // 2]), "empty": b""}
    path.unlink()
    if way != "missing":
        path.write_bytes(changed[way])


def _try(row: Row, data: Path, stopped: Path, run: Path, name: str, way: str) -> None:
    shutil.copytree(stopped, run)
    damage(run / "checkpoints" / f"step-{STOPPED:08d}" / name, way)
    for restart, last in enumerate((STOPPED + 1, STOPPED + 2, STEPS)):
        words = io.StringIO()
        with contextlib.redirect_stderr(words):
            run_recipe(data, run, f"run.stop_after={last}")
        told = f"step-{STOPPED:08d} is not used" in words.getvalue()
        if told != (restart == 0):
            row.fail("not_found", f"{name}, restart {restart}: it says {words.getvalue()!r}")
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    if f".damaged-step-{STOPPED:08d}" not in names:
        row.fail("not_found", f"{name}: not set aside, but {names}")
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if problem := verify(checkpoint):
            row.fail("lost", f"{name}: {checkpoint.name}: {problem}")
    if losses(run) != losses(run.parent / "whole"):
        row.fail("lost", f"{name}: losses {losses(run)}")
    for folder in ("final", "final-ema"):
        ours, theirs = (each / folder / "model.safetensors" for each in (run, run.parent / "whole"))
        if ours.read_bytes() != theirs.read_bytes():
            row.fail("lost", f"{name}: {folder} holds other weights")
