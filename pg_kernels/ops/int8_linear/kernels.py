"""Triton kernels of int8_linear. M = tokens, N = output features, K = inner size: x [M, K], int8 weight [N, K].

`SCALES` says how many scales of a weight's row one step over K meets:
    "per_row": one for the whole row, applied to the finished sum.
    "per_block": one for each block of K, applied to the block's partial product.
    "per_column": several, as groups are shorter than a block of K. The weight is dequantised before the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import gelu


@triton.jit
def quantize_rows_kernel(x_ptr, qx_ptr, scale_ptr, K, stride_xm, BLOCK_K: tl.constexpr):
    """Quantise one row of x [M, K] to int8 [M, K] and a scale [M], rounding half to even.

    A row with NaN or infinity becomes zeros with the scale NaN.
    """
    row = tl.program_id(0)
    x = x_ptr + tl.cast(row, tl.int64) * stride_xm
    qx = qx_ptr + tl.cast(row, tl.int64) * K
    column = tl.arange(0, BLOCK_K)
    absmax = tl.zeros([BLOCK_K], tl.float32)
    # Track NaN and infinity separately: a maximum may drop NaN.
    not_finite = tl.zeros([BLOCK_K], tl.int32)
    for start in tl.range(0, K, BLOCK_K):
        magnitude = tl.abs(tl.load(x + start + column, mask=start + column < K, other=0.0).to(tl.float32))  # [BLOCK_K]
        absmax = tl.maximum(absmax, magnitude)
        not_finite = tl.where(magnitude < float("inf"), not_finite, 1)
    finite = tl.max(not_finite, axis=0) == 0
    scale = tl.div_rn(tl.max(absmax, axis=0), 127.0)
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")))
    step = tl.where(scale > 0.0, scale, 1.0)
    for start in tl.range(0, K, BLOCK_K):
        mask = start + column < K
        value = tl.load(x + start + column, mask=mask, other=0.0).to(tl.float32)
        level = tl.div_rn(tl.where(finite, value, 0.0), step + tl.zeros([BLOCK_K], tl.float32))
        level = tl.minimum(tl.maximum(level, -127.0), 127.0)
        # Round half to even: fp32 numbers near 1.5 · 2^23 are 1 apart.
        level = (level + 12582912.0) - 12582912.0
        tl.store(qx + start + column, level.to(tl.int8), mask=mask)


@triton.jit
def _accumulate(
    acc,
    weight,
    scale,
    x,
    mask,
    group,
    W8A8: tl.constexpr,
    SCALES: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add one block of weight · x to acc [BLOCK_N, BLOCK_M].

    `weight` are pointers [BLOCK_N, BLOCK_K], `scale` pointers [BLOCK_N] to the rows' first scales and x a tile
    [BLOCK_K, BLOCK_M]. `mask` [BLOCK_K] are the columns that exist, `group` their group: one, or [BLOCK_K] with "per_column".
    """
    if EVEN_K:
        w = tl.load(weight)  # [BLOCK_N, BLOCK_K]
    else:
        w = tl.load(weight, mask=mask[None, :], other=0)  # [BLOCK_N, BLOCK_K]
    if SCALES == "per_column":
        scales = tl.load(scale[:, None] + group[None, :], mask=mask[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(w.to(tl.float32) * scales, x.to(tl.float32), acc, input_precision="ieee")
    elif W8A8:
        if SCALES == "per_row":
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        else:
            acc += tl.dot(w, x, out_dtype=tl.int32).to(tl.float32) * tl.load(scale + group)[:, None]
    else:
        if UPCAST:
            w, x = w.to(tl.float32), x.to(tl.float32)
        else:
            w = w.to(x.dtype)
        if SCALES == "per_row":
            acc = tl.dot(w, x, acc, input_precision="ieee")
        else:
            acc += tl.dot(w, x, input_precision="ieee") * tl.load(scale + group)[:, None]
    return acc


@triton.jit
def _scale_and_add_bias(acc, scale_ptr, bias_ptr, row_scale_ptr, feature, token, SCALES: tl.constexpr):
    """Return acc [BLOCK_N, BLOCK_M] in fp32 with the scales that are still missing, and the bias."""
    y = acc.to(tl.float32)
    if SCALES == "per_row":
        y *= tl.load(scale_ptr + feature)[:, None]
    if row_scale_ptr is not None:
        y *= tl.load(row_scale_ptr + token)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + feature).to(tl.float32)[:, None]
    return y


@triton.jit
def int8_gemm_kernel(
    x_ptr,
    row_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    up_ptr,
    up_scale_ptr,
    up_bias_ptr,
    y_ptr,
    partial_ptr,
    M,
    N,
    K,
    num_groups,
    stride_xm,
    stride_wn,
    stride_un,
    k_per_split,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALES: tl.constexpr,
    W8A8: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute BLOCK_M rows by BLOCK_N columns of y [M, N] = x · (weight · scale)ᵀ + bias.

    With `up` given, compute gelu(x · weightᵀ) · (x · upᵀ) instead. With `partial` given, store program_id(1)'s part of the sums,
    over k_per_split columns, to partial [splits, 1 or 2, M, N]; `reduce_split_k_kernel` adds them up.

    The weight is the first operand of the product: on sm_90 the first operand may come from registers, where the weight is
    converted.
    """
    # GROUP_M blocks of rows run side by side for each block of columns.
    num_blocks_m, num_blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group_m = program // (GROUP_M * num_blocks_n)
    group_m_size = tl.minimum(num_blocks_m - group_m * GROUP_M, GROUP_M)
    block_m = group_m * GROUP_M + (program % (GROUP_M * num_blocks_n)) % group_m_size
    block_n = (program % (GROUP_M * num_blocks_n)) // group_m_size

    token = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Clamp indices past the end: unmasked loads are faster, and these results are never stored.
    read_token = tl.minimum(token, M - 1).to(tl.int64)
    read_feature = tl.minimum(feature, N - 1).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    x = x_ptr + read_token[None, :] * stride_xm + column[:, None]  # [BLOCK_K, BLOCK_M]
    weight = weight_ptr + read_feature[:, None] * stride_wn + column[None, :]  # [BLOCK_N, BLOCK_K]
    scale = scale_ptr + read_feature * num_groups  # [BLOCK_N]
    gated: tl.constexpr = up_ptr is not None
    if W8A8 and SCALES == "per_row":
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    else:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if gated:
        up = up_ptr + read_feature[:, None] * stride_un + column[None, :]  # [BLOCK_N, BLOCK_K]
        up_scale = up_scale_ptr + read_feature * num_groups  # [BLOCK_N]
        up_acc = acc

    first = tl.program_id(1) * k_per_split
    for start in tl.range(first, tl.minimum(first + k_per_split, K), BLOCK_K):
        mask = start + column < K
        if EVEN_K:
            x_block = tl.load(x + start)  # [BLOCK_K, BLOCK_M]
        else:
            x_block = tl.load(x + start, mask=mask[:, None], other=0)  # [BLOCK_K, BLOCK_M]
        if SCALES == "per_column":
            # Columns past the end have no group: clamp theirs to the last one.
            group = tl.minimum((start + column) // GROUP_SIZE, num_groups - 1)
        else:
            group = start // GROUP_SIZE
        acc = _accumulate(acc, weight + start, scale, x_block, mask, group, W8A8, SCALES, EVEN_K, UPCAST)
        if gated:
            up_acc = _accumulate(up_acc, up + start, up_scale, x_block, mask, group, W8A8, SCALES, EVEN_K, UPCAST)

    offsets = token.to(tl.int64)[None, :] * N + feature[:, None]  # [BLOCK_N, BLOCK_M]
    stored = (feature < N)[:, None] & (token < M)[None, :]
    if partial_ptr is not None:
        size = tl.cast(M, tl.int64) * N
        weights: tl.constexpr = 2 if gated else 1
        partial = partial_ptr + tl.program_id(1) * weights * size + offsets
        tl.store(partial, acc, mask=stored)
        if gated:
            tl.store(partial + size, up_acc, mask=stored)
    else:
        y = _scale_and_add_bias(acc, scale_ptr, bias_ptr, row_scale_ptr, read_feature, read_token, SCALES)
        if gated:
            y = gelu(y) * _scale_and_add_bias(
                up_acc, up_scale_ptr, up_bias_ptr, row_scale_ptr, read_feature, read_token, SCALES
            )
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=stored)


@triton.jit
def reduce_split_k_kernel(
    partial_ptr,
    row_scale_ptr,
    scale_ptr,
    bias_ptr,
    up_scale_ptr,
    up_bias_ptr,
    y_ptr,
    M,
    N,
    num_splits,
    GATED: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add BLOCK_N sums of one token over partial [splits, 1 or 2, M, N], in the order of the splits, and finish y [M, N]."""
    token = tl.program_id(0) + tl.arange(0, 1)
    feature = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = feature < N
    read_feature = tl.minimum(feature, N - 1)
    size = tl.cast(M, tl.int64) * N
    offsets = token.to(tl.int64)[None, :] * N + feature[:, None]  # [BLOCK_N, 1]
    acc = tl.zeros([BLOCK_N, 1], partial_ptr.dtype.element_ty)
    up_acc = acc
    for _ in tl.range(0, num_splits):
        acc += tl.load(partial_ptr + offsets, mask=mask[:, None], other=0)
        if GATED:
            up_acc += tl.load(partial_ptr + size + offsets, mask=mask[:, None], other=0)
        partial_ptr += size * 2 if GATED else size
    y = _scale_and_add_bias(acc, scale_ptr, bias_ptr, row_scale_ptr, read_feature, token, SCALES)
    if GATED:
        y = gelu(y) * _scale_and_add_bias(up_acc, up_scale_ptr, up_bias_ptr, row_scale_ptr, read_feature, token, SCALES)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def int8_input_grad_kernel(
    grad_ptr,
    weight_ptr,
    scale_ptr,
    grad_x_ptr,
    M,
    N,
    K,
    num_groups,
    stride_gm,
    stride_wn,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute BLOCK_M rows by BLOCK_K columns of grad_x [M, K] = grad [M, N] · (weight · scale) [N, K].

    `SCALES` is "per_block" where all columns of a tile share their scales, else "per_column".
    """
    num_blocks_m, num_blocks_k = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    group_m = program // (GROUP_M * num_blocks_k)
    group_m_size = tl.minimum(num_blocks_m - group_m * GROUP_M, GROUP_M)
    block_m = group_m * GROUP_M + (program % (GROUP_M * num_blocks_k)) % group_m_size
    block_k = (program % (GROUP_M * num_blocks_k)) // group_m_size

    token = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    read_token = tl.minimum(token, M - 1).to(tl.int64)
    read_column = tl.minimum(column, K - 1)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        feature = start + tl.arange(0, BLOCK_N)
        mask = feature < N
        row = feature.to(tl.int64)
        grad = tl.load(  # [BLOCK_M, BLOCK_N]
            grad_ptr + read_token[:, None] * stride_gm + feature[None, :], mask=mask[None, :], other=0.0
        )
        weight = weight_ptr + row[:, None] * stride_wn + read_column[None, :]
        w = tl.load(weight, mask=mask[:, None], other=0)  # [BLOCK_N, BLOCK_K]
        grad = grad.to(tl.float32)
        if SCALES == "per_column":
            scales = scale_ptr + row[:, None] * num_groups + (read_column // GROUP_SIZE)[None, :]  # [BLOCK_N, BLOCK_K]
            w = w.to(tl.float32) * tl.load(scales, mask=mask[:, None], other=0.0)
            acc = tl.dot(grad, w, acc, input_precision="ieee")
        else:
            group = block_k * BLOCK_K // GROUP_SIZE
            grad *= tl.load(scale_ptr + row * num_groups + group, mask=mask, other=0.0)[None, :]
            if grad_ptr.dtype.element_ty == tl.float32:
                acc = tl.dot(grad, w.to(tl.float32), acc, input_precision="ieee")
            else:
                # Split into two bf16 numbers. bf16 has fp32's range, and two of them hold the digits of a 16-bit gradient
                # times a scale.
                high = grad.to(tl.bfloat16)
                low = (grad - high.to(tl.float32)).to(tl.bfloat16)
                if UPCAST:
                    high, low, w = high.to(tl.float32), low.to(tl.float32), w.to(tl.float32)
                else:
                    w = w.to(tl.bfloat16)
                acc = tl.dot(high, w, acc, input_precision="ieee")
                acc = tl.dot(low, w, acc, input_precision="ieee")
    grad_x = grad_x_ptr + token.to(tl.int64)[:, None] * K + column[None, :]  # [BLOCK_M, BLOCK_K]
    tl.store(grad_x, acc.to(grad_x_ptr.dtype.element_ty), mask=(token < M)[:, None] & (column < K)[None, :])
