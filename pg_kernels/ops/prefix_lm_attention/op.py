from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pg_kernels.backends import register_backend, select
from pg_kernels.ops._common import checks, devices
from pg_kernels.ops._common.autograd import refuse_second_derivative
from pg_kernels.ops._common.registration import define_composite, define_opaque
from pg_kernels.ops.prefix_lm_attention import reference, sdpa, tiles

_LENGTHS = (
    "Tensor? prefix_lens, Tensor? kv_starts, Tensor? kv_lens, Tensor? q_starts, Tensor? cu_seqlens, SymInt[] lengths"
)
"""int32 [B] each, or one for all examples in `lengths`: (prefix length, start, end, first query's position, longest sequence)."""
_SCORES = "bool causal, float scale, float? softcap, int? window"


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    prefix_lens: Tensor | None,
    kv_starts: Tensor | None,
    kv_lens: Tensor | None,
    q_starts: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Sequence[int],
    causal: bool,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Sq, D], in memory [B, Sq, H, D], and log-sum-exp to base 2 [B, Hkv, Sq · H / Hkv] of the scores."""
    from pg_kernels.ops.prefix_lm_attention import kernels

    out, lse = _fake_forward(q, k)
    if not out.numel():
        return out, lse
    if cu_seqlens is not None:
        out.fill_(float("nan"))  # of tokens that are in no sequence, or beyond the longest one's length that was given
    q, k, v = (_adjacent(tensor) for tensor in (q, k, v))
    sizes, device = _sizes(cu_seqlens, lengths, q, k, v), devices.device_of(q)
    chosen = tiles.choose("forward", q.shape[3], k.element_size(), sizes.rows, device)
    row_blocks = -(-sizes.rows // chosen.rows)
    programs = row_blocks * sizes.batch * k.shape[1]
    splits = 1 if row_blocks > 1 or cu_seqlens is not None else tiles.splits(programs, k.shape[2], chosen.keys, device)
    parts, part_lses = out, lse
    if splits > 1:
        parts, part_lses = (t.new_empty(splits, *t.shape, dtype=torch.float32) for t in (out.transpose(1, 2), lse))
        parts = parts.transpose(2, 3)
    with devices.on_device_of(q):
        kernels.forward[(row_blocks, sizes.batch * k.shape[1], splits)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            **_descriptors(k, v, chosen),
            k_scale_ptr=k_scale,
            v_scale_ptr=v_scale,
            out_ptr=parts,
            lse_ptr=part_lses,
            **_example_arguments(prefix_lens, kv_starts, kv_lens, q_starts, cu_seqlens, lengths),
            q_strides=sizes.strides(q),
            k_strides=sizes.strides(k),
            v_strides=sizes.strides(v),
            scale_strides=(0, 0, 0) if k_scale is None else k_scale.stride(),
            out_strides=(*sizes.strides(parts[0] if splits > 1 else parts), parts.stride(0)),
            lse_strides=(*sizes.lse_strides(lse), part_lses.stride(0)),
            q_len=q.shape[2],
            kv_len=k.shape[2],
            kv_heads=k.shape[1],
            scale=scale,
            softcap=softcap,
            window=window,
            **_constants(q, sizes, chosen),
            SPLITS=splits,
            CAUSAL=causal,
        )
        if splits > 1:
            kernels.combine[(lse.numel(),)](
                parts_ptr=parts,
                part_lses_ptr=part_lses,
                out_ptr=out,
                lse_ptr=lse,
                parts_strides=(*sizes.strides(parts[0]), parts.stride(0)),
                out_strides=sizes.strides(out),
                rows=sizes.rows,
                kv_heads=k.shape[1],
                GROUP=sizes.group,
                UNIT=sizes.unit,
                DIM=q.shape[3],
                BLOCK=_power_of_two(q.shape[3]),
                SPLITS=splits,
                SPLIT_BLOCK=_power_of_two(splits),
                num_warps=4,
                enable_fp_fusion=True,
            )
    return out, lse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    prefix_lens: Tensor | None,
    kv_starts: Tensor | None,
    kv_lens: Tensor | None,
    q_starts: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Sequence[int],
    causal: bool,
    scale: float,
    softcap: float | None,
    window: int | None,
    needs_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; without `needs_kv` the last two are empty."""
    from pg_kernels.ops.prefix_lm_attention import kernels

    grad_q, grad_k, grad_v = _fake_backward(grad, q, k, v, needs_kv)
    if not q.numel() or not k.numel() or cu_seqlens is not None:
        for gradient in (grad_q, grad_k, grad_v):
            gradient.zero_()
    if not q.numel() or not k.numel():
        return grad_q, grad_k, grad_v
    grad, q, k, v, out = (_adjacent(tensor) for tensor in (grad, q, k, v, out))
    sizes, device = _sizes(cu_seqlens, lengths, q, k, v, grad, out), devices.device_of(q)
    delta = torch.empty_like(lse)
    common = {
        **_example_arguments(prefix_lens, kv_starts, kv_lens, q_starts, cu_seqlens, lengths),
        "grad_ptr": grad,
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "grad_strides": sizes.strides(grad),
        "q_strides": sizes.strides(q),
        "k_strides": sizes.strides(k),
        "v_strides": sizes.strides(v),
        "lse_strides": sizes.lse_strides(lse),
        "q_len": q.shape[2],
        "kv_len": k.shape[2],
        "kv_heads": k.shape[1],
        "scale": scale,
        "softcap": softcap,
        "window": window,
        "CAUSAL": causal,
    }
    programs = sizes.batch * k.shape[1]
    with devices.on_device_of(q):
        chosen = tiles.choose("backward_q", q.shape[3], q.element_size(), sizes.rows, device)
        kernels.backward_q[(-(-sizes.rows // chosen.rows), programs)](
            **common,
            out_ptr=out,
            grad_q_ptr=grad_q,
            out_strides=sizes.strides(out),
            grad_q_strides=sizes.strides(grad_q),
            **_constants(q, sizes, chosen),
        )
        if needs_kv:
            chosen = tiles.choose("backward_kv", q.shape[3], q.element_size(), sizes.rows, device)
            kernels.backward_kv[(-(-sizes.longest(k) // chosen.keys), programs)](
                **common,
                grad_k_ptr=grad_k,
                grad_v_ptr=grad_v,
                grad_k_strides=sizes.strides(grad_k),
                grad_v_strides=sizes.strides(grad_v),
                **_constants(q, sizes, chosen),
            )
    return grad_q, grad_k, grad_v


@dataclass(frozen=True)
class _Sizes:
    batch: int
    group: int
    """Heads that share a KV head."""
    rows: int
    """Queries of one KV head's heads, of the longest sequence where several are packed."""
    packed: bool
    unit: int
    """What all strides are multiples of."""

    def strides(self, tensor: Tensor) -> tuple[int, int, int]:
        """Of batch, head and row; packed sequences are told apart by their offsets alone."""
        batch, head, row = (stride // self.unit for stride in tensor.stride()[:3])
        return 0 if self.packed else batch, head, row

    def lse_strides(self, lse: Tensor) -> tuple[int, int]:
        """Of batch and KV head, in elements."""
        return 0 if self.packed else lse.stride(0), lse.stride(1)

    def longest(self, k: Tensor) -> int:
        return self.rows // self.group if self.packed else k.shape[2]


def _sizes(cu_seqlens: Tensor | None, lengths: Sequence[int], q: Tensor, k: Tensor, *others: Tensor) -> _Sizes:
    group, packed = q.shape[1] // k.shape[1], cu_seqlens is not None
    batch = len(cu_seqlens) - 1 if cu_seqlens is not None else q.shape[0]
    strides = [q.shape[3], *(stride for tensor in (q, k, *others) for stride in tensor.stride()[:3])]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return _Sizes(batch, group, (lengths[4] if packed else q.shape[2]) * group, packed, unit)


def _example_arguments(
    prefix_lens: Tensor | None,
    kv_starts: Tensor | None,
    kv_lens: Tensor | None,
    q_starts: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Sequence[int],
) -> dict[str, Any]:
    given = (prefix_lens, kv_starts, kv_lens, q_starts, cu_seqlens)
    prefix_ptr, starts_ptr, ends_ptr, q_starts_ptr, offsets_ptr = (t if t is None else t.contiguous() for t in given)
    return {
        "prefix_ptr": prefix_ptr,
        "starts_ptr": starts_ptr,
        "ends_ptr": ends_ptr,
        "q_starts_ptr": q_starts_ptr,
        "offsets_ptr": offsets_ptr,
        "lengths": tuple(lengths[:4]),
    }


def _constants(q: Tensor, sizes: _Sizes, chosen: tiles.Tiles) -> dict[str, Any]:
    low, high = tiles.blocks(q.shape[3], q.element_size())
    return {
        "GROUP": sizes.group,
        "UNIT": sizes.unit,
        "DIM": q.shape[3],
        "LOW": low,
        "HIGH": high,
        "ROWS": chosen.rows,
        "KEYS": chosen.keys,
        "WIDEN": devices.upcasts_dot_operands(q),
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
        "enable_fp_fusion": True,
    }


def _descriptors(k: Tensor, v: Tensor, chosen: tiles.Tiles) -> dict[str, Any]:
    """What the hardware needs for loading whole tiles by itself, or None for all where pointers must do."""
    names = ("k_low", "k_high", "v_low", "v_high")
    if not (chosen.descriptors and all(map(_is_describable, (k, v)))):
        return dict.fromkeys(names)
    from triton.tools.tensor_descriptor import TensorDescriptor

    widths = tiles.blocks(k.shape[3], k.element_size())
    given = [
        TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, chosen.keys, width]) if width else None
        for t in (k, v)
        for width in widths
    ]
    return dict(zip(names, given, strict=True))


def _is_describable(tensor: Tensor) -> bool:
    """Floating-point, and every row begins at a multiple of 16 bytes and is there once."""
    strides = [stride * tensor.element_size() for stride in tensor.stride()[:3]]
    aligned = tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 and stride > 0 for stride in strides)
    return aligned and tensor.is_floating_point()


def _adjacent(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _fake_forward(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, dim = q.shape
    out = q.new_empty(batch, q_len, heads, dim).transpose(1, 2)
    return out, q.new_empty(batch, k.shape[1], q_len * (heads // k.shape[1]), dtype=torch.float32)


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v))
    return (grad_q, grad_k, grad_v) if rest[-1] else (grad_q, q.new_empty(0), q.new_empty(0))


class _PrefixLMAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.pg_kernels.prefix_lm_attention_triton(q, k, v, *options)
        _, _, *lengths, cu_seqlens, sizes, causal, scale, softcap, window = options
        ctx.save_for_backward(q, k, v, out, lse, *lengths, cu_seqlens)
        ctx.options = (sizes, causal, scale, softcap, window)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("prefix_lm_attention")
        needs = ctx.needs_input_grad[:3]
        grads = torch.ops.pg_kernels.prefix_lm_attention_triton_backward(
            grad, *ctx.saved_tensors, *ctx.options, needs[1] or needs[2]
        )
        return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *[None] * 12


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
    _forward,
    _fake_forward,
    _PrefixLMAttention.apply,
)
define_opaque(
    f"prefix_lm_attention_triton_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_LENGTHS}, "
    f"{_SCORES}, bool needs_kv) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
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
    """Attention that is bidirectional over each example's prefix and causal after it, with grouped key-value heads.

    Query i of example b stands at position p = q_starts[b] + i. It sees key j when kv_starts[b] <= j < kv_lens[b] and either
    j - kv_starts[b] < prefix_lens[b], or (not causal or j <= p) and (window is None or p - j < window). A query that sees
    nothing gives 0. Lengths are one int for all, or int32 [B]. Infinity and NaN in keys and values that a query does not see
    leave its output as it is; the Triton kernels promise that of keys only, and of values outside [kv_starts, kv_lens).

    Args:
        q: [B, H, Sq, D], fp32, fp16 or bf16, any strides. Under autocast q, k and v are cast.
        k, v: [B, Hkv, Skv, D] in q's dtype, H a multiple of Hkv; or int8 with scales, which have no gradient.
        prefix_lens: how many keys from kv_starts on everybody sees; default 0.
        kv_starts: the first valid key, for left padding; default 0.
        kv_lens: the end of the valid keys, for right padding and static caches; default Skv.
        q_starts: position of the first query among the keys; default Skv − Sq. With a static cache: kv_lens − Sq.
        causal: false lets every query see every valid key inside its window.
        scale: of the scores; default D^−½.
        softcap: scores become softcap · tanh(scores / softcap).
        window: a key outside the prefix is seen from fewer than this many positions later.
        k_scale, v_scale: [B, Hkv, Skv] fp32, what int8 keys and values are multiplied by.

    Returns:
        [B, H, Sq, D] in q's dtype.

    Raises:
        TypeError: q, k, v not floating-point or of several dtypes, int8 without scales or scales without int8, lengths not
            integers.
        ValueError: shapes or devices that do not fit; scale, softcap or window not positive; kv_starts or kv_lens outside
            [0, Skv] or prefix_lens below 0. Tensors are looked at on the CPU only; in a compiled graph and on a GPU an
            example with such lengths gives NaN.

    Source: Raffel et al., https://arxiv.org/abs/1910.10683 (prefix LM); Gemma 2, https://arxiv.org/abs/2408.00118 (softcap).
    """
    quantised = _check_tensors(q, k, v, "Sq", "Skv", k_scale, v_scale)
    if not quantised:
        q, k, v = checks.autocast(q, k, v)
        checks.check_same(q=q, k=k, v=v)
    scores = _checked_scores(q, causal, scale, softcap, window)
    batch, _, q_len, _ = q.shape
    kv_len = k.shape[2]
    lengths = [
        _per_example("prefix_lens", prefix_lens, 0, q, lower=0, upper=None),
        _per_example("kv_starts", kv_starts, 0, q, lower=0, upper=kv_len),
        _per_example("kv_lens", kv_lens, kv_len, q, lower=0, upper=kv_len),
        _per_example("q_starts", q_starts, kv_len - q_len, q, lower=None, upper=None),
    ]
    backend = _selected(q, k, lengths)
    if backend == "native":
        numbers = [t.tolist() if isinstance(t, Tensor) else [t] * batch for t in lengths]
        keys, values = sdpa.Rows(k, k_scale), sdpa.Rows(v, v_scale)
        valid = slice(min(numbers[1], default=0), max(numbers[2], default=0))
        if sdpa.handles(q, keys, values, valid, sdpa.Scores(*scores)):
            return sdpa.prefix_lm_attention(q, keys, values, list(zip(*numbers, strict=True)), sdpa.Scores(*scores))
    if backend == "triton":
        tensors = [length if isinstance(length, Tensor) else None for length in lengths]
        ints = [0 if isinstance(length, Tensor) else length for length in lengths]
        return torch.ops.pg_kernels.prefix_lm_attention_triton(
            q, k, v, k_scale, v_scale, *tensors, None, [*ints, 0], *scores
        )[0]
    if k_scale is not None and v_scale is not None:
        k, v = k * k_scale[..., None], v * v_scale[..., None]
    full = [
        t if isinstance(t, Tensor) else torch.full((batch,), t, dtype=torch.int32, device=q.device) for t in lengths
    ]
    return torch.ops.pg_kernels.prefix_lm_attention(q, k, v, *full, *scores)


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
    """`prefix_lm_attention` of sequences of different lengths laid end to end, each on its own: fine-tuning without padding.

    Args:
        q: [T, H, D], fp32, fp16 or bf16: the tokens of all sequences. Under autocast q, k and v are cast.
        k, v: [T, Hkv, D] in q's dtype.
        cu_seqlens: int32 or int64 [B + 1]: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1], from 0 to T.
        max_seqlen: length of the longest sequence, or more.
        prefix_lens: one int, or int32 [B]: how many tokens from each sequence's first on all its tokens see; default 0.
        causal, scale, softcap, window: as there.

    Returns:
        [T, H, D] in q's dtype.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes or devices that do not fit; offsets that do not rise from 0 to T in steps of at most max_seqlen, which
            are looked at on the CPU only: on a GPU tokens that no sequence holds give NaN.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_shape(name, tensor, ["T", "heads", "D"])
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    _check_tensors(q, k, v, "T", q.shape[2])
    q, k, v = checks.autocast(q, k, v)
    checks.check_same(q=q, k=k, v=v)
    scores = _checked_scores(q, causal, scale, softcap, window)
    checks.check_integer(cu_seqlens=cu_seqlens)
    checks.check_shape("cu_seqlens", cu_seqlens, ["B + 1"])
    checks.check_device(q=q, cu_seqlens=cu_seqlens)
    max_seqlen = _checked_longest(cu_seqlens, max_seqlen, q.shape[2])
    prefix = _per_example("prefix_lens", prefix_lens, 0, cu_seqlens[1:], lower=0, upper=None)
    backend = _selected(q, k, [cu_seqlens, prefix])
    every = sdpa.Rows(k, None), sdpa.Rows(v, None), slice(None)
    if backend == "native" and sdpa.handles(q, *every, sdpa.Scores(*scores)):
        prefixes = prefix.tolist() if isinstance(prefix, Tensor) else [prefix] * (len(cu_seqlens) - 1)
        out = sdpa.prefix_lm_attention_varlen(q, k, v, cu_seqlens.tolist(), prefixes, sdpa.Scores(*scores))
    elif backend == "triton":
        given = prefix if isinstance(prefix, Tensor) else None
        lengths = [0 if isinstance(prefix, Tensor) else prefix, 0, 0, 0, max_seqlen]
        out, _ = torch.ops.pg_kernels.prefix_lm_attention_triton(
            q, k, v, None, None, given, None, None, None, cu_seqlens.int(), lengths, *scores
        )
    else:
        out = reference.prefix_lm_attention_varlen(q, k, v, cu_seqlens, max_seqlen, prefix, scores)
    return out[0].transpose(0, 1)


def _check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_len: str,
    kv_len: int | str,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> bool:
    """Check q [B, H, Sq, D] against k and v [B, Hkv, Skv, D] and their scales; tell whether they are int8."""
    checks.check_float(q=q)
    checks.check_tensor(k=k, v=v)
    quantised = k.dtype == torch.int8 and v.dtype == torch.int8
    if not quantised:
        checks.check_float(k=k, v=v)
    checks.check_shape("q", q, ["B", "H", q_len, "D"])
    batch, heads, _, dim = q.shape
    checks.check_shape("k", k, [batch, "Hkv", kv_len, dim], " (B and D as in q)")
    checks.check_shape("v", v, list(k.shape), " (k's)")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"k: q's {heads} heads are not a multiple of {k.shape[1]} key-value heads")
    if dim == 0:
        raise ValueError("q: the head dimension is 0")
    checks.check_device(q=q, k=k, v=v)
    for name, given in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (given is not None) != quantised:
            raise TypeError(f"{name}: int8 keys and values come with both their scales, others with none")
        if given is not None:
            checks.check_shape(name, given, list(k.shape[:3]), " (k's without D)")
            checks.check_device(q=q, **{name: given})
            if given.dtype != torch.float32:
                raise TypeError(f"{name}: expected float32, got {given.dtype}")
    if quantised and torch.is_grad_enabled() and q.requires_grad:
        raise RuntimeError("prefix_lm_attention: there are no gradients with int8 keys and values; use torch.no_grad()")
    return quantised


def _selected(q: Tensor, k: Tensor, lengths: Sequence[Tensor | int]) -> str:
    triton, native = devices.unsupported_reason(q, k), None
    if not tiles.MIN_DIM <= q.shape[3] <= tiles.MAX_DIM:
        triton = f"a head dimension of {q.shape[3]} is not between {tiles.MIN_DIM} and {tiles.MAX_DIM}"
    if torch.compiler.is_compiling() or not all(checks.values_are_free(t) for t in lengths if isinstance(t, Tensor)):
        native = "lengths must be known, which they are not in a compiled graph"
    return select("prefix_lm_attention", q.device.type, {"triton": triton, "native": native})


def _checked_scores(
    q: Tensor, causal: bool, scale: float | None, softcap: float | None, window: int | None
) -> tuple[bool, float, float | None, int | None]:
    checks.check_bool(causal=causal)
    checks.check_positive(scale=scale, softcap=softcap, window=window)
    checks.check_int(window=window)
    # A longer window hides nothing: positions are below _FAR.
    return causal, q.shape[3] ** -0.5 if scale is None else scale, softcap, window and min(window, 2 * _FAR - 1)


def _checked_longest(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> int:
    """Check the offsets, and give max_seqlen, but not more than there are tokens."""
    checks.check_int(max_seqlen=max_seqlen)
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen: expected 0 or more, got {max_seqlen}")
    if len(cu_seqlens) == 0:
        raise ValueError("cu_seqlens: expected at least one number, got none")
    if checks.values_are_free(cu_seqlens):
        steps = cu_seqlens.diff()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens or bool((steps < 0).any()):
            raise ValueError(
                f"cu_seqlens: expected numbers that rise from 0 to T = {tokens}, got {cu_seqlens.tolist()}"
            )
        if len(steps) and int(steps.max()) > max_seqlen:
            raise ValueError(f"max_seqlen: got {max_seqlen}, but a sequence has {int(steps.max())} tokens")
    return min(max_seqlen, tokens)


_FAR = 2**30
"""Beyond every key, and sums of it with a key's index still fit into int32."""


def _per_example(
    name: str, value: Tensor | int | None, default: int, q: Tensor, *, lower: int | None, upper: int | None
) -> Tensor | int:
    """Check a length: int32 [B], or one for all examples."""
    if not isinstance(value, Tensor):
        number = default if value is None else value
        if not isinstance(number, int | torch.SymInt) or isinstance(number, bool):
            raise TypeError(f"{name}: expected an int or an int32 tensor, got {type(number).__name__}")
        _check_range(name, number, number, lower, upper)
        return min(max(number, -_FAR), _FAR)
    checks.check_integer(**{name: value})
    checks.check_shape(name, value, [q.shape[0]], " (B)")
    checks.check_device(q=q, **{name: value})
    if checks.values_are_free(value) and value.numel():
        numbers = value.tolist()  # a fraction of what two reductions take
        _check_range(name, min(numbers), max(numbers), lower, upper)
    return value if value.dtype == torch.int32 else value.clamp(-_FAR, _FAR).to(torch.int32)


def _check_range(name: str, smallest: int, largest: int, lower: int | None, upper: int | None) -> None:
    if (lower is not None and smallest < lower) or (upper is not None and largest > upper):
        allowed = f"at least {lower}" if upper is None else f"between {lower} and Skv = {upper}"
        given = str(smallest) if smallest == largest else f"values from {smallest} to {largest}"
        raise ValueError(f"{name}: got {given}, expected {allowed}")
