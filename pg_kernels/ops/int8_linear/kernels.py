from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import gelu


@triton.jit
def quantize_rows(x_ptr, level_ptr, scale_ptr, inner, x_stride, BLOCK: tl.constexpr):
    """A row of x as int8 [M, K] · scale [M], rounded half to even; a row that is not finite gets zeros and the scale NaN."""
    row = tl.program_id(0)
    x = x_ptr + tl.cast(row, tl.int64) * x_stride
    levels = level_ptr + tl.cast(row, tl.int64) * inner
    column = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.float32)
    # A maximum may drop NaN.
    faults = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, inner, BLOCK):
        size = tl.abs(tl.load(x + start + column, mask=start + column < inner, other=0.0).to(tl.float32))
        most = tl.maximum(most, size)
        faults = tl.where(size < float("inf"), faults, 1)
    finite = tl.max(faults, axis=0) == 0
    scale = tl.div_rn(tl.max(most, axis=0), 127.0)
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")))
    step = tl.where(scale > 0.0, scale, 1.0)
    for start in tl.range(0, inner, BLOCK):
        there = start + column < inner
        value = tl.load(x + start + column, mask=there, other=0.0).to(tl.float32)
        level = tl.div_rn(tl.where(finite, value, 0.0), step + tl.zeros([BLOCK], tl.float32))
        level = tl.minimum(tl.maximum(level, -127.0), 127.0)
        # At 1.5 · 2^23 numbers lie 1 apart.
        level = (level + 12582912.0) - 12582912.0
        tl.store(levels + start + column, level.to(tl.int8), mask=there)


@triton.jit
def _plus_block(
    sums,
    weight,
    scale,
    x,
    there,
    group,
    EXACT: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """sums [features, tokens] and a block of the weight times x, a block [inner, tokens]; `group` is its group of columns."""
    if EVEN:
        w = tl.load(weight)
    else:
        w = tl.load(weight, mask=there[None, :], other=0)
    if GROUPS == "many":
        scales = tl.load(scale[:, None] + group[None, :], mask=there[None, :], other=0.0)
        sums = tl.dot(w.to(tl.float32) * scales, x.to(tl.float32), sums, input_precision="ieee")
    elif EXACT:
        if GROUPS == "one":
            sums = tl.dot(w, x, sums, out_dtype=tl.int32)
        else:
            sums += tl.dot(w, x, out_dtype=tl.int32).to(tl.float32) * tl.load(scale + group)[:, None]
    else:
        if WIDEN:
            w, x = w.to(tl.float32), x.to(tl.float32)
        else:
            w = w.to(x.dtype)
        if GROUPS == "one":
            sums = tl.dot(w, x, sums, input_precision="ieee")
        else:
            sums += tl.dot(w, x, input_precision="ieee") * tl.load(scale + group)[:, None]
    return sums


@triton.jit
def _finished(sums, scale_ptr, bias_ptr, row_scale_ptr, feature, token, GROUPS: tl.constexpr):
    """Sums [features, tokens] with what is left to multiply and add."""
    y = sums.to(tl.float32)
    if GROUPS == "one":
        y *= tl.load(scale_ptr + feature)[:, None]
    if row_scale_ptr is not None:
        y *= tl.load(row_scale_ptr + token)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + feature).to(tl.float32)[:, None]
    return y


