"""Which tiles a program visits: the mask contract of `prefix_lm_attention` as ranges of tiles along the key or the query axis.

Full tiles need no mask: every query of the block sees every key of the tile. Partial tiles need one. Other tiles are skipped.
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(2**30)
"""Beyond every key; sums of it and a key's index still fit into int32."""


@triton.jit
def example_lengths(
    prefix_lens_ptr, kv_starts_ptr, kv_lens_ptr, q_starts_ptr, cu_seqlens_ptr, batch, q_len, kv_len, lengths
):
    """Return one example's lengths, clamped to the tensors: (seq_start, q_len, kv_start, kv_end, prefix_end, q_start, allowed).

    seq_start is the example's first row among packed sequences, else 0. A length without a tensor is the one in `lengths`,
    (prefix length, kv_start, kv_len, q_start). `allowed` is false if a length was outside its range.
    """
    if cu_seqlens_ptr is not None:
        seq_start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + batch), 0), kv_len)
        q_len = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + batch + 1) - seq_start, 0), kv_len - seq_start)
        kv_start, kv_end, q_start, kv_len = 0, q_len, 0, q_len
    else:
        seq_start = 0
        kv_start = lengths[1] if kv_starts_ptr is None else tl.load(kv_starts_ptr + batch)
        kv_end = lengths[2] if kv_lens_ptr is None else tl.load(kv_lens_ptr + batch)
        q_start = lengths[3] if q_starts_ptr is None else tl.load(q_starts_ptr + batch)
    prefix_len = lengths[0] if prefix_lens_ptr is None else tl.load(prefix_lens_ptr + batch)
    allowed = (kv_start >= 0) & (kv_start <= kv_len) & (kv_end >= 0) & (kv_end <= kv_len) & (prefix_len >= 0)
    kv_start = tl.minimum(tl.maximum(kv_start, 0), kv_len)
    kv_end = tl.maximum(tl.minimum(kv_end, kv_len), kv_start)
    prefix_end = tl.minimum(kv_start + tl.minimum(tl.maximum(prefix_len, 0), FAR), kv_end)
    q_start = tl.minimum(tl.maximum(q_start, -FAR), FAR)
    return seq_start, q_len, kv_start, kv_end, prefix_end, q_start, allowed


