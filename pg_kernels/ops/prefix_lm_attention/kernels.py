"""Flash attention with the prefix-LM mask, forward and backward, for grouped key-value heads.

| kernel | one program computes |
|---|---|
| `attn_fwd_kernel` | BLOCK_M rows of out and lse; with NUM_SPLITS > 1 their partial results over one part of the keys |
| `attn_fwd_combine_kernel` | one row of out and lse from its partial results |
| `attn_bwd_dq_kernel` | BLOCK_M rows of the gradient of q, and of delta |
| `attn_bwd_dkv_kernel` | BLOCK_N rows of the gradients of k and v |

The query heads of a KV head share its loads: row r of a KV head is query r // HEADS_PER_KV of its query head r % HEADS_PER_KV.
Tiles of keys begin at an example's first valid key in all kernels but `attn_bwd_dkv_kernel`, where they begin at key 0.
Scores and lse are in base 2, for the hardware's exp2. `load_store.py` tells how tensors and head dimensions are laid out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import tanh
from pg_kernels.ops.prefix_lm_attention.load_store import (
    head_ptr,
    key_offsets,
    load_tile,
    load_tile_tma,
    row_offsets,
    row_values_ptr,
    store_tile,
)
from pg_kernels.ops.prefix_lm_attention.tile_ranges import (
    boundary_tile,
    example_bounds,
    full_tile,
    is_visible,
    key_tiles,
    row_tiles,
)

LOG2_E = tl.constexpr(1.4426950408889634)
MIN_ROW_MAX = tl.constexpr(-3e38)
"""Lower bound of a row's maximum once the row has seen a key. The score of a visible key may be −inf."""
LENGTHS = ["q_len", "kv_len", "int_lengths"]
"""Arguments whose values must not cause another compilation."""


