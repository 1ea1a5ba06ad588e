"""Training that is killed or stopped: one rank or all, at any moment, and gone on with in another world.

    attempt   a world of 1, 2 or 3 ranks, DDP or FSDP, and one fault in it; the next, until RUN/final is there
    right     exit codes; no hang; every loss and validation loss of an undisturbed run, once and the same

``rows`` tries a sample of the kinds; ``faults.trials`` all of them, often.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks import start
from tiny_dataset import build_tiny_dataset
from tiny_recipe import tiny_recipe, write_recipe

from faults.table import Row

STEPS, PATIENCE = 14, 100.0  # seconds for one attempt, of which most is a machine at work on other things
TOLERANCE = 2e-5  # of a loss of about 5: float32 summed in another order, over all steps
WORLDS = (("auto", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 3), ("ddp", 3))
MOMENTS = ("step", "vote", "save", "write", "rename", "evaluation", "export")
KILL, STOP, ABORT = int(signal.SIGKILL), int(signal.SIGTERM), int(signal.SIGABRT)
GUARD = {"first_step_timeout": 60.0, "step_timeout": 30.0, "evaluation_timeout": 30.0}


@dataclass(frozen=True)
class Fault:
    """One signal."""

    number: int
    whom: str  # one | all
    moment: str | None  # of MOMENTS, planted in the ranks themselves; None: at random, from outside


def rows(folder: Path, short: bool) -> Iterator[Row]:
    """A sample: every moment once with either signal in turn, and a few at random."""
    rng = random.Random(14)
    moments = MOMENTS[:1] if short else MOMENTS
    turns = itertools.cycle([("one", STOP), ("all", KILL), ("all", STOP), ("one", KILL)])
    planted = [Fault(number, whom, moment) for moment, (whom, number) in zip(moments, turns, strict=False)]
    trial = Trial(folder, rng)
    for number, name in ((KILL, "kill -9 of training"), (STOP, "SIGTERM of training")):
        faults = [fault for fault in planted if fault.number == number]
        if faults:
            yield trial.row(name, "at a moment", faults)
        count = 1 if short else 2
        yield trial.row(name, "at random", [Fault(number, w, None) for w in ("one", "all")] * count)


class Trial:
    """Runs that meet one fault after the other."""

    worlds: tuple[tuple[str, int], ...] = WORLDS
    patience = PATIENCE

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng, self.number = folder, rng, 0
        self.next_worlds = itertools.cycle(self.worlds)
        self.data = self.build()
        codes, *_ = self.attempt(self.recipe("whole"), "auto", 1, None)
        assert codes == [0], "the undisturbed run must end well"
        self.expected = lines(folder / "whole")
        assert len(self.expected["loss"]) == STEPS

    def build(self) -> Path:
        """The dataset."""
        return build_tiny_dataset(self.folder / "data", num_samples=40, num_val=8)

    def recipe(self, name: str) -> Path:
        """A recipe in which everything that can be hit comes often."""
        sections = {"checkpoint": {"every": 2, "keep_last": 2}, "guard": GUARD} | self.sections()
        tree = tiny_recipe(self.data, self.folder / name, **sections)
        return write_recipe(self.folder / f"{name}.yaml", tree)

    def sections(self) -> dict[str, Any]:
        """What the recipe says of this trial's data and model."""
        source = str(self.data)
        return {
            "data": {
                "train": [{"path": source}],
                "val": [{"path": source, "split": "val"}],
                **{"max_tokens": 144, "global_batch": 6, "num_workers": 0},
            },
            "optim": {"steps": STEPS, "ema": 0.9},
            "eval": {"every": 2, "num_batches": 2, "num_questions": 2},
        }

    def row(self, fault: str, how: str, faults: list[Fault]) -> Row:
        """Every fault tried, and the last run brought to its end."""
        with Row(fault, how).timed() as row:
            waiting, recipe = list(faults), None
            while waiting or recipe is not None:
                if recipe is None:
                    self.number += 1
                    recipe = self.recipe(f"run-{self.number}")
                recipe = self._one(row, recipe, waiting)
        return row

    def _one(self, row: Row, recipe: Path, waiting: list[Fault]) -> Path | None:
        """One attempt; the recipe if the run is to go on."""
        strategy, size = next(self.next_worlds)
        fault = waiting[0] if waiting else None
        run = recipe.with_suffix("")
        codes, was_hit, errors = self.attempt(recipe, strategy, size, fault)
        what = f"{run.name} {strategy} x {size} {fault if was_hit else 'undisturbed'}: codes {codes}"
        if problem := wrong_end(codes, fault if was_hit else None, size):
            row.fail("not_found", f"{what}: {problem}: {errors[-600:]}")
            if problem != "hang":  # go on elsewhere
                shutil.copytree(run, run.with_name(f"{run.name}-failed"), dirs_exist_ok=True)
        if was_hit:
            row.tried += 1
            waiting.pop(0)
        if all(code == 0 for code in codes) and (run / "final").exists():
            compare(row, what, self.expected, lines(run))
            return None
        if problem and not was_hit:
            return None
        return recipe

    def attempt(
        self, recipe: Path, strategy: str, size: int, fault: Fault | None
    ) -> tuple[list[int | None], bool, str]:
        """Exit codes (None: it hung), whether the fault hit, what the ranks wrote to stderr."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        victims = self._victims(fault, size)
        log = recipe.with_suffix(".stderr")
        log.write_text("")
        hit = recipe.with_suffix(".hit")
        hit.unlink(missing_ok=True)
        count = self.rng.randint(1, 3)
        processes = [
            start(
                one_rank,
                *(rank, size, port, recipe, strategy, log, hit),
                (fault.moment, fault.number, count) if fault and fault.moment and rank in victims else None,
            )
            for rank in range(size)
        ]
        if fault and not fault.moment:
            self._shoot(recipe, processes, victims, fault.number, hit)
        deadline = time.monotonic() + self.patience
        for process in processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        return codes, hit.exists(), log.read_text()

    def _victims(self, fault: Fault | None, size: int) -> set[int]:
        if fault is None or fault.whom == "all":
            return set(range(size))
        # Only rank 0 renames; the moment would never come on another one.
        return {0 if fault.moment == "rename" else self.rng.randrange(size)}

    def _shoot(self, recipe: Path, processes: list[Any], victims: set[int], number: int, hit: Path) -> None:
        """Within what is left of the run, once it trains: before, no run has begun."""
        metrics = recipe.with_suffix("") / "metrics.jsonl"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        while all(process.is_alive() for process in processes):
            if metrics.exists() and metrics.stat().st_mtime_ns != before and metrics.stat().st_size:
                break
            time.sleep(0.002)
        time.sleep(self.rng.uniform(0, 1.5))
        if all(process.is_alive() for process in processes):
            for rank in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(processes[rank].pid, number)
                    hit.touch()


def lines(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every line with a loss and with a validation loss, as they stand in metrics.jsonl."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "val_loss", "val_loss_ema")
    return {name: [(line["step"], line[name]) for line in read if name in line] for name in names}


def compare(row: Row, what: str, expected: dict[str, list], found: dict[str, list]) -> None:
    """Each line once, with the undisturbed run's value."""
    for name, lines_expected in expected.items():
        steps = [step for step, _ in found[name]]
        row_doubled = len(steps) - len(set(steps))
        if row_doubled:
            row.fail("doubled", f"{what}: {name} of steps {steps}", row_doubled)
        values = dict(found[name])
        for step, value in lines_expected:
            if step not in values or not math.isclose(values[step], value, rel_tol=0, abs_tol=TOLERANCE):
                row.fail("lost", f"{what}: {name} of step {step}: {value} is {values.get(step)}")


