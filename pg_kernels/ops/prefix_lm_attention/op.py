"""The public functions, their registration as PyTorch ops, and autograd of the Triton backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pg_kernels.backends import register_backend, select
from pg_kernels.ops._common import checks, devices
from pg_kernels.ops._common.autograd import refuse_second_derivative
from pg_kernels.ops._common.registration import define_composite, define_opaque
from pg_kernels.ops.prefix_lm_attention import cpu, launch, reference, tiles
from pg_kernels.ops.prefix_lm_attention.arguments import (
    check_tensors,
    checked_length,
    checked_max_seqlen,
    checked_scores,
)

_LENGTHS = "Tensor? prefix_lens, Tensor? kv_starts, Tensor? kv_lens, Tensor? q_starts, Tensor? cu_seqlens, SymInt[] int_lengths"
"""Lengths as int32 [B], and five ints: prefix length, first key, end of keys, position of the first query, max_seqlen.

The ints stand for the tensors that are None. max_seqlen is used with cu_seqlens only.
"""
_SCORES = "bool causal, float scale, float? softcap, int? window"


class _PrefixLMAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.pg_kernels.prefix_lm_attention_triton(q, k, v, *options)
        _, _, *lengths, cu_seqlens, int_lengths, causal, scale, softcap, window = options
        ctx.save_for_backward(q, k, v, out, lse, *lengths, cu_seqlens)
        ctx.options = (int_lengths, causal, scale, softcap, window)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("prefix_lm_attention")
        needs_grad = ctx.needs_input_grad[:3]
        needs_kv = needs_grad[1] or needs_grad[2]
        grads = torch.ops.pg_kernels.prefix_lm_attention_triton_backward(
            grad_out, *ctx.saved_tensors, *ctx.options, needs_kv
        )
        return *(grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)), *[None] * 12


register_backend("prefix_lm_attention", "triton", devices.unavailable_reason)
register_backend(
    "prefix_lm_attention",
    "native",
    lambda device_type: None if device_type == "cpu" else "PyTorch's attention, for CPUs",
)
define_composite(
    "prefix_lm_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_lens, Tensor kv_starts, Tensor kv_lens, "
    f"Tensor q_starts, {_SCORES}) -> Tensor",
    reference.prefix_lm_attention,
)
define_opaque(
    f"prefix_lm_attention_triton(Tensor q, Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, {_LENGTHS}, {_SCORES}) "
    "-> (Tensor, Tensor)",
    launch.forward,
    launch.empty_outputs,
    _PrefixLMAttention.apply,
)
define_opaque(
    "prefix_lm_attention_triton_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_LENGTHS}, {_SCORES}, bool needs_kv) -> (Tensor, Tensor, Tensor)",
    launch.backward,
    launch.empty_gradients,
)


def prefix_lm_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    prefix_lens: Tensor | int | None = None,
    kv_starts: Tensor | int | None = None,
    kv_lens: Tensor | int | None = None,
    q_starts: Tensor | int | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Compute attention that is bidirectional over each example's prefix and causal after it, with grouped key-value heads.

    Query i of example b stands at position p = q_starts[b] + i. It sees key j if kv_starts[b] <= j < kv_lens[b] and either
    j - kv_starts[b] < prefix_lens[b], or (not causal or j <= p) and (window is None or p - j < window). A query that sees
    nothing gives 0. A length is one int for all examples, or int32 [B].

    Infinity and NaN in keys and values that a query does not see do not change its output. The Triton kernels guarantee this
    for keys, and for values outside [kv_starts, kv_lens) only.

    Args:
        q: [B, H, Sq, D], fp32, fp16 or bf16, any strides. Under autocast q, k and v are cast.
        k, v: [B, Hkv, Skv, D] in q's dtype, H a multiple of Hkv; or int8 with scales, which have no gradient.
        prefix_lens: number of keys, from kv_starts on, that every query sees; default 0.
        kv_starts: the first valid key, for left padding; default 0.
        kv_lens: the end of the valid keys, for right padding and static caches; default Skv.
        q_starts: position of the first query among the keys; default Skv − Sq. With a static cache: kv_lens − Sq.
        causal: False lets every query see every valid key inside its window.
        scale: factor of the scores; default D^−½.
        softcap: bound of the scores, which become softcap · tanh(scores / softcap); default none.
        window: number of positions, its own included, that a query sees back outside the prefix; default no limit.
        k_scale, v_scale: fp32 [B, Hkv, Skv], factors of int8 keys and values.

    Returns:
        [B, H, Sq, D] in q's dtype.

    Raises:
        TypeError: q, k or v is not floating-point or they differ in dtype; int8 without scales or scales without int8; a length
            that is not an integer.
        ValueError: shapes or devices do not fit; scale, softcap or window is not positive; kv_starts or kv_lens is outside
            [0, Skv] or prefix_lens below 0. Values of tensors are checked on the CPU only. In a compiled graph and on a GPU an
            example with invalid lengths gives NaN.

    Source: Raffel et al., https://arxiv.org/abs/1910.10683 (prefix LM); Gemma 2, https://arxiv.org/abs/2408.00118 (softcap).
    """
    is_int8 = check_tensors(q, k, v, "Sq", "Skv", k_scale, v_scale)
    if not is_int8:
        q, k, v = checks.autocast(q, k, v)
        checks.check_same(q=q, k=k, v=v)
    scores = checked_scores(q, causal, scale, softcap, window)
    batch, _, q_len, _ = q.shape
    kv_len = k.shape[2]
    lengths = [
        checked_length("prefix_lens", prefix_lens, 0, q, lower=0, upper=None),
        checked_length("kv_starts", kv_starts, 0, q, lower=0, upper=kv_len),
        checked_length("kv_lens", kv_lens, kv_len, q, lower=0, upper=kv_len),
        checked_length("q_starts", q_starts, kv_len - q_len, q, lower=None, upper=None),
    ]
    backend = _select_backend(q, k, lengths)
    if backend == "native":
        lists = [t.tolist() if isinstance(t, Tensor) else [t] * batch for t in lengths]
        examples = [cpu.ExampleLengths(*numbers) for numbers in zip(*lists, strict=True)]
        keys, values = cpu.ScaledTensor(k, k_scale), cpu.ScaledTensor(v, v_scale)
        if cpu.is_supported(q, keys, values, cpu.valid_keys(examples), cpu.ScoreOptions(*scores)):
            return cpu.prefix_lm_attention(q, keys, values, examples, cpu.ScoreOptions(*scores))
    if backend == "triton":
        tensors = [length if isinstance(length, Tensor) else None for length in lengths]
        ints = [0 if isinstance(length, Tensor) else length for length in lengths]
        return torch.ops.pg_kernels.prefix_lm_attention_triton(
            q, k, v, k_scale, v_scale, *tensors, None, [*ints, 0], *scores
        )[0]
    if k_scale is not None and v_scale is not None:
        k, v = k * k_scale[..., None], v * v_scale[..., None]
    tensors = [
        t if isinstance(t, Tensor) else torch.full((batch,), t, dtype=torch.int32, device=q.device) for t in lengths
    ]
    return torch.ops.pg_kernels.prefix_lm_attention(q, k, v, *tensors, *scores)


