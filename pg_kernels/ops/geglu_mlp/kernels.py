from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import gelu


@triton.jit
def gate_up(
    x_ptr,
    gate_ptr,
    up_ptr,
    y_ptr,
    rows,
    features,
    inner,
    x_stride,
    gate_stride,
    up_stride,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of gelu(x · gateᵀ) · (x · upᵀ): both products share the loads of x, and neither is ever written."""
    row_blocks, feature_blocks = tl.cdiv(rows, ROWS), tl.cdiv(features, FEATURES)
    program = tl.program_id(0)
    group = program // (GROUP * feature_blocks)
    in_group = tl.minimum(row_blocks - group * GROUP, GROUP)
    row_block = group * GROUP + (program % (GROUP * feature_blocks)) % in_group
    feature_block = (program % (GROUP * feature_blocks)) // in_group

    row = row_block * ROWS + tl.arange(0, ROWS)
    feature = feature_block * FEATURES + tl.arange(0, FEATURES)
    # Beyond the end the last ones again: a load without a mask is faster, and those results are not stored.
    read_row = tl.minimum(row, rows - 1).to(tl.int64)
    read_feature = tl.minimum(feature, features - 1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = x_ptr + read_row[:, None] * x_stride + column[None, :]
    gate = gate_ptr + read_feature[None, :] * gate_stride + column[:, None]
    up = up_ptr + read_feature[None, :] * up_stride + column[:, None]

    gates = tl.zeros([ROWS, FEATURES], tl.float32)
    ups = tl.zeros([ROWS, FEATURES], tl.float32)
    for start in tl.range(0, inner, BLOCK):
        if EVEN:
            a, b, c = tl.load(x + start), tl.load(gate + start), tl.load(up + start)
        else:
            there = start + column < inner
            a = tl.load(x + start, mask=there[None, :], other=0.0)
            b = tl.load(gate + start, mask=there[:, None], other=0.0)
            c = tl.load(up + start, mask=there[:, None], other=0.0)
        if WIDEN:
            a, b, c = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32)
        gates = tl.dot(a, b, gates, input_precision="ieee")
        ups = tl.dot(a, c, ups, input_precision="ieee")

    y = y_ptr + row.to(tl.int64)[:, None] * features + feature[None, :]
    tl.store(
        y, (gelu(gates) * ups).to(y_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (feature < features)[None, :]
    )