@triton.jit
def product(
    x_ptr,
    row_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    up_ptr,
    up_scale_ptr,
    up_bias_ptr,
    y_ptr,
    parts_ptr,
    tokens,
    features,
    inner,
    groups,
    x_stride,
    weight_stride,
    up_stride,
    span,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    EXACT: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of x · (weight · scale)ᵀ, or of gelu of that times the same for `up`; with `parts` a part of its sums instead.

    The weight is the first operand, as on sm_90 that may come from registers, where it is converted.
    """
    token_blocks, feature_blocks = tl.cdiv(tokens, TOKENS), tl.cdiv(features, FEATURES)
    program = tl.program_id(0)
    side_by_side = program // (GROUP * feature_blocks)
    in_group = tl.minimum(token_blocks - side_by_side * GROUP, GROUP)
    token_block = side_by_side * GROUP + (program % (GROUP * feature_blocks)) % in_group
    feature_block = (program % (GROUP * feature_blocks)) // in_group

    token = token_block * TOKENS + tl.arange(0, TOKENS)
    feature = feature_block * FEATURES + tl.arange(0, FEATURES)
    # Beyond the end the last ones again: a load without a mask is faster, and those results are not stored.
    read_token = tl.minimum(token, tokens - 1).to(tl.int64)
    read_feature = tl.minimum(feature, features - 1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = x_ptr + read_token[None, :] * x_stride + column[:, None]
    weight = weight_ptr + read_feature[:, None] * weight_stride + column[None, :]
    scale = scale_ptr + read_feature * groups
    gated: tl.constexpr = up_ptr is not None
    if EXACT and GROUPS == "one":
        sums = tl.zeros([FEATURES, TOKENS], tl.int32)
    else:
        sums = tl.zeros([FEATURES, TOKENS], tl.float32)
    if gated:
        up = up_ptr + read_feature[:, None] * up_stride + column[None, :]
        up_scale = up_scale_ptr + read_feature * groups
        ups = sums

    first = tl.program_id(1) * span
    for start in tl.range(first, tl.minimum(first + span, inner), BLOCK):
        there = start + column < inner
        if EVEN:
            block = tl.load(x + start)
        else:
            block = tl.load(x + start, mask=there[:, None], other=0)
        if GROUPS == "many":
            # Columns of zeros beyond the end have no group.
            group = tl.minimum((start + column) // GROUP_SIZE, groups - 1)
        else:
            group = start // GROUP_SIZE
        sums = _plus_block(sums, weight + start, scale, block, there, group, EXACT, GROUPS, EVEN, WIDEN)
        if gated:
            ups = _plus_block(ups, up + start, up_scale, block, there, group, EXACT, GROUPS, EVEN, WIDEN)

    place = token.to(tl.int64)[None, :] * features + feature[:, None]
    stored = (feature < features)[:, None] & (token < tokens)[None, :]
    if parts_ptr is not None:
        size = tl.cast(tokens, tl.int64) * features
        weights: tl.constexpr = 2 if gated else 1
        parts = parts_ptr + tl.program_id(1) * weights * size + place
        tl.store(parts, sums, mask=stored)
        if gated:
            tl.store(parts + size, ups, mask=stored)
    else:
        y = _finished(sums, scale_ptr, bias_ptr, row_scale_ptr, read_feature, read_token, GROUPS)
        if gated:
            y = gelu(y) * _finished(ups, up_scale_ptr, up_bias_ptr, row_scale_ptr, read_feature, read_token, GROUPS)
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=stored)


@triton.jit
def add_parts(
    parts_ptr,
    row_scale_ptr,
    scale_ptr,
    bias_ptr,
    up_scale_ptr,
    up_bias_ptr,
    y_ptr,
    tokens,
    features,
    splits,
    GATED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the parts of a row's sums [splits, 1 or 2, M, N] in their order, and finish it."""
    token = tl.program_id(0) + tl.arange(0, 1)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = feature < features
    read_feature = tl.minimum(feature, features - 1)
    size = tl.cast(tokens, tl.int64) * features
    place = token.to(tl.int64)[None, :] * features + feature[:, None]
    sums = tl.zeros([BLOCK, 1], parts_ptr.dtype.element_ty)
    ups = sums
    for _ in tl.range(0, splits):
        sums += tl.load(parts_ptr + place, mask=there[:, None], other=0)
        if GATED:
            ups += tl.load(parts_ptr + size + place, mask=there[:, None], other=0)
        parts_ptr += size * 2 if GATED else size
    y = _finished(sums, scale_ptr, bias_ptr, row_scale_ptr, read_feature, token, GROUPS)
    if GATED:
        y = gelu(y) * _finished(ups, up_scale_ptr, up_bias_ptr, row_scale_ptr, read_feature, token, GROUPS)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=there[:, None])


@triton.jit
def input_gradient(
    grad_ptr,
    weight_ptr,
    scale_ptr,
    y_ptr,
    tokens,
    features,
    inner,
    groups,
    grad_stride,
    weight_stride,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    MANY: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of grad [M, N] · (weight · scale) [N, K]; the columns of a tile share their scales, or are `MANY` groups'."""
    token_blocks, column_blocks = tl.cdiv(tokens, TOKENS), tl.cdiv(inner, COLUMNS)
    program = tl.program_id(0)
    side_by_side = program // (GROUP * column_blocks)
    in_group = tl.minimum(token_blocks - side_by_side * GROUP, GROUP)
    token_block = side_by_side * GROUP + (program % (GROUP * column_blocks)) % in_group
    column_block = (program % (GROUP * column_blocks)) // in_group

    token = token_block * TOKENS + tl.arange(0, TOKENS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    read_token = tl.minimum(token, tokens - 1).to(tl.int64)
    read_column = tl.minimum(column, inner - 1)
    sums = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in tl.range(0, features, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        there = feature < features
        row = feature.to(tl.int64)
        grad = tl.load(grad_ptr + read_token[:, None] * grad_stride + feature[None, :], mask=there[None, :], other=0.0)
        weight = weight_ptr + row[:, None] * weight_stride + read_column[None, :]
        w = tl.load(weight, mask=there[:, None], other=0)
        grad = grad.to(tl.float32)
        if MANY:
            scales = scale_ptr + row[:, None] * groups + (read_column // GROUP_SIZE)[None, :]
            w = w.to(tl.float32) * tl.load(scales, mask=there[:, None], other=0.0)
            sums = tl.dot(grad, w, sums, input_precision="ieee")
        else:
            group = column_block * COLUMNS // GROUP_SIZE
            grad *= tl.load(scale_ptr + row * groups + group, mask=there, other=0.0)[None, :]
            if grad_ptr.dtype.element_ty == tl.float32:
                sums = tl.dot(grad, w.to(tl.float32), sums, input_precision="ieee")
            else:
                # Two numbers of bf16, whose range is fp32's, have as many digits as a gradient of 16 bits times a scale needs.
                high = grad.to(tl.bfloat16)
                low = (grad - high.to(tl.float32)).to(tl.bfloat16)
                if WIDEN:
                    high, low, w = high.to(tl.float32), low.to(tl.float32), w.to(tl.float32)
                else:
                    w = w.to(tl.bfloat16)
                sums = tl.dot(high, w, sums, input_precision="ieee")
                sums = tl.dot(low, w, sums, input_precision="ieee")
    y = y_ptr + token.to(tl.int64)[:, None] * inner + column[None, :]
    tl.store(y, sums.to(y_ptr.dtype.element_ty), mask=(token < tokens)[:, None] & (column < inner)[None, :])
