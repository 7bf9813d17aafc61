"""The backward pass in chunks of the vocabulary, which the reference and the Triton backend share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def logit_grad_scale(grad_losses: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
    """Return the factor of each token's logit gradients [T]: its loss's gradient, or NaN for a label outside the vocabulary."""
    return grad_losses.where((labels >= 0) & (labels < vocab_size), float("nan"))


def gradients_by_chunk(
    logit_gradients: Callable[[int, int], Tensor],
    chunk_size: int,
    hidden: Tensor,
    counted: Tensor,
    weight: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of hidden [T, D] and weight [V, D]; an unneeded one is empty.

    `counted` are the indices of the tokens that count. `logit_gradients(start, end)` returns their logits' gradients
    [len(counted), end - start] for these rows of the vocabulary; it is called for `chunk_size` rows at a time.

    With chunks of the vocabulary, each row of the weight's gradient is one product that is written once, in the weight's dtype.
    Chunks of tokens would each add to the whole gradient in fp32, and it is the largest tensor of a training step.
    """
    rows = hidden[counted]
    acc_dtype = torch.promote_types(hidden.dtype, torch.float32)
    grad_rows = torch.zeros_like(rows, dtype=acc_dtype)
    grad_weight = (
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else weight.new_empty(0)
    )
    for start in range(0, weight.shape[0], chunk_size):
        end = min(start + chunk_size, weight.shape[0])
        grad = logit_gradients(start, end)
        if needs_weight:
            torch.mm(grad.T, rows, out=grad_weight[start:end])
        if needs_hidden:
            grad_rows += _mm(grad, weight[start:end], acc_dtype)
    if not needs_hidden:
        return hidden.new_empty(0), grad_weight
    return torch.zeros_like(hidden).index_copy_(0, counted, grad_rows.to(hidden.dtype)), grad_weight


def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Return a · b, on GPUs without rounding the sum to the inputs' dtype."""
    return torch.mm(a, b, out_dtype=out_dtype) if a.is_cuda and a.dtype != out_dtype else a @ b
