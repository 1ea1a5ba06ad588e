"""Imported by the fork server of a build: reads tokenizer or processor while the command looks at sources.

Workers are forked from it, so the dataset's copy of the same tokenizer is not read again
(omnidata.text.prepared), nor is what renders with it made again (omnidata.text.encoder). A processor's copy
is loaded by each, but its modules are imported: 0.4 seconds less.
"""

import contextlib
import os
from pathlib import Path

from omnidata.profiles.folder import load_processor
from omnidata.schema import CONTENT_TOKENS, UserError
from omnidata.start import MODEL, TOKENIZER
from omnidata.text.encoder import encoder_of
from omnidata.text.prepared import load_prepared

if folder := os.environ.get(TOKENIZER):
    with contextlib.suppress(OSError, UserError):  # the command itself says what is wrong with it
        if tokenizer := load_prepared(folder):
            encoder_of(tokenizer, content_tokens=CONTENT_TOKENS)
if (folder := os.environ.get(MODEL)) and Path(folder).is_dir():  # a hub is asked once, by the command
    with contextlib.suppress(UserError):
        load_processor(folder)
