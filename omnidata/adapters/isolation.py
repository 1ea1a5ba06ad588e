"""Isolation: does a model keep the documents of a pack apart? Asked of the model itself, as it will train.

    [ a | b ]    loss of b
    [ a'| b ]    the same, whatever a says and shows
    [ a | b ]    loss of a
    [ a | b']    the same (pictures may see each other in both directions)
    [ a ] [ b ]  the losses in the pack, up to rounding

The packs have the same shapes, so rounding is the same and a difference is sight. a' is a with its reply
reversed and its pictures inverted; that a's own loss changes by it shows that the question is one.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from omnidata.adapters.batch import model_inputs
from omnidata.loader.loader import PackLoader, State
from omnidata.loader.microbatch import Microbatch
from omnidata.loader.reader import Document
from omnidata.schema import IGNORE_INDEX, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENOUGH, MOST_STEPS = 16, 64  # documents to choose two from, and steps to look for them in
ROUNDING, ROUNDING_OF_HALF = 1e-4, 3e-2  # of the loss; packed and alone have other shapes
TOLERANCE = 1e-5  # of the loss; equal shapes give equal numbers but for the order of a GPU's sums
REMEDY = (
    'try attn_implementation="sdpa" or "flash_attention_2" when the model is loaded; recurrent and '
    "convolutional layers keep nothing apart in transformers: pipelines/train.py runs those once per document"
)


def check_model(model: PreTrainedModel, loader: PackLoader, *, token_types: str | None = None) -> bool:
    """UserError if the model cannot learn from these packs; whether it divides by ``num_items_in_batch``."""
    dataset = loader.plan.sources[0].index.dataset
    rows, needed = model.get_input_embeddings().weight.shape[0], dataset.manifest.vocab_size
    if rows < needed:
        raise UserError(
            f"{type(model).__name__} has embeddings for {rows} tokens, {dataset.path} has {needed}: build "
            "the dataset with the model's own tokenizer"
        )
    check_isolation(model, loader, token_types=token_types)
    return takes_denominator(model, loader, token_types=token_types)


@torch.no_grad()
def check_isolation(model: PreTrainedModel, loader: PackLoader, *, token_types: str | None = None) -> None:
    """Twelve short forwards of ``model``, where it is and with its dtype, on two documents of the first step.

    Raises:
        UserError: they see each other, or the model does not take what it is given.
    """
    whole, parts = _two_documents(loader)
    was_training, name = model.training, type(model).__name__
    model.eval()
    try:
        seen = [_sees(model, whole, parts, which, token_types) for which in (0, 1)]
        apart = [_differs(model, whole, parts, which, token_types) for which in (0, 1)]
    except (ValueError, TypeError, NotImplementedError, KeyError) as error:  # what classes raise on arguments
        raise UserError(f"{name} does not take a pack of this dataset: {error}") from error
    finally:
        model.train(was_training)
    if max(seen) > TOLERANCE:
        config = getattr(model, "config", None)
        attention = getattr(config, "_attn_implementation", None)
        raise UserError(
            f"in {name} with attn_implementation={attention} the documents of a pack see each other: "
            f"changing one moves another's loss by {max(seen):.1e} of it; {REMEDY}"
        )
    rounding = ROUNDING if next(model.parameters()).dtype.itemsize >= 4 else ROUNDING_OF_HALF
    if max(apart) > rounding:
        raise UserError(
            f"in {name} a document's loss in a pack differs by {max(apart):.1e} of it from its loss alone "
            f"(allowed: {rounding:.0e}): the class does not know where documents begin; {REMEDY}"
        )


@torch.no_grad()
def takes_denominator(model: PreTrainedModel, loader: PackLoader, *, token_types: str | None = None) -> bool:
    """Does the model divide its loss by ``num_items_in_batch``? Some classes ignore it."""
    whole, _ = _two_documents(loader)
    was_training = model.training
    model.eval()
    by_one, by_two = (_loss(model, whole, 1, token_types, number) for number in (1, 2))
    model.train(was_training)
    return abs(by_one / by_two - 2) < 1e-3


def _sees(
    model: PreTrainedModel, whole: Microbatch, parts: list[Microbatch], which: int, token_types: str | None
) -> float:
    """By how much the loss of document ``1 - which`` moves when ``which`` changes, as a share of it."""
    other = _changed(whole, parts, which)
    mine, its = (_loss(model, pack, which, token_types) for pack in (whole, other))
    if mine == its:
        raise UserError(f"{type(model).__name__}'s loss does not change with a document's reply and pictures")
    before, after = (_loss(model, pack, 1 - which, token_types) for pack in (whole, other))
    return abs(after - before) / max(abs(before), 1e-30)


def _differs(
    model: PreTrainedModel, whole: Microbatch, parts: list[Microbatch], which: int, token_types: str | None
) -> float:
    """By how much a document's loss in the pack differs from its loss alone, as a share of it."""
    packed, alone = (_loss(model, pack, which, token_types) for pack in (whole, parts[which]))
    return abs(packed - alone) / max(abs(alone), 1e-30)


