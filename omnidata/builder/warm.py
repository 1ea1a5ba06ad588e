"""Imported by the fork server of a build: reads the tokenizer while the command looks at its sources.

Workers are forked from it, so the dataset's copy of the same file is not read again (omnidata.text.prepared),
nor is what renders with it made again (omnidata.text.encoder).
"""

import contextlib
import os

from omnidata.schema import CONTENT_TOKENS, UserError
from omnidata.start import TOKENIZER
from omnidata.text.encoder import encoder_of
from omnidata.text.prepared import load_prepared

if folder := os.environ.get(TOKENIZER):
    with contextlib.suppress(OSError, UserError):  # the command itself says what is wrong with it
        if tokenizer := load_prepared(folder):
            encoder_of(tokenizer, content_tokens=CONTENT_TOKENS)
