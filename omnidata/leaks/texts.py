"""A sample's text, from its ids: without images and special tokens."""

from __future__ import annotations

from typing import Any

from omnidata.dataset import Dataset
from omnidata.schema import Sample, UserError
from omnidata.shards import CorruptSampleError
from omnidata.text.tokenizer import load_tokenizer


class TextReader:
    """Reads samples of a dataset and decodes their ids."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._tokenizer = load_tokenizer(dataset.tokenizer_dir)

    def sample(self, row: dict[str, Any]) -> Sample:
        """The sample of an index row.

        Raises:
            UserError: its bytes are damaged.
        """
        try:
            return self._dataset.read_row(row)
        except CorruptSampleError as error:
            raise UserError(
                f"{self._dataset.path}, sample {row['key']} cannot be read ({error}): "
                "run `omnidata verify --deep`"
            ) from error

    def text(self, sample: Sample) -> str:
        """All its turns."""
        return self._tokenizer.decode(sample.input_ids.tolist(), skip_special_tokens=True)
