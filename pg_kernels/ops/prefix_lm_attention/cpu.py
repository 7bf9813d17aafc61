"""On the CPU, where lengths can be looked at: attention over what each block of queries sees, and no more.

PyTorch's, or for a few queries the C++ extension's: PyTorch's costs more than the work itself there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pg_kernels.ops._common import checks, extension
from pg_kernels.ops._common.autograd import is_function_transformed, needs_autograd
from pg_kernels.ops._common.registration import define_opaque
from pg_kernels.ops.prefix_lm_attention.mask import visible_keys

ROWS = 256
"""Queries that share a mask, where they need any: [ROWS, keys in sight], never [Sq, Skv]."""
FEW = 16
"""So many queries the C++ extension attends for: when decoding, and in prompts as short."""

Example = tuple[int, int, int, int]
"""Prefix length, start, end, position of the first query."""


@dataclass(frozen=True)
class Scores:
    """What becomes of them, as in the public function."""

    causal: bool
    scale: float
    softcap: float | None
    window: int | None


@dataclass(frozen=True)
class Rows:
    """Keys or values [B, Hkv, Skv, D], and the scales [B, Hkv, Skv] of int8 ones."""

    tensor: Tensor
    scale: Tensor | None

    def split(self, sizes: Sequence[int]) -> list[Rows]:
        """Parts of so many examples."""
        scales = [None] * len(sizes) if self.scale is None else self.scale.split(list(sizes))
        return [Rows(tensor, scale) for tensor, scale in zip(self.tensor.split(list(sizes)), scales, strict=True)]

    def largest(self, rows: slice) -> float:
        """The largest magnitude of these rows or more; NaN where one is NaN."""
        if self.scale is not None:
            return 128 * _largest(self.scale[:, :, rows])
        return _largest(self.tensor[:, :, rows])

    def part(self, rows: slice, dtype: torch.dtype) -> Tensor:
        part = self.tensor[:, :, rows]
        return part if self.scale is None else (part * self.scale[:, :, rows, None]).to(dtype)


def handles(q: Tensor, k: Rows, v: Rows, rows: slice, scores: Scores) -> bool:
    """Whether all scores and values of keys in `rows` are sure to be finite, or the C++ extension is for them.

    PyTorch's kernel takes a score of NaN for −inf, and multiplies the values that a query does not see by 0.
    """
    known = all(map(checks.values_are_free, (q, k.tensor, v.tensor))) and not is_function_transformed()
    if not known or _are_few(q, k, v):
        return True
    key, value, most = k.largest(rows), v.largest(rows), torch.finfo(q.dtype).max
    return q.shape[3] * _largest(q) * key * max(scores.scale, 1.0) < 1e38 and key <= most and value <= most


def _largest(x: Tensor) -> float:
    if not x.numel():
        return 0.0
    least, most = torch.aminmax(x.detach())  # both NaN where one is; a sixteenth of vector_norm's time
    return max(-float(least), float(most))


def prefix_lm_attention(q: Tensor, k: Rows, v: Rows, examples: Sequence[Example], scores: Scores) -> Tensor:
    """Attention of q [B, H, Sq, D]; examples that are alike are done at once."""
    if _are_few(q, k, v):
        numbers = list(chain.from_iterable(examples))
        options = (scores.causal, scores.scale, scores.softcap, scores.window)
        return torch.ops.pg_kernels.prefix_lm_attention_few(q, k.tensor, v.tensor, numbers, *options)
    alike = [(example, len(list(group))) for example, group in groupby(examples)]
    # Split, not sliced: the gradient of every slice would be as large as the whole, mostly zeros, and added to the others.
    sizes = [size for _, size in alike]
    outs = []
    for (example, _), queries, keys, values in zip(alike, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        blocks = _blocks(q.shape[2], example, scores)
        outs.append(_joined([_block(queries, keys, values, example, block, scores) for block in blocks], 2))
    return _joined(outs, 0) if outs else q * (k.tensor.sum() + v.tensor.sum())


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """torch.cat, which copies a single part, too."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _are_few(q: Tensor, k: Rows, v: Rows) -> bool:
    """Whether the C++ extension is for them."""
    fits = (
        q.dtype in extension.FLOAT_CODES and k.scale is None and q.shape[3] <= extension.LONGEST_HEAD and q.numel() > 0
    )
    few = fits and q.shape[2] <= FEW and extension.unavailable_reason(q.device.type) is None
    return few and not needs_autograd(q, k.tensor, v.tensor)


