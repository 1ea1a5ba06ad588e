"""Train a vision-language model: one loop, from a laptop to a cluster.

    python pipelines/train.py pipelines/recipes/tiny_cpu.yaml optim.lr=1e-3
    torchrun --nproc-per-node 8 pipelines/train.py pipelines/recipes/sft.yaml [--profile]

    prepare   recipe -> datasets that fit -> model -> optimizer -> loader -> newest verified checkpoint
    loop      microbatches -> loss -> gradients -> update -> metrics -> evaluation -> checkpoint
    finish    evaluation, last checkpoint, RUN/final (weights, tokenizer, card), with optim.ema also
              RUN/final-ema, RUN/loss.svg

The loss of a step is the sum over its supervised tokens, of all ranks and microbatches, divided by their
number, which the loader knows before the step begins. So each microbatch can be divided at once, and how a
step is cut into microbatches and ranks does not change it.

The same command goes on from the newest verified checkpoint. SIGTERM and SIGUSR1 finish the step, save and
exit 0. torchrun passes SIGTERM on, gives its ranks 30 seconds and then itself exits 1; where a step takes
longer send SIGUSR1 to the ranks, as pipelines/cluster does.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # a file run by its path (PEP 366); the folder is `omnipipelines` in a wheel
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = Path(__file__).resolve().parent.name

if __name__ == "__main__":  # before torch: what is wrong with the command is told at once
    from .command import check

    check(sys.argv[1:], __doc__)

import torch

from omnidata import Dataset
from omnidata.loader.loader import PackLoader
from omnidata.loader.microbatch import Microbatch
from omnidata.schema import UserError

from .by_group import GroupCounts
from .checkpoint import Checkpoints, restore_training_state, training_state
from .command import recipe_of
from .config import Recipe, to_yaml
from .data import (
    model_config,
    model_inputs,
    new_token_ids,
    open_datasets,
    refuse_empty_epochs,
    refuse_mismatches,
    refuse_short_schedule,
    tail_of_epoch,
    train_loader,
)
from .ema import Ema
from .evaluate import Evaluation
from .export import export
from .garbage import Garbage
from .gpu_days import hint
from .guard import LossGuard, StopSignal, Watchdog
from .isolation import prove_isolation
from .memory import check_fits, check_rehearsed
from .metrics import MetricsLog, StepCounts, batch_arithmetic, parameter_table
from .model import BuiltModel, build_model
from .optim import NewTokenRows, build_optimizer, clip_gradients, lr_factor, set_lr
from .origin import naming_changes, origin_of, refuse_other_origin
from .parallel import World, compute_dtype, reduce_gradients, start
from .plot import plot
from .profiler import profiler
from .run_lock import RunLock


@dataclass
class Training:
    """Everything that the loop uses. Only ``step``, ``evaluated`` and ``best`` change."""

    recipe: Recipe
    world: World
    datasets: Sequence[Dataset]
    built: BuiltModel
    optimizer: torch.optim.AdamW
    new_token_rows: NewTokenRows | None
    loader: PackLoader
    total_steps: int
    checkpoints: Checkpoints
    evaluation: Evaluation
    guard: LossGuard
    ema: Ema | None = None  # the weights' running mean, if optim.ema asks for one
    step: int = 0  # updates done
    evaluated: int = 0  # the step of the last evaluation
    best: tuple[float, int] | None = None  # lowest validation loss, and its step

    def save(self) -> None:
        """Checkpoint the state after ``step`` updates."""
        trainer = {
            "step": self.step,
            "loader": self.loader.state_dict(),
            "guard": self.guard.state_dict(),
            "best": self.best,
            "evaluated": self.evaluated,
            "world_size": self.world.size,
            "origin": origin_of(self.recipe.model, self.datasets),
        }
        self.checkpoints.save(self._tensors(), trainer, recipe=to_yaml(self.recipe))

    def resume(self) -> bool:
        """Take up the newest verified checkpoint, if there is one."""
        path = self.checkpoints.newest()
        if path is None:
            return False
        tensors = self._tensors()
        trainer = self.checkpoints.load(path, tensors, recipe=self.recipe)
        refuse_other_origin(path, trainer["origin"], origin_of(self.recipe.model, self.datasets))
        restore_training_state(self.built.model, self.optimizer, tensors, rank=self.world.rank)
        if self.ema is not None and "ema" not in tensors:
            self.ema.restart()  # it was switched on after that checkpoint
        with naming_changes(path, self.recipe):
            self.loader.load_state_dict(trainer["loader"])
        self.guard.load_state_dict(trainer["guard"])
        self.step, self.best, self.evaluated = trainer["step"], trainer["best"], trainer["evaluated"]
        if self.recipe.optim.epochs:  # with another global_batch the data ends after other steps
            self.total_steps = self.step + self.loader.steps_left()
        return True

    def _tensors(self) -> dict[str, Any]:
        skip_frozen = self.recipe.model.path is not None  # they can be read from there again
        state = training_state(
            self.built.model, self.optimizer, rank=self.world.rank, skip_frozen=skip_frozen
        )
        return state if self.ema is None else state | {"ema": self.ema.state_dict()}


def prepare(recipe: Recipe, world: World) -> Training:
    """Build everything; what does not fit is refused before the model is built."""
    run_dir = Path(recipe.run.dir)
    datasets = open_datasets([*recipe.data.train, *recipe.data.val])
    config = model_config(recipe.model, datasets[0])
    refuse_mismatches(recipe, datasets, config)
    loader = train_loader(recipe, world, config)
    epochs = map(loader.steps_per_epoch, range(recipe.optim.epochs or 0))
    total_steps = recipe.optim.steps or sum(epochs)
    refuse_empty_epochs(recipe.data, loader)
    refuse_short_schedule(recipe.optim, total_steps)
    if world.is_main:
        print(check_fits(recipe, config, world), flush=True)
    checkpoints = Checkpoints(run_dir / "checkpoints", world, config=recipe.checkpoint)
    if not recipe.run.resume:
        checkpoints.refuse_existing()
    built = build_model(recipe, config, world)
    loader.weigh(**built.flop_count.token_weights)
    proven = prove_isolation(recipe, world, built, datasets[0])
    if world.is_main and proven:
        print(proven, flush=True)
    optimizer = build_optimizer(built.model, recipe.optim)
    ema = Ema(built.model, recipe.optim.ema) if recipe.optim.ema else None
    rows = new_token_ids(datasets[0].manifest) if recipe.model.train_only_new_tokens else []
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "recipe.yaml").write_text(to_yaml(recipe))
    world.barrier()
    return Training(
        recipe=recipe,
        world=world,
        datasets=datasets,
        built=built,
        optimizer=optimizer,
        new_token_rows=NewTokenRows(built.model, optimizer, rows=rows) if rows else None,
        loader=loader,
        total_steps=total_steps,
        checkpoints=checkpoints,
        evaluation=Evaluation(recipe, world, built, ema),
        guard=LossGuard(recipe.guard, run_dir, rank=world.rank),
        ema=ema,
    )


def loop(t: Training, log: MetricsLog, watchdog: Watchdog, stop: StopSignal) -> None:
    """Every step until the end, or until somebody asks to stop."""
    recipe, world, wrapped = t.recipe, t.world, t.built.wrapped
    trainable = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    last_step = min(t.total_steps, recipe.run.stop_after or t.total_steps)
    steps = grouped(t.loader)
    is_stopped = False  # by a vote; the flag of the signal is never written here
    with profiler(recipe, world) as profile, Garbage() as garbage:
        while t.step < last_step and not is_stopped:
            counts = StepCounts(t.built.flop_count)
            by_group = GroupCounts(t.loader.group_names, world.device)
            loss = torch.zeros((), device=world.device)
            # (1) read, one microbatch ahead
            for microbatch, is_last in marking_last(counts.waiting_for(next(steps))):
                # (2) forward and backward; gradients add up over microbatches, then over ranks
                now = is_last or recipe.parallel.sync_every_microbatch
                with reduce_gradients(wrapped, now=now), naming_memory(microbatch):
                    with compute_dtype(recipe.run, world), by_group.watching(microbatch):
                        part = wrapped(**model_inputs(microbatch, world.device)).loss
                    part.backward()
                loss += part.detach()
                counts.add(microbatch)

            # (3) update, unless the gradient is not finite: its norm is the same number on every rank
            if t.new_token_rows:
                t.new_token_rows.mask_gradients()
            grad_norm = clip_gradients(trainable, recipe.optim.clip)
            factor = lr_factor(t.step, t.total_steps, recipe.optim)
            set_lr(t.optimizer, factor)
            is_finite = math.isfinite(grad_norm)
            if is_finite:
                t.optimizer.step()
                if t.ema is not None:
                    t.ema.update()
            t.optimizer.zero_grad()
            t.step += 1

            # (4) tell; a signal that reached one rank stops all of them after the same step, and so does a
            # checkpoint that one of them could not write
            votes = [loss.item(), stop.requested, t.checkpoints.has_failed]
            total_loss, stop_votes, failures = world.sum(votes)
            is_stopped = stop_votes > 0
            if failures:
                t.checkpoints.fail()
            figures = {"step": t.step, "loss": total_loss, "grad_norm": grad_norm}
            figures |= {"lr": recipe.optim.lr * factor, "epoch": microbatch.epoch}
            log.step(figures | counts.line(world) | by_group.line(world))
            if is_finite:
                log.warn(t.guard.finite(t.step, total_loss, counts.keys))
            else:
                log.warn(t.guard.nonfinite(t.step, counts.keys))
            profile.step()
            watchdog.step_finished()
            garbage.step_finished(t.step)

            # (5) save, look at the validation data, and keep what is best
            if t.step < last_step and not is_stopped:
                if is_due(t.step, recipe.checkpoint.every):
                    with watchdog.around("checkpoint"):
                        t.save()
                evaluate_if_due(t, log, watchdog)


def grouped(loader: PackLoader) -> Iterator[Iterator[Microbatch]]:
    """The microbatches of one step after the other, for as long as is asked; read when they are taken."""
    stream = iter(loader)
    while True:
        yield itertools.islice(stream, loader.microbatches_per_step)


def marking_last(microbatches: Iterator[Microbatch]) -> Iterator[tuple[Microbatch, bool]]:
    """Each with whether it is the last: a, b -> (a, False), (b, True). Reads one ahead."""
    ahead = next(microbatches)
    for following in microbatches:
        yield ahead, False
        ahead = following
    yield ahead, True


@contextlib.contextmanager
def naming_memory(microbatch: Microbatch) -> Iterator[None]:
    """A GPU without memory left says which pack it had in hand.

    Raises:
        UserError: in place of torch's OutOfMemoryError, with the pack's size and samples.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"{microbatch.num_tokens:,} tokens and {microbatch.num_images:,} images"
        keys = ", ".join(microbatch.keys) or "none"
        raise UserError(
            f"no memory left for a microbatch of {what} (samples {keys}): lower "
            "data.max_tokens or data.max_images, or set model.activation_checkpointing; "
            f"`python pipelines/plan_memory.py RECIPE` says what fits. torch says: {error}"
        ) from error


