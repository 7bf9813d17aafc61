"""linear_cross_entropy in plain PyTorch: the definition, and the reference backend that holds only chunks of the logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pg_kernels.ops.linear_cross_entropy.chunks import gradients_by_chunk, logit_grad_scale

CHUNK_ELEMENTS = 1 << 25
"""Logits that are held at once: 128 MiB in fp32.

They are 130 tokens of the 257,152-row vocabulary, enough for efficient matrix products.
"""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the loss of every token [T] (0 where ignored) from hidden [T, D] and weight [V, D], holding all logits at once."""
    return F.cross_entropy(
        _logits(hidden, weight, softcap),
        labels,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )


def forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, softcap: float | None, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Compute losses [T] and log-sum-exps [T], both fp32, in chunks of tokens.

    Both are 0 where ignored. A label outside the vocabulary makes the loss NaN.
    """
    losses = torch.zeros(labels.shape, dtype=_wide(hidden), device=hidden.device)
    lses = torch.zeros_like(losses)
    for rows in _token_chunks(labels, ignore_index, weight.shape[0]):
        logits, targets = _logits(hidden[rows], weight, softcap), labels[rows]
        lse = logits.logsumexp(-1)
        is_valid = (targets >= 0) & (targets < weight.shape[0])
        label_logits = logits.gather(1, targets.where(is_valid, 0)[:, None])[:, 0]
        mean = logits.mean(-1) if label_smoothing else 0.0
        loss = lse - (1.0 - label_smoothing) * label_logits - label_smoothing * mean
        losses[rows] = loss.where(is_valid, float("nan"))
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
    """Compute the gradients of hidden [T, D] and weight [V, D] from recomputed chunks of logits; an unneeded one is empty."""
    vocab_size = weight.shape[0]
    counted = (labels != ignore_index).nonzero()[:, 0]
    rows, targets, lse = hidden[counted], labels[counted], lses[counted][:, None]
    scale = logit_grad_scale(grad_losses[counted], targets, vocab_size)[:, None]

    def logit_gradients(start: int, end: int) -> Tensor:
        logits = _logits(rows, weight[start:end], softcap)
        grad = (logits - lse).exp_().sub_(label_smoothing / vocab_size)
        is_in_chunk = (targets >= start) & (targets < end)
        index = (targets - start).where(is_in_chunk, 0)[:, None]
        grad.scatter_add_(1, index, (is_in_chunk * (label_smoothing - 1.0)).to(grad.dtype)[:, None])
        grad.mul_(scale)
        if softcap is not None:
            grad.mul_(1.0 - (logits / softcap).square())
        return grad.to(hidden.dtype)

    chunk_size = max(1, CHUNK_ELEMENTS // max(len(counted), 1))
    return gradients_by_chunk(logit_gradients, chunk_size, hidden, counted, weight, needs_hidden, needs_weight)


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = F.linear(hidden, weight).to(_wide(hidden))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _token_chunks(labels: Tensor, ignore_index: int, vocab_size: int) -> tuple[Tensor, ...]:
    """Return the indices of the tokens that count, in chunks whose logits are at most CHUNK_ELEMENTS."""
    counted = (labels != ignore_index).nonzero()[:, 0]
    return counted.split(max(1, CHUNK_ELEMENTS // vocab_size)) if len(counted) else ()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