def _few(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    examples: Sequence[int],
    causal: bool,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """`examples` are prefix lengths, starts, ends and first positions, [4 · B]."""
    extension.check(q=q, k=k, v=v)
    checks.check_same(q=q, k=k, v=v)
    checks.check_shape("q", q, ["B", "H", "Sq", "D"])
    checks.check_shape("k", k, [q.shape[0], "Hkv", "Skv", q.shape[3]], " (B and D as in q)")
    checks.check_shape("v", v, list(k.shape), " (k's)")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or not 1 <= q.shape[3] <= extension.LONGEST_HEAD:
        raise ValueError(f"q: {list(q.shape)} are not heads of at most {extension.LONGEST_HEAD} over k's {k.shape[1]}")
    bounds = [0 <= place <= k.shape[2] for i, place in enumerate(examples) if i % 4 in (1, 2)]
    if len(examples) != 4 * q.shape[0] or not all(bounds):
        raise ValueError(f"examples: expected 4 lengths for each of {q.shape[0]}, with keys in [0, {k.shape[2]}]")
    q, k, v = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (q, k, v))
    out = q.new_empty(q.shape)
    prefix_lens, starts, ends, q_starts = (list(examples[i::4]) for i in range(4))
    extension._C.attention(
        q=extension.heads(q),
        k=extension.heads(k),
        v=extension.heads(v),
        out=extension.heads(out),
        prefix_ends=[start + prefix for start, prefix in zip(starts, prefix_lens, strict=True)],
        starts=starts,
        ends=ends,
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
    _few,
    lambda q, *rest: q.new_empty(q.shape),
)


def prefix_lm_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, offsets: Sequence[int], prefix_lens: Sequence[int], scores: Scores
) -> Tensor:
    """Sequences laid end to end in q [1, H, T, D], from each offset to the next."""
    outs = []
    for (start, end), prefix in zip(pairwise(offsets), prefix_lens, strict=True):
        rows = (tensor[:, :, start:end] for tensor in (q, k, v))
        one, keys, values = rows
        example = (prefix, 0, end - start, 0)
        outs.append(prefix_lm_attention(one, Rows(keys, None), Rows(values, None), [example], scores))
    return _joined(outs, 2) if outs else q * (k.sum() + v.sum())


def _blocks(q_len: int, example: Example, scores: Scores) -> Iterator[slice]:
    """Blocks of queries: one of few, else those inside the prefix, who see all of it and nothing else, however many there are."""
    prefix, start, end, q_start = example
    if (not scores.causal and scores.window is None) or q_len <= ROWS:
        yield slice(0, q_len)
        return
    inside = min(max(min(start + prefix, end) - q_start, 0), q_len) if scores.causal else 0
    if inside:
        yield slice(0, inside)
    for first in range(inside, q_len, ROWS):
        yield slice(first, min(first + ROWS, q_len))


def _block(q: Tensor, k: Rows, v: Rows, example: Example, block: slice, scores: Scores) -> Tensor:
    """A block of queries of examples that are alike, with a mask only where not all of it see the same keys."""
    prefix, start, end, q_start = example
    q = q[:, :, block]
    prefix_end, window = min(start + prefix, end), scores.window
    first, last = q_start + block.start, q_start + block.stop - 1
    seen_end, all_end = (min(end, last + 1), min(end, first + 1)) if scores.causal else (end, end)
    seen_begin, all_begin = (start, start) if window is None else (first - window + 1, last - window + 1)
    low = start if prefix_end > start else max(start, seen_begin)
    high = max(prefix_end, seen_end)
    if high <= low or not q.numel():  # nothing to see: 0, and so are its gradients
        high = low
    keys, values = (rows.part(slice(low, high), q.dtype) for rows in (k, v))
    if high == low:
        # Not 0 · q, which is NaN for infinity.
        return q.masked_fill(torch.ones((), dtype=torch.bool), 0.0) + (keys.sum() + values.sum())
    if high <= prefix_end or (all_end >= high and all_begin <= max(low, prefix_end)):
        return _attend(q, keys, values, None, scores)
    one = torch.tensor([prefix, start - low, end - low, first - low]).unsqueeze(1)
    visible = visible_keys(q.shape[2], high - low, one[0], one[1], one[2], one[3], scores.causal, window)[0]
    sees = visible.any(-1, keepdim=True)
    if sees.all():
        return _attend(q, keys, values, visible, scores)
    # A row that sees nothing would be 0 / 0: it sees all, and is 0 before, whatever it held, and afterwards.
    return _attend(q.masked_fill(~sees, 0.0), keys, values, visible | ~sees, scores).masked_fill(~sees, 0.0)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """No key is repeated: PyTorch's forward for CPUs knows that heads share keys.

    Its backward does not, where all query heads of a KV head as rows of one product take a sixth less time (D = 256).
    """
    group = q.shape[1] // k.shape[1]
    if scores.softcap is None and (group == 1 or not needs_autograd(q, k, v)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scores.scale, enable_gqa=group > 1)
    rows = q if group == 1 else q.unflatten(1, (-1, group)).transpose(2, 3).flatten(2, 3)
    mask = None if mask is None else mask.repeat_interleave(group, 0)
    if scores.softcap is None:
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scores.scale)
    else:
        out = _softcapped(rows, k, v, mask, scores.scale, scores.softcap)
    return out if group == 1 else out.unflatten(2, (-1, group)).transpose(2, 3).flatten(1, 2)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = softcap * torch.tanh((q.to(wide) * (scale / softcap)) @ k.to(wide).mT)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1) @ v.to(wide)).to(q.dtype)
