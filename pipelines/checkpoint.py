"""Checkpoints: written behind the training, whole or not at all, verified before they are used.

    RUN/checkpoints/step-00000040/
        __0_0.distcp … .metadata   torch.distributed.checkpoint: weights, Adam moments, RNG states
        trainer.json               step, loader state, counters
        recipe.yaml                the resolved recipe
        sha256sums                 a line for every file above, as `sha256sum -c` reads it
        COMPLETE                   the sha256 of sha256sums: written last

A checkpoint is written under ``.tmp-step-…`` and renamed when it is complete, so a killed process leaves
either all of it or a leftover that the next start removes. ``newest`` recomputes all checksums and passes
over a checkpoint that does not match, with a warning: a flipped bit would otherwise load without a word. Such
a one is renamed ``.damaged-step-…``, so that its step can be written again and pruning does not count it.

Which rank makes which checksum is told in pipelines.checksums. If one rank cannot write, all of them end,
each with a line that says so.

Weights that are frozen and come from ``model.path`` are not written: resuming reads them from there.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from omnidata.durable import sync
from omnidata.schema import UserError

from .checkpoint_reader import CheckpointReader
from .checksums import CheckpointWriter, complete, verify
from .config import CheckpointConfig, Recipe, to_dict
from .parallel import World

# DCP says so whenever one process saves, which is what one process means to do.
warnings.filterwarnings("ignore", "torch.distributed is disabled")

TRAINER, RECIPE = "trainer.json", "recipe.yaml"


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, world: World, *, config: CheckpointConfig) -> None:
        self.directory, self.world, self.config = directory, world, config
        # Its own group: the writer's collectives must not meet those of the training.
        self.group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self.group = cast("dist.ProcessGroup", dist.new_group(backend="gloo"))  # of all ranks
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None
        # Beside the folder, so that a run whose checkpoints went away is known from one that had none yet.
        self._mark = directory.with_name("has-checkpoints")
        self.changes: list[str] = []  # keys of the recipe that differ from the loaded checkpoint's
        if world.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in directory.glob(".tmp-*"):
                shutil.rmtree(leftover)
        world.barrier()

    def save(self, tensors: dict[str, Any], trainer: dict[str, Any], *, recipe: str) -> None:
        """Stage ``tensors`` in memory and write them; returns at once if asynchronous.

        ``trainer`` must have "step" and "best", a (loss, step) whose checkpoint is never pruned, or None.
        """
        self.wait()
        temporary = self.directory / f".tmp-{_name(trainer['step'])}"
        if self.world.is_main:
            try:
                temporary.mkdir()
                (temporary / TRAINER).write_text(json.dumps(trainer, indent=1))
                (temporary / RECIPE).write_text(recipe)
            except OSError as error:
                self._give_up(error, temporary, trainer["step"])
        self._fail_together()
        writer = CheckpointWriter(temporary)
        future = dcp.async_save(
            tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None
        )
        self._writing = threading.Thread(target=self._finish, args=(future, temporary, trainer), daemon=True)
        self._writing.start()
        if not self.config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint being written is complete. A collective: if one rank fails, all of them do."""
        self._join()
        self._fail_together()

    def fail(self) -> None:
        """A rank could not write its part: raise, on every rank, what this one knows of it."""
        self._join()
        raise self._error or UserError(
            "another rank could not write its part of the checkpoint; it says why. Those that are "
            "there are whole: the same command goes on from the newest"
        )

    def _fail_together(self) -> None:
        if self.world.sum([self.has_failed])[0]:
            self.fail()

    def _join(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _finish(self, future: Future[Any], temporary: Path, trainer: dict[str, Any]) -> None:
        """In a thread. DCP's future ends on rank 0 after all ranks have written, so rank 0 completes it."""
        try:
            future.result()
            if self.world.is_main:
                complete(temporary)
                self._replace(temporary, self.directory / _name(trainer["step"]))
                sync(self.directory)
                self._mark.touch()
                self._prune(trainer["best"])
        except (OSError, CheckpointException) as error:
            self._give_up(error, temporary, trainer["step"])
        except BaseException as error:
            self._error = error
            raise

    def _give_up(self, error: BaseException, temporary: Path, step: int) -> None:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, its space is needed
        self._error = UserError(
            f"the checkpoint of step {step} could not be written to {self.directory}: "
            f"{_reason(error)}. Those before it are whole: free some space, start the same command again"
        )

    def _replace(self, temporary: Path, final: Path) -> None:
        if final.exists():  # the same step, saved again with more to tell
            doomed = final.with_name(f".tmp-removed-{final.name}")
            os.replace(final, doomed)
            os.replace(temporary, final)
            shutil.rmtree(doomed)
        else:
            os.replace(temporary, final)

    def _prune(self, best: tuple[float, int] | None) -> None:
        names = self._names()
        kept = {*names[-self.config.keep_last :], _name(best[1] if best else 0)}
        for name in names:
            if name not in kept:
                # Renamed first: a half-removed checkpoint must not be taken for a damaged one.
                doomed = self.directory / f".tmp-removed-{name}"
                os.replace(self.directory / name, doomed)
                shutil.rmtree(doomed)

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.directory.glob("step-*"))

    def newest(self) -> Path | None:
        """The newest checkpoint whose every file has its checksum; the same answer on every rank."""
        found = None
        if self.world.is_main:
            for name in reversed(self._names()):
                problem = verify(self.directory / name)
                if problem is None:
                    found = self.directory / name
                    break
                self._set_aside(name, problem)
        aside = sorted(path.name for path in self.directory.glob(".damaged-*"))
        found, damaged, is_marked = self.world.share((found, aside, self._mark.exists()))
        if found is None and damaged:
            raise UserError(
                f"{self.directory} has no checkpoint that is whole ({', '.join(damaged)}). A new start would "
                "erase this run's metrics: take another run.dir, or remove the run's folder to begin anew"
            )
        if found is None and is_marked:
            raise UserError(
                f"{self.directory} is empty, but this run had checkpoints there. A new start would erase its "
                "metrics: put them back, take another run.dir, or remove this run's folder to begin here anew"
            )
        return found

    def _set_aside(self, name: str, problem: str) -> None:
        aside = self.directory / f".damaged-{name}"
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
        os.replace(self.directory / name, aside)
        print(
            f"warning: checkpoint {self.directory / name} is not used: {problem}; it is now {aside.name}",
            file=sys.stderr,
        )

    def refuse_existing(self) -> None:
        """UserError if there are checkpoints: run.resume=false must not write over a run."""
        if names := self.world.share(self._names() if self.world.is_main else None):
            raise UserError(
                f"run.resume is false, but {self.directory} has {names[-1]}: take another run.dir, or remove "
                "the old run's folder"
            )

    @property
    def has_failed(self) -> bool:
        """Could the last checkpoint not be written? ``wait`` raises why."""
        return self._error is not None

    def load(self, path: Path, tensors: dict[str, Any], *, recipe: Recipe) -> dict[str, Any]:
        """Fill ``tensors`` in place from ``path``; returns what ``save`` was given as ``trainer``.

        What the checkpoint does not have leaves ``tensors``: the random numbers of another number of ranks,
        the running mean of a run that kept none ("ema").
        """
        refuse_other_recipe(path, recipe)
        self.changes = changed_keys(path, recipe)
        trainer = json.loads((path / TRAINER).read_text())
        if trainer["world_size"] != self.world.size:  # other ranks, other random numbers
            tensors.pop(f"rng-{self.world.rank}")
        reader = CheckpointReader(path)
        held = reader.read_metadata().state_dict_metadata  # refuses what is not ours, before DCP wraps it
        if not any(name.startswith("ema.") for name in held):
            tensors.pop("ema", None)
        dcp.load(tensors, storage_reader=reader, process_group=self.group, no_dist=self.group is None)
        return trainer

    def close(self) -> None:
        """Let a checkpoint that is being written end; used on the way out, so it raises nothing."""
        if self._writing is not None:
            self._writing.join(timeout=600)


