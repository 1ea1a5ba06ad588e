"""What tests of the renderer look at: the supervised text, and what holds for every rendering."""

import numpy as np

from omnidata.schema import IGNORE_INDEX, IM_END, IM_PATCH, IM_START


def supervised(renderer, rendered):
    """The text that the model learns to write; a line end in front keeps the decoder from eating a blank."""
    ids = rendered.input_ids[rendered.labels != IGNORE_INDEX].tolist()
    line_end = renderer.tokenizer.encode("\n", add_special_tokens=False)[-1]
    return renderer.tokenizer.decode([line_end, *ids])[1:]


def check_invariants(renderer, rendered, num_images):
    """What holds for every rendering."""
    ids, labels = rendered.input_ids, rendered.labels
    start, patch, end = (
        renderer.tokenizer.convert_tokens_to_ids(token) for token in (IM_START, IM_PATCH, IM_END)
    )
    assert ids.dtype == labels.dtype == np.int32 and ids.shape == labels.shape
    assert ((labels == IGNORE_INDEX) | (labels == ids)).all()
    starts = np.flatnonzero(ids == start)
    assert len(starts) == (ids == end).sum() == rendered.num_images == num_images
    assert (ids == patch).sum() == num_images * renderer.num_query
    for first in starts:
        block = slice(first, first + renderer.num_query + 2)
        assert ids[block].tolist() == [start, *[patch] * renderer.num_query, end]
        assert (labels[block] == IGNORE_INDEX).all()
