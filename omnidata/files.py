"""Local files of somebody else's dataset: only regular ones are opened.

Opening a named pipe waits for its writer, for ever, and reading a device may never end. Every door through
which a dataset's file is opened asks here first.
"""

from __future__ import annotations

import os
import stat

from omnidata.schema import UserError


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what is there and is no regular file (a link to one is fine); what is missing is no matter.

    Raises:
        UserError: a folder, pipe, socket or device.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:  # whoever opens it says why it cannot be
        return
    if not stat.S_ISREG(mode):
        raise UserError(f"{os.fspath(path)} is not a regular file: the dataset is damaged or not trustworthy")


def open_regular(path: str) -> int:
    """A descriptor of a regular file, for reading; never waits.

    Raises:
        OSError: there is no such file, or it is none that can be read.
        UserError: it is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise UserError(f"{path} is not a regular file: the dataset is damaged or not trustworthy")