def prefix_lm_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    prefix_lens: Tensor | int | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Compute `prefix_lm_attention` of packed sequences, each on its own: fine-tuning without padding.

    Args:
        q: [T, H, D], fp32, fp16 or bf16: the tokens of all sequences, end to end. Under autocast q, k and v are cast.
        k, v: [T, Hkv, D] in q's dtype.
        cu_seqlens: int32 or int64 [B + 1], rising from 0 to T: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1].
        max_seqlen: length of the longest sequence, or more.
        prefix_lens: one int, or int32 [B]: number of tokens at the begin of a sequence that all its tokens see; default 0.
        causal, scale, softcap, window: as in `prefix_lm_attention`.

    Returns:
        [T, H, D] in q's dtype.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit; cu_seqlens does not rise from 0 to T in steps of at most max_seqlen. Its values
            are checked on the CPU only. On a GPU tokens that are in no sequence give NaN.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_shape(name, tensor, ["T", "heads", "D"])
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    check_tensors(q, k, v, "T", q.shape[2])
    q, k, v = checks.autocast(q, k, v)
    checks.check_same(q=q, k=k, v=v)
    scores = checked_scores(q, causal, scale, softcap, window)
    checks.check_integer(cu_seqlens=cu_seqlens)
    checks.check_shape("cu_seqlens", cu_seqlens, ["B + 1"])
    checks.check_device(q=q, cu_seqlens=cu_seqlens)
    max_seqlen = checked_max_seqlen(cu_seqlens, max_seqlen, q.shape[2])
    prefix = checked_length("prefix_lens", prefix_lens, 0, cu_seqlens[1:], lower=0, upper=None)
    backend = _select_backend(q, k, [cu_seqlens, prefix])
    keys, values = cpu.ScaledTensor(k, None), cpu.ScaledTensor(v, None)
    if backend == "native" and cpu.is_supported(q, keys, values, slice(None), cpu.ScoreOptions(*scores)):
        prefixes = prefix.tolist() if isinstance(prefix, Tensor) else [prefix] * (len(cu_seqlens) - 1)
        out = cpu.prefix_lm_attention_varlen(q, k, v, cu_seqlens.tolist(), prefixes, cpu.ScoreOptions(*scores))
    elif backend == "triton":
        prefix_tensor, prefix_int = (prefix, 0) if isinstance(prefix, Tensor) else (None, prefix)
        int_lengths = [prefix_int, 0, 0, 0, max_seqlen]
        out, _ = torch.ops.pg_kernels.prefix_lm_attention_triton(
            q, k, v, None, None, prefix_tensor, None, None, None, cu_seqlens.int(), int_lengths, *scores
        )
    else:
        out = reference.prefix_lm_attention_varlen(q, k, v, cu_seqlens, max_seqlen, prefix, scores)
    return out[0].transpose(0, 1)


def _select_backend(q: Tensor, k: Tensor, lengths: Sequence[Tensor | int]) -> str:
    triton, native = devices.unsupported_reason(q, k), None
    if not tiles.MIN_HEAD_DIM <= q.shape[3] <= tiles.MAX_HEAD_DIM:
        triton = f"a head dimension of {q.shape[3]} is not between {tiles.MIN_HEAD_DIM} and {tiles.MAX_HEAD_DIM}"
    if torch.compiler.is_compiling() or not all(checks.values_are_free(t) for t in lengths if isinstance(t, Tensor)):
        native = "lengths must be known, which they are not in a compiled graph"
    return select("prefix_lm_attention", q.device.type, {"triton": triton, "native": native})
