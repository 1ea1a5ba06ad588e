"""What stops a run, or saves it: signals, non-finite gradients, loss spikes, stalled ranks.

SIGTERM, SIGUSR1, SIGINT   StopSignal.requested: finish the step, save, exit 0; a second SIGINT aborts
NaN or Inf gradient        LossGuard.nonfinite: skip the update on all ranks; stop after N in a row
loss far over its mean     LossGuard.check_spike: a warning that names the step's samples
no step for N seconds      Watchdog: every thread's stack goes to a file, a line to stderr, the process exits
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from omnidata.schema import UserError

from .config import GuardConfig
from .parallel import shorten_timeout

GRACE_SECONDS = 10.0


class StopSignal:
    """Turns the scheduler's notice into a flag, which ranks vote on between two steps. A context manager.

    Only the handler writes the flag: what a rank does about it is decided by the vote, so that a signal that
    reaches some ranks at any moment stops all of them after the same step. It stays until the run has ended,
    so that a second signal does not kill the last save.
    """

    def __init__(self) -> None:
        self.requested = self._interrupted = False

    def __enter__(self) -> StopSignal:
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.requested = True


class LossGuard:
    """Counts non-finite steps and watches the loss; writes the keys of suspicious samples to a file."""

    def __init__(self, config: GuardConfig, run_dir: Path, *, rank: int) -> None:
        self.config, self.rank = config, rank
        self.path = run_dir / f"suspicious-samples-rank{rank}.jsonl"
        self.num_nonfinite = 0  # over the run
        self.in_a_row = 0
        self.mean: float | None = None  # exponential running mean of the loss

    def nonfinite(self, step: int, keys: Sequence[str]) -> str:
        """Count one skipped step; after ``max_nonfinite`` in a row, stop the run on all ranks alike."""
        self.num_nonfinite += 1
        self.in_a_row += 1
        self._write(step, "non-finite gradient", keys)
        if self.in_a_row >= self.config.max_nonfinite:
            raise UserError(
                f"step {step}: the gradient was not finite {self.in_a_row} steps in a row. The samples are "
                f"in {self.path.parent}/suspicious-samples-rank*.jsonl (omnidata inspect --key shows one). "
                "Lower optim.lr, lengthen optim.warmup_steps, or remove the samples"
            )
        return f"step {step}: gradient not finite, no update ({self.num_nonfinite} so far); see {self.path}"

    def finite(self, step: int, loss: float, keys: Sequence[str]) -> str | None:
        """Note a sound step; returns a warning when its loss spikes."""
        self.in_a_row = 0
        mean, factor = self.mean, self.config.spike_factor
        self.mean = loss if mean is None else 0.98 * mean + 0.02 * loss
        # Early losses fall quickly and are no yardstick, but a fall is no spike either.
        if not factor or mean is None or loss <= factor * mean:
            return None
        self._write(step, f"loss {loss:.4f}, mean {mean:.4f}", keys)
        return f"step {step}: loss {loss:.4f} is over {factor:g}x its mean {mean:.4f}; samples in {self.path}"

    def _write(self, step: int, reason: str, keys: Sequence[str]) -> None:
        with self.path.open("a") as file:
            file.write(
                json.dumps({"step": step, "reason": reason, "rank": self.rank, "keys": list(keys)}) + "\n"
            )

    def state_dict(self) -> dict[str, float | int | None]:
        """Travels with checkpoints, so that a resumed run warns and stops where the other would have."""
        return {"num_nonfinite": self.num_nonfinite, "in_a_row": self.in_a_row, "mean": self.mean}

    def load_state_dict(self, state: dict[str, float | int | None]) -> None:
        """Inverse of state_dict."""
        self.num_nonfinite, self.in_a_row = int(state["num_nonfinite"] or 0), int(state["in_a_row"] or 0)
        self.mean = state["mean"]


class Watchdog:
    """Ends a process whose loop has not come round for a while, after dumping all its stacks.

    Python's faulthandler runs it on a C thread: it works while a collective holds the interpreter lock. The
    exit code is 1, so torchrun ends the other ranks, and the next start resumes from the last checkpoint.
    """

    def __init__(self, config: GuardConfig, run_dir: Path, *, rank: int) -> None:
        self.config, self.rank = config, rank
        self._timer: threading.Timer | None = None
        self.path = run_dir / f"stalled-rank{rank}.txt"
        self.file = self.path.open("w")
        self.first_step_done = False
        self._arm(config.first_step_timeout)

    def _arm(self, seconds: float, what: str = "finished step") -> None:
        self.pause()
        self._timer = threading.Timer(seconds, self._end, (seconds, what))
        self._timer.daemon = True
        self._timer.start()
        # Should the interpreter's lock be held for ever, this needs none.
        faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True, file=self.file)

    def _end(self, seconds: float, what: str) -> None:
        print(
            f"error: rank {self.rank}: no {what} for {seconds:g} s, so it ends; stacks: {self.path}",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(self.file, all_threads=True)
        self.file.flush()
        os._exit(1)

    @contextlib.contextmanager
    def around(self, what: str) -> Iterator[None]:
        """Something that is no step: an evaluation, a save, the export. Collectives may wait as long."""
        seconds = self.config.evaluation_timeout
        shorten_timeout(seconds)
        self._arm(seconds, what)
        yield
        shorten_timeout(self.config.step_timeout if self.first_step_done else self.config.first_step_timeout)
        self._arm(self.config.step_timeout if self.first_step_done else self.config.first_step_timeout)

    def step_finished(self) -> None:
        """Start counting again; from the second step on with the short timeout, which collectives get too."""
        if not self.first_step_done:
            shorten_timeout(self.config.step_timeout)
        self.first_step_done = True
        self._arm(self.config.step_timeout)

    def pause(self) -> None:
        """Stop counting."""
        if self._timer:
            self._timer.cancel()
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """The loop is over; leave no empty file."""
        self.pause()
        self.file.close()
        if not self.path.stat().st_size:
            self.path.unlink()
