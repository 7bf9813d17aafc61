"""The mask contract inside the kernels: the bounds of an example, and which tiles are full, boundary or skipped.

A tile is a block of query rows and a block of keys. In a full tile every row sees every key, so that the kernels need no mask.
In a boundary tile some rows see some keys. All other tiles are skipped.
"""

from __future__ import annotations

import triton
import triton.language as tl

POSITION_LIMIT = tl.constexpr(2**30)
"""Beyond every key. Its sum with an index of a key still fits into int32."""


@triton.jit
def example_bounds(
    prefix_lens_ptr, kv_starts_ptr, kv_lens_ptr, q_starts_ptr, cu_seqlens_ptr, batch, q_len, kv_len, int_lengths
):
    """Return (token_offset, q_len, start, end, prefix_end, q_start, is_valid) of an example.

    token_offset is its first token among packed sequences, [start, end) its valid keys, q_start the position of its first query.
    Everything is clamped so that no load leaves the tensors; is_valid is false if the lengths were out of range.
    `int_lengths` (prefix length, first key, end of the keys, position of the first query) replaces the tensors that are None.
    """
    if cu_seqlens_ptr is not None:
        token_offset = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + batch), 0), kv_len)
        q_len = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + batch + 1) - token_offset, 0), kv_len - token_offset)
        start, end, q_start, kv_len = 0, q_len, 0, q_len
    else:
        token_offset = 0
        start = int_lengths[1] if kv_starts_ptr is None else tl.load(kv_starts_ptr + batch)
        end = int_lengths[2] if kv_lens_ptr is None else tl.load(kv_lens_ptr + batch)
        q_start = int_lengths[3] if q_starts_ptr is None else tl.load(q_starts_ptr + batch)
    prefix_len = int_lengths[0] if prefix_lens_ptr is None else tl.load(prefix_lens_ptr + batch)
    is_valid = (start >= 0) & (start <= kv_len) & (end >= 0) & (end <= kv_len) & (prefix_len >= 0)
    start = tl.minimum(tl.maximum(start, 0), kv_len)
    end = tl.maximum(tl.minimum(end, kv_len), start)
    prefix_end = tl.minimum(start + tl.minimum(tl.maximum(prefix_len, 0), POSITION_LIMIT), end)
    q_start = tl.minimum(tl.maximum(q_start, -POSITION_LIMIT), POSITION_LIMIT)
    return token_offset, q_len, start, end, prefix_end, q_start, is_valid


@triton.jit
def is_visible(position, key, end, prefix_end, window, CAUSAL: tl.constexpr):
    """Return whether queries see keys. The keys must not lie before the first valid one."""
    visible = key < prefix_end
    if CAUSAL:
        visible_by_position = key <= position
        if window is not None:
            visible_by_position &= position - key < window
        visible |= visible_by_position
    elif window is not None:
        visible |= position - key < window
    else:
        visible = key < end
    return visible & (key < end)


