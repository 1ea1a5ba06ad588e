"""The same shards for people who have a webdataset pipeline already.

>>> for sample in webdataset_pipeline("data/llava").shuffle(1000).decode("pil"):   # doctest: +SKIP
...     sample["__key__"], sample["input_ids.npy"], sample["labels.npy"], sample["jpg"]

What a plain pipeline does not give: an exact resume, equal steps on every rank, packing, known denominators.
"""

from __future__ import annotations

import os
from typing import Any

from omnidata.dataset import Dataset
from omnidata.schema import is_member


def webdataset_pipeline(
    path: str | os.PathLike[str], split: str = "train", *, shuffle_shards: bool | int = False, **options: Any
) -> object:
    """An ordinary ``webdataset.WebDataset`` over the shards of one split; members are left as bytes.

    Only members that the schema knows are read: ``.decode()`` unpickles whatever else a stranger put into
    a shard.

    Args:
        path: a dataset, local or at a URL that webdataset can open.
        shuffle_shards: webdataset's ``shardshuffle``.
        options: further arguments of ``webdataset.WebDataset``. Ranks share the shards (``split_by_node``)
            unless another ``nodesplitter`` is given.
    """
    import webdataset

    dataset = Dataset(path, split)
    root = dataset.local_root or dataset.path
    urls = [f"{root}/{shard.path}" for shard in dataset.manifest.shards if shard.split == split]
    defaults = {"nodesplitter": webdataset.split_by_node, "empty_check": False, "select_files": is_member}
    return webdataset.WebDataset(urls, shardshuffle=shuffle_shards, **(defaults | options))
