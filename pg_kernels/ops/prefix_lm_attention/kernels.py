"""The attention kernels: forward, the sum over splits of the keys, and backward of q and of k and v.

A program's rows are the queries of one KV head, so that all its query heads share the loads of keys: row r is query
r // HEADS_PER_KV of head r % HEADS_PER_KV. Tiles of keys are counted from an example's first valid key. A head dimension is held
as one or two blocks, x0 [., BLOCK_D0] and x1 [., BLOCK_D1] (see tile_io.py). Scores are in base 2, for the hardware's exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import tanh
from pg_kernels.ops.prefix_lm_attention.tile_io import (
    head_base,
    key_offsets,
    load_described,
    load_rows,
    lse_base,
    row_offsets,
    store_rows,
)
from pg_kernels.ops.prefix_lm_attention.tile_ranges import (
    block_positions,
    example_lengths,
    full_tile,
    is_visible,
    key_tiles,
    partial_tile,
    row_tiles,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3e38)
"""The least row_max of a row that has seen a key: a key's own score may be -inf."""
LENGTHS = ["q_len", "kv_len", "lengths"]
"""Arguments that Triton does not specialise on: other values do not compile the kernel again."""


@triton.jit(do_not_specialize=LENGTHS)
def attn_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_descriptor0,
    k_descriptor1,
    v_descriptor0,
    v_descriptor1,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    lse_ptr,
    prefix_lens_ptr,
    kv_starts_ptr,
    kv_lens_ptr,
    q_starts_ptr,
    cu_seqlens_ptr,
    q_strides,
    k_strides,
    v_strides,
    scale_strides,
    out_strides,
    lse_strides,
    q_len,
    kv_len,
    lengths,
    kv_heads,
    scale,
    softcap,
    window,
    HEADS_PER_KV: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute the output and log-sum-exp of BLOCK_M rows; with NUM_SPLITS > 1, over one split of the keys."""
    batch, head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    seq_start, q_len, kv_start, kv_end, prefix_end, q_start, allowed = example_lengths(
        prefix_lens_ptr, kv_starts_ptr, kv_lens_ptr, q_starts_ptr, cu_seqlens_ptr, batch, q_len, kv_len, lengths
    )
    # The last rows see the most keys, so they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    if block * BLOCK_M < q_len * HEADS_PER_KV:
        row_mask = row < q_len * HEADS_PER_KV
        dims = (tl.arange(0, BLOCK_D0), BLOCK_D0 + tl.arange(0, BLOCK_D1 if BLOCK_D1 else 16))
        q_base = head_base(q_ptr, q_strides, batch, head * HEADS_PER_KV, seq_start, STRIDE_UNIT)
        q_offsets = row_offsets(row, q_strides, HEADS_PER_KV, STRIDE_UNIT)
        q0, q1 = load_rows(q_base, q_offsets, dims, row_mask, True, HEAD_DIM, BLOCK_D0, BLOCK_D1, UPCAST)
        k_base = head_base(k_ptr, k_strides, batch, head, seq_start, STRIDE_UNIT)
        v_base = head_base(v_ptr, v_strides, batch, head, seq_start, STRIDE_UNIT)
        scale_offset = batch.to(tl.int64) * scale_strides[0] + head * scale_strides[1]
        example = batch if cu_seqlens_ptr is None else 0  # packed sequences are one example

        position = q_start + row // HEADS_PER_KV
        first, last = block_positions(block, q_start, q_len, HEADS_PER_KV, BLOCK_M)
        full, partial = key_tiles(first, last, kv_start, kv_end, prefix_end, window, CAUSAL, BLOCK_N)
        if NUM_SPLITS > 1:
            tiles_per_split = tl.cdiv(full[2] + partial[3], NUM_SPLITS)
            split_begin, split_end = tl.program_id(2) * tiles_per_split, (tl.program_id(2) + 1) * tiles_per_split

        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc0 = tl.zeros([BLOCK_M, BLOCK_D0], tl.float32)
        acc1 = tl.zeros([BLOCK_M, BLOCK_D1 if BLOCK_D1 else 16], tl.float32)
        for is_partial in tl.static_range(2):
            begin, stop = 0, partial[3] if is_partial else full[2]
            if NUM_SPLITS > 1:
                before = full[2] if is_partial else 0
                begin, stop = tl.maximum(split_begin - before, 0), tl.minimum(split_end - before, stop)
            for number in tl.range(begin, stop):
                tile = partial_tile(number, partial, window) if is_partial else full_tile(number, full, window)
                key = kv_start + tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
                key_mask = key < kv_end
                if k_descriptor0 is not None:
                    place = (example, head, seq_start + kv_start + tile * BLOCK_N)
                    k0, k1 = load_described(k_descriptor0, k_descriptor1, place, BLOCK_D0, BLOCK_D1, BLOCK_N, UPCAST)
                else:
                    k_offsets = key_offsets(key, k_strides, STRIDE_UNIT)
                    k0, k1 = load_rows(
                        k_base, k_offsets, dims, key_mask, is_partial == 1, HEAD_DIM, BLOCK_D0, BLOCK_D1, UPCAST
                    )
                if k_scale_ptr is not None:
                    k0, k1 = k0.to(q0.dtype), k1.to(q0.dtype)
                scores = dot_transposed(q0, q1, k0, k1, BLOCK_D1)  # [BLOCK_M, BLOCK_N]
                if k_scale_ptr is not None:
                    scores *= tl.load(k_scale_ptr + scale_offset + key * scale_strides[2], mask=key_mask, other=0.0)[
                        None, :
                    ]
                scores, _ = scale_scores(scores, scale, softcap)
                if is_partial:
                    visible = is_visible(position[:, None], key[None, :], kv_end, prefix_end, window, CAUSAL)
                    scores = tl.where(visible, scores, float("-inf"))
                    new_max = tl.max(tl.where(visible, tl.maximum(scores, LOWEST), float("-inf")), axis=1)
                else:
                    new_max = tl.maximum(tl.max(scores, axis=1), LOWEST)
                new_max = tl.maximum(row_max, new_max)
                # A row that has seen no key yet: -inf - -inf would be NaN.
                safe_max = tl.where(new_max == float("-inf"), 0.0, new_max) if is_partial == 1 else new_max
                p = tl.exp2(scores - safe_max[:, None])
                alpha = tl.exp2(row_max - safe_max)
                row_sum = row_sum * alpha + tl.sum(p, axis=1)
                row_max = new_max
                if v_descriptor0 is not None:
                    v0, v1 = load_described(v_descriptor0, v_descriptor1, place, BLOCK_D0, BLOCK_D1, BLOCK_N, UPCAST)
                    if is_partial:  # keys past kv_end may hold NaN, and 0 * NaN is NaN
                        v0, v1 = tl.where(key_mask[:, None], v0, 0.0), tl.where(key_mask[:, None], v1, 0.0)
                else:
                    v_offsets = key_offsets(key, v_strides, STRIDE_UNIT)
                    v0, v1 = load_rows(
                        v_base, v_offsets, dims, key_mask, is_partial == 1, HEAD_DIM, BLOCK_D0, BLOCK_D1, UPCAST
                    )
                if v_scale_ptr is not None:
                    p *= tl.load(v_scale_ptr + scale_offset + key * scale_strides[2], mask=key_mask, other=0.0)[None, :]
                    v0, v1 = v0.to(q0.dtype), v1.to(q0.dtype)
                p = p.to(v0.dtype)
                acc0 = tl.dot(p, v0, acc0 * alpha[:, None], input_precision="ieee")
                if BLOCK_D1:
                    acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision="ieee")

        # A row that sees no key is 0; one that sees only -inf is 0 / 0. Lengths out of range give NaN, not a plausible number.
        denominator = tl.where(row_sum == 0.0 if NUM_SPLITS > 1 else row_max == float("-inf"), 1.0, row_sum)
        factor = tl.where(allowed, 1.0 / denominator, float("nan"))
        lse = row_max + tl.log2(denominator)
        if NUM_SPLITS == 1:
            lse = tl.where(row_max == float("-inf"), float("inf"), lse)
        out_base = head_base(out_ptr, out_strides, batch, head * HEADS_PER_KV, seq_start, STRIDE_UNIT)
        if NUM_SPLITS > 1:
            out_base += tl.program_id(2).to(tl.int64) * out_strides[3]
            lse_ptr += tl.program_id(2).to(tl.int64) * lse_strides[2]
        out_offsets = row_offsets(row, out_strides, HEADS_PER_KV, STRIDE_UNIT)
        store_rows(
            out_base,
            out_offsets,
            dims,
            row_mask,
            acc0 * factor[:, None],
            acc1 * factor[:, None],
            HEAD_DIM,
            BLOCK_D0,
            BLOCK_D1,
        )
        tl.store(lse_base(lse_ptr, lse_strides, batch, head, seq_start, HEADS_PER_KV) + row, lse, mask=row_mask)


@triton.jit
def attn_combine_kernel(
    partial_out_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    partial_out_strides,
    out_strides,
    num_rows,
    kv_heads,
    HEADS_PER_KV: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Combine the splits of one row, each weighted by its part of the sum of exponentials."""
    index = tl.program_id(0)
    batch, head, row = index // num_rows // kv_heads, index // num_rows % kv_heads, index % num_rows
    split, column = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_D)
    lses = partial_lse_ptr + split * tl.num_programs(0).to(tl.int64) + index
    lses = tl.load(lses, mask=split < NUM_SPLITS, other=float("-inf"))
    row_max = tl.max(lses, axis=0)
    p = tl.where(lses > LOWEST, tl.exp2(lses - row_max), 0.0)
    p = tl.where(lses == lses, p, lses)  # NaN
    row_sum = tl.sum(p, axis=0)
    base = head_base(partial_out_ptr, partial_out_strides, batch, head * HEADS_PER_KV, 0, STRIDE_UNIT)
    base += row_offsets(row, partial_out_strides, HEADS_PER_KV, STRIDE_UNIT)
    partial_out = base + (split.to(tl.int64) * partial_out_strides[3])[:, None] + column[None, :]
    partial_out = tl.load(partial_out, mask=(split < NUM_SPLITS)[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    # A row that sees no key is 0. A row that sees only scores of -inf is 0 / 0 = NaN.
    denominator = tl.where(row_max == float("-inf"), 1.0, row_sum)
    out = tl.sum(partial_out * p[:, None], axis=0) / denominator
    base = head_base(out_ptr, out_strides, batch, head * HEADS_PER_KV, 0, STRIDE_UNIT)
    base += row_offsets(row, out_strides, HEADS_PER_KV, STRIDE_UNIT)
    tl.store(base + column, out.to(out_ptr.dtype.element_ty), mask=column < HEAD_DIM)
    tl.store(lse_ptr + index, tl.where(row_max == float("-inf"), float("inf"), row_max + tl.log2(denominator)))


@triton.jit(do_not_specialize=LENGTHS)
def attn_bwd_dq_kernel(
    grad_out_ptr,
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    prefix_lens_ptr,
    kv_starts_ptr,
    kv_lens_ptr,
    q_starts_ptr,
    cu_seqlens_ptr,
    grad_out_strides,
    out_strides,
    q_strides,
    k_strides,
    v_strides,
    grad_q_strides,
    lse_strides,
    q_len,
    kv_len,
    lengths,
    kv_heads,
    scale,
    softcap,
    window,
    HEADS_PER_KV: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute the gradient of BLOCK_M rows of q, and delta for the other kernel: each row's sum of out * grad_out."""
    batch, head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    seq_start, q_len, kv_start, kv_end, prefix_end, q_start, allowed = example_lengths(
        prefix_lens_ptr, kv_starts_ptr, kv_lens_ptr, q_starts_ptr, cu_seqlens_ptr, batch, q_len, kv_len, lengths
    )
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    if block * BLOCK_M < q_len * HEADS_PER_KV:
        row_mask = row < q_len * HEADS_PER_KV
        dims = (tl.arange(0, BLOCK_D0), BLOCK_D0 + tl.arange(0, BLOCK_D1 if BLOCK_D1 else 16))
        q_base = head_base(q_ptr, q_strides, batch, head * HEADS_PER_KV, seq_start, STRIDE_UNIT)
        q_offsets = row_offsets(row, q_strides, HEADS_PER_KV, STRIDE_UNIT)
        q0, q1 = load_rows(q_base, q_offsets, dims, row_mask, True, HEAD_DIM, BLOCK_D0, BLOCK_D1, UPCAST)
        grad_out_base = head_base(grad_out_ptr, grad_out_strides, batch, head * HEADS_PER_KV, seq_start, STRIDE_UNIT)
        grad_out_offsets = row_offsets(row, grad_out_strides, HEADS_PER_KV, STRIDE_UNIT)
        grad_out0, grad_out1 = load_rows(
            grad_out_base, grad_out_offsets, dims, row_mask, True, HEAD_DIM, BLOCK_D0, BLOCK_D1, UPCAST
        )
        out_base = head_base(out_ptr, out_strides, batch, head * HEADS_PER_KV, seq_start, STRIDE_UNIT)
        out_offsets = row_offsets(row, out_strides, HEADS_PER_KV, STRIDE_UNIT)
        out0, out1 = load_rows(out_base, out_offsets, dims, row_mask, True, HEAD_DIM, BLOCK_D0, BLOCK_D1, UPCAST)
        delta = tl.sum(out0.to(tl.float32) * grad_out0.to(tl.float32), axis=1)
        if BLOCK_D1:
            delta += tl.sum(out1.to(tl.float32) * grad_out1.to(tl.float32), axis=1)
        # A NaN delta would reach keys that the row does not see, as 0 * NaN. Keys that it sees get NaN from p.
        finite_delta = tl.where(delta == delta, delta, 0.0)
        tl.store(
            lse_base(delta_ptr, lse_strides, batch, head, seq_start, HEADS_PER_KV) + row, finite_delta, mask=row_mask
        )
        lse = tl.load(
            lse_base(lse_ptr, lse_strides, batch, head, seq_start, HEADS_PER_KV) + row,
            mask=row_mask,
            other=float("inf"),
        )
        k_base = head_base(k_ptr, k_strides, batch, head, seq_start, STRIDE_UNIT)
        v_base = head_base(v_ptr, v_strides, batch, head, seq_start, STRIDE_UNIT)

        position = q_start + row // HEADS_PER_KV
        first, last = block_positions(block, q_start, q_len, HEADS_PER_KV, BLOCK_M)
        full, partial = key_tiles(first, last, kv_start, kv_end, prefix_end, window, CAUSAL, BLOCK_N)
        acc0 = tl.zeros([BLOCK_M, BLOCK_D0], tl.float32)
        acc1 = tl.zeros([BLOCK_M, BLOCK_D1 if BLOCK_D1 else 16], tl.float32)
        for is_partial in tl.static_range(2):
            for number in tl.range(0, partial[3] if is_partial else full[2]):
                tile = partial_tile(number, partial, window) if is_partial else full_tile(number, full, window)
                key = kv_start + tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
                key_mask = key < kv_end
                k_offsets = key_offsets(key, k_strides, STRIDE_UNIT)
                k0, k1 = load_rows(
                    k_base, k_offsets, dims, key_mask, is_partial == 1, HEAD_DIM, BLOCK_D0, BLOCK_D1, UPCAST
                )
                v_offsets = key_offsets(key, v_strides, STRIDE_UNIT)
                v0, v1 = load_rows(
                    v_base, v_offsets, dims, key_mask, is_partial == 1, HEAD_DIM, BLOCK_D0, BLOCK_D1, UPCAST
                )
                # [BLOCK_M, BLOCK_N]
                scores, slope = scale_scores(dot_transposed(q0, q1, k0, k1, BLOCK_D1), scale, softcap)
                p = tl.exp2(scores - lse[:, None])
                if is_partial:
                    visible = is_visible(position[:, None], key[None, :], kv_end, prefix_end, window, CAUSAL)
                    p = tl.where(visible, p, 0.0)
                grad_s = p * (dot_transposed(grad_out0, grad_out1, v0, v1, BLOCK_D1) - delta[:, None])
                if softcap is not None:
                    grad_s *= slope
                if is_partial:  # a hidden key or value may be NaN, and 0 * NaN is NaN
                    grad_s = tl.where(p == 0.0, 0.0, grad_s)
                grad_s = grad_s.to(k0.dtype)
                acc0 = tl.dot(grad_s, k0, acc0, input_precision="ieee")
                if BLOCK_D1:
                    acc1 = tl.dot(grad_s, k1, acc1, input_precision="ieee")
        factor = tl.where(allowed, tl.cast(scale, tl.float32), float("nan"))
        base = head_base(grad_q_ptr, grad_q_strides, batch, head * HEADS_PER_KV, seq_start, STRIDE_UNIT)
        grad_q_offsets = row_offsets(row, grad_q_strides, HEADS_PER_KV, STRIDE_UNIT)
        store_rows(base, grad_q_offsets, dims, row_mask, acc0 * factor, acc1 * factor, HEAD_DIM, BLOCK_D0, BLOCK_D1)


@triton.jit(do_not_specialize=LENGTHS)
def attn_bwd_dkv_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    prefix_lens_ptr,
    kv_starts_ptr,
    kv_lens_ptr,
    q_starts_ptr,
    cu_seqlens_ptr,
    grad_out_strides,
    q_strides,
    k_strides,
    v_strides,
    grad_k_strides,
    grad_v_strides,
    lse_strides,
    q_len,
    kv_len,
    lengths,
    kv_heads,
    scale,
    softcap,
    window,
    HEADS_PER_KV: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute the gradients of BLOCK_N keys and values, summed over the rows of all their heads; 0 for invalid keys."""
    batch, head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    seq_start, q_len, kv_start, kv_end, prefix_end, q_start, allowed = example_lengths(
        prefix_lens_ptr, kv_starts_ptr, kv_lens_ptr, q_starts_ptr, cu_seqlens_ptr, batch, q_len, kv_len, lengths
    )
    if cu_seqlens_ptr is not None:
        kv_len = q_len
    block = tl.program_id(0)
    if block * BLOCK_N < kv_len:
        key = block * BLOCK_N + tl.arange(0, BLOCK_N)
        key_mask = (key >= kv_start) & (key < kv_end)
        dims = (tl.arange(0, BLOCK_D0), BLOCK_D0 + tl.arange(0, BLOCK_D1 if BLOCK_D1 else 16))
        k_base = head_base(k_ptr, k_strides, batch, head, seq_start, STRIDE_UNIT)
        v_base = head_base(v_ptr, v_strides, batch, head, seq_start, STRIDE_UNIT)
        k_offsets = key_offsets(key, k_strides, STRIDE_UNIT)
        k0, k1 = load_rows(k_base, k_offsets, dims, key_mask, True, HEAD_DIM, BLOCK_D0, BLOCK_D1, UPCAST)
        v_offsets = key_offsets(key, v_strides, STRIDE_UNIT)
        v0, v1 = load_rows(v_base, v_offsets, dims, key_mask, True, HEAD_DIM, BLOCK_D0, BLOCK_D1, UPCAST)
        q_base = head_base(q_ptr, q_strides, batch, head * HEADS_PER_KV, seq_start, STRIDE_UNIT)
        grad_out_base = head_base(grad_out_ptr, grad_out_strides, batch, head * HEADS_PER_KV, seq_start, STRIDE_UNIT)
        lses = lse_base(lse_ptr, lse_strides, batch, head, seq_start, HEADS_PER_KV)
        deltas = lse_base(delta_ptr, lse_strides, batch, head, seq_start, HEADS_PER_KV)

        first, last = tl.maximum(block * BLOCK_N, kv_start), tl.minimum((block + 1) * BLOCK_N, kv_end) - 1
        begin, full_begin, full_end, end = row_tiles(
            first, last, q_len, q_start, prefix_end, window, CAUSAL, HEADS_PER_KV, BLOCK_M
        )
        before = full_begin - begin  # partial tiles before the full ones
        grad_k0 = tl.zeros([BLOCK_N, BLOCK_D0], tl.float32)
        grad_k1 = tl.zeros([BLOCK_N, BLOCK_D1 if BLOCK_D1 else 16], tl.float32)
        grad_v0 = tl.zeros([BLOCK_N, BLOCK_D0], tl.float32)
        grad_v1 = tl.zeros([BLOCK_N, BLOCK_D1 if BLOCK_D1 else 16], tl.float32)
        for is_partial in tl.static_range(2):
            for number in tl.range(0, before + end - full_end if is_partial else full_end - full_begin):
                tile = full_begin + number
                if is_partial:
                    tile = tl.where(number < before, begin + number, full_end - full_begin + begin + number)
                row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
                row_mask = row < q_len * HEADS_PER_KV
                q_offsets = row_offsets(row, q_strides, HEADS_PER_KV, STRIDE_UNIT)
                q0, q1 = load_rows(q_base, q_offsets, dims, row_mask, True, HEAD_DIM, BLOCK_D0, BLOCK_D1, UPCAST)
                grad_out_offsets = row_offsets(row, grad_out_strides, HEADS_PER_KV, STRIDE_UNIT)
                grad_out0, grad_out1 = load_rows(
                    grad_out_base, grad_out_offsets, dims, row_mask, True, HEAD_DIM, BLOCK_D0, BLOCK_D1, UPCAST
                )
                lse = tl.load(lses + row, mask=row_mask, other=float("inf"))
                delta = tl.load(deltas + row, mask=row_mask, other=0.0)
                # [BLOCK_N, BLOCK_M]: transposed, so that p and grad_s are left operands of the products below.
                scores, slope = scale_scores(dot_transposed(k0, k1, q0, q1, BLOCK_D1), scale, softcap)
                p = tl.exp2(scores - lse[None, :])
                if is_partial:
                    position = q_start + row // HEADS_PER_KV
                    visible = is_visible(position[None, :], key[:, None], kv_end, prefix_end, window, CAUSAL)
                    p = tl.where(visible, p, 0.0)
                grad_s = p * (dot_transposed(v0, v1, grad_out0, grad_out1, BLOCK_D1) - delta[None, :])
                if softcap is not None:
                    grad_s *= slope
                p, grad_s = p.to(grad_out0.dtype), grad_s.to(q0.dtype)
                grad_v0 = tl.dot(p, grad_out0, grad_v0, input_precision="ieee")
                grad_k0 = tl.dot(grad_s, q0, grad_k0, input_precision="ieee")
                if BLOCK_D1:
                    grad_v1 = tl.dot(p, grad_out1, grad_v1, input_precision="ieee")
                    grad_k1 = tl.dot(grad_s, q1, grad_k1, input_precision="ieee")
        # Invalid keys of the tile have accumulated numbers, infinity among them: set them to 0.
        key_mask = key_mask[:, None]
        grad_v0, grad_v1 = tl.where(key_mask, grad_v0, 0.0), tl.where(key_mask, grad_v1, 0.0)
        grad_k0, grad_k1 = tl.where(key_mask, grad_k0, 0.0), tl.where(key_mask, grad_k1, 0.0)
        factor = tl.where(allowed, 1.0, float("nan"))
        stored = key < kv_len
        base = head_base(grad_v_ptr, grad_v_strides, batch, head, seq_start, STRIDE_UNIT)
        grad_v_offsets = key_offsets(key, grad_v_strides, STRIDE_UNIT)
        store_rows(base, grad_v_offsets, dims, stored, grad_v0 * factor, grad_v1 * factor, HEAD_DIM, BLOCK_D0, BLOCK_D1)
        base = head_base(grad_k_ptr, grad_k_strides, batch, head, seq_start, STRIDE_UNIT)
        grad_k_offsets = key_offsets(key, grad_k_strides, STRIDE_UNIT)
        factor *= tl.cast(scale, tl.float32)
        store_rows(base, grad_k_offsets, dims, stored, grad_k0 * factor, grad_k1 * factor, HEAD_DIM, BLOCK_D0, BLOCK_D1)


@triton.jit
def dot_transposed(a0, a1, b0, b1, BLOCK_D1: tl.constexpr):
    """Return a · bᵀ, summed over both blocks of the head dimension."""
    product = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if BLOCK_D1:
        product = tl.dot(a1, tl.trans(b1), product, input_precision="ieee")
    return product


@triton.jit
def scale_scores(products, scale, softcap):
    """Return scores in base 2, and the derivative of the softcap (1.0 without one)."""
    if softcap is None:
        scores, slope = products * (tl.cast(scale, tl.float32) * LOG2_E), 1.0
    else:
        bounded = tanh(products * (tl.cast(scale, tl.float32) / tl.cast(softcap, tl.float32)))
        scores, slope = bounded * (tl.cast(softcap, tl.float32) * LOG2_E), 1.0 - bounded * bounded
    return scores, slope