@triton.jit
def block_positions(block, q_start, q_len, HEADS_PER_KV: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the positions of the first and the last query of a block of rows."""
    first = q_start + block * BLOCK_M // HEADS_PER_KV
    last = q_start + tl.minimum((block + 1) * BLOCK_M - 1, q_len * HEADS_PER_KV - 1) // HEADS_PER_KV
    return first, last


@triton.jit
def key_tiles(first, last, kv_start, kv_end, prefix_end, window, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the tiles of keys for queries at positions first to last, as (full, partial) for `full_tile` and `partial_tile`.

    Tiles of BLOCK_N keys are counted from kv_start. With a window W the key axis is, from left to right:

        kv_start      prefix_end        first - W + 1    last - W + 1     first      last
        |               |                 |                |                |          |
        [ full ][ partial ]    skipped    [     partial    ][     full      ][ partial ]
        0       |         |               |                 |                |         |
            prefix_full_end prefix_end_tile window_begin  window_full_begin window_full_end window_end

    Without a window there is no gap, and full tiles end where the first query's keys end.
    """
    any_end, all_end = kv_end, kv_end  # the end of the keys that some query sees, and that every query sees
    if CAUSAL:
        any_end, all_end = tl.minimum(kv_end, last + 1), tl.minimum(kv_end, first + 1)
    prefix_end = tl.maximum(prefix_end, kv_start)
    if window is None:
        full_end = (tl.maximum(all_end, prefix_end) - kv_start) // BLOCK_N
        end = tl.cdiv(tl.maximum(any_end, prefix_end) - kv_start, BLOCK_N)
        full = (full_end, full_end, full_end)
        partial = (full_end, end, end, end - full_end, end - full_end, end - full_end)
    else:
        any_begin, all_begin = first - window + 1, last - window + 1
        # If the window reaches back to the prefix, the full tiles of both are one range.
        prefix_full_end = tl.where(all_begin <= prefix_end, tl.maximum(all_end, prefix_end), prefix_end) - kv_start
        prefix_full_end, prefix_end_tile = prefix_full_end // BLOCK_N, tl.cdiv(prefix_end - kv_start, BLOCK_N)
        prefix_end_tile = tl.maximum(prefix_full_end, prefix_end_tile)
        window_begin = tl.maximum(prefix_end_tile, (any_begin - kv_start) // BLOCK_N)
        window_end = tl.where(
            any_begin < any_end, tl.maximum(window_begin, tl.cdiv(any_end - kv_start, BLOCK_N)), window_begin
        )
        window_full_begin = tl.minimum(tl.maximum(window_begin, tl.cdiv(all_begin - kv_start, BLOCK_N)), window_end)
        window_full_end = tl.minimum(tl.maximum(window_full_begin, (all_end - kv_start) // BLOCK_N), window_end)
        before_window = prefix_end_tile - prefix_full_end
        before_last = prefix_end_tile - prefix_full_end + window_full_begin - window_begin
        full = (prefix_full_end, window_full_begin, prefix_full_end + window_full_end - window_full_begin)
        partial = (
            prefix_full_end,
            window_begin,
            window_full_end,
            before_last + window_end - window_full_end,
            before_window,
            before_last,
        )
    return full, partial


@triton.jit
def full_tile(number, full, window):
    """Return the number-th full tile; `full` is (end of the prefix's tiles, begin of the window's tiles, how many in all)."""
    tile = number
    if window is not None:
        tile = tl.where(number < full[0], number, full[1] + number - full[0])
    return tile


@triton.jit
def partial_tile(number, partial, window):
    """Return the number-th partial tile.

    `partial` is (begin of the first, second and third range, how many in all, how many before the second and the third range).
    """
    tile = partial[0] + number
    if window is not None:
        tile = tl.where(number < partial[4], tile, partial[1] + number - partial[4])
        tile = tl.where(number < partial[5], tile, partial[2] + number - partial[5])
    return tile


@triton.jit
def row_tiles(
    first,
    last,
    q_len,
    q_start,
    prefix_end,
    window,
    CAUSAL: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Return the tiles of rows that see some of the keys first to last, as (begin, full_begin, full_end, end).

    Rows are ordered by query. Keys of the prefix are seen by every row; other keys from their own query on, up to the window:

        0      first - q_start   last - q_start     first + W - q_start   last + W - q_start    q_len
        |            |                |                     |                    |                |
        |  skipped   [    partial     ][        full        ][      partial      ]    skipped     |
                   begin          full_begin             full_end               end
    """
    any_begin, any_end, all_begin, all_end = 0, q_len, 0, q_len
    if CAUSAL:
        any_begin, all_begin = first - q_start, last - q_start
    if window is not None:
        any_end, all_end = tl.minimum(q_len, last + window - q_start), tl.minimum(q_len, first + window - q_start)
    any_begin = tl.where(first < prefix_end, 0, tl.minimum(tl.maximum(any_begin, 0), q_len))
    any_end = tl.where(first < prefix_end, q_len, tl.maximum(any_end, any_begin))
    all_begin = tl.where(last < prefix_end, 0, tl.minimum(tl.maximum(all_begin, 0), q_len))
    all_end = tl.where(last < prefix_end, q_len, tl.maximum(all_end, all_begin))
    begin, end = any_begin * HEADS_PER_KV // BLOCK_M, tl.cdiv(any_end * HEADS_PER_KV, BLOCK_M)
    end = tl.where((last < first) | (any_end <= any_begin), begin, end)
    full_begin = tl.minimum(tl.maximum(tl.cdiv(all_begin * HEADS_PER_KV, BLOCK_M), begin), end)
    # Rows past the last query load as 0 and weigh nothing, so the last tile counts as full.
    full_end = tl.where(all_end == q_len, tl.cdiv(all_end * HEADS_PER_KV, BLOCK_M), all_end * HEADS_PER_KV // BLOCK_M)
    return begin, full_begin, tl.minimum(tl.maximum(full_end, full_begin), end), end


@triton.jit
def is_visible(position, key, kv_end, prefix_end, window, CAUSAL: tl.constexpr):
    """Return whether queries at `position` see `key`, for keys from kv_start on."""
    visible = key < prefix_end
    if CAUSAL:
        in_sight = key <= position
        if window is not None:
            in_sight &= position - key < window
        visible |= in_sight
    elif window is not None:
        visible |= position - key < window
    else:
        visible = key < kv_end
    return visible & (key < kv_end)