def is_due(step: int, every: int) -> bool:
    """Every ``every`` steps; never for 0."""
    return every > 0 and step % every == 0


def evaluate_if_due(t: Training, log: MetricsLog, watchdog: Watchdog) -> None:
    """Once after each ``eval.every`` steps; after a restart, if the checkpoint was written before it."""
    if is_due(t.step, t.recipe.eval.every) and t.evaluated != t.step:
        with watchdog.around("evaluation"):
            if evaluate(t, log):
                t.save()


def evaluate(t: Training, log: MetricsLog) -> bool:
    """Validation figures into the log; whether this is the lowest loss so far and worth keeping."""
    t.evaluated = t.step
    figures = t.evaluation.run()
    if not figures:
        return False
    log.write({"step": t.step, **figures})
    log.say(
        "  validation: "
        + "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if "/" not in name)
    )
    loss = figures.get("val_loss")
    if loss is None or (t.best is not None and loss >= t.best[0]):
        return False
    t.best = (loss, t.step)
    return t.recipe.eval.keep_best


def finish(t: Training, log: MetricsLog, *, started_at: int) -> None:
    """After the loop: save, and if all steps are done, evaluate and export."""
    run_dir, done = Path(t.recipe.run.dir), t.step >= t.total_steps
    if done and t.evaluated != t.step:
        evaluate(t, log)
    if t.step > started_at:
        t.save()
    t.checkpoints.wait()  # whole before anything else takes room on the disk and in memory
    if not done:
        log.say(f"stopped after step {t.step} of {t.total_steps}; the same command goes on from there")
        return
    final = export(t.built.model, t.recipe, t.datasets, t.world, step=t.step, best=t.best)
    if t.ema is not None:
        with t.ema.in_place():
            export(t.built.model, t.recipe, t.datasets, t.world, step=t.step, best=t.best, is_mean=True)
    log.say(f"done: {final}")
    if t.recipe.log.plot and t.world.is_main:
        plot(run_dir)


