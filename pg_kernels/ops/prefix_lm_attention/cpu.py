"""The native backend: attention on the CPU over the keys that each block of queries sees.

Lengths are Python ints here, so that no work is done for keys that nothing sees. PyTorch's scaled_dot_product_attention (SDPA)
does most of the work. A few queries go to the C++ extension: for them SDPA's overhead is larger than the work itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pg_kernels.ops._common import checks, extension
from pg_kernels.ops._common.autograd import is_function_transformed, needs_autograd
from pg_kernels.ops._common.registration import define_opaque
from pg_kernels.ops.prefix_lm_attention.mask import visible_keys

BLOCK_M = 256
"""Queries that share a mask, if they need one: it is [BLOCK_M, visible keys], never [Sq, Skv]."""
MAX_FEW_QUERIES = 16
"""The C++ extension takes up to this many queries per example: decoding, and prompts this short."""


class ExampleLengths(NamedTuple):
    """The lengths of one example of the batch."""

    prefix_len: int
    kv_start: int
    kv_end: int
    q_start: int


@dataclass(frozen=True)
class ScoreOptions:
    """How scores are computed and masked, as in the public function."""

    causal: bool
    scale: float
    softcap: float | None
    window: int | None


@dataclass(frozen=True)
class ScaledTensor:
    """Keys or values [B, Hkv, Skv, D]. Int8 ones have scales, fp32 [B, Hkv, Skv]."""

    tensor: Tensor
    scale: Tensor | None

    def split(self, sizes: Sequence[int]) -> list[ScaledTensor]:
        """Split the batch into parts of these many examples."""
        scales = [None] * len(sizes) if self.scale is None else self.scale.split(list(sizes))
        return [ScaledTensor(t, scale) for t, scale in zip(self.tensor.split(list(sizes)), scales, strict=True)]

    def upper_bound(self, keys: slice) -> float:
        """Return an upper bound of the magnitudes at these keys; NaN if there is a NaN."""
        if self.scale is not None:
            return 128 * _max_abs(self.scale[:, :, keys])
        return _max_abs(self.tensor[:, :, keys])

    def dequantize(self, keys: slice, dtype: torch.dtype) -> Tensor:
        """Return the rows of these keys: int8 ones multiplied by their scales, in `dtype`."""
        part = self.tensor[:, :, keys]
        return part if self.scale is None else (part * self.scale[:, :, keys, None]).to(dtype)


def valid_keys(examples: Sequence[ExampleLengths]) -> slice:
    """Return the smallest slice of keys that holds the valid keys of all examples."""
    start = min((example.kv_start for example in examples), default=0)
    return slice(start, max((example.kv_end for example in examples), default=0))


def is_supported(q: Tensor, k: ScaledTensor, v: ScaledTensor, keys: slice, scores: ScoreOptions) -> bool:
    """Return True if the C++ extension will run, or if all scores and values of `keys` are sure to be finite.

    SDPA's kernel treats a score of NaN as −inf, and multiplies values that a query does not see by 0. Return True, too, if the
    tensors hold no values that can be read: fake tensors, tensors in a function transform.
    """
    are_readable = all(map(checks.values_are_free, (q, k.tensor, v.tensor))) and not is_function_transformed()
    if not are_readable or _uses_extension(q, k, v):
        return True
    max_key, max_value, max_finite = k.upper_bound(keys), v.upper_bound(keys), torch.finfo(q.dtype).max
    max_score = q.shape[3] * _max_abs(q) * max_key * max(scores.scale, 1.0)
    return max_score < 1e38 and max_key <= max_finite and max_value <= max_finite


def _max_abs(x: Tensor) -> float:
    if not x.numel():
        return 0.0
    smallest, largest = torch.aminmax(x.detach())  # both NaN if one element is; a sixteenth of vector_norm's time
    return max(-float(smallest), float(largest))


def prefix_lm_attention(
    q: Tensor, k: ScaledTensor, v: ScaledTensor, examples: Sequence[ExampleLengths], scores: ScoreOptions
) -> Tensor:
    """Compute attention of q [B, H, Sq, D]. Adjacent examples of equal lengths are computed together."""
    if _uses_extension(q, k, v):
        numbers = list(chain.from_iterable(examples))
        options = (scores.causal, scores.scale, scores.softcap, scores.window)
        return torch.ops.pg_kernels.prefix_lm_attention_few(q, k.tensor, v.tensor, numbers, *options)
    groups = [(example, len(list(group))) for example, group in groupby(examples)]
    # Use split, not slices: each slice's backward would allocate a full-size, mostly zero gradient.
    sizes = [size for _, size in groups]
    outs = []
    for (example, _), queries, keys, values in zip(groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        blocks = _query_blocks(q.shape[2], example, scores)
        outs.append(_cat([_attend_block(queries, keys, values, example, block, scores) for block in blocks], 2))
    return _cat(outs, 0) if outs else q * (k.tensor.sum() + v.tensor.sum())


def _cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate, without the copy that torch.cat makes of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _uses_extension(q: Tensor, k: ScaledTensor, v: ScaledTensor) -> bool:
    return (
        q.dtype in extension.FLOAT_CODES
        and k.scale is None
        and q.shape[3] <= extension.LONGEST_HEAD
        and q.shape[2] <= MAX_FEW_QUERIES
        and q.numel() > 0
        and extension.unavailable_reason(q.device.type) is None
        and not needs_autograd(q, k.tensor, v.tensor)
    )


def _few_queries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    examples: Sequence[int],
    causal: bool,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Compute attention with the C++ extension. `examples` holds the four numbers of every `ExampleLengths`, [B · 4]."""
    extension.check(q=q, k=k, v=v)
    checks.check_same(q=q, k=k, v=v)
    checks.check_shape("q", q, ["B", "H", "Sq", "D"])
    checks.check_shape("k", k, [q.shape[0], "Hkv", "Skv", q.shape[3]], " (B and D as in q)")
    checks.check_shape("v", v, list(k.shape), " (k's)")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or not 1 <= q.shape[3] <= extension.LONGEST_HEAD:
        raise ValueError(f"q: {list(q.shape)} are not heads of at most {extension.LONGEST_HEAD} over k's {k.shape[1]}")
    prefix_lens, kv_starts, kv_ends, q_starts = (list(examples[i::4]) for i in range(4))
    if len(examples) != 4 * q.shape[0] or not all(0 <= bound <= k.shape[2] for bound in (*kv_starts, *kv_ends)):
        raise ValueError(f"examples: expected 4 lengths for each of {q.shape[0]}, with keys in [0, {k.shape[2]}]")
    q, k, v = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (q, k, v))
    out = q.new_empty(q.shape)
    extension._C.attention(
        q=extension.heads(q),
        k=extension.heads(k),
        v=extension.heads(v),
        out=extension.heads(out),
        prefix_ends=[start + prefix_len for start, prefix_len in zip(kv_starts, prefix_lens, strict=True)],
        starts=kv_starts,
        ends=kv_ends,
        q_starts=q_starts,
        queries=q.shape[2],
        keys=k.shape[2],
        dim=q.shape[3],
        type=extension.FLOAT_CODES[q.dtype],
        causal=causal,
        scale=scale,
        softcap=softcap or 0.0,
        window=window or 0,
    )
    return out