def _reason(error: BaseException) -> str:
    """DCP wraps what went wrong on each rank; the first cause says it."""
    failures = getattr(error, "failures", {})
    cause = next(iter(failures.values()))[0] if failures else error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__
    return str(cause)


def refuse_other_recipe(path: Path, recipe: Recipe) -> None:
    """UserError if the checkpoint was made by a recipe whose weights mean something else.

    The loader compares the data; speed, logging, schedule and the number of ranks may change.
    """
    saved, current = yaml.safe_load((path / RECIPE).read_text()), to_dict(recipe)
    free = ("activation_checkpointing", "compile")
    changed = [
        f"model.{key}: {saved['model'].get(key)} in the checkpoint, now {value}"
        for key, value in current["model"].items()
        if key not in free and saved["model"].get(key) != value
    ]
    if saved["run"]["seed"] != recipe.run.seed:
        changed.append(f"run.seed: {saved['run']['seed']} in the checkpoint, now {recipe.run.seed}")
    if changed:
        raise UserError(
            f"{path} cannot be resumed with this recipe; use another run.dir:\n  " + "\n  ".join(changed)
        )


def changed_keys(path: Path, recipe: Recipe) -> list[str]:
    """Every key whose value is another one than in the checkpoint's recipe: ``optim.lr: 0.001 -> 0.0001``."""

    def leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from leaves(inner, f"{key}.{name}" if key else str(name))
        else:
            yield key, value

    saved = dict(leaves(yaml.safe_load((path / RECIPE).read_text()), ""))
    current = dict(leaves(to_dict(recipe), ""))
    keys = [key for key in {**saved, **current} if saved.get(key) != current.get(key)]
    return [f"{key}: {saved.get(key)} -> {current.get(key)}" for key in keys]


def _name(step: int) -> str:
    return f"step-{step:08d}"


# --- what is inside ---------------------------------------------------------------------------------------


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, rank: int, skip_frozen: bool
) -> dict[str, Any]:
    """Everything that DCP saves, and the tensors that it loads into."""
    options = StateDictOptions(ignore_frozen_params=skip_frozen)
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer)["state"],
        f"rng-{rank}": rng_state(),
    }


def restore_training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, rank: int
) -> None:
    """Put a loaded ``training_state`` to work. Learning rates and decay stay the recipe's."""
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    full = get_optimizer_state_dict(model, optimizer)
    settings = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    set_optimizer_state_dict(model, optimizer, full | {"state": state["optimizer"]})
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    if f"rng-{rank}" in state:
        set_rng_state(state[f"rng-{rank}"])


def rng_state() -> dict[str, torch.Tensor]:
    """This process's random generators, as tensors."""
    words = np.random.get_state(legacy=False)["state"]
    version, inner, gauss = random.getstate()
    assert version == 3 and gauss is None, "nothing here draws with random.gauss"
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.append(words["key"].astype(np.int64), words["pos"])),
        "python": torch.tensor(inner, dtype=torch.int64),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Inverse of rng_state."""
    torch.set_rng_state(state["torch"])
    numbers = state["numpy"].numpy()
    np.random.set_state(("MT19937", numbers[:-1].astype(np.uint32), int(numbers[-1]), 0, 0.0))
    random.setstate((3, tuple(state["python"].tolist()), None))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