def announce(t: Training, log: MetricsLog, *, resumed: bool) -> None:
    """What is about to happen."""
    micro = t.loader.microbatches_per_step
    log.say(parameter_table(t.built.model, t.optimizer))
    log.say(batch_arithmetic(t.recipe.data, t.world, microbatches=micro, total_steps=t.total_steps))
    for line in hint(t.recipe, t.world, t.built.model.parameters(), steps=t.total_steps - t.step):
        log.say(line)
    for line in tail_of_epoch(t.recipe.data, t.world, t.loader.plan.totals.num_packs):
        log.say(line)
    if resumed:
        log.say(f"resumed after step {t.step}")
        for line in t.checkpoints.changes:
            log.say(f"  changed since that checkpoint: {line}")


def train(recipe: Recipe) -> None:
    """A whole run, or the rest of one."""
    if recipe.guard.plan_memory and os.environ.get("RANK", "0") == "0":
        print(check_rehearsed(recipe), flush=True)
    with start(recipe) as world, contextlib.ExitStack() as held:
        held.enter_context(RunLock(Path(recipe.run.dir), world))
        t = prepare(recipe, world)
        resumed = t.resume()
        run_dir, started_at = Path(recipe.run.dir), t.step
        log = MetricsLog(
            recipe, run_dir, world, step=t.step, evaluated=t.evaluated, total_steps=t.total_steps
        )
        announce(t, log, resumed=resumed)
        watchdog = Watchdog(recipe.guard, run_dir, rank=world.rank)
        try:
            with StopSignal() as stop:
                if resumed and t.step < t.total_steps:
                    evaluate_if_due(t, log, watchdog)
                loop(t, log, watchdog, stop)
                with watchdog.around("last evaluation, checkpoint and export"):
                    finish(t, log, started_at=started_at)
        finally:
            watchdog.close()
            log.close()
            t.checkpoints.close()


def main(arguments: list[str]) -> int:
    """``train.py RECIPE [dotted.key=value ...] [--profile]``"""
    try:
        train(recipe_of(arguments, __doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"error: no space left for the run's files ({error}). Checkpoints that are there are whole: free "
            "some space and start the same command again",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