define_opaque(
    "prefix_lm_attention_few(Tensor q, Tensor k, Tensor v, int[] examples, bool causal, float scale, float? softcap, "
    "int? window) -> Tensor",
    _few_queries,
    lambda q, *rest: q.new_empty(q.shape),
)


def prefix_lm_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int], prefix_lens: Sequence[int], scores: ScoreOptions
) -> Tensor:
    """Compute attention of packed sequences q [1, H, T, D], from each of `cu_seqlens` to the next."""
    outs = []
    for (start, end), prefix_len in zip(pairwise(cu_seqlens), prefix_lens, strict=True):
        queries, keys, values = (tensor[:, :, start:end] for tensor in (q, k, v))
        example = ExampleLengths(prefix_len, 0, end - start, 0)
        outs.append(
            prefix_lm_attention(queries, ScaledTensor(keys, None), ScaledTensor(values, None), [example], scores)
        )
    return _cat(outs, 2) if outs else q * (k.sum() + v.sum())


def _query_blocks(q_len: int, example: ExampleLengths, scores: ScoreOptions) -> Iterator[slice]:
    """Yield blocks of queries.

    Queries inside the prefix see the whole prefix and nothing else: they are one block of any length. The others are blocks of
    BLOCK_M. Without a mask by position, or with at most BLOCK_M queries, there is one block.
    """
    prefix_len, kv_start, kv_end, q_start = example
    if (not scores.causal and scores.window is None) or q_len <= BLOCK_M:
        yield slice(0, q_len)
        return
    num_in_prefix = min(max(min(kv_start + prefix_len, kv_end) - q_start, 0), q_len) if scores.causal else 0
    if num_in_prefix:
        yield slice(0, num_in_prefix)
    for first in range(num_in_prefix, q_len, BLOCK_M):
        yield slice(first, min(first + BLOCK_M, q_len))


