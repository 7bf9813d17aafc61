from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25
"""Logits held at once: 128 MiB in fp32, 130 tokens of the 257,152-row vocabulary, enough for efficient matrix products."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of every token [T] (0 where ignored) from hidden [T, D] and weight [V, D], holding all logits at once."""
    losses = F.cross_entropy(
        _logits(hidden, weight, softcap),
        labels,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    return losses


def forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, softcap: float | None, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """The same in chunks of tokens: losses [T] and log-sum-exps [T], both fp32. A label outside the vocabulary gives NaN."""
    losses = torch.zeros(labels.shape, dtype=_wide(hidden), device=hidden.device)
    lses = torch.zeros_like(losses)
    for rows in _chunks(labels, ignore_index, weight.shape[0]):
        logits, target = _logits(hidden[rows], weight, softcap), labels[rows]
        lse = logits.logsumexp(-1)
        inside = (target >= 0) & (target < weight.shape[0])
        picked = logits.gather(1, target.where(inside, 0)[:, None])[:, 0]
        mean = logits.mean(-1) if label_smoothing else 0.0
        loss = lse - (1.0 - label_smoothing) * picked - label_smoothing * mean
        losses[rows] = loss.where(inside, float("nan"))
        lses[rows] = lse
    return losses, lses


def backward(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lses: Tensor,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden [T, D] and weight [V, D] from recomputed chunks of logits; an unneeded one is empty."""
    vocabulary = weight.shape[0]
    counted = (labels != ignore_index).nonzero()[:, 0]
    rows, targets, lse = hidden[counted], labels[counted], lses[counted][:, None]
    scale = label_scale(grad_losses[counted], targets, vocabulary)[:, None]

    def logit_gradients(first: int, last: int) -> Tensor:
        logits = _logits(rows, weight[first:last], softcap)
        grad = (logits - lse).exp_().sub_(label_smoothing / vocabulary)
        here = (targets >= first) & (targets < last)
        index = (targets - first).where(here, 0)[:, None]
        grad.scatter_add_(1, index, (here * (label_smoothing - 1.0)).to(grad.dtype)[:, None])
        grad.mul_(scale)
        if softcap is not None:
            grad.mul_(1.0 - (logits / softcap).square())
        return grad.to(hidden.dtype)

    words = max(1, CHUNK_ELEMENTS // max(len(counted), 1))
    return gradients_by_words(logit_gradients, words, hidden, counted, weight, needs_hidden, needs_weight)


def label_scale(grad_losses: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """What the gradients of each token's logits are multiplied by: NaN where the label is outside the vocabulary."""
    return grad_losses.where((targets >= 0) & (targets < vocabulary), float("nan"))


def gradients_by_words(
    logit_gradients: Callable[[int, int], Tensor],
    words: int,
    hidden: Tensor,
    counted: Tensor,
    weight: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight from those of the logits, [counted, last − first] for `words` rows of the vocabulary each.

    In chunks of the vocabulary each row of the weight's gradient is one product, written once in its own dtype. Chunks of tokens
    would add to all of it again and again, in fp32: the largest tensor of a training step.
    """
    rows = hidden[counted]
    grad_rows = torch.zeros_like(rows, dtype=_wide(hidden))
    grad_weight = (
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else weight.new_empty(0)
    )
    for first in range(0, weight.shape[0], words):
        last = min(first + words, weight.shape[0])
        grad = logit_gradients(first, last)
        if needs_weight:
            torch.mm(grad.T, rows, out=grad_weight[first:last])
        if needs_hidden:
            grad_rows += _product(grad, weight[first:last])
    if not needs_hidden:
        return hidden.new_empty(0), grad_weight
    return torch.zeros_like(hidden).index_copy_(0, counted, grad_rows.to(hidden.dtype)), grad_weight


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a · b, on GPUs without rounding the sum down to the inputs' dtype."""
    return torch.mm(a, b, out_dtype=_wide(a)) if a.is_cuda and a.dtype != _wide(a) else a @ b


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = F.linear(hidden, weight).to(_wide(hidden))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _chunks(labels: Tensor, ignore_index: int, vocabulary: int) -> tuple[Tensor, ...]:
    """Indices of the tokens that count, as many at a time as CHUNK_ELEMENTS allows."""
    counted = (labels != ignore_index).nonzero()[:, 0]
    return counted.split(max(1, CHUNK_ELEMENTS // vocabulary)) if len(counted) else ()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
