"""Rows of a tile are a KV head's queries, so that its heads share the keys' loads: row r is query r // GROUP of head r % GROUP.

Tiles of keys begin at an example's first valid key. Head dimensions that are no power of two are two blocks, the larger LOW and
the rest in HIGH (0 for none): 72 is 64 and 16 rather than 128. Strides count UNITs of elements, so that the compiler knows a
row of 72 to be whole vectors: of a stride itself it only sees multiples of 16. Scores are in base 2, for the hardware's exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import tanh

LOG2_E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(2**30)
LOWEST = tl.constexpr(-3e38)
"""The least that a row's highest score is once it has seen a key, whose own score may be −inf."""
LENGTHS = ["q_len", "kv_len", "lengths"]
"""Arguments whose values are no reason to compile anew."""


@triton.jit(do_not_specialize=LENGTHS)
def forward(
    q_ptr,
    k_ptr,
    v_ptr,
    k_low,
    k_high,
    v_low,
    v_high,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    lse_ptr,
    prefix_ptr,
    starts_ptr,
    ends_ptr,
    q_starts_ptr,
    offsets_ptr,
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
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Output and log-sum-exp of ROWS rows; with SPLITS > 1, of those over one part of the keys."""
    batch, head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    offset, q_len, start, end, prefix_end, q_start, inside = _example(
        prefix_ptr, starts_ptr, ends_ptr, q_starts_ptr, offsets_ptr, batch, q_len, kv_len, lengths
    )
    # The last rows see the most keys: they begin first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    if block * ROWS < q_len * GROUP:
        here = row < q_len * GROUP
        low, high = tl.arange(0, LOW), LOW + tl.arange(0, HIGH if HIGH else 16)
        q_base = _base(q_ptr, q_strides, batch, head * GROUP, offset, UNIT)
        q_rows = _rows(row, q_strides, GROUP, UNIT)
        q0, q1 = _load(q_base, q_rows, low, high, here, True, DIM, LOW, HIGH, WIDEN)
        k_base = _base(k_ptr, k_strides, batch, head, offset, UNIT)
        v_base = _base(v_ptr, v_strides, batch, head, offset, UNIT)
        scale_offset = batch.to(tl.int64) * scale_strides[0] + head * scale_strides[1]
        example = batch if offsets_ptr is None else 0  # packed sequences are one

        position = q_start + row // GROUP
        first, last = (
            q_start + block * ROWS // GROUP,
            q_start + tl.minimum((block + 1) * ROWS - 1, q_len * GROUP - 1) // GROUP,
        )
        whole, bounds = key_tiles(first, last, start, end, prefix_end, window, CAUSAL, KEYS)
        if SPLITS > 1:
            each = tl.cdiv(whole[2] + bounds[3], SPLITS)
            this, next = tl.program_id(2) * each, (tl.program_id(2) + 1) * each

        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc0 = tl.zeros([ROWS, LOW], tl.float32)
        acc1 = tl.zeros([ROWS, HIGH if HIGH else 16], tl.float32)
        for boundary in tl.static_range(2):
            begin, stop = 0, bounds[3] if boundary else whole[2]
            if SPLITS > 1:
                before = whole[2] if boundary else 0
                begin, stop = tl.maximum(this - before, 0), tl.minimum(next - before, stop)
            for number in tl.range(begin, stop):
                tile = _boundary_tile(number, bounds, window) if boundary else _whole_tile(number, whole, window)
                key = start + tile * KEYS + tl.arange(0, KEYS)
                valid = key < end
                if k_low is not None:
                    place = (example, head, offset + start + tile * KEYS)
                    k0, k1 = _load_described(k_low, k_high, place, LOW, HIGH, KEYS, WIDEN)
                else:
                    k0, k1 = _load(
                        k_base, _keys(key, k_strides, UNIT), low, high, valid, boundary == 1, DIM, LOW, HIGH, WIDEN
                    )
                if k_scale_ptr is not None:
                    k0, k1 = k0.to(q0.dtype), k1.to(q0.dtype)
                scores = _product(q0, q1, k0, k1, HIGH)
                if k_scale_ptr is not None:
                    scores *= tl.load(k_scale_ptr + scale_offset + key * scale_strides[2], mask=valid, other=0.0)[
                        None, :
                    ]
                scores, _ = _scaled(scores, scale, softcap)
                if boundary:
                    visible = _visible(position[:, None], key[None, :], end, prefix_end, window, CAUSAL)
                    scores = tl.where(visible, scores, float("-inf"))
                    higher = tl.max(tl.where(visible, tl.maximum(scores, LOWEST), float("-inf")), axis=1)
                else:
                    higher = tl.maximum(tl.max(scores, axis=1), LOWEST)
                higher = tl.maximum(highest, higher)
                # A row that has seen nothing yet: −inf − −inf would be NaN.
                finite = tl.where(higher == float("-inf"), 0.0, higher) if boundary == 1 else higher
                weights = tl.exp2(scores - finite[:, None])
                shrink = tl.exp2(highest - finite)
                total = total * shrink + tl.sum(weights, axis=1)
                highest = higher
                if v_low is not None:
                    v0, v1 = _load_described(v_low, v_high, place, LOW, HIGH, KEYS, WIDEN)
                    if boundary:  # keys beyond the last valid one may hold NaN, and 0 · NaN is not 0
                        v0, v1 = tl.where(valid[:, None], v0, 0.0), tl.where(valid[:, None], v1, 0.0)
                else:
                    v0, v1 = _load(
                        v_base, _keys(key, v_strides, UNIT), low, high, valid, boundary == 1, DIM, LOW, HIGH, WIDEN
                    )
                if v_scale_ptr is not None:
                    weights *= tl.load(v_scale_ptr + scale_offset + key * scale_strides[2], mask=valid, other=0.0)[
                        None, :
                    ]
                    v0, v1 = v0.to(q0.dtype), v1.to(q0.dtype)
                weights = weights.to(v0.dtype)
                acc0 = tl.dot(weights, v0, acc0 * shrink[:, None], input_precision="ieee")
                if HIGH:
                    acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision="ieee")

        # A row that sees nothing is 0, and one that sees −inf alone 0 / 0. Lengths outside what is allowed must not look right.
        some = tl.where(total == 0.0 if SPLITS > 1 else highest == float("-inf"), 1.0, total)
        share = tl.where(inside, 1.0 / some, float("nan"))
        lse = highest + tl.log2(some)
        if SPLITS == 1:
            lse = tl.where(highest == float("-inf"), float("inf"), lse)
        out_base = _base(out_ptr, out_strides, batch, head * GROUP, offset, UNIT)
        if SPLITS > 1:
            out_base += tl.program_id(2).to(tl.int64) * out_strides[3]
            lse_ptr += tl.program_id(2).to(tl.int64) * lse_strides[2]
        _store(
            out_base,
            _rows(row, out_strides, GROUP, UNIT),
            low,
            high,
            here,
            acc0 * share[:, None],
            acc1 * share[:, None],
            DIM,
            LOW,
            HIGH,
        )
        tl.store(_lse(lse_ptr, lse_strides, batch, head, offset, GROUP) + row, lse, mask=here)


@triton.jit
def combine(
    parts_ptr,
    part_lses_ptr,
    out_ptr,
    lse_ptr,
    parts_strides,
    out_strides,
    rows,
    kv_heads,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
):
    """One row from its parts, each weighed by its share of the sum of exponentials."""
    number = tl.program_id(0)
    batch, head, row = number // rows // kv_heads, number // rows % kv_heads, number % rows
    split, column = tl.arange(0, SPLIT_BLOCK), tl.arange(0, BLOCK)
    lses = part_lses_ptr + split * tl.num_programs(0).to(tl.int64) + number
    lses = tl.load(lses, mask=split < SPLITS, other=float("-inf"))
    highest = tl.max(lses, axis=0)
    weights = tl.where(lses > LOWEST, tl.exp2(lses - highest), 0.0)
    weights = tl.where(lses == lses, weights, lses)  # NaN
    total = tl.sum(weights, axis=0)
    place = _base(parts_ptr, parts_strides, batch, head * GROUP, 0, UNIT) + _rows(row, parts_strides, GROUP, UNIT)
    parts = place + (split.to(tl.int64) * parts_strides[3])[:, None] + column[None, :]
    parts = tl.load(parts, mask=(split < SPLITS)[:, None] & (column < DIM)[None, :], other=0.0)
    # Nothing in sight is 0, and −inf alone 0 / 0.
    some = tl.where(highest == float("-inf"), 1.0, total)
    out = tl.sum(parts * weights[:, None], axis=0) / some
    place = _base(out_ptr, out_strides, batch, head * GROUP, 0, UNIT) + _rows(row, out_strides, GROUP, UNIT)
    tl.store(place + column, out.to(out_ptr.dtype.element_ty), mask=column < DIM)
    tl.store(lse_ptr + number, tl.where(highest == float("-inf"), float("inf"), highest + tl.log2(some)))


@triton.jit(do_not_specialize=LENGTHS)
def backward_q(
    grad_ptr,
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    prefix_ptr,
    starts_ptr,
    ends_ptr,
    q_starts_ptr,
    offsets_ptr,
    grad_strides,
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
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Gradient of ROWS rows of q; and for the other kernel delta, each row's sum of out · grad."""
    batch, head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    offset, q_len, start, end, prefix_end, q_start, inside = _example(
        prefix_ptr, starts_ptr, ends_ptr, q_starts_ptr, offsets_ptr, batch, q_len, kv_len, lengths
    )
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    if block * ROWS < q_len * GROUP:
        here = row < q_len * GROUP
        low, high = tl.arange(0, LOW), LOW + tl.arange(0, HIGH if HIGH else 16)
        q_base = _base(q_ptr, q_strides, batch, head * GROUP, offset, UNIT)
        q0, q1 = _load(q_base, _rows(row, q_strides, GROUP, UNIT), low, high, here, True, DIM, LOW, HIGH, WIDEN)
        grad_base = _base(grad_ptr, grad_strides, batch, head * GROUP, offset, UNIT)
        grad0, grad1 = _load(
            grad_base, _rows(row, grad_strides, GROUP, UNIT), low, high, here, True, DIM, LOW, HIGH, WIDEN
        )
        out_base = _base(out_ptr, out_strides, batch, head * GROUP, offset, UNIT)
        out0, out1 = _load(out_base, _rows(row, out_strides, GROUP, UNIT), low, high, here, True, DIM, LOW, HIGH, WIDEN)
        delta = tl.sum(out0.to(tl.float32) * grad0.to(tl.float32), axis=1)
        if HIGH:
            delta += tl.sum(out1.to(tl.float32) * grad1.to(tl.float32), axis=1)
        # NaN would reach keys that the row does not see, as 0 · NaN; to those it sees its weights bring NaN anyway.
        known = tl.where(delta == delta, delta, 0.0)
        tl.store(_lse(delta_ptr, lse_strides, batch, head, offset, GROUP) + row, known, mask=here)
        lse = tl.load(_lse(lse_ptr, lse_strides, batch, head, offset, GROUP) + row, mask=here, other=float("inf"))
        k_base = _base(k_ptr, k_strides, batch, head, offset, UNIT)
        v_base = _base(v_ptr, v_strides, batch, head, offset, UNIT)

        position = q_start + row // GROUP
        first, last = (
            q_start + block * ROWS // GROUP,
            q_start + tl.minimum((block + 1) * ROWS - 1, q_len * GROUP - 1) // GROUP,
        )
        whole, bounds = key_tiles(first, last, start, end, prefix_end, window, CAUSAL, KEYS)
        acc0 = tl.zeros([ROWS, LOW], tl.float32)
        acc1 = tl.zeros([ROWS, HIGH if HIGH else 16], tl.float32)
        for boundary in tl.static_range(2):
            for number in tl.range(0, bounds[3] if boundary else whole[2]):
                tile = _boundary_tile(number, bounds, window) if boundary else _whole_tile(number, whole, window)
                key = start + tile * KEYS + tl.arange(0, KEYS)
                valid = key < end
                k0, k1 = _load(
                    k_base, _keys(key, k_strides, UNIT), low, high, valid, boundary == 1, DIM, LOW, HIGH, WIDEN
                )
                v0, v1 = _load(
                    v_base, _keys(key, v_strides, UNIT), low, high, valid, boundary == 1, DIM, LOW, HIGH, WIDEN
                )
                scores, slope = _scaled(_product(q0, q1, k0, k1, HIGH), scale, softcap)
                weights = tl.exp2(scores - lse[:, None])
                if boundary:
                    visible = _visible(position[:, None], key[None, :], end, prefix_end, window, CAUSAL)
                    weights = tl.where(visible, weights, 0.0)
                grad_scores = weights * (_product(grad0, grad1, v0, v1, HIGH) - delta[:, None])
                if softcap is not None:
                    grad_scores *= slope
                if boundary:  # 0 · NaN is NaN, also of a key or value that a row does not see
                    grad_scores = tl.where(weights == 0.0, 0.0, grad_scores)
                grad_scores = grad_scores.to(k0.dtype)
                acc0 = tl.dot(grad_scores, k0, acc0, input_precision="ieee")
                if HIGH:
                    acc1 = tl.dot(grad_scores, k1, acc1, input_precision="ieee")
        factor = tl.where(inside, tl.cast(scale, tl.float32), float("nan"))
        base = _base(grad_q_ptr, grad_q_strides, batch, head * GROUP, offset, UNIT)
        _store(
            base, _rows(row, grad_q_strides, GROUP, UNIT), low, high, here, acc0 * factor, acc1 * factor, DIM, LOW, HIGH
        )


@triton.jit(do_not_specialize=LENGTHS)
def backward_kv(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    prefix_ptr,
    starts_ptr,
    ends_ptr,
    q_starts_ptr,
    offsets_ptr,
    grad_strides,
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
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    DIM: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Gradients of KEYS keys and values, summed over the rows of all their heads; 0 for keys that are not valid."""
    batch, head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    offset, q_len, start, end, prefix_end, q_start, inside = _example(
        prefix_ptr, starts_ptr, ends_ptr, q_starts_ptr, offsets_ptr, batch, q_len, kv_len, lengths
    )
    if offsets_ptr is not None:
        kv_len = q_len
    block = tl.program_id(0)
    if block * KEYS < kv_len:
        key = block * KEYS + tl.arange(0, KEYS)
        valid = (key >= start) & (key < end)
        low, high = tl.arange(0, LOW), LOW + tl.arange(0, HIGH if HIGH else 16)
        k_base = _base(k_ptr, k_strides, batch, head, offset, UNIT)
        v_base = _base(v_ptr, v_strides, batch, head, offset, UNIT)
        k0, k1 = _load(k_base, _keys(key, k_strides, UNIT), low, high, valid, True, DIM, LOW, HIGH, WIDEN)
        v0, v1 = _load(v_base, _keys(key, v_strides, UNIT), low, high, valid, True, DIM, LOW, HIGH, WIDEN)
        q_base = _base(q_ptr, q_strides, batch, head * GROUP, offset, UNIT)
        grad_base = _base(grad_ptr, grad_strides, batch, head * GROUP, offset, UNIT)
        lses = _lse(lse_ptr, lse_strides, batch, head, offset, GROUP)
        deltas = _lse(delta_ptr, lse_strides, batch, head, offset, GROUP)

        first, last = tl.maximum(block * KEYS, start), tl.minimum((block + 1) * KEYS, end) - 1
        a, b, c, d = row_tiles(first, last, q_len, q_start, prefix_end, window, CAUSAL, GROUP, ROWS)
        grad_k0 = tl.zeros([KEYS, LOW], tl.float32)
        grad_k1 = tl.zeros([KEYS, HIGH if HIGH else 16], tl.float32)
        grad_v0 = tl.zeros([KEYS, LOW], tl.float32)
        grad_v1 = tl.zeros([KEYS, HIGH if HIGH else 16], tl.float32)
        for boundary in tl.static_range(2):
            for number in tl.range(0, b - a + d - c if boundary else c - b):
                tile = tl.where(number < b - a, a + number, c - b + a + number) if boundary else b + number
                row = tile * ROWS + tl.arange(0, ROWS)
                here = row < q_len * GROUP
                q0, q1 = _load(q_base, _rows(row, q_strides, GROUP, UNIT), low, high, here, True, DIM, LOW, HIGH, WIDEN)
                grad0, grad1 = _load(
                    grad_base, _rows(row, grad_strides, GROUP, UNIT), low, high, here, True, DIM, LOW, HIGH, WIDEN
                )
                lse = tl.load(lses + row, mask=here, other=float("inf"))
                delta = tl.load(deltas + row, mask=here, other=0.0)
                scores, slope = _scaled(_product(k0, k1, q0, q1, HIGH), scale, softcap)
                weights = tl.exp2(scores - lse[None, :])
                if boundary:
                    position = q_start + row // GROUP
                    visible = _visible(position[None, :], key[:, None], end, prefix_end, window, CAUSAL)
                    weights = tl.where(visible, weights, 0.0)
                grad_scores = weights * (_product(v0, v1, grad0, grad1, HIGH) - delta[None, :])
                if softcap is not None:
                    grad_scores *= slope
                weights, grad_scores = weights.to(grad0.dtype), grad_scores.to(q0.dtype)
                grad_v0 = tl.dot(weights, grad0, grad_v0, input_precision="ieee")
                grad_k0 = tl.dot(grad_scores, q0, grad_k0, input_precision="ieee")
                if HIGH:
                    grad_v1 = tl.dot(weights, grad1, grad_v1, input_precision="ieee")
                    grad_k1 = tl.dot(grad_scores, q1, grad_k1, input_precision="ieee")
        # Keys of the tile that are not valid have gathered what is not theirs, infinity among it.
        valid = valid[:, None]
        grad_v0, grad_v1 = tl.where(valid, grad_v0, 0.0), tl.where(valid, grad_v1, 0.0)
        grad_k0, grad_k1 = tl.where(valid, grad_k0, 0.0), tl.where(valid, grad_k1, 0.0)
        factor = tl.where(inside, 1.0, float("nan"))
        there = key < kv_len
        base = _base(grad_v_ptr, grad_v_strides, batch, head, offset, UNIT)
        rows = _keys(key, grad_v_strides, UNIT)
        _store(base, rows, low, high, there, grad_v0 * factor, grad_v1 * factor, DIM, LOW, HIGH)
        base = _base(grad_k_ptr, grad_k_strides, batch, head, offset, UNIT)
        rows = _keys(key, grad_k_strides, UNIT)
        factor *= tl.cast(scale, tl.float32)
        _store(base, rows, low, high, there, grad_k0 * factor, grad_k1 * factor, DIM, LOW, HIGH)


@triton.jit
def key_tiles(first, last, start, end, prefix_end, window, CAUSAL: tl.constexpr, KEYS: tl.constexpr):
    """Tiles of keys, counted from `start`, for queries at positions first to last.

    Those that all of them see whole are [0, a), and with a window, which may leave a gap behind the prefix, some from d on: given
    as (a, d, how many). Those that some see in part begin at a, at c behind the gap, and at e: as (a, c, e, how many, how many
    before those at c, before those at e).
    """
    seen_end, all_end = end, end
    if CAUSAL:
        seen_end, all_end = tl.minimum(end, last + 1), tl.minimum(end, first + 1)
    prefix_end = tl.maximum(prefix_end, start)
    if window is None:
        a, b = tl.maximum(all_end, prefix_end) - start, tl.maximum(seen_end, prefix_end) - start
        a, b = a // KEYS, tl.cdiv(b, KEYS)
        whole, bounds = (a, a, a), (a, b, b, b - a, b - a, b - a)
    else:
        seen_begin, all_begin = first - window + 1, last - window + 1
        a = tl.where(all_begin <= prefix_end, tl.maximum(all_end, prefix_end), prefix_end) - start
        a, b = a // KEYS, tl.cdiv(prefix_end - start, KEYS)
        b = tl.maximum(a, b)
        c = tl.maximum(b, (seen_begin - start) // KEYS)
        f = tl.where(seen_begin < seen_end, tl.maximum(c, tl.cdiv(seen_end - start, KEYS)), c)
        d = tl.minimum(tl.maximum(c, tl.cdiv(all_begin - start, KEYS)), f)
        e = tl.minimum(tl.maximum(d, (all_end - start) // KEYS), f)
        whole, bounds = (a, d, a + e - d), (a, c, e, b - a + d - c + f - e, b - a, b - a + d - c)
    return whole, bounds


@triton.jit
def _whole_tile(number, whole, window):
    tile = number
    if window is not None:
        tile = tl.where(number < whole[0], number, whole[1] + number - whole[0])
    return tile


@triton.jit
def _boundary_tile(number, bounds, window):
    tile = bounds[0] + number
    if window is not None:
        tile = tl.where(number < bounds[4], tile, bounds[1] + number - bounds[4])
        tile = tl.where(number < bounds[5], tile, bounds[2] + number - bounds[5])
    return tile


@triton.jit
def row_tiles(
    first, last, q_len, q_start, prefix_end, window, CAUSAL: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr
):
    """Tiles of rows for the keys first to last: all of [b, c) see all these keys, of [a, b) and [c, d) some see some."""
    seen_begin, seen_end, all_begin, all_end = 0, q_len, 0, q_len
    if CAUSAL:
        seen_begin, all_begin = first - q_start, last - q_start
    if window is not None:
        seen_end, all_end = tl.minimum(q_len, last + window - q_start), tl.minimum(q_len, first + window - q_start)
    # The prefix is seen by every row.
    seen_begin = tl.where(first < prefix_end, 0, tl.minimum(tl.maximum(seen_begin, 0), q_len))
    seen_end = tl.where(first < prefix_end, q_len, tl.maximum(seen_end, seen_begin))
    all_begin = tl.where(last < prefix_end, 0, tl.minimum(tl.maximum(all_begin, 0), q_len))
    all_end = tl.where(last < prefix_end, q_len, tl.maximum(all_end, all_begin))
    a, d = seen_begin * GROUP // ROWS, tl.cdiv(seen_end * GROUP, ROWS)
    d = tl.where((last < first) | (seen_end <= seen_begin), a, d)
    b = tl.minimum(tl.maximum(tl.cdiv(all_begin * GROUP, ROWS), a), d)
    # Rows beyond the last query load as 0 and weigh nothing: to the end, a tile is a whole one.
    c = tl.where(all_end == q_len, tl.cdiv(all_end * GROUP, ROWS), all_end * GROUP // ROWS)
    return a, b, tl.minimum(tl.maximum(c, b), d), d


@triton.jit
def _example(prefix_ptr, starts_ptr, ends_ptr, q_starts_ptr, offsets_ptr, batch, q_len, kv_len, lengths):
    """An example's first row among packed sequences, its number of queries, bounds of its keys, and whether they are allowed.

    A length that no tensor gives is that of `lengths`, (prefix length, start, end, position of the first query).
    """
    if offsets_ptr is not None:
        offset = tl.minimum(tl.maximum(tl.load(offsets_ptr + batch), 0), kv_len)
        q_len = tl.minimum(tl.maximum(tl.load(offsets_ptr + batch + 1) - offset, 0), kv_len - offset)
        start, end, q_start, kv_len = 0, q_len, 0, q_len
    else:
        offset = 0
        start = lengths[1] if starts_ptr is None else tl.load(starts_ptr + batch)
        end = lengths[2] if ends_ptr is None else tl.load(ends_ptr + batch)
        q_start = lengths[3] if q_starts_ptr is None else tl.load(q_starts_ptr + batch)
    prefix = lengths[0] if prefix_ptr is None else tl.load(prefix_ptr + batch)
    inside = (start >= 0) & (start <= kv_len) & (end >= 0) & (end <= kv_len) & (prefix >= 0)
    start = tl.minimum(tl.maximum(start, 0), kv_len)
    end = tl.maximum(tl.minimum(end, kv_len), start)
    prefix_end = tl.minimum(start + tl.minimum(tl.maximum(prefix, 0), FAR), end)
    return offset, q_len, start, end, prefix_end, tl.minimum(tl.maximum(q_start, -FAR), FAR), inside


@triton.jit
def _base(pointer, strides, batch, head, offset, UNIT: tl.constexpr):
    """Where an example's rows of one head begin in [B, H, S, D]; packed sequences begin `offset` rows into the only example."""
    rows = tl.cast(head, tl.int64) * strides[1] + tl.cast(offset, tl.int64) * strides[2]
    return pointer + (tl.cast(batch, tl.int64) * strides[0] + rows) * UNIT


@triton.jit
def _rows(row, strides, GROUP: tl.constexpr, UNIT: tl.constexpr):
    """Where rows begin, from the first head's first one."""
    return (tl.cast(row // GROUP, tl.int64) * strides[2] + (row % GROUP) * strides[1]) * UNIT


@triton.jit
def _keys(key, strides, UNIT: tl.constexpr):
    return key.to(tl.int64) * strides[2] * UNIT


@triton.jit
def _lse(pointer, strides, batch, head, offset, GROUP: tl.constexpr):
    """Where the numbers [B, Hkv, Sq · GROUP] of one head's rows begin."""
    base = tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    return pointer + base + tl.cast(offset, tl.int64) * GROUP


@triton.jit
def _load(
    base, rows, low, high, here, MASKED: tl.constexpr, DIM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Both blocks of rows; MASKED reads 0 where `here` is false."""
    if MASKED and LOW > DIM:
        x0 = tl.load(base + rows[:, None] + low[None, :], mask=here[:, None] & (low < DIM)[None, :], other=0.0)
    elif MASKED:
        x0 = tl.load(base + rows[:, None] + low[None, :], mask=here[:, None], other=0.0)
    elif LOW > DIM:
        x0 = tl.load(base + rows[:, None] + low[None, :], mask=(low < DIM)[None, :], other=0.0)
    else:
        x0 = tl.load(base + rows[:, None] + low[None, :])
    x1 = x0
    if HIGH:
        if MASKED:
            x1 = tl.load(base + rows[:, None] + high[None, :], mask=here[:, None] & (high < DIM)[None, :], other=0.0)
        elif LOW + HIGH > DIM:
            x1 = tl.load(base + rows[:, None] + high[None, :], mask=(high < DIM)[None, :], other=0.0)
        else:
            x1 = tl.load(base + rows[:, None] + high[None, :])
    if WIDEN:
        x0, x1 = x0.to(tl.float32), x1.to(tl.float32)
    return x0, x1


@triton.jit
def _load_described(low, high, place, LOW: tl.constexpr, HIGH: tl.constexpr, KEYS: tl.constexpr, WIDEN: tl.constexpr):
    """Both blocks of rows from place on, (batch, head, row), by descriptors of [B, H, S, D]: TMA, where there is one."""
    x0 = low.load([place[0], place[1], place[2], 0]).reshape([KEYS, LOW])
    x1 = x0
    if HIGH:
        x1 = high.load([place[0], place[1], place[2], LOW]).reshape([KEYS, HIGH])
    if WIDEN:
        x0, x1 = x0.to(tl.float32), x1.to(tl.float32)
    return x0, x1


@triton.jit
def _store(base, rows, low, high, here, x0, x1, DIM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    type = base.dtype.element_ty
    if LOW > DIM:
        tl.store(base + rows[:, None] + low[None, :], x0.to(type), mask=here[:, None] & (low < DIM)[None, :])
    else:
        tl.store(base + rows[:, None] + low[None, :], x0.to(type), mask=here[:, None])
    if HIGH:
        tl.store(base + rows[:, None] + high[None, :], x1.to(type), mask=here[:, None] & (high < DIM)[None, :])


@triton.jit
def _product(a0, a1, b0, b1, HIGH: tl.constexpr):
    """a · bᵀ."""
    product = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if HIGH:
        product = tl.dot(a1, tl.trans(b1), product, input_precision="ieee")
    return product


@triton.jit
def _scaled(products, scale, softcap):
    """Scores in base 2, and with a softcap its slope."""
    if softcap is None:
        scores, slope = products * (tl.cast(scale, tl.float32) * LOG2_E), 1.0
    else:
        bounded = tanh(products * (tl.cast(scale, tl.float32) / tl.cast(softcap, tl.float32)))
        scores, slope = bounded * (tl.cast(softcap, tl.float32) * LOG2_E), 1.0 - bounded * bounded
    return scores, slope


@triton.jit
def _visible(position, key, end, prefix_end, window, CAUSAL: tl.constexpr):
    """The mask contract, of keys that are not before the first valid one."""
    visible = key < prefix_end
    if CAUSAL:
        seen = key <= position
        if window is not None:
            seen &= position - key < window
        visible |= seen
    elif window is not None:
        visible |= position - key < window
    else:
        visible = key < end
    return visible & (key < end)
