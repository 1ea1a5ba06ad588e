"""What a run tells: every step as a line of metrics.jsonl, now and then a line for people, and viewers.

    {"step": 40, "loss": 1.92, "grad_norm": 0.8, "lr": 0.0003, "tokens": 8110, "tokens_per_s": 5231.0, ...}

    step   40/400  loss 1.9203  norm 0.80  lr 3.0e-04  5.2k tok/s  41 img/s  900 sup/s  wait 0.4%  …

All figures are of all ranks together. MFU is counted from the model's FLOPs, without recomputation, against
the data sheet's peak; it is left out where no peak is known (on a CPU).
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from omnidata.loader.microbatch import Microbatch
from omnidata.printable import clock
from omnimodel.parts import Parts

from .config import DataConfig, Recipe, to_dict
from .data import num_supervised
from .flops import FlopCount, ProcessorFlopCount, peak_flops
from .parallel import World

COUNTS = ("tokens", "supervised_tokens", "images", "samples", "skipped_samples", "flops")  # over all ranks


@dataclass
class StepCounts:
    """What this rank did in one step."""

    flop_count: FlopCount | ProcessorFlopCount
    started: float = field(default_factory=time.perf_counter)
    wait: float = 0.0  # seconds in which the loader had nothing ready
    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0.0))
    keys: list[str] = field(default_factory=list)  # samples of the step on this rank

    def waiting_for(self, microbatches: Iterator[Microbatch]) -> Iterator[Microbatch]:
        """The same microbatches; the time until each is there counts as waiting."""
        while True:
            begin = time.perf_counter()
            microbatch = next(microbatches, None)
            self.wait += time.perf_counter() - begin
            if microbatch is None:
                return
            yield microbatch

    def add(self, microbatch: Microbatch) -> None:
        """Count one microbatch."""
        self.keys += microbatch.keys
        self.totals["tokens"] += microbatch.num_tokens
        self.totals["supervised_tokens"] += num_supervised(microbatch)
        self.totals["images"] += microbatch.num_images
        self.totals["samples"] += len(microbatch.keys)
        self.totals["skipped_samples"] += microbatch.num_skipped
        self.totals["flops"] += self.flop_count.microbatch(microbatch)

    def line(self, world: World) -> dict[str, float]:
        """Counts and rates over all ranks. Call on every rank once the step's work is done."""
        seconds = time.perf_counter() - self.started
        sums = world.sum([*self.totals.values(), self.wait / seconds])
        line: dict[str, float] = dict(zip(COUNTS, sums, strict=False))
        flops, wait = line.pop("flops"), sums[-1] / world.size
        for name in ("tokens", "images", "supervised_tokens", "samples"):
            line[f"{name}_per_s"] = line[name] / seconds
        line |= {"seconds": seconds, "data_wait": wait, "memory_gb": memory_gb(world.device)}
        peak = peak_flops(world.device)
        if peak:
            line["mfu"] = flops / (seconds * peak * world.size)
        return line


