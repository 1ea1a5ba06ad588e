"""What a record may cause, caught in one place: its refusal, or an error that nobody foresaw.

A build of a million records must not end over one of them. An exception that no stage raises on purpose is a
mistake of ours (or of a library), so it becomes a reject of its own reason, ``unexpected``, that says where
it came from; it is counted, and the build ends with exit code 1, so that somebody hears of it.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from omnidata.schema import RejectError, UserError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def caught(
    function: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
) -> Result | RejectError:
    """The function's result, or why there is none, as a RejectError.

    Raises:
        UserError: the settings are wrong, not the record.
        OSError: the disk or the network failed (an error of theirs has a number).
    """
    try:
        return function(*arguments, **named)
    except RejectError as error:
        return error
    except UserError:
        raise
    except RecursionError:
        return RejectError("bad_record", "its values are nested too deep")
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return unexpected(error)


def without_addresses(text: str) -> str:
    """``<BytesIO object at 0x7f…>`` differs from run to run; a dataset's bytes must not."""
    return _ADDRESS.sub("0x…", text)


_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")


def unexpected(error: Exception) -> RejectError:
    """The reject of an error that nobody foresaw; it names the line that raised it, and no addresses."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}omnidata{os.sep}" in frame.filename] or frames
    place = f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno}" if ours else "no line"
    text = without_addresses(" ".join(str(error).split()))[:200]
    return RejectError("unexpected", f"{type(error).__name__} at {place}: {text}; please report it")
