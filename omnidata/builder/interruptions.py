"""Interruptions: what may end a build at any time, and how: in one clear line, with all that is done kept."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from omnidata.durable import HOPELESS, Store
from omnidata.schema import UserError

# Libraries under fsspec whose errors are no OSError: a short body, a wrong checksum, no answer.
CLIENTS = ("aiohttp", "aiobotocore", "azure", "botocore", "gcsfs", "google", "requests", "urllib3")


class BuildInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; the message says how to go on."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM (a scheduler that wants the machine back) ends a build as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
    before = signal.signal(signal.SIGTERM, interrupt) if in_main else None
    try:
        yield
    except KeyboardInterrupt:
        raise BuildInterrupted("Interrupted. Run the same command again to go on.") from None
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def one_clear_line(store: Store) -> Iterator[None]:
    """For errors of the file system that trying again cannot mend, and for those of an object store."""
    try:
        yield
    except OSError as error:
        if error.errno not in HOPELESS:
            raise
        raise UserError(
            f"cannot write to {store.url}: {error}. What is built is kept: "
            "mend that (free some space?) and run the same command again."
        ) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in CLIENTS:
            raise
        raise UserError(
            f"the object store failed: {type(error).__name__}: {' '.join(str(error).split())}. "
            "What is built is kept: run the same command again."
        ) from error