def wrong_end(codes: list[int | None], fault: Fault | None, size: int) -> str | None:
    """What is not right about the exit codes.

    A stopped rank exits 0; if it was already on its way out, the signal may find no handler any more. A
    killed one has its signal, and the others, which lose a peer, end by themselves: with 1, or with SIGABRT
    if it is a callback of gloo's that learns of it.
    """
    if None in codes:
        return "hang"
    if fault is None:
        return None if codes == [0] * size else "an undisturbed attempt failed"
    if fault.number == STOP:
        return None if set(codes) <= {0, -STOP} else "a stopped rank must exit 0"
    return None if set(codes) <= {0, 1, -ABORT, -KILL} and -KILL in codes else "another code than 1"


# --- in a rank's own process ------------------------------------------------------------------------------


def one_rank(
    rank: int,
    size: int,
    port: int,
    recipe: Path,
    strategy: str,
    log: Path,
    hit: Path,
    plan: tuple[str, int, int] | None,
) -> None:
    """``train.py RECIPE`` as torchrun starts it, with a signal planted."""
    if size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    from pipelines import train

    if plan:
        plant(*plan, hit)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(train.main([str(recipe), f"parallel.strategy={strategy}"]))


def plant(moment: str, number: int, count: int, hit: Path) -> None:
    """Send this process ``number`` at the ``count``-th time that the moment comes."""
    from pipelines import checkpoint, checksums, evaluate, parallel, train

    calls = itertools.count(1)

    def hitting(function: Callable[..., Any], when: Callable[..., bool] = lambda *_, **__: True) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if when(*args, **kwargs) and next(calls) == count:
                hit.touch()
                os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        return run

    if moment == "step":
        train.clip_gradients = hitting(train.clip_gradients)
    elif moment == "vote":
        vote = hitting(parallel.World.sum, when=lambda world, values: len(values) == 3)
        parallel.World.sum = vote
    elif moment == "save":
        checkpoint.Checkpoints.save = hitting(checkpoint.Checkpoints.save)
    elif moment == "write":
        checksums.CheckpointWriter.write_data = hitting(checksums.CheckpointWriter.write_data)
    elif moment == "rename":
        checkpoint.Checkpoints._replace = hitting(checkpoint.Checkpoints._replace)
    elif moment == "evaluation":
        evaluate.Evaluation.run = hitting(evaluate.Evaluation.run)
    else:
        count = 1  # it comes once
        train.export = hitting(train.export)