def memory_gb(device: torch.device) -> float:
    """Most memory held so far: of the GPU's allocator, or of this process on a CPU; decimal GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class MetricsLog:
    """metrics.jsonl, the terminal, TensorBoard and a tracker; silent on all ranks but the first."""

    def __init__(
        self, recipe: Recipe, run_dir: Path, world: World, *, step: int, evaluated: int, total_steps: int
    ) -> None:
        self.recipe, self.world, self.total_steps = recipe, world, total_steps
        self._window: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        self._sinks: list[Any] = []
        if world.is_main:
            path = run_dir / "metrics.jsonl"
            forget_after(path, step, evaluated)
            self._file = path.open("a", buffering=1)
            self._sinks = list(_open_sinks(recipe, run_dir, step))

    def say(self, text: str) -> None:
        """A line for people."""
        if self.world.is_main:
            print(text, flush=True)

    def warn(self, text: str | None) -> None:
        """Something that a person should look at."""
        if text:
            self.say(f"warning: {text}")

    def step(self, line: Mapping[str, Any]) -> None:
        """One training step."""
        self.write(line)
        self._window.append(dict(line))
        every = self.recipe.log.every
        if line["step"] % every == 0 or line["step"] in (1, self.total_steps):
            self.say(progress(self._window, self.total_steps))
            skipped = sum(line["skipped_samples"] for line in self._window)
            if skipped:
                self.warn(f"{skipped:.0f} unreadable samples left out since the last line")
            self._window = []

    def write(self, line: Mapping[str, Any]) -> None:
        """One line of figures, "step" among them."""
        if self._file is not None:
            self._file.write(json.dumps(_rounded(line)) + "\n")
            for sink in self._sinks:
                sink.log(line)

    def close(self) -> None:
        """No more lines."""
        if self._file is not None:
            self._file.close()
            for sink in self._sinks:
                sink.close()


def forget_after(path: Path, step: int, evaluated: int) -> None:
    """Drop the lines that a resumed run is about to repeat, so that each is there once.

    They are those of steps after ``step``, and of evaluations after the step ``evaluated``.
    """
    if not path.exists():
        return
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    kept = [line for line in whole if _is_final(json.loads(line), step, evaluated)]
    if whole and not kept:  # killed before its first checkpoint: its lines stay to be seen
        os.replace(path, path.with_suffix(f".before-{time.time_ns()}.jsonl"))
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _is_final(line: Mapping[str, Any], step: int, evaluated: int) -> bool:
    return line["step"] <= (step if "loss" in line else evaluated)


def progress(window: list[dict[str, Any]], total_steps: int) -> str:
    """The line for people: mean loss and rates over the steps since the last one, else of the last step."""
    last = window[-1]
    seconds = sum(line["seconds"] for line in window)
    loss = sum(line["loss"] for line in window) / len(window)

    def rate(name: str) -> str:
        return _short(sum(line[name] for line in window) / seconds)

    wait = sum(line["data_wait"] * line["seconds"] for line in window) / seconds
    eta = (total_steps - last["step"]) * seconds / len(window)
    mfu = f"  mfu {last['mfu']:.1%}" if "mfu" in last else ""
    return (
        f"step {last['step']:>{len(str(total_steps))}}/{total_steps}  loss {loss:.4f}  "
        f"norm {last['grad_norm']:.2f}  lr {last['lr']:.1e}  "
        f"{rate('tokens')} tok/s  {rate('images')} img/s  {rate('supervised_tokens')} sup/s"
        f"{mfu}  wait {wait:.1%}  {last['memory_gb']:.1f} GB  eta {clock(eta)}"
    )


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"


def _rounded(line: Mapping[str, Any]) -> dict[str, Any]:
    """Rates lose digits that are noise; losses and norms keep all, so that runs can be compared exactly."""

    def one(name: str, value: Any) -> Any:
        if not isinstance(value, float):
            return value
        if not math.isfinite(value):
            return None  # JSON has no NaN
        return value if name in ("loss", "grad_norm", "lr", "val_loss", "val_loss_ema") else round(value, 4)

    return {name: one(name, value) for name, value in line.items()}


@dataclass(frozen=True)
class _Sink:
    """A viewer."""

    log: Callable[[Mapping[str, Any]], None]
    close: Callable[[], None]


def _open_sinks(recipe: Recipe, run_dir: Path, step: int) -> Iterator[_Sink]:
    if recipe.log.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        # Steps after the one that the run goes on from were written before it stopped: hide them.
        writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

        def to_tensorboard(line: Mapping[str, Any]) -> None:
            for name, value in line.items():
                if name != "step":
                    writer.add_scalar(name, value, line["step"])

        yield _Sink(to_tensorboard, writer.close)
    if recipe.log.tracker != "none":
        yield _open_tracker(recipe, run_dir)


def _open_tracker(recipe: Recipe, run_dir: Path) -> _Sink:
    """wandb and trackio share these calls."""
    name = recipe.log.tracker
    os.environ.setdefault("WANDB_DIR", str(run_dir))  # or it would write into the current folder
    tracker = importlib.import_module(name)
    run = {"project": recipe.log.project, "name": run_dir.name, "config": to_dict(recipe)}
    if name == "wandb":
        run["id"] = _tracker_id(run_dir)  # trackio knows a run by its name
    tracker.init(**run, resume="allow")  # a restart goes on with the same run

    def to_tracker(line: Mapping[str, Any]) -> None:
        tracker.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])

    return _Sink(to_tracker, tracker.finish)


def _tracker_id(run_dir: Path) -> str:
    """The run's name to wandb, drawn once and kept in its folder: another folder is another run."""
    path = run_dir / "tracker-id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()


# --- told once, at the start ------------------------------------------------------------------------------


def batch_arithmetic(data: DataConfig, world: World, *, microbatches: int, total_steps: int) -> str:
    """How packs become steps, in one line."""
    return (
        f"{data.global_batch} packs per step = {world.size} rank(s) x {microbatches} microbatch(es) of up to "
        f"{data.max_tokens} tokens; {total_steps} steps"
    )


def parameter_table(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Component, parameters, how many of them learn, dtype, peak learning rate."""
    peaks = {group["component"]: group["peak_lr"] for group in optimizer.param_groups}
    rows = [("component", "parameters", "trainable", "dtype", "peak lr")]
    parts = Parts(model)
    for name in parts.names:
        parameters = parts.parameters(name)
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
        peak = f"{peaks[name]:.1e}" if name in peaks else "-"
        total = sum(p.numel() for p in parameters)
        rows.append((name, f"{total:,}", f"{trainable:,}", "+".join(dtypes), peak))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    template = "{:<%d}  {:>%d}  {:>%d}  {:<%d}  {:>%d}" % tuple(widths)  # noqa: UP031
    return "\n".join(template.format(*row) for row in rows)
