"""What stops a run, or saves it: signals, non-finite gradients, loss spikes, stalled ranks.

SIGTERM / SIGUSR1          StopSignal.requested: finish the step, save, exit 0
NaN or Inf gradient        LossGuard.nonfinite: skip the update on all ranks; stop after N in a row
loss far over its mean     LossGuard.check_spike: a warning that names the step's samples
no step for N seconds      Watchdog: every thread's stack goes to a file, then the process exits
"""

from __future__ import annotations

import faulthandler
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from omnidata.schema import UserError
from pipelines.config import GuardConfig
from pipelines.parallel import shorten_timeout


class StopSignal:
    """Turns the scheduler's notice into a flag that the loop reads between two steps. A context manager."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignal:
        numbers = (signal.SIGTERM, signal.SIGUSR1)
        self._previous = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
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
        self.num_nonfinite, self.in_a_row, self.mean = (
            state["num_nonfinite"],
            state["in_a_row"],
            state["mean"],
        )


class Watchdog:
    """Ends a process whose loop has not come round for a while, after dumping all its stacks.

    Python's faulthandler runs it on a C thread: it works while a collective holds the interpreter lock. The
    exit code is 1, so torchrun ends the other ranks, and the next start resumes from the last checkpoint.
    """

    def __init__(self, config: GuardConfig, run_dir: Path, *, rank: int) -> None:
        self.config = config
        self.path = run_dir / f"stalled-rank{rank}.txt"
        self.file = self.path.open("w")
        self.first_step_done = False
        self._arm(config.first_step_timeout)

    def _arm(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=self.file)

    def step_finished(self) -> None:
        """Start counting again; from the second step on with the short timeout, which collectives get too."""
        if not self.first_step_done:
            shorten_timeout(self.config.step_timeout)
        self.first_step_done = True
        self._arm(self.config.step_timeout)

    def pause(self) -> None:
        """Stop counting."""
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """The loop is over; leave no empty file."""
        self.pause()
        self.file.close()
        if not self.path.stat().st_size:
            self.path.unlink()