@triton.jit
def key_tiles(
    first_position, last_position, start, end, prefix_end, window, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Return (full, num_full, boundary, num_boundary): the tiles of keys that queries at positions first to last see.

    Tiles are counted from `start`. `full_tile` and `boundary_tile` turn an index below num_full or num_boundary into a tile.
    The ranges of tiles on the axis of keys:

        0          prefix_full_end   prefix_seen_end                                        without a window
        |   full   |    boundary     |  skipped ...

        0          prefix_full_end   prefix_seen_end   window_seen_begin   window_full_begin   window_full_end   window_seen_end
        |   full   |    boundary     |     skipped     |     boundary      |       full        |    boundary     |  skipped ...

    Without a window the first two ranges hold the prefix and the keys that causal attention sees after it. With a window they
    hold the prefix, and the other ranges the keys of the window.
    """
    # By position some query sees keys [key_seen_begin, key_seen_end), and every query keys [key_full_begin, key_full_end).
    key_seen_end, key_full_end = end, end
    if CAUSAL:
        key_seen_end, key_full_end = tl.minimum(end, last_position + 1), tl.minimum(end, first_position + 1)
    prefix_end = tl.maximum(prefix_end, start)
    if window is None:
        prefix_full_end = (tl.maximum(key_full_end, prefix_end) - start) // BLOCK_N
        prefix_seen_end = tl.cdiv(tl.maximum(key_seen_end, prefix_end) - start, BLOCK_N)
        full, num_full = (prefix_full_end, prefix_full_end), prefix_full_end
        num_boundary = prefix_seen_end - prefix_full_end
        boundary = (prefix_full_end, prefix_seen_end, prefix_seen_end, num_boundary, num_boundary)
    else:
        key_seen_begin, key_full_begin = first_position - window + 1, last_position - window + 1
        # A window that begins inside the prefix continues it.
        key_prefix_full_end = tl.where(key_full_begin <= prefix_end, tl.maximum(key_full_end, prefix_end), prefix_end)
        prefix_full_end = (key_prefix_full_end - start) // BLOCK_N
        prefix_seen_end = tl.maximum(prefix_full_end, tl.cdiv(prefix_end - start, BLOCK_N))
        window_seen_begin = tl.maximum(prefix_seen_end, (key_seen_begin - start) // BLOCK_N)
        window_seen_end = tl.maximum(window_seen_begin, tl.cdiv(key_seen_end - start, BLOCK_N))
        window_seen_end = tl.where(key_seen_begin < key_seen_end, window_seen_end, window_seen_begin)
        window_full_begin = tl.maximum(window_seen_begin, tl.cdiv(key_full_begin - start, BLOCK_N))
        window_full_begin = tl.minimum(window_full_begin, window_seen_end)
        window_full_end = tl.maximum(window_full_begin, (key_full_end - start) // BLOCK_N)
        window_full_end = tl.minimum(window_full_end, window_seen_end)
        full = (prefix_full_end, window_full_begin)
        num_full = prefix_full_end + window_full_end - window_full_begin
        # Boundary tiles before window_seen_begin, and before window_full_end.
        num_before_window = prefix_seen_end - prefix_full_end
        num_before_end = num_before_window + window_full_begin - window_seen_begin
        num_boundary = num_before_end + window_seen_end - window_full_end
        boundary = (prefix_full_end, window_seen_begin, window_full_end, num_before_window, num_before_end)
    return full, num_full, boundary, num_boundary


@triton.jit
def full_tile(index, full, window):
    """Return the index-th full tile of keys."""
    prefix_full_end, window_full_begin = full
    tile = index
    if window is not None:
        tile = tl.where(index < prefix_full_end, index, window_full_begin + index - prefix_full_end)
    return tile


@triton.jit
def boundary_tile(index, boundary, window):
    """Return the index-th boundary tile of keys: at the end of the prefix, at the begin of the window, or at its end."""
    prefix_full_end, window_seen_begin, window_full_end, num_before_window, num_before_end = boundary
    tile = prefix_full_end + index
    if window is not None:
        tile = tl.where(index < num_before_window, tile, window_seen_begin + index - num_before_window)
        tile = tl.where(index < num_before_end, tile, window_full_end + index - num_before_end)
    return tile


@triton.jit
def row_tiles(
    first_key,
    last_key,
    q_len,
    q_start,
    prefix_end,
    window,
    CAUSAL: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Return (seen_begin, full_begin, full_end, seen_end): the tiles of query rows that see the keys first to last.

    The ranges of tiles on the axis of rows:

        0             seen_begin     full_begin   full_end       seen_end
        |   skipped   |   boundary   |    full    |   boundary   |  skipped ...
    """
    # Queries [query_seen_begin, query_seen_end) see some of the keys, queries [query_full_begin, query_full_end) all of them.
    query_seen_begin, query_seen_end, query_full_begin, query_full_end = 0, q_len, 0, q_len
    if CAUSAL:
        query_seen_begin, query_full_begin = first_key - q_start, last_key - q_start
    if window is not None:
        query_seen_end = tl.minimum(q_len, last_key + window - q_start)
        query_full_end = tl.minimum(q_len, first_key + window - q_start)
    # Every query sees the prefix.
    query_seen_begin = tl.where(first_key < prefix_end, 0, tl.minimum(tl.maximum(query_seen_begin, 0), q_len))
    query_seen_end = tl.where(first_key < prefix_end, q_len, tl.maximum(query_seen_end, query_seen_begin))
    query_full_begin = tl.where(last_key < prefix_end, 0, tl.minimum(tl.maximum(query_full_begin, 0), q_len))
    query_full_end = tl.where(last_key < prefix_end, q_len, tl.maximum(query_full_end, query_full_begin))
    seen_begin, seen_end = query_seen_begin * HEADS_PER_KV // BLOCK_M, tl.cdiv(query_seen_end * HEADS_PER_KV, BLOCK_M)
    seen_end = tl.where((last_key < first_key) | (query_seen_end <= query_seen_begin), seen_begin, seen_end)
    full_begin = tl.minimum(tl.maximum(tl.cdiv(query_full_begin * HEADS_PER_KV, BLOCK_M), seen_begin), seen_end)
    # Rows past the last query load as 0 and weigh nothing: the last tile counts as full.
    full_end = tl.where(
        query_full_end == q_len,
        tl.cdiv(query_full_end * HEADS_PER_KV, BLOCK_M),
        query_full_end * HEADS_PER_KV // BLOCK_M,
    )
    return seen_begin, full_begin, tl.minimum(tl.maximum(full_end, full_begin), seen_end), seen_end
