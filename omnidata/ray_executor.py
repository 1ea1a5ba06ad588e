"""RayExecutor: tasks on a Ray cluster, with the same events as the executors of one machine.

Ray is an extra, imported when an executor is made. Its own retries are off: ``run_tasks`` counts them, and
names the record that a worker died of.
"""

from __future__ import annotations

import os
import socket

from omnidata.executors import Died, Done, Event, Failed, Work, portable
from omnidata.schema import UserError


class RayExecutor:
    """Tasks of a Ray cluster: the one RAY_ADDRESS names, else one started on this machine.

    The output, the corpus and the images must be at paths or URLs that every node can open.
    """

    def __init__(self, work: Work, *, num_workers: int | None, folder: str | None = None) -> None:
        """``folder``: where relative paths start, which every node must have; None: there are none."""
        try:
            import ray
        except ImportError:
            raise UserError("--executor ray needs Ray: pip install 'omnilmm-toolkit[ray]'") from None
        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            address = os.environ.get("RAY_ADDRESS")
            size = {} if address else {"num_cpus": num_workers, "include_dashboard": False}
            ray.init(address=address or "local", log_to_driver=False, logging_level="error", **size)
        self.capacity = num_workers or int(ray.cluster_resources().get("CPU", 1))
        self._remote = ray.remote(max_retries=0, num_cpus=1)(_ray_task)
        self._work, self._folder = ray.put(work), folder
        self._running: dict[object, object] = {}

    def submit(self, task: object) -> None:
        """Start a Ray task."""
        self._running[self._remote.remote(self._work, self._folder, task)] = task

    def wait(self) -> list[Event]:
        """Block until a Ray task ended."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        return [self._event(reference) for reference in ready]

    def _event(self, reference: object) -> Event:
        task, errors = self._running.pop(reference), self._ray.exceptions
        try:
            return Done(task, self._ray.get(reference))
        except errors.RayTaskError as error:
            return Failed(task, error.cause)
        except errors.RayError as error:
            return Died(task, f"{type(error).__name__}: {error}".splitlines()[0])

    def close(self) -> None:
        """Cancel what runs; leave a cluster that was there before us as it was."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._started:
            self._ray.shutdown()


def _ray_task(work: Work, folder: str | None, task: object) -> object:
    """Runs on a Ray worker. Nothing is reported on the way: the result says it all."""
    try:
        if folder is not None:
            _enter(folder)
        return work(task, lambda data: None)
    except Exception as error:
        raise portable(error) from error


def _enter(folder: str) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} has no {folder}, where relative paths start ({error.strerror}). "
            "Give paths on storage that all nodes share, or URLs."
        ) from error
