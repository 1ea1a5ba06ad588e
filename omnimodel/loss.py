"""Cross-entropy over supervised positions only, without ever holding all the logits.

    hidden [T, D], shift_labels [T]
      1  rows that are supervised                  -> supervised_rows   (10-50 % of a conversation)
      2  a chunk of them at a time: logits, float32 loss, gradients, logits freed   -> LossHead
    loss = sum over supervised tokens / num_supervised_tokens, float32

At 32,009 words the float32 logits of 16k tokens are 2 GB, and their gradient as much again. Here one chunk's
are alive at a time, and the gradients of hidden states and weight are ready when the forward ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from omnimodel.tally import tally

IGNORE_INDEX = -100
CHUNK_ROWS = 1024  # rows of logits alive at a time: 131 MB in float32 at 32,009 words


def shift(labels: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """Unshifted labels ``[B, T]`` -> what each position must predict. The one place where labels are shifted.

    >>> shift(torch.tensor([[-100, 7, 8]]))
    tensor([[   7,    8, -100]])
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if cu_seqlens is not None:  # the last token of a document must not predict the next document's first
        shifted[:, cu_seqlens[1:].long() - 1] = IGNORE_INDEX
    return shifted


def supervised_rows(
    hidden_TD: torch.Tensor, labels_T: torch.Tensor, num_rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and labels of the supervised positions, in order.

    ``num_rows`` is their number where the host knows it (count the labels before they go to the GPU). With it
    nothing here waits for the GPU; without it the count is read back, once.
    """
    supervised = labels_T != IGNORE_INDEX
    if num_rows is None:
        num_rows = int(supervised.sum())
    else:
        torch._assert_async(
            (supervised.sum() == num_rows), "num_supervised_rows is not the labels' own count"
        )
    # A stable sort puts them first; its length is known, unlike that of a boolean index.
    rows = torch.argsort((~supervised).to(torch.uint8), stable=True)[:num_rows]
    return hidden_TD.index_select(0, rows), labels_T.index_select(0, rows)


class LossHead(nn.Linear):
    """``lm_head``: logits when called with hidden states, the summed loss when also given labels.

    One module for both, so that hooks on it (FSDP's all-gather) run in both cases.
    """

    chunk_rows: int = CHUNK_ROWS

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """``[..., D]`` -> logits ``[..., V]``; with labels ``[N]`` for ``[N, D]`` -> their summed loss."""
        if labels is None:
            return super().forward(hidden)
        return _ChunkedCrossEntropy.apply(hidden, self.weight, labels, self.chunk_rows)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of ``hidden @ weight.T``; gradients are made in the forward, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk_rows):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = F.linear(hidden[rows], weight)
            compute_dtype = logits.dtype  # autocast may have lowered it
            log_probs = logits.float().log_softmax(dim=-1)
            losses = -log_probs.gather(1, labels[rows, None]).squeeze(1)
            total += losses.sum()
            tally(losses, start)
            if not (needs_hidden or needs_weight):
                continue
            grad_logits = _minus_one_hot(log_probs.exp_(), labels[rows]).to(compute_dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight.to(compute_dtype)
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[rows].to(compute_dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def _minus_one_hot(probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """In place: d(cross-entropy)/d(logits) is the probabilities, less one at the label."""
    return probs.scatter_add_(1, labels[:, None], probs.new_full((1, 1), -1.0).expand(probs.shape[0], 1))


class LogitScale(NamedTuple):
    """What some models do to logits behind their head."""

    scale: float = 1.0
    cap: float | None = None  # cap * tanh(logits / cap), after scaling

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits as the loss takes them."""
        logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def summed_loss(
    lm_head: nn.Module,
    hidden_ND: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    scale: LogitScale | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> torch.Tensor:
    """Sum of cross-entropies, float32, through a LossHead or any other head, chunk by chunk.

    Args:
        lm_head: OmniLMM's, another model's, or what LoRA or resizing put in its place.
        hidden_ND: of the supervised rows.
        labels_N: int64.
        scale: of the logits, if the model has one.
        chunk_rows: rows of logits alive at a time.
    """
    if isinstance(lm_head, LossHead):
        return lm_head(hidden_ND, labels_N)
    # One call, however many chunks there are, and without any row as well: sharded ranks meet in it, and
    # would meet again in every chunk that is computed anew for the backward pass.
    logits_of, before = lm_head.forward, vars(lm_head).get("forward")
    lm_head.forward = functools.partial(_in_chunks, logits_of, scale=scale, chunk_rows=chunk_rows)
    try:
        total: torch.Tensor = lm_head(hidden_ND, labels_N)
        return total
    finally:
        del lm_head.forward
        if before is not None:
            lm_head.forward = before


def _in_chunks(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    *,
    scale: LogitScale | None,
    chunk_rows: int,
) -> torch.Tensor:
    total, start = hidden.new_zeros((), dtype=torch.float32), 0
    for rows, wanted in zip(hidden.split(chunk_rows), labels.split(chunk_rows), strict=True):
        total = total + checkpoint(_head_loss, logits_of, rows, wanted, scale, start, use_reentrant=False)
        start += len(rows)
    return total


def _head_loss(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    scale: LogitScale | None,
    start: int,
) -> torch.Tensor:
    logits = logits_of(hidden).float()
    losses = F.cross_entropy(logits if scale is None else scale(logits), labels, reduction="none")
    tally(losses, start)  # when it is computed again for the backward pass, nothing is open to add to
    return losses.sum()
