"""Positions: 1-D, or M-RoPE for each document, by the model's own ``get_rope_index``.

    1d      [T]      0, 1, 2, … in every document
    mrope   [4, T]   row 0 as above (it shows where documents begin), rows 1–3 time, height, width

``get_rope_index`` needs nothing of a model but its configuration, so it is called on a bare instance.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from omnidata.profiles.folder import model_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ONE_D, MROPE, UNKNOWN = "1d", "mrope", "unknown"  # unknown: the model's folder has no config.json


def kind_of_positions(folder: str | os.PathLike[str]) -> str:
    """What the model of a processor's folder takes."""
    if model_config(folder) is None:
        return UNKNOWN
    return MROPE if _bare_model(os.fspath(folder)) is not None else ONE_D


@lru_cache(maxsize=8)
def _bare_model(folder: str) -> PreTrainedModel | None:
    """An instance without weights that has ``get_rope_index``; None: the model has no such positions."""
    from transformers import AutoModelForImageTextToText

    config = model_config(folder)
    mapping = AutoModelForImageTextToText._model_mapping
    if type(config) not in mapping:
        return None
    whole = mapping[type(config)]
    module = sys.modules[whole.__module__]
    classes = [whole, *(kind for _, kind in inspect.getmembers(module, inspect.isclass))]
    for kind in classes:
        if kind.__module__ == module.__name__ and hasattr(kind, "get_rope_index"):
            bare = object.__new__(kind)
            bare.__dict__["config"] = config
            return bare
    return None


def mrope_positions(
    folder: str,
    documents: Sequence[np.ndarray],
    num_images: Sequence[int],
    tensors: Mapping[str, Any],
    image_token_ids: Sequence[int],
) -> np.ndarray:
    """int64 ``[4, T]`` of documents laid end to end.

    Args:
        folder: the processor's, with the model's config.json.
        documents: ids int32 ``[L]`` of each.
        num_images: pictures of each.
        tensors: the processor's for all pictures, in order; those with one row per picture are dealt out.
        image_token_ids: ids that are marked as a picture's.
    """
    import torch

    model = _bare_model(folder)
    assert model is not None, "asked only if kind_of_positions gave MROPE"
    wanted = set(inspect.signature(model.get_rope_index).parameters)
    total, first, columns = sum(num_images), 0, []
    for ids, number in zip(documents, num_images, strict=True):
        mine = {
            name: tensor[first : first + number] if number else None
            for name, tensor in tensors.items()
            if name in wanted and len(tensor) == total
        }
        first += number
        batch = torch.from_numpy(ids.astype(np.int64))[None]
        if "mm_token_type_ids" in wanted:
            mine["mm_token_type_ids"] = torch.isin(batch, torch.tensor(list(image_token_ids))).int()
        positions = model.get_rope_index(input_ids=batch, attention_mask=torch.ones_like(batch), **mine)[0]
        columns.append(np.vstack([np.arange(len(ids)), positions[:, 0].numpy()]))
    return np.concatenate(columns, axis=1).astype(np.int64)
