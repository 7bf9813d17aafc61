"""Launches of linear_cross_entropy's Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pg_kernels.ops._common import devices
from pg_kernels.ops.linear_cross_entropy import tiles
from pg_kernels.ops.linear_cross_entropy.chunks import gradients_by_chunk, logit_grad_scale


def forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, softcap: float | None, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return losses [T] and log-sum-exps [T], both fp32.

    Both are 0 where ignored. A label outside the vocabulary makes the loss NaN.
    """
    from pg_kernels.ops.linear_cross_entropy import kernels

    losses, lses = (torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device) for _ in range(2))
    counted = _counted(labels, ignore_index)
    if not len(counted):
        return losses, lses
    rows, weight, targets = hidden[counted], _with_contiguous_rows(weight), labels[counted]
    (m, k), n, device = rows.shape, weight.shape[0], devices.device_of(hidden)
    chosen = tiles.choose(m, rows.dtype, device)
    num_blocks_m, num_blocks_n = -(-m // chosen.block_m), -(-n // chosen.block_n)
    n_per_split = -(-num_blocks_n // tiles.num_splits(num_blocks_m, num_blocks_n, device)) * chosen.block_n
    num_splits = -(-n // n_per_split)
    partial_lse = losses.new_empty(num_splits, m)
    partial_sum = losses.new_empty(num_splits, m) if label_smoothing else None
    label_logits = losses.new_full((m,), float("nan"))
    with devices.on_device_of(hidden):
        kernels.linear_cross_entropy_fwd_kernel[(num_blocks_m, num_splits)](
            hidden_ptr=rows,
            weight_ptr=weight,
            labels_ptr=targets,
            lse_ptr=partial_lse,
            sum_ptr=partial_sum,
            label_logit_ptr=label_logits,
            M=m,
            N=n,
            n_per_split=n_per_split,
            K=k,
            stride_hidden_m=rows.stride(0),
            stride_weight_n=weight.stride(0),
            softcap=softcap,
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            BLOCK_K=chosen.block_k,
            EVEN_K=k % chosen.block_k == 0,
            UPCAST=devices.upcasts_dot_operands(rows),
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            enable_fp_fusion=True,
        )
    lse = partial_lse.logsumexp(0)
    loss = lse - (1.0 - label_smoothing) * label_logits
    if partial_sum is not None:
        loss -= label_smoothing / n * partial_sum.sum(0)
    loss = loss.where(targets != ignore_index, 0.0)
    return losses.index_copy_(0, counted, loss), lses.index_copy_(0, counted, lse)


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
    """Return the gradients of hidden [T, D] and weight [V, D]; an unneeded one is empty."""
    from pg_kernels.ops.linear_cross_entropy import kernels

    counted = _counted(labels, ignore_index)
    rows, weight, targets = hidden[counted], _with_contiguous_rows(weight), labels[counted]
    lse, vocab_size = lses[counted], weight.shape[0]
    scale = logit_grad_scale(grad_losses[counted], targets, vocab_size).where(targets != ignore_index, 0.0)
    m, k = rows.shape
    chosen = tiles.choose(m, rows.dtype, devices.device_of(hidden))

    def logit_gradients(start: int, end: int) -> Tensor:
        n = end - start
        grad = rows.new_empty(m, n)
        if not m:
            return grad
        with devices.on_device_of(rows):
            kernels.linear_cross_entropy_logit_grad_kernel[(-(-m // chosen.block_m), -(-n // chosen.block_n))](
                hidden_ptr=rows,
                weight_ptr=weight[start:],
                labels_ptr=targets,
                lse_ptr=lse,
                scale_ptr=scale,
                grad_ptr=grad,
                M=m,
                N=n,
                vocab_start=start,
                K=k,
                stride_hidden_m=rows.stride(0),
                stride_weight_n=weight.stride(0),
                softcap=softcap,
                label_smoothing=label_smoothing,
                smoothing_per_logit=label_smoothing / vocab_size,
                BLOCK_M=chosen.block_m,
                BLOCK_N=chosen.block_n,
                BLOCK_K=chosen.block_k,
                EVEN_K=k % chosen.block_k == 0,
                UPCAST=devices.upcasts_dot_operands(rows),
                num_warps=chosen.num_warps,
                num_stages=chosen.num_stages,
                enable_fp_fusion=True,
            )
        return grad

    chunk_size = tiles.chunk_size(m, rows.element_size())
    return gradients_by_chunk(logit_gradients, chunk_size, hidden, counted, weight, needs_hidden, needs_weight)


def _counted(labels: Tensor, ignore_index: int) -> Tensor:
    """Return the indices of the tokens that count, or of all tokens during CUDA graph capture.

    On a GPU their number requires a synchronisation, which a graph cannot contain.
    """
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.arange(len(labels), device=labels.device)
    return (labels != ignore_index).nonzero()[:, 0]


def _with_contiguous_rows(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.contiguous()
