"""Batch: a Microbatch as the keyword arguments that a model's forward takes.

    Microbatch                      OmniLMM                 a class of transformers
    input_ids       [T]             input_ids       [1, T]  input_ids          [1, T]
    labels          [T], shifted    labels          [1, T]  labels             [1, T], unshifted
    position_ids    [T] or [4, T]   position_ids    [1, T]  position_ids       [1, T] or [4, 1, T]
    cu_seqlens      [D + 1]         cu_seqlens              cu_seq_lens_q, cu_seq_lens_k
    max_seqlen                      max_seqlen              max_length_q, max_length_k
    images                          pixel_values            the processor's tensors by name
    token_type_ids  [T]                                     token_type_ids or mm_token_type_ids [1, T]

There is no attention mask: documents are told apart by where they begin. ``num_items_in_batch``, the loss's
denominator, counts the supervised tokens of the whole step, over all ranks and microbatches.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from omnidata.dataset import Dataset
from omnidata.loader.microbatch import Microbatch
from omnidata.profiles.folder import model_config
from omnidata.profiles.opening import processor_folder
from omnidata.schema import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")


def unshifted(labels: torch.Tensor) -> torch.Tensor:
    """int64 ``[T]``: what stands at each position, where it is supervised.

    The first token of a document is predicted by nobody, so its label is IGNORE_INDEX and a model that shifts
    the whole row never asks one document's end for the next one's beginning.

    Example: [a1, a2, -, b1, -] -> [-, a1, a2, -, b1]
    """
    return torch.cat([labels.new_full((1,), IGNORE_INDEX), labels[:-1]])


def model_inputs(
    microbatch: Microbatch, *, token_types: str | None = None, averaged_over: int = 1
) -> dict[str, Any]:
    """Keyword arguments of the forward of the model that the dataset was built for.

    Args:
        microbatch: of an OmniLMM dataset or of a processor's.
        token_types: the name under which the model takes the marks of image tokens; None: it takes none.
        averaged_over: losses whose mean the host takes, of ranks and microbatches, where their sum is wanted.
    """
    number = microbatch.num_supervised_tokens
    inputs: dict[str, object] = {
        "input_ids": microbatch.input_ids[None],
        "labels": unshifted(microbatch.labels)[None],
        "position_ids": _positions(microbatch.position_ids),
        "num_items_in_batch": number if averaged_over == 1 else number / averaged_over,
        "use_cache": False,
    }
    if isinstance(microbatch.images, dict):
        bounds, longest = microbatch.cu_seqlens, microbatch.max_seqlen
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        inputs |= {"max_length_q": longest, "max_length_k": longest, **microbatch.images}
        if token_types is not None and microbatch.token_type_ids is not None:
            inputs[token_types] = microbatch.token_type_ids[None]
        return inputs
    inputs |= {"cu_seqlens": microbatch.cu_seqlens, "max_seqlen": microbatch.max_seqlen}
    if len(microbatch.images):
        inputs["pixel_values"] = microbatch.images
    return inputs


def _positions(position_ids: torch.Tensor) -> torch.Tensor:
    """``[1, T]``, or M-RoPE's ``[4, 1, T]``: only of four rows do models take the first to find documents."""
    return position_ids[None] if position_ids.ndim == 1 else position_ids[:, None]


def summed_loss(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """The sum over supervised tokens by ``num_items_in_batch``.

    Args:
        logits: ``[1, T, V]``; only supervised rows become float32.
        labels: int64 ``[1, T]``, unshifted.
        num_items_in_batch: None: this batch's own number.
    """
    wanted = labels[:, 1:] != IGNORE_INDEX
    rows = logits[:, :-1][wanted].float()
    total = torch.nn.functional.cross_entropy(rows, labels[:, 1:][wanted], reduction="sum")
    return total / (max(1, len(rows)) if num_items_in_batch is None else num_items_in_batch)


def token_types_name(model: PreTrainedModel) -> str | None:
    """How a model (or its class) calls the marks of image tokens in its forward."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model  # behind peft
    names = inspect.signature(whole.forward).parameters
    return next((name for name in TOKEN_TYPES if name in names), None)


def model_class(dataset: Dataset) -> type | None:
    """The class of transformers that a processor's dataset was built for; None: OmniLMM's, or not known."""
    if dataset.manifest.is_omnilmm:
        return None
    from transformers import AutoModelForImageTextToText

    config = model_config(processor_folder(dataset.path))
    mapping = AutoModelForImageTextToText._model_mapping
    return mapping.get(type(config), None)
