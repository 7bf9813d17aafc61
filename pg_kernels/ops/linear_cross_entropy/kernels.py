"""Triton kernels of linear_cross_entropy. M = tokens, N = vocabulary, K = hidden size: hidden [M, K], weight [N, K]."""

from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import tanh


@triton.jit
def linear_cross_entropy_fwd_kernel(
    hidden_ptr,
    weight_ptr,
    labels_ptr,
    lse_ptr,
    sum_ptr,
    label_logit_ptr,
    M,
    N,
    n_per_split,
    K,
    stride_hidden_m,
    stride_weight_n,
    softcap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Reduce the logits of BLOCK_M tokens over one split of the vocabulary.

    Stores the split's log-sum-exp (natural), with sum_ptr the sum of its logits, and the label's logit if the split has it.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    split = tl.program_id(1)
    label = tl.load(labels_ptr + offs_m, mask=offs_m < M, other=-1)  # [BLOCK_M]
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    exp_sum = tl.zeros([BLOCK_M], tl.float32)
    logit_sum = tl.zeros([BLOCK_M], tl.float32)
    label_logit = tl.zeros([BLOCK_M], tl.float32)
    split_start = split * n_per_split
    split_end = tl.minimum(split_start + n_per_split, N)
    for start in tl.range(split_start, split_end, BLOCK_N):  # rows of the weight
        offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        logits = _logits(
            hidden_ptr,
            weight_ptr,
            offs_m,
            offs_n,
            M,
            N,
            K,
            stride_hidden_m,
            stride_weight_n,
            BLOCK_K,
            EVEN_K,
            UPCAST,
        )  # [BLOCK_M, BLOCK_N]
        if softcap is not None:
            logits = tl.cast(softcap, tl.float32) * tanh(logits / tl.cast(softcap, tl.float32))
        mask = (offs_n < split_end)[None, :]
        if sum_ptr is not None:
            logit_sum += tl.sum(tl.where(mask, logits, 0.0), axis=1)
        label_logit += tl.sum(tl.where(mask & (offs_n[None, :] == label[:, None]), logits, 0.0), axis=1)
        logits = tl.where(mask, logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        exp_sum = exp_sum * tl.exp(row_max - new_max) + tl.sum(tl.exp(logits - new_max[:, None]), axis=1)
        row_max = new_max
    out_offsets = split.to(tl.int64) * M + offs_m
    tl.store(lse_ptr + out_offsets, row_max + tl.log(exp_sum), mask=offs_m < M)
    if sum_ptr is not None:
        tl.store(sum_ptr + out_offsets, logit_sum, mask=offs_m < M)
    # Exactly one split has the label. The caller fills label_logit with NaN, which stays for a label outside the vocabulary.
    has_label = (label >= split_start) & (label < split_end)
    tl.store(label_logit_ptr + offs_m, label_logit, mask=(offs_m < M) & has_label)


@triton.jit
def linear_cross_entropy_logit_grad_kernel(
    hidden_ptr,
    weight_ptr,
    labels_ptr,
    lse_ptr,
    scale_ptr,
    grad_ptr,
    M,
    N,
    vocab_start,
    K,
    stride_hidden_m,
    stride_weight_n,
    softcap,
    label_smoothing,
    smoothing_per_logit,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute a tile [BLOCK_M, BLOCK_N] of scale · d loss / d logit for one chunk of the vocabulary.

    weight_ptr points to the chunk: N rows, of which the first is row vocab_start of the whole weight.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    logits = _logits(
        hidden_ptr, weight_ptr, offs_m, offs_n, M, N, K, stride_hidden_m, stride_weight_n, BLOCK_K, EVEN_K, UPCAST
    )  # [BLOCK_M, BLOCK_N]
    label = tl.load(labels_ptr + offs_m, mask=offs_m < M, other=-1)  # [BLOCK_M]
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < M, other=0.0)  # [BLOCK_M]
    scale = tl.load(scale_ptr + offs_m, mask=offs_m < M, other=0.0)  # [BLOCK_M]
    if softcap is not None:
        capped = tanh(logits / tl.cast(softcap, tl.float32))
        logits = tl.cast(softcap, tl.float32) * capped
    grad = tl.exp(logits - lse[:, None]) - tl.cast(smoothing_per_logit, tl.float32)
    is_label = (offs_n + vocab_start)[None, :] == label[:, None]
    grad = tl.where(is_label, grad - (1.0 - tl.cast(label_smoothing, tl.float32)), grad) * scale[:, None]
    if softcap is not None:
        grad *= 1.0 - capped * capped
    out = grad_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out, grad.to(grad_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _logits(
    hidden_ptr,
    weight_ptr,
    offs_m,
    offs_n,
    M,
    N,
    K,
    stride_hidden_m,
    stride_weight_n,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute hidden[offs_m] · weight[offs_n]ᵀ in fp32: [BLOCK_M, BLOCK_N].

    Indices past the end are clamped, as unmasked loads are faster. The caller masks their results.
    """
    offs_k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    hidden_tile = hidden_ptr + tl.minimum(offs_m, M - 1).to(tl.int64)[:, None] * stride_hidden_m + offs_k[None, :]
    weight_tile = weight_ptr + tl.minimum(offs_n, N - 1).to(tl.int64)[None, :] * stride_weight_n + offs_k[:, None]
    acc = tl.zeros([offs_m.shape[0], offs_n.shape[0]], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        if EVEN_K:
            hidden, weight = tl.load(hidden_tile + start), tl.load(weight_tile + start)
        else:
            hidden = tl.load(hidden_tile + start, mask=(start + offs_k < K)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
            weight = tl.load(weight_tile + start, mask=(start + offs_k < K)[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        if UPCAST:
            hidden, weight = hidden.to(tl.float32), weight.to(tl.float32)
        acc = tl.dot(hidden, weight, acc, input_precision="ieee")
    return acc