def _attend_block(
    q: Tensor, k: ScaledTensor, v: ScaledTensor, example: ExampleLengths, block: slice, scores: ScoreOptions
) -> Tensor:
    """Compute a block of queries of examples of equal lengths, with a mask only if its queries see different keys."""
    prefix_len, kv_start, kv_end, q_start = example
    q = q[:, :, block]
    prefix_end, window = min(kv_start + prefix_len, kv_end), scores.window
    first_position, last_position = q_start + block.start, q_start + block.stop - 1
    # By position, some query sees keys from seen_begin to seen_end, and every query keys from full_begin to full_end.
    seen_end, full_end = kv_end, kv_end
    if scores.causal:
        seen_end, full_end = min(kv_end, last_position + 1), min(kv_end, first_position + 1)
    seen_begin, full_begin = kv_start, kv_start
    if window is not None:
        seen_begin, full_begin = first_position - window + 1, last_position - window + 1
    begin = kv_start if prefix_end > kv_start else max(kv_start, seen_begin)
    end = max(prefix_end, seen_end)
    if end <= begin or not q.numel():  # no query sees a key
        end = begin
    keys, values = (rows.dequantize(slice(begin, end), q.dtype) for rows in (k, v))
    if end == begin:
        # 0 with zero gradients. Not 0 · q, which is NaN for infinity.
        return q.masked_fill(torch.ones((), dtype=torch.bool), 0.0) + (keys.sum() + values.sum())
    if end <= prefix_end or (full_end >= end and full_begin <= max(begin, prefix_end)):
        return _sdpa(q, keys, values, None, scores)
    # Count keys and positions from `begin`, as lengths of a batch of one.
    lengths = torch.tensor([prefix_len, kv_start - begin, kv_end - begin, first_position - begin]).unsqueeze(1)
    prefix_lens, kv_starts, kv_lens, q_starts = lengths
    visible = visible_keys(q.shape[2], end - begin, prefix_lens, kv_starts, kv_lens, q_starts, scores.causal, window)[
        0
    ]  # [Sq, keys]
    sees_any = visible.any(-1, keepdim=True)
    if sees_any.all():
        return _sdpa(q, keys, values, visible, scores)
    # A row that sees nothing would give 0 / 0. Let it see all keys, with 0 for its query, and set its output to 0.
    out = _sdpa(q.masked_fill(~sees_any, 0.0), keys, values, visible | ~sees_any, scores)
    return out.masked_fill(~sees_any, 0.0)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: ScoreOptions) -> Tensor:
    """Call SDPA without repeating key heads.

    SDPA's forward for CPUs shares a key head among query heads. Its backward does not: with gradients, the query heads of a KV
    head become rows of one head, which takes a sixth less time (D = 256).
    """
    group = q.shape[1] // k.shape[1]
    if scores.softcap is None and (group == 1 or not needs_autograd(q, k, v)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scores.scale, enable_gqa=group > 1)
    rows = q if group == 1 else q.unflatten(1, (-1, group)).transpose(2, 3).flatten(2, 3)  # [B, Hkv, Sq · group, D]
    mask = None if mask is None else mask.repeat_interleave(group, 0)
    if scores.softcap is None:
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scores.scale)
    else:
        out = _softcapped_attention(rows, k, v, mask, scores.scale, scores.softcap)
    return out if group == 1 else out.unflatten(2, (-1, group)).transpose(2, 3).flatten(1, 2)


def _softcapped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Compute in fp32 (fp64 for fp64): SDPA has no softcap."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = softcap * torch.tanh((q.to(wide) * (scale / softcap)) @ k.to(wide).mT)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1) @ v.to(wide)).to(q.dtype)
