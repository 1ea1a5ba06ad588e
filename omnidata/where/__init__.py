"""Where: which samples of a dataset to take, as a condition on the columns of its index.

    relevance_min >= 4 and n_images <= 8 and source != "ocr.json"
    task in ["vqa", "caption"] and not (lang is null or lang == "de")
    100 <= n_tokens < 2000 and `my column` == true

The grammar, from the loosest to the tightest::

    condition   = all {"or" all}
    all         = not {"and" not}
    not         = ["not"] (comparison | "(" condition ")")
    comparison  = value operator value [operator value]         ==  !=  <  <=  >  >=
                | column ["not"] "in" "[" literal {"," literal} "]"
                | column "is" ["not"] "null"
                | column                                        of true and false
    value       = column | literal
    literal     = 12, -0.5, 1e-3, "text", 'text', true, false          a backslash before " or \\ in a text

A column whose name is no word stands in backquotes. A sample that has no value in a column meets no
comparison with it, ``!=`` and ``not in`` included; ``is null`` asks for such samples.

``Where`` is parsed without ``eval`` and becomes a ``pyarrow.dataset`` expression, so row groups whose
statistics rule it out are not even read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from omnidata.index import kept_fields, open_parquet, reading_table
from omnidata.schema import INDEX
from omnidata.where.binder import Binder
from omnidata.where.grammar import Parser, names_of, spell

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq


class Where:
    """A parsed condition.

    >>> str(Where("n_images<=8 and source!='ocr.json'"))
    'n_images <= 8 and source != "ocr.json"'

    Raises:
        UserError: what is wrong with the text, and at which character.
    """

    def __init__(self, text: str) -> None:
        self._tree = Parser(text).parse()

    def __str__(self) -> str:
        """The same for every spelling of the same condition: what a digest is made from."""
        return spell(self._tree)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Where) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def columns(self) -> list[str]:
        """The columns that it asks for, each once."""
        return list(dict.fromkeys(name.name for name in names_of(self._tree)))

    def expression(self, schema: pa.Schema, *, name: str) -> ds.Expression:
        """The ``pyarrow.dataset`` expression over a table of this schema; ``name`` is the dataset's.

        Raises:
            UserError: an unknown column, or a comparison of what cannot be compared.
        """
        return Binder(schema, name).bind(self._tree)

    def find(self, file: BinaryIO | pa.NativeFile, *, name: str, split: str | None = None) -> np.ndarray:
        """Rows of an index that meet the condition, and are of the split.

        Only the columns that the condition names are read, of the row groups whose statistics allow a match.

        Args:
            file: the index, open.
            name: the dataset's, for messages.

        Returns:
            int64, ascending positions in the whole index.

        Raises:
            UserError: as ``expression``; or the index is damaged.
        """
        import pyarrow.dataset as ds

        with reading_table(f"{name}/{INDEX}"):
            parquet, threads = open_parquet(file)
            schema = parquet.schema_arrow
            kept_fields(schema, f"{name}/{INDEX}")
            condition = self.expression(schema, name=name)
            if split is not None:
                condition &= ds.field("split") == split
            groups = _row_groups(file, condition)
            columns = list(dict.fromkeys([*self.columns, "split"]))
            table = parquet.read_row_groups(groups, columns=columns, use_threads=threads)
        return table.append_column(_ROW, [_rows_of(parquet, groups)]).filter(condition)[_ROW].to_numpy()


_ROW = "\0row"  # no column of an index is called so


def _row_groups(file: BinaryIO | pa.NativeFile, condition: ds.Expression) -> list[int]:
    """The row groups that may hold a match, by their statistics."""
    import pyarrow.dataset as ds

    fragment = ds.ParquetFileFormat().make_fragment(file).subset(filter=condition)
    return [group.id for group in fragment.row_groups]


def _rows_of(parquet: pq.ParquetFile, groups: list[int]) -> np.ndarray:
    metadata = parquet.metadata
    ends = np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], dtype=np.int64)
    spans = [np.arange(ends[i] - metadata.row_group(i).num_rows, ends[i]) for i in groups]
    return np.concatenate(spans) if spans else np.zeros(0, np.int64)
