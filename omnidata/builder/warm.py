"""Imported by the fork server of a build: reads the tokenizer while the command looks at its sources.

Workers are forked from it, so the dataset's copy of the same file is not read again (omnidata.text.prepared).
"""

import contextlib
import os

from omnidata.start import TOKENIZER
from omnidata.text.prepared import load_prepared

if folder := os.environ.get(TOKENIZER):
    with contextlib.suppress(OSError):  # the command itself says what is wrong with it
        load_prepared(folder)