def _loss(
    model: PreTrainedModel, pack: Microbatch, which: int, token_types: str | None, number: int = 1
) -> float:
    """The loss of one document of two; ``number``: what to divide its sum by."""
    inputs = model_inputs(pack, token_types=token_types)
    middle = int(pack.cu_seqlens[1])
    labels = inputs["labels"].clone()
    if len(pack.keys) > 1:  # a dummy's document has no key
        labels[:, slice(middle, None) if which == 0 else slice(None, middle)] = IGNORE_INDEX
    inputs |= {"labels": labels, "num_items_in_batch": number}
    device = next(model.parameters()).device
    moved = {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}
    outputs = model(**moved)
    return float(outputs["loss"] if isinstance(outputs, dict) else outputs[0])


# --- the documents ------------------------------------------------------------------------------------------


def _two_documents(loader: PackLoader) -> tuple[Microbatch, list[Microbatch]]:
    """Two documents of the first steps as a pack, and each alone: short ones, with pictures if any."""
    found: list[tuple[Document, int]] = []
    for step, _, places in islice(loader.steps_from(State()), MOST_STEPS):
        for pack in step.packs:
            supervised = pack.lengths.supervised.tolist()
            found += zip(places.documents(pack), supervised, strict=True)
        if len(found) >= ENOUGH:
            break
    found = sorted(found, key=lambda one: (not one[0].num_images, one[1] < 2, one[0].num_tokens))
    if len(found) < 2:
        raise UserError("a dataset of one sample cannot be asked if its documents see each other")
    at = State(step=1)  # any: nothing is counted
    return loader.read_documents(found[:2], at), [loader.read_documents([one], at) for one in found[:2]]


def _changed(whole: Microbatch, parts: list[Microbatch], which: int) -> Microbatch:
    """``whole`` with another reply and inverted pictures in document ``which``; all shapes stay."""
    middle = int(whole.cu_seqlens[1])
    span = slice(0, middle) if which == 0 else slice(middle, None)
    input_ids = whole.input_ids.clone()
    labels = whole.labels.clone()
    learned = torch.unique(labels[labels != IGNORE_INDEX])
    mine = torch.zeros_like(labels, dtype=torch.bool)
    mine[span] = labels[span] != IGNORE_INDEX
    rank = torch.searchsorted(learned, labels[mine])
    labels[mine] = learned[(rank + 1) % len(learned)]
    places = torch.nonzero(mine)[:, 0] + 1  # labels are shifted: what is predicted stands one further
    input_ids[places] = labels[mine]
    alone = {} if parts[which].has_dummy else parts[which].images  # a dummy's picture is not the document's
    images = _inverted(whole.images, alone, first=which == 0)
    return replace(whole, input_ids=input_ids, labels=labels, images=images)


def _inverted(images: Any, alone: Any, *, first: bool) -> Any:
    """A pack's picture tensors with those of one document inverted; ``alone`` are that document's own."""
    if isinstance(images, dict):
        return {
            name: _inverted_tensor(tensor, alone.get(name), first=first) for name, tensor in images.items()
        }
    return _inverted_tensor(images, alone, first=first)


def _inverted_tensor(tensor: torch.Tensor, alone: torch.Tensor | None, *, first: bool) -> torch.Tensor:
    if alone is None or not (tensor.is_floating_point() or tensor.dtype == torch.uint8):
        return tensor
    axes = [axis for axis in range(tensor.ndim) if tensor.shape[axis] != alone.shape[axis]]
    axis = axes[0] if axes else 0  # none: all pictures are this document's
    length = alone.shape[axis]
    start = 0 if first else tensor.shape[axis] - length
    inverted = tensor.clone()
    part = inverted.narrow(axis, start, length)
    part.copy_(255 - part if tensor.dtype == torch.uint8 else -part)
    return inverted