@triton.jit(do_not_specialize=LENGTHS)
def attn_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    k_tail_desc,
    v_desc,
    v_tail_desc,
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
    int_lengths,
    num_kv_heads,
    scale,
    softcap,
    window,
    HEADS_PER_KV: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute out and lse of BLOCK_M query rows of one (batch, KV head); with NUM_SPLITS > 1 over one part of the keys."""
    batch, kv_head = tl.program_id(1) // num_kv_heads, tl.program_id(1) % num_kv_heads
    token_offset, q_len, start, end, prefix_end, q_start, is_valid = example_bounds(
        prefix_lens_ptr, kv_starts_ptr, kv_lens_ptr, q_starts_ptr, cu_seqlens_ptr, batch, q_len, kv_len, int_lengths
    )
    block, row = _query_block(BLOCK_M)  # row: [BLOCK_M]
    if block * BLOCK_M < q_len * HEADS_PER_KV:
        row_mask = row < q_len * HEADS_PER_KV
        q_base = head_ptr(q_ptr, q_strides, batch, kv_head * HEADS_PER_KV, token_offset, STRIDE_UNIT)
        q_offsets = row_offsets(row, q_strides, HEADS_PER_KV, STRIDE_UNIT)
        # [BLOCK_M, BLOCK_D] and [BLOCK_M, BLOCK_D_TAIL]
        q, q_tail = load_tile(q_base, q_offsets, row_mask, True, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, UPCAST)
        k_base = head_ptr(k_ptr, k_strides, batch, kv_head, token_offset, STRIDE_UNIT)
        v_base = head_ptr(v_ptr, v_strides, batch, kv_head, token_offset, STRIDE_UNIT)
        scale_offset = batch.to(tl.int64) * scale_strides[0] + kv_head * scale_strides[1]
        tma_batch = batch if cu_seqlens_ptr is None else 0  # packed sequences are one example

        position = q_start + row // HEADS_PER_KV
        first_position, last_position = _position_range(block, q_len, q_start, HEADS_PER_KV, BLOCK_M)
        full, num_full, boundary, num_boundary = key_tiles(
            first_position, last_position, start, end, prefix_end, window, CAUSAL, BLOCK_N
        )
        if NUM_SPLITS > 1:
            tiles_per_split = tl.cdiv(num_full + num_boundary, NUM_SPLITS)
            split_begin, split_end = tl.program_id(2) * tiles_per_split, (tl.program_id(2) + 1) * tiles_per_split

        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        acc_tail = tl.zeros([BLOCK_M, BLOCK_D_TAIL if BLOCK_D_TAIL else 16], tl.float32)
        for IS_BOUNDARY in tl.static_range(2):  # the full tiles, then the boundary tiles
            loop_begin, loop_end = 0, num_boundary if IS_BOUNDARY else num_full
            if NUM_SPLITS > 1:
                num_before = num_full if IS_BOUNDARY else 0
                loop_begin = tl.maximum(split_begin - num_before, 0)
                loop_end = tl.minimum(split_end - num_before, loop_end)
            for index in tl.range(loop_begin, loop_end):  # the tiles of keys of this kind in this program's part
                tile = boundary_tile(index, boundary, window) if IS_BOUNDARY else full_tile(index, full, window)
                key = start + tile * BLOCK_N + tl.arange(0, BLOCK_N)
                key_mask = key < end
                # [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_D_TAIL]
                if k_desc is not None:
                    tma_row = token_offset + start + tile * BLOCK_N
                    k, k_tail = load_tile_tma(
                        k_desc, k_tail_desc, tma_batch, kv_head, tma_row, BLOCK_D, BLOCK_D_TAIL, BLOCK_N, UPCAST
                    )
                else:
                    k, k_tail = load_tile(
                        k_base,
                        key_offsets(key, k_strides, STRIDE_UNIT),
                        key_mask,
                        IS_BOUNDARY == 1,
                        HEAD_DIM,
                        BLOCK_D,
                        BLOCK_D_TAIL,
                        UPCAST,
                    )
                if k_scale_ptr is not None:
                    k, k_tail = k.to(q.dtype), k_tail.to(q.dtype)
                scores = _dot_transposed(q, q_tail, k, k_tail, BLOCK_D_TAIL)  # [BLOCK_M, BLOCK_N]
                if k_scale_ptr is not None:
                    k_scale = tl.load(k_scale_ptr + scale_offset + key * scale_strides[2], mask=key_mask, other=0.0)
                    scores *= k_scale[None, :]
                scores, _ = _scale_scores(scores, scale, softcap)
                if IS_BOUNDARY:
                    visible = is_visible(position[:, None], key[None, :], end, prefix_end, window, CAUSAL)
                    scores = tl.where(visible, scores, float("-inf"))
                    tile_max = tl.max(tl.where(visible, tl.maximum(scores, MIN_ROW_MAX), float("-inf")), axis=1)
                else:
                    tile_max = tl.maximum(tl.max(scores, axis=1), MIN_ROW_MAX)
                new_max = tl.maximum(row_max, tile_max)
                # Subtract 0 in rows that have seen no key yet: −inf − −inf is NaN.
                subtracted = tl.where(new_max == float("-inf"), 0.0, new_max) if IS_BOUNDARY == 1 else new_max
                weights = tl.exp2(scores - subtracted[:, None])  # [BLOCK_M, BLOCK_N]
                rescale = tl.exp2(row_max - subtracted)
                row_sum = row_sum * rescale + tl.sum(weights, axis=1)
                row_max = new_max
                # [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_D_TAIL]
                if v_desc is not None:
                    v, v_tail = load_tile_tma(
                        v_desc, v_tail_desc, tma_batch, kv_head, tma_row, BLOCK_D, BLOCK_D_TAIL, BLOCK_N, UPCAST
                    )
                    if IS_BOUNDARY:  # keys past the last valid one may hold NaN, and 0 · NaN is NaN
                        v, v_tail = tl.where(key_mask[:, None], v, 0.0), tl.where(key_mask[:, None], v_tail, 0.0)
                else:
                    v, v_tail = load_tile(
                        v_base,
                        key_offsets(key, v_strides, STRIDE_UNIT),
                        key_mask,
                        IS_BOUNDARY == 1,
                        HEAD_DIM,
                        BLOCK_D,
                        BLOCK_D_TAIL,
                        UPCAST,
                    )
                if v_scale_ptr is not None:
                    v_scale = tl.load(v_scale_ptr + scale_offset + key * scale_strides[2], mask=key_mask, other=0.0)
                    weights *= v_scale[None, :]
                    v, v_tail = v.to(q.dtype), v_tail.to(q.dtype)
                weights = weights.to(v.dtype)
                acc = tl.dot(weights, v, acc * rescale[:, None], input_precision="ieee")
                if BLOCK_D_TAIL:
                    acc_tail = tl.dot(weights, v_tail, acc_tail * rescale[:, None], input_precision="ieee")

        # A row that sees nothing gives 0. A row that sees only scores of −inf gives 0 / 0, as softmax does.
        saw_nothing = row_sum == 0.0 if NUM_SPLITS > 1 else row_max == float("-inf")
        safe_sum = tl.where(saw_nothing, 1.0, row_sum)
        # Invalid lengths give NaN so that the error is visible.
        normalizer = tl.where(is_valid, 1.0 / safe_sum, float("nan"))
        lse = row_max + tl.log2(safe_sum)
        if NUM_SPLITS == 1:
            lse = tl.where(row_max == float("-inf"), float("inf"), lse)
        out_base = head_ptr(out_ptr, out_strides, batch, kv_head * HEADS_PER_KV, token_offset, STRIDE_UNIT)
        if NUM_SPLITS > 1:
            out_base += tl.program_id(2).to(tl.int64) * out_strides[3]
            lse_ptr += tl.program_id(2).to(tl.int64) * lse_strides[2]
        store_tile(
            out_base,
            row_offsets(row, out_strides, HEADS_PER_KV, STRIDE_UNIT),
            row_mask,
            acc * normalizer[:, None],
            acc_tail * normalizer[:, None],
            HEAD_DIM,
            BLOCK_D,
            BLOCK_D_TAIL,
        )
        lse_base = row_values_ptr(lse_ptr, lse_strides, batch, kv_head, token_offset, HEADS_PER_KV)
        tl.store(lse_base + row, lse, mask=row_mask)


@triton.jit
def attn_fwd_combine_kernel(
    partial_out_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    partial_strides,
    out_strides,
    num_rows,
    num_kv_heads,
    HEADS_PER_KV: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Compute one row of out and lse: the mean of its partial results, weighted by their shares of the sum of exponentials."""
    index = tl.program_id(0)  # of the row in lse, [B, Hkv, num_rows]
    batch, kv_head, row = index // num_rows // num_kv_heads, index // num_rows % num_kv_heads, index % num_rows
    split, col = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_D)
    lse_ptrs = partial_lse_ptr + split * tl.num_programs(0).to(tl.int64) + index
    partial_lse = tl.load(lse_ptrs, mask=split < NUM_SPLITS, other=float("-inf"))  # [BLOCK_SPLITS]
    max_lse = tl.max(partial_lse, axis=0)
    weights = tl.where(partial_lse > MIN_ROW_MAX, tl.exp2(partial_lse - max_lse), 0.0)
    weights = tl.where(partial_lse == partial_lse, weights, partial_lse)  # NaN stays NaN
    weight_sum = tl.sum(weights, axis=0)
    partial_base = head_ptr(
        partial_out_ptr, partial_strides, batch, kv_head * HEADS_PER_KV, 0, STRIDE_UNIT
    ) + row_offsets(row, partial_strides, HEADS_PER_KV, STRIDE_UNIT)
    partial_ptrs = partial_base + (split.to(tl.int64) * partial_strides[3])[:, None] + col[None, :]
    partial_mask = (split < NUM_SPLITS)[:, None] & (col < HEAD_DIM)[None, :]
    partial = tl.load(partial_ptrs, mask=partial_mask, other=0.0)  # [BLOCK_SPLITS, BLOCK_D]
    # A row that sees nothing gives 0. A row that sees only scores of −inf gives 0 / 0, as softmax does.
    safe_sum = tl.where(max_lse == float("-inf"), 1.0, weight_sum)
    out = tl.sum(partial * weights[:, None], axis=0) / safe_sum  # [BLOCK_D]
    out_base = head_ptr(out_ptr, out_strides, batch, kv_head * HEADS_PER_KV, 0, STRIDE_UNIT) + row_offsets(
        row, out_strides, HEADS_PER_KV, STRIDE_UNIT
    )
    tl.store(out_base + col, out.to(out_ptr.dtype.element_ty), mask=col < HEAD_DIM)
    tl.store(lse_ptr + index, tl.where(max_lse == float("-inf"), float("inf"), max_lse + tl.log2(safe_sum)))


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
    int_lengths,
    num_kv_heads,
    scale,
    softcap,
    window,
    HEADS_PER_KV: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute BLOCK_M rows of the gradient of q, and for `attn_bwd_dkv_kernel` their delta: each row's sum of out · grad_out."""
    batch, kv_head = tl.program_id(1) // num_kv_heads, tl.program_id(1) % num_kv_heads
    token_offset, q_len, start, end, prefix_end, q_start, is_valid = example_bounds(
        prefix_lens_ptr, kv_starts_ptr, kv_lens_ptr, q_starts_ptr, cu_seqlens_ptr, batch, q_len, kv_len, int_lengths
    )
    block, row = _query_block(BLOCK_M)  # row: [BLOCK_M]
    if block * BLOCK_M < q_len * HEADS_PER_KV:
        row_mask = row < q_len * HEADS_PER_KV
        # Each [BLOCK_M, BLOCK_D] and [BLOCK_M, BLOCK_D_TAIL]
        q_base = head_ptr(q_ptr, q_strides, batch, kv_head * HEADS_PER_KV, token_offset, STRIDE_UNIT)
        q_offsets = row_offsets(row, q_strides, HEADS_PER_KV, STRIDE_UNIT)
        q, q_tail = load_tile(q_base, q_offsets, row_mask, True, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, UPCAST)
        grad_out_base = head_ptr(
            grad_out_ptr, grad_out_strides, batch, kv_head * HEADS_PER_KV, token_offset, STRIDE_UNIT
        )
        grad_out_offsets = row_offsets(row, grad_out_strides, HEADS_PER_KV, STRIDE_UNIT)
        grad_out, grad_out_tail = load_tile(
            grad_out_base, grad_out_offsets, row_mask, True, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, UPCAST
        )
        out_base = head_ptr(out_ptr, out_strides, batch, kv_head * HEADS_PER_KV, token_offset, STRIDE_UNIT)
        out_offsets = row_offsets(row, out_strides, HEADS_PER_KV, STRIDE_UNIT)
        out, out_tail = load_tile(out_base, out_offsets, row_mask, True, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, UPCAST)
        delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)
        if BLOCK_D_TAIL:
            delta += tl.sum(out_tail.to(tl.float32) * grad_out_tail.to(tl.float32), axis=1)
        # Store 0 for NaN: a delta of NaN would reach keys that the row does not see, as 0 · NaN. Keys that the row sees get NaN
        # from their weights anyway.
        finite_delta = tl.where(delta == delta, delta, 0.0)
        delta_base = row_values_ptr(delta_ptr, lse_strides, batch, kv_head, token_offset, HEADS_PER_KV)
        tl.store(delta_base + row, finite_delta, mask=row_mask)
        lse_base = row_values_ptr(lse_ptr, lse_strides, batch, kv_head, token_offset, HEADS_PER_KV)
        lse = tl.load(lse_base + row, mask=row_mask, other=float("inf"))
        k_base = head_ptr(k_ptr, k_strides, batch, kv_head, token_offset, STRIDE_UNIT)
        v_base = head_ptr(v_ptr, v_strides, batch, kv_head, token_offset, STRIDE_UNIT)

        position = q_start + row // HEADS_PER_KV
        first_position, last_position = _position_range(block, q_len, q_start, HEADS_PER_KV, BLOCK_M)
        full, num_full, boundary, num_boundary = key_tiles(
            first_position, last_position, start, end, prefix_end, window, CAUSAL, BLOCK_N
        )
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        acc_tail = tl.zeros([BLOCK_M, BLOCK_D_TAIL if BLOCK_D_TAIL else 16], tl.float32)
        for IS_BOUNDARY in tl.static_range(2):  # the full tiles, then the boundary tiles
            for index in tl.range(0, num_boundary if IS_BOUNDARY else num_full):  # the tiles of keys of this kind
                tile = boundary_tile(index, boundary, window) if IS_BOUNDARY else full_tile(index, full, window)
                key = start + tile * BLOCK_N + tl.arange(0, BLOCK_N)
                key_mask = key < end
                # Each [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_D_TAIL]
                k_offsets = key_offsets(key, k_strides, STRIDE_UNIT)
                k, k_tail = load_tile(
                    k_base, k_offsets, key_mask, IS_BOUNDARY == 1, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, UPCAST
                )
                v_offsets = key_offsets(key, v_strides, STRIDE_UNIT)
                v, v_tail = load_tile(
                    v_base, v_offsets, key_mask, IS_BOUNDARY == 1, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, UPCAST
                )
                scores = _dot_transposed(q, q_tail, k, k_tail, BLOCK_D_TAIL)  # [BLOCK_M, BLOCK_N]
                scores, slope = _scale_scores(scores, scale, softcap)
                weights = tl.exp2(scores - lse[:, None])
                if IS_BOUNDARY:
                    visible = is_visible(position[:, None], key[None, :], end, prefix_end, window, CAUSAL)
                    weights = tl.where(visible, weights, 0.0)
                grad_weights = _dot_transposed(grad_out, grad_out_tail, v, v_tail, BLOCK_D_TAIL)  # [BLOCK_M, BLOCK_N]
                grad_scores = weights * (grad_weights - delta[:, None])
                if softcap is not None:
                    grad_scores *= slope
                if IS_BOUNDARY:  # 0 · NaN is NaN, also if the NaN is in a key or value that the row does not see
                    grad_scores = tl.where(weights == 0.0, 0.0, grad_scores)
                grad_scores = grad_scores.to(k.dtype)
                acc = tl.dot(grad_scores, k, acc, input_precision="ieee")
                if BLOCK_D_TAIL:
                    acc_tail = tl.dot(grad_scores, k_tail, acc_tail, input_precision="ieee")
        # Invalid lengths give NaN so that the error is visible.
        factor = tl.where(is_valid, tl.cast(scale, tl.float32), float("nan"))
        grad_q_base = head_ptr(grad_q_ptr, grad_q_strides, batch, kv_head * HEADS_PER_KV, token_offset, STRIDE_UNIT)
        grad_q_offsets = row_offsets(row, grad_q_strides, HEADS_PER_KV, STRIDE_UNIT)
        store_tile(
            grad_q_base, grad_q_offsets, row_mask, acc * factor, acc_tail * factor, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL
        )


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
    int_lengths,
    num_kv_heads,
    scale,
    softcap,
    window,
    HEADS_PER_KV: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute the gradients of BLOCK_N keys and values, summed over all rows of their KV head; 0 for keys that are not valid."""
    batch, kv_head = tl.program_id(1) // num_kv_heads, tl.program_id(1) % num_kv_heads
    token_offset, q_len, start, end, prefix_end, q_start, is_valid = example_bounds(
        prefix_lens_ptr, kv_starts_ptr, kv_lens_ptr, q_starts_ptr, cu_seqlens_ptr, batch, q_len, kv_len, int_lengths
    )
    if cu_seqlens_ptr is not None:
        kv_len = q_len
    block = tl.program_id(0)
    if block * BLOCK_N < kv_len:
        key = block * BLOCK_N + tl.arange(0, BLOCK_N)
        key_mask = (key >= start) & (key < end)
        # Each [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_D_TAIL]
        k_base = head_ptr(k_ptr, k_strides, batch, kv_head, token_offset, STRIDE_UNIT)
        v_base = head_ptr(v_ptr, v_strides, batch, kv_head, token_offset, STRIDE_UNIT)
        k_offsets = key_offsets(key, k_strides, STRIDE_UNIT)
        k, k_tail = load_tile(k_base, k_offsets, key_mask, True, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, UPCAST)
        v_offsets = key_offsets(key, v_strides, STRIDE_UNIT)
        v, v_tail = load_tile(v_base, v_offsets, key_mask, True, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, UPCAST)
        q_base = head_ptr(q_ptr, q_strides, batch, kv_head * HEADS_PER_KV, token_offset, STRIDE_UNIT)
        grad_out_base = head_ptr(
            grad_out_ptr, grad_out_strides, batch, kv_head * HEADS_PER_KV, token_offset, STRIDE_UNIT
        )
        lse_base = row_values_ptr(lse_ptr, lse_strides, batch, kv_head, token_offset, HEADS_PER_KV)
        delta_base = row_values_ptr(delta_ptr, lse_strides, batch, kv_head, token_offset, HEADS_PER_KV)

        first_key, last_key = tl.maximum(block * BLOCK_N, start), tl.minimum((block + 1) * BLOCK_N, end) - 1
        seen_begin, full_begin, full_end, seen_end = row_tiles(
            first_key, last_key, q_len, q_start, prefix_end, window, CAUSAL, HEADS_PER_KV, BLOCK_M
        )
        grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        grad_k_tail = tl.zeros([BLOCK_N, BLOCK_D_TAIL if BLOCK_D_TAIL else 16], tl.float32)
        grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        grad_v_tail = tl.zeros([BLOCK_N, BLOCK_D_TAIL if BLOCK_D_TAIL else 16], tl.float32)
        for IS_BOUNDARY in tl.static_range(2):  # the full tiles, then the boundary tiles
            num_boundary = full_begin - seen_begin + seen_end - full_end
            num_tiles = num_boundary if IS_BOUNDARY else full_end - full_begin
            for index in tl.range(0, num_tiles):  # the tiles of rows of this kind
                if IS_BOUNDARY:  # skip the full tiles
                    tile = tl.where(
                        index < full_begin - seen_begin, seen_begin + index, full_end - full_begin + seen_begin + index
                    )
                else:
                    tile = full_begin + index
                row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
                row_mask = row < q_len * HEADS_PER_KV
                # Each [BLOCK_M, BLOCK_D] and [BLOCK_M, BLOCK_D_TAIL]
                q_offsets = row_offsets(row, q_strides, HEADS_PER_KV, STRIDE_UNIT)
                q, q_tail = load_tile(q_base, q_offsets, row_mask, True, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, UPCAST)
                grad_out_offsets = row_offsets(row, grad_out_strides, HEADS_PER_KV, STRIDE_UNIT)
                grad_out, grad_out_tail = load_tile(
                    grad_out_base, grad_out_offsets, row_mask, True, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, UPCAST
                )
                lse = tl.load(lse_base + row, mask=row_mask, other=float("inf"))
                delta = tl.load(delta_base + row, mask=row_mask, other=0.0)
                scores = _dot_transposed(k, k_tail, q, q_tail, BLOCK_D_TAIL)  # [BLOCK_N, BLOCK_M]
                scores, slope = _scale_scores(scores, scale, softcap)
                weights = tl.exp2(scores - lse[None, :])
                if IS_BOUNDARY:
                    position = q_start + row // HEADS_PER_KV
                    visible = is_visible(position[None, :], key[:, None], end, prefix_end, window, CAUSAL)
                    weights = tl.where(visible, weights, 0.0)
                grad_weights = _dot_transposed(v, v_tail, grad_out, grad_out_tail, BLOCK_D_TAIL)  # [BLOCK_N, BLOCK_M]
                grad_scores = weights * (grad_weights - delta[None, :])
                if softcap is not None:
                    grad_scores *= slope
                weights, grad_scores = weights.to(grad_out.dtype), grad_scores.to(q.dtype)
                grad_v = tl.dot(weights, grad_out, grad_v, input_precision="ieee")
                grad_k = tl.dot(grad_scores, q, grad_k, input_precision="ieee")
                if BLOCK_D_TAIL:
                    grad_v_tail = tl.dot(weights, grad_out_tail, grad_v_tail, input_precision="ieee")
                    grad_k_tail = tl.dot(grad_scores, q_tail, grad_k_tail, input_precision="ieee")
        # Keys of the tile that are not valid have accumulated garbage, which may be infinite.
        valid = key_mask[:, None]
        grad_v, grad_v_tail = tl.where(valid, grad_v, 0.0), tl.where(valid, grad_v_tail, 0.0)
        grad_k, grad_k_tail = tl.where(valid, grad_k, 0.0), tl.where(valid, grad_k_tail, 0.0)
        # Invalid lengths give NaN so that the error is visible.
        factor = tl.where(is_valid, 1.0, float("nan"))
        store_mask = key < kv_len
        grad_v_base = head_ptr(grad_v_ptr, grad_v_strides, batch, kv_head, token_offset, STRIDE_UNIT)
        grad_v_offsets = key_offsets(key, grad_v_strides, STRIDE_UNIT)
        store_tile(
            grad_v_base,
            grad_v_offsets,
            store_mask,
            grad_v * factor,
            grad_v_tail * factor,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_D_TAIL,
        )
        grad_k_base = head_ptr(grad_k_ptr, grad_k_strides, batch, kv_head, token_offset, STRIDE_UNIT)
        grad_k_offsets = key_offsets(key, grad_k_strides, STRIDE_UNIT)
        factor *= tl.cast(scale, tl.float32)
        store_tile(
            grad_k_base,
            grad_k_offsets,
            store_mask,
            grad_k * factor,
            grad_k_tail * factor,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_D_TAIL,
        )


@triton.jit
def _query_block(BLOCK_M: tl.constexpr):
    """Return this program's block and its rows. The last rows see the most keys, so their programs start first."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    return block, block * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit
