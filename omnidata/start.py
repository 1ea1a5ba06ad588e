"""Start: what a command does first, so that it answers at once.

Measured on a build of eight records, in seconds of CPU: pandas 0.2 in each process that made a table with
pyarrow; the workers' imports 0.4, one after the other with the command's own until both began together.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

# Imported by the fork server once, before the workers are forked from it.
WORKER = ("omnidata.builder.worker", "omnidata.without_pandas", "omnidata.builder.warm")
TOKENIZER = "OMNIDATA_WARM_TOKENIZER"  # in that server's environment: the folder of the build's tokenizer
MODEL = "OMNIDATA_WARM_MODEL"  # the folder of its model


class _NoPandas:
    """A finder of modules that says that there is no pandas."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ImportError(f"{__name__} keeps pandas out for a moment")


def keep_pandas_out() -> None:
    """Let pyarrow make its first array without pandas, which it would import, if there, to know a Series.

    For processes of our own only: where others hand pyarrow a Series afterwards, it takes it for a sequence.
    (``to_pandas()`` works all the same.)
    """
    sys.meta_path.insert(0, _NoPandas)
    try:
        import pyarrow

        pyarrow.array([0])
    finally:
        sys.meta_path.remove(_NoPandas)


def worker_imports(*, model: str = "", max_slices: int = 0) -> Sequence[str]:
    """What a build's workers need."""
    if model:
        return (*WORKER, "torch", "transformers.models.auto.processing_auto")
    return (*WORKER, "torch") if max_slices else WORKER  # tiles are cut as training resizes
