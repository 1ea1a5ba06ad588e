"""Buffers: memory that the training process owns and lends to a worker for one microbatch's images.

    Lender.lend ──▶ Loan, and the buffer's descriptor if the worker has not seen it ──▶ Borrower.memory
    array over the Loan's buffer ──▶ Microbatch.images ──▶ dropped ──▶ the buffer is free for the next Loan

A buffer is mapped once on both sides. A fresh mapping for every microbatch would spend more time in page
faults than in the copy that it saves, and would need a place in /dev/shm, which containers keep small.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np

_ROUND_UP = 1 << 20  # bytes: buffers come in steps, so that few sizes serve all microbatches


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Shared memory, mapped in this process; unmapped when nobody refers to it any more."""

    number: int  # its name on both sides
    memory: mmap.mmap


@dataclass(frozen=True, slots=True)
class Loan:
    """What the worker is told. Sent before the descriptor, if that is needed at all."""

    number: int
    num_bytes: int
    is_new: bool  # a descriptor follows
    forget: tuple[int, ...]  # buffers that were too small and will not be lent again


class Lender:
    """The training process's side, for one worker."""

    def __init__(self) -> None:
        self._free: deque[Buffer] = deque()  # appended to by whoever drops a microbatch, from any thread
        self._num_created = 0

    def lend(self, num_bytes: int) -> tuple[Buffer, Loan, int | None]:
        """A free buffer of at least ``num_bytes``, or a new one and its descriptor, to send and close."""
        for _ in range(len(self._free)):
            buffer = self._free.popleft()
            if len(buffer.memory) >= num_bytes:
                return buffer, Loan(buffer.number, len(buffer.memory), False, ()), None
            self._free.append(buffer)
        forget = (self._free.popleft().number,) if self._free else ()
        num_bytes = -(-num_bytes // _ROUND_UP) * _ROUND_UP
        descriptor = _anonymous_file()
        os.truncate(descriptor, num_bytes)
        buffer = Buffer(self._num_created, mmap.mmap(descriptor, num_bytes))
        self._num_created += 1
        return buffer, Loan(buffer.number, num_bytes, True, forget), descriptor

    def array(self, buffer: Buffer, shape: tuple[int, ...]) -> np.ndarray:
        """uint8 over the buffer, which is free again when the array and all views of it are dropped."""
        flat = np.frombuffer(buffer.memory, np.uint8, int(np.prod(shape)))
        weakref.finalize(flat, self._free.append, buffer).atexit = False
        return flat.reshape(shape)

    def take_back(self, buffer: Buffer) -> None:
        """The buffer was not needed, or what it held has been copied."""
        self._free.append(buffer)


def _anonymous_file() -> int:
    """The descriptor of a file without a name: in memory on Linux, elsewhere a deleted temporary one."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("omnidata-images")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Borrower:
    """The worker's side."""

    def __init__(self) -> None:
        self._buffers: dict[int, mmap.mmap] = {}

    def memory(self, loan: Loan, descriptor: int | None) -> np.ndarray:
        """The buffer of ``loan`` as uint8; ``descriptor`` is closed."""
        for number in loan.forget:
            self._buffers.pop(number, None)
        if descriptor is not None:
            self._buffers[loan.number] = mmap.mmap(descriptor, loan.num_bytes)
            os.close(descriptor)
        return np.frombuffer(self._buffers[loan.number], np.uint8)