def _position_range(block, q_len, q_start, HEADS_PER_KV: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the positions of the first and the last query of a block of rows."""
    first_position = q_start + block * BLOCK_M // HEADS_PER_KV
    last_row = tl.minimum((block + 1) * BLOCK_M - 1, q_len * HEADS_PER_KV - 1)
    return first_position, q_start + last_row // HEADS_PER_KV


@triton.jit
def _dot_transposed(a, a_tail, b, b_tail, BLOCK_D_TAIL: tl.constexpr):
    """Return a · bᵀ over the whole head dimension."""
    product = tl.dot(a, tl.trans(b), input_precision="ieee")
    if BLOCK_D_TAIL:
        product = tl.dot(a_tail, tl.trans(b_tail), product, input_precision="ieee")
    return product


@triton.jit
def _scale_scores(products, scale, softcap):
    """Return scores in base 2, and the derivative of the softcap (1 without a softcap)."""
    if softcap is None:
        scores, slope = products * (tl.cast(scale, tl.float32) * LOG2_E), 1.0
    else:
        bounded = tanh(products * (tl.cast(scale, tl.float32) / tl.cast(softcap, tl.float32)))
        scores, slope = bounded * (tl.cast(softcap, tl.float32) * LOG2_E), 1.0 - bounded * bounded
    return scores, slope
