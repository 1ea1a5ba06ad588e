"""Do documents of a pack see each other? Asked of the very model that will be trained, before it is.

    A  text                       packed [A B A]  each document at its place
    B  text, a picture, text      alone  [A], [B] against those
                                  joined [A B A]  as one document: the control, which must differ

A class for which the answer is not clear is not to be trained on packs. The class's own loss on B alone is
compared as well: it shows a head that does more than ``lm_head`` (scaled logits, another loss).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from omnimodel.host_known import HostKnown, known
from omnimodel.loss import IGNORE_INDEX
from omnimodel.packed import own_inputs
from omnimodel.parts import Parts

# Differences of hidden states, as shares of the largest one: rounding, not sight.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9, torch.bfloat16: 2e-2, torch.float16: 4e-3}
OWN_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 3e-2, torch.float16: 1e-2}
MARGIN = 10  # times by which the control must exceed what isolation leaves


@dataclass(frozen=True)
class Probe:
    """One document for the probe, on the device."""

    input_ids: torch.Tensor  # int64 [L]
    position_ids: torch.Tensor  # int64 [L] or [4, L]
    token_type_ids: torch.Tensor  # int64 [L]
    images: dict[str, torch.Tensor]  # the processor's tensors; {} without a picture


@dataclass(frozen=True)
class Isolation:
    """What the probe found; differences as shares of the largest hidden state."""

    packed: float  # packed against alone
    joined: float  # the control against alone
    own_loss: float
    our_loss: float
    dtype: torch.dtype

    @property
    def problem(self) -> str | None:
        """Why this model must not be trained on packs; None: it may."""
        if not self.packed <= TOLERANCE[self.dtype] or not self.joined > MARGIN * self.packed:
            return (
                "documents of a pack are not proven apart: packed they differ from alone by "
                f"{self.packed:.2e} of the largest hidden state, joined on purpose by {self.joined:.2e} "
                f"(allowed: {TOLERANCE[self.dtype]:.0e}, and {MARGIN} times less than joined)"
            )
        if not abs(self.own_loss - self.our_loss) <= OWN_TOLERANCE[self.dtype] * max(1.0, abs(self.own_loss)):
            return (
                f"its own loss on a document is {self.own_loss:.6f}, on the same document here "
                f"{self.our_loss:.6f}: it does more behind its head than is known of"
            )
        return None


@torch.no_grad()
def probe(model: PreTrainedModel, text: Probe, picture: Probe) -> Isolation:
    """Seven short forwards of ``model``, which may be sharded: then a collective of all ranks."""
    was_training = model.training
    model.eval()
    try:
        documents = [text, picture, text]
        alone = [_hidden(model, [document]) for document in (text, picture)]
        alone_TD = torch.cat([alone[0], alone[1], alone[0]])
        largest = alone_TD.abs().max().clamp(min=1e-30)
        packed = (_hidden(model, documents) - alone_TD).abs().max() / largest
        joined = (_hidden(model, documents, is_joined=True) - alone_TD).abs().max() / largest
        inputs = _inputs([picture])
        own = model(**own_inputs(model, inputs | {"shift_labels": _labels(inputs)})).loss
        ours = _as_its_own(model, inputs, own)
        dtype = alone_TD.dtype
        found = Isolation(float(packed), float(joined), float(own), float(ours), dtype)
    finally:
        model.train(was_training)
    return found


def _as_its_own(model: PreTrainedModel, inputs: dict[str, Any], own: torch.Tensor) -> torch.Tensor:
    """Our loss; without the scale of the text model's configuration if the class does not apply it."""
    ours = model(**inputs, shift_labels=_labels(inputs)).loss
    scale = model.logit_scale
    if scale is None or abs(own - ours) <= OWN_TOLERANCE[own.dtype] * abs(own):
        return ours
    model.logit_scale = None
    plain = model(**inputs, shift_labels=_labels(inputs)).loss
    if abs(own - plain) <= OWN_TOLERANCE[own.dtype] * abs(own):
        return plain
    model.logit_scale = scale
    return ours


def unreached(call: nn.Module, model: nn.Module, picture: Probe) -> list[str]:
    """Trainable parameters of tower and connector that the loss does not depend on, by one backward pass.

    Some towers have layers behind the one whose features are used. (A language model's experts may only not
    be chosen by so short a text; they are not looked at.)

    Args:
        call: ``model``, or DDP around it.
        model: of a ``packed_class``; a collective of all ranks if it is sharded.
        picture: a document with one.
    """
    inputs, parts = _inputs([picture]), Parts(model)
    call(**inputs, shift_labels=_labels(inputs)).loss.backward()
    looked_at = ("vision_tower", "connector")
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None and parts.of(name) in looked_at
    ]
    model.zero_grad(set_to_none=True)
    return names


def _hidden(model: nn.Module, documents: Sequence[Probe], *, is_joined: bool = False) -> torch.Tensor:
    """Last hidden states ``[T, D]`` of documents end to end; ``is_joined``: with no bound between them."""
    inputs = _inputs(documents, is_joined=is_joined)
    labels = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
    labels[:, 0] = inputs["input_ids"][:, 0]  # the head is called, too: sharded ranks meet in it
    return model(**inputs, shift_labels=labels, return_hidden=True).hidden_states[0][0]


def _labels(inputs: dict[str, Any]) -> torch.Tensor:
    """Every next token of one document; none behind its last."""
    labels = inputs["input_ids"].roll(-1, dims=1)
    labels[:, -1] = IGNORE_INDEX
    return labels


def _inputs(documents: Sequence[Probe], *, is_joined: bool = False) -> dict[str, Any]:
    lengths = [len(document.input_ids) for document in documents]
    if is_joined:
        lengths = [sum(lengths)]
    device = documents[0].input_ids.device
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    is_known = isinstance(documents[0].input_ids, HostKnown)
    images: dict[str, torch.Tensor] = {}
    for document in documents:
        images |= document.images  # at most one of them has a picture
    return {
        "input_ids": torch.cat([document.input_ids for document in documents])[None],
        "position_ids": torch.cat([document.position_ids for document in documents], dim=-1).unsqueeze(-2),
        "token_type_ids": torch.cat([document.token_type_ids for document in documents])[None],
        "cu_seqlens": known(bounds, device) if is_known else bounds.to(device),
        "max_seqlen": max(lengths),
        **images,
    }
