"""Random calls of every public op, and of registered ops that take addresses, each with a definition in plain PyTorch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pg_kernels as pg

OPS = torch.ops.pg_kernels
FLOATS = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
EXTENSION_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65)
WIDTHS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256, 513)
IGNORED = -100


@dataclass
class Call:
    """An op, its arguments by name, and its definition."""

    op: Callable[..., Any]
    arguments: dict[str, Any]
    definition: Callable[..., Any]
    """The definition. It takes the same arguments, also in float64."""
    differentiable: tuple[str, ...] = ()
    slack: float = 0.0
    """Allowed error of results beyond the usual bound."""
    gradient_slack: float = 0.0
    """Allowed error of gradients beyond the usual bound: they are sums over many rows."""
    names: tuple[str, ...] = field(default=("weight", "data", "scale", "bias"))
    """Names that errors may mention besides the arguments: parts of them."""


class Draw:
    """Draw random choices, and tensors of random layout."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.random.randrange(len(options))]

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def rows(self, columns: int) -> list[int]:
        """Draw a shape [..., columns] of up to a few thousand elements."""
        shape = [self.choice(SIZES) for _ in range(self.integer(0, 3))]
        while torch.Size(shape).numel() * columns > 20_000:
            shape[shape.index(max(shape))] //= 4
        return [*shape, columns]

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, factor: float = 1.0) -> Tensor:
        """Draw normal numbers in a tensor of random memory layout."""
        dense = (torch.randn(tuple(shape), generator=self.generator) * factor).to(dtype)
        return self.laid_out(dense)

    def integers(self, shape: Sequence[int], low: int, high: int, dtype: torch.dtype) -> Tensor:
        """Draw numbers in [low, high)."""
        return self.laid_out(torch.randint(low, high, tuple(shape), generator=self.generator).to(dtype))

    def laid_out(self, dense: Tensor) -> Tensor:
        kind = self.choice(("dense", "dense", "every other", "transposed", "shifted", "expanded"))
        if kind == "dense" or dense.dim() == 0:
            return dense
        if kind == "every other":
            return torch.stack((dense, dense), dim=-1)[..., 0]
        if kind == "transposed":
            return dense.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == "shifted":
            return F.pad(dense, (1, 2))[..., 1:-2]
        return dense[:1].expand(dense.shape) if dense.shape[0] else dense


# Norms


def _norm_arguments(draw: Draw) -> dict[str, Any]:
    columns, dtype = draw.choice(WIDTHS), draw.choice(FLOATS)
    shape = draw.rows(columns)
    arguments = {
        "x": draw.tensor(shape, dtype),
        "weight": draw.tensor([columns], draw.choice((dtype, draw.choice(EXTENSION_FLOATS)))),
        "eps": draw.choice((1e-6, 1e-5, 0.5)),
    }
    if draw.chance(0.5):
        arguments["residual"] = draw.tensor(shape, draw.choice((dtype, draw.choice(FLOATS))))
    return arguments


def rms_norm(draw: Draw) -> Call:
    arguments = _norm_arguments(draw) | {"weight_offset": draw.choice((0.0, 1.0, -0.5))}
    return Call(pg.rms_norm, arguments, _rms_norm, ("x", "weight", "residual"), gradient_slack=_of_rows(arguments["x"]))


def _of_rows(x: Tensor) -> float:
    """Return the allowed error of a sum over the rows of x in fp32."""
    return x.shape[:-1].numel() * torch.finfo(torch.float32).eps


def _rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float, residual: Tensor | None = None) -> Any:
    total = x if residual is None else x + residual
    y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * (weight_offset + weight)
    _require(weight.shape == x.shape[-1:] and (residual is None or residual.shape == x.shape))
    y = y.to(total.dtype)
    return y if residual is None else (y, total)


def layer_norm(draw: Draw) -> Call:
    arguments = _norm_arguments(draw)
    arguments["bias"] = draw.tensor(arguments["weight"].shape, draw.choice((arguments["x"].dtype, torch.float32)))
    slack = _of_rows(arguments["x"])
    if len(arguments["weight"]) == 1:  # no variance: the error of the mean is divided by sqrt(eps)
        slack *= arguments["eps"] ** -0.5
    return Call(pg.layer_norm, arguments, _layer_norm, ("x", "weight", "bias", "residual"), gradient_slack=slack)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    _require(weight.shape == bias.shape == x.shape[-1:] and (residual is None or residual.shape == x.shape))
    total = x if residual is None else x + residual
    if total.dtype == weight.dtype == bias.dtype:  # PyTorch's own
        y = F.layer_norm(total, weight.shape, weight, bias, eps)
        return y if residual is None else (y, total)
    centred = total - total.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias
    y = y.to(total.dtype)
    return y if residual is None else (y, total)


def rms_norm_native(draw: Draw) -> Call:
    columns, dtype = draw.choice(WIDTHS), draw.choice(EXTENSION_FLOATS)
    shape = draw.rows(columns)
    arguments = {
        "x": draw.tensor(shape, dtype),
        "residual": draw.choice((None, draw.tensor(shape, dtype))),
        "weight": draw.tensor([columns], draw.choice(EXTENSION_FLOATS)),
        "eps": 1e-6,
        "weight_offset": 1.0,
    }

    def definition(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float) -> Any:
        y = _rms_norm(x, weight, eps, weight_offset, residual)
        _require(residual is None or x.dtype == residual.dtype)
        return (y, x.new_empty(0)) if residual is None else y

    return Call(lambda **given: OPS.rms_norm_native(**given)[:2], arguments, definition)


# GeGLU


def geglu(draw: Draw) -> Call:
    shape, dtype = draw.rows(draw.choice(WIDTHS)), draw.choice(FLOATS)
    arguments = {"gate": draw.tensor(shape, dtype, 2.0), "up": draw.tensor(shape, dtype)}
    return Call(pg.geglu, arguments, _geglu, ("gate", "up"))


def _geglu(gate: Tensor, up: Tensor) -> Tensor:
    _require(gate.shape == up.shape and gate.dtype == up.dtype)
    return F.gelu(gate, approximate="tanh") * up


def geglu_native(draw: Draw) -> Call:
    shape, dtype = draw.rows(draw.choice(WIDTHS)), draw.choice(EXTENSION_FLOATS)
    arguments = {"gate": draw.tensor(shape, dtype, 2.0), "up": draw.tensor(shape, dtype)}
    return Call(OPS.geglu_native, arguments, _geglu)


def geglu_native_backward(draw: Draw) -> Call:
    arguments = geglu_native(draw).arguments
    arguments = {"grad": draw.tensor(arguments["gate"].shape, arguments["gate"].dtype), **arguments}

    def definition(grad: Tensor, gate: Tensor, up: Tensor, with_product: bool) -> Any:
        with torch.enable_grad():
            leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
            y = _geglu(*leaves)
            grads = torch.autograd.grad(y, leaves, grad)
        return *grads, y.detach() if with_product else y.new_empty(0)

    return Call(OPS.geglu_native_backward, arguments | {"with_product": draw.chance(0.5)}, definition)


def geglu_mlp(draw: Draw) -> Call:
    inner, features, outputs = draw.choice(WIDTHS[:-2]), draw.choice(SIZES), draw.choice(SIZES)
    dtype = draw.choice(FLOATS)
    shape = draw.rows(inner)
    arguments = {
        "x": draw.tensor(shape, dtype),
        "gate_weight": draw.tensor([features, inner], dtype, inner**-0.5),
        "up_weight": draw.tensor([features, inner], dtype, inner**-0.5),
        "down_weight": draw.tensor([outputs, features], dtype, max(features, 1) ** -0.5),
    }
    return Call(pg.geglu_mlp, arguments, _geglu_mlp, tuple(arguments))


def _geglu_mlp(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    return F.linear(_geglu(F.linear(x, gate_weight), F.linear(x, up_weight)), down_weight)


# Rotary


def _rotary_arguments(draw: Draw, dtypes: Sequence[torch.dtype]) -> tuple[dict[str, Any], float]:
    batch, length, dim = draw.choice((0, 1, 2, 3)), draw.choice((0, 1, 1, 2, 3, 17, 33)), draw.choice((2, 4, 6, 16, 64))
    heads, kv_heads, dtype = draw.choice((1, 2, 4)), draw.choice((1, 2)), draw.choice(dtypes)
    most = draw.choice((10, 4096))
    positions = draw.integers(
        draw.choice(([length], [batch, length])), 0, most, draw.choice((torch.int32, torch.int64))
    )
    arguments = {
        "q": draw.tensor([batch, heads, length, dim], dtype),
        "k": draw.tensor([batch, kv_heads, length, dim], dtype),
        "positions": positions,
        "theta": draw.choice((10_000.0, 10_000, 100.0, 1e6)),
    }
    # An angle is exact to a few roundings of itself.
    return arguments, 8 * most * torch.finfo(torch.float32).eps


def apply_rotary(draw: Draw) -> Call:
    arguments, slack = _rotary_arguments(draw, FLOATS)
    return Call(pg.apply_rotary, arguments, _apply_rotary, ("q", "k"), slack)


def _apply_rotary(q: Tensor, k: Tensor, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    _require(q.dtype == k.dtype and q.shape[3] == k.shape[3])
    return _rotated(q, positions, theta), _rotated(k, positions, theta)


def _rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    frequencies = float(theta) ** (-torch.arange(half, dtype=wide) / half)
    angles = positions.expand(x.shape[0], x.shape[2])[:, None, :, None].to(wide) * frequencies
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _cache_arguments(draw: Draw, dtypes: Sequence[torch.dtype]) -> tuple[dict[str, Any], float]:
    arguments, slack = _rotary_arguments(draw, dtypes)
    batch, kv_heads, length, dim = arguments["k"].shape
    capacity = length + draw.integer(0, 3)
    dtype, int_type = draw.choice(dtypes), draw.choice((torch.int32, torch.int64))
    caches = [torch.zeros(batch, capacity, kv_heads, dim, dtype=dtype) for _ in range(2)]
    if draw.chance(0.5):
        caches = [cache.transpose(1, 2) for cache in caches]
    else:
        caches = [cache.reshape(batch, kv_heads, capacity, dim) for cache in caches]
    cache_positions = torch.randperm(capacity, generator=draw.generator)[:length].to(int_type)
    arguments |= {
        "v": draw.tensor(arguments["k"].shape, arguments["k"].dtype),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "cache_positions": cache_positions.expand(batch, -1) if draw.chance(0.5) else cache_positions,
    }
    return arguments, slack


def apply_rotary_to_cache(draw: Draw) -> Call:
    arguments, slack = _cache_arguments(draw, FLOATS)
    return Call(_with_caches(pg.apply_rotary_to_cache), arguments, _apply_rotary_to_cache, slack=slack)


def apply_rotary_to_cache_native(draw: Draw) -> Call:
    arguments, slack = _cache_arguments(draw, EXTENSION_FLOATS)
    for name in ("positions", "cache_positions"):
        if arguments[name].dim() == 1:
            arguments[name] = arguments[name][None]
    op = _with_caches(OPS.apply_rotary_to_cache_native)
    return Call(op, arguments, _apply_rotary_to_cache, slack=slack)


def _with_caches(op: Callable[..., Tensor]) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        return op(**arguments), arguments["k_cache"], arguments["v_cache"]

    return call


def _apply_rotary_to_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    theta: float,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_positions: Tensor,
) -> Any:
    q, k = _apply_rotary(q, k, positions, theta)
    _require(
        v.dtype == k.dtype and v.shape == k.shape and k_cache.dtype == v_cache.dtype and k_cache.shape == v_cache.shape
    )
    _require(k_cache.shape[0] == k.shape[0] and k_cache.shape[1] == k.shape[1])
    caches = []
    for cache, new in ((k_cache, k), (v_cache, v)):
        index = cache_positions.long().expand(new.shape[0], new.shape[2])[:, None, :, None].expand(new.shape)
        caches.append(cache.scatter(2, index, new.to(cache.dtype)))
    return q, *caches


# Attention


def _length(draw: Draw, batch: int, low: int, high: int) -> Any:
    return draw.choice(
        (draw.integer(low, high), draw.integers([batch], low, high + 1, draw.choice((torch.int32, torch.int64))))
    )


def _attention_options(draw: Draw) -> dict[str, Any]:
    return {
        "causal": draw.chance(0.7),
        "scale": draw.choice((None, 0.1, 1.0)),
        "softcap": draw.choice((None, None, 5.0)),
        "window": draw.choice((None, None, 1, 5)),
    }


def prefix_lm_attention(draw: Draw) -> Call:
    batch, q_len, kv_len = (
        draw.choice((0, 1, 2, 3)),
        draw.choice((0, 1, 1, 2, 16, 17, 33)),
        draw.choice((0, 1, 5, 33, 65)),
    )
    kv_heads, group, dim = draw.choice((1, 1, 2)), draw.choice((1, 2, 3)), draw.choice((1, 2, 16, 24, 64))
    dtype = draw.choice(FLOATS)
    arguments = {
        "q": draw.tensor([batch, kv_heads * group, q_len, dim], dtype),
        "k": draw.tensor([batch, kv_heads, kv_len, dim], dtype),
        "v": draw.tensor([batch, kv_heads, kv_len, dim], dtype),
        "prefix_lens": draw.choice((None, _length(draw, batch, 0, kv_len + 1))),
        "kv_starts": draw.choice((None, _length(draw, batch, 0, kv_len))),
        "kv_lens": draw.choice((None, _length(draw, batch, 0, kv_len))),
        "q_starts": draw.choice((None, _length(draw, batch, -2, kv_len + 2))),
        **_attention_options(draw),
    }
    if draw.chance(0.15):
        for name in ("k", "v"):
            arguments[name] = draw.integers(arguments[name].shape, -128, 128, torch.int8)
            scale = draw.laid_out(torch.rand(batch, kv_heads, kv_len, generator=draw.generator) / 100)
            arguments[f"{name}_scale"] = scale
        return Call(pg.prefix_lm_attention, arguments, _attention)
    return Call(pg.prefix_lm_attention, arguments, _attention, ("q", "k", "v"))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_lens: Any = None,
    kv_starts: Any = None,
    kv_lens: Any = None,
    q_starts: Any = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    if k_scale is not None and v_scale is not None:
        k, v = (k * k_scale[..., None]).to(q.dtype), (v * v_scale[..., None]).to(q.dtype)
    batch, heads, q_len, dim = q.shape
    kv_len = k.shape[2]

    def length(value: Any, default: int) -> Tensor:
        value = default if value is None else value
        value = value if isinstance(value, Tensor) else torch.tensor(min(max(value, -(2**40)), 2**40))
        return value.expand(batch)[:, None, None]

    prefix, start, end = length(prefix_lens, 0), length(kv_starts, 0), length(kv_lens, kv_len)
    position = length(q_starts, kv_len - q_len) + torch.arange(q_len)[:, None]
    key = torch.arange(kv_len)
    seen = (key <= position) if causal else torch.ones(1, q_len, kv_len, dtype=torch.bool)
    if window is not None:
        seen = seen & (position - key < window)
    seen = ((seen | (key - start < prefix)) & (key >= start) & (key < end))[:, None]
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1).masked_fill(~seen, 0.0)
    return weights @ v


def prefix_lm_attention_varlen(draw: Draw) -> Call:
    lengths = [draw.choice((0, 1, 2, 5, 17)) for _ in range(draw.choice((0, 1, 2, 3)))]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    kv_heads, group, dim = draw.choice((1, 2)), draw.choice((1, 2)), draw.choice((2, 16, 24))
    dtype = draw.choice(FLOATS)
    arguments = {
        "q": draw.tensor([offsets[-1], kv_heads * group, dim], dtype),
        "k": draw.tensor([offsets[-1], kv_heads, dim], dtype),
        "v": draw.tensor([offsets[-1], kv_heads, dim], dtype),
        "cu_seqlens": torch.tensor(offsets, dtype=draw.choice((torch.int32, torch.int64))),
        "max_seqlen": max(lengths, default=0) + draw.integer(0, 2),
        "prefix_lens": draw.choice((None, _length(draw, len(lengths), 0, 5))),
        **_attention_options(draw),
    }
    return Call(pg.prefix_lm_attention_varlen, arguments, _varlen, ("q", "k", "v"))


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, prefix_lens: Any, **options: Any
) -> Tensor:
    outs = [q[:0] * (k.sum() + v.sum())]
    for index, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        prefix = prefix_lens[index : index + 1] if isinstance(prefix_lens, Tensor) else prefix_lens
        one_q, one_k, one_v = (tensor[start:end].transpose(0, 1)[None] for tensor in (q, k, v))
        outs.append(_attention(one_q, one_k, one_v, prefix, **options)[0].transpose(0, 1))
    return torch.cat(outs)


# Loss


def linear_cross_entropy(draw: Draw) -> Call:
    inner, vocabulary, dtype = draw.choice(WIDTHS[:-2]), draw.choice((1, 2, 17, 64, 129)), draw.choice(FLOATS)
    shape = draw.rows(inner)
    labels = draw.integers(shape[:-1], 0, vocabulary, torch.int64)
    arguments = {
        "hidden": draw.tensor(shape, dtype),
        "weight": draw.tensor([vocabulary, inner], dtype, inner**-0.5),
        "labels": labels.where(torch.rand(labels.shape, generator=draw.generator) < 0.7, IGNORED),
        "ignore_index": IGNORED,
        "softcap": draw.choice((None, 5.0)),
        "label_smoothing": draw.choice((0.0, 0.1)),
        "reduction": draw.choice(("mean", "sum", "none")),
    }
    slack = _of_rows(arguments["hidden"])
    return Call(pg.linear_cross_entropy, arguments, _linear_cross_entropy, ("hidden", "weight"), slack)


def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden @ weight.T).to(wide).reshape(-1, len(weight))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "none"}
    losses = F.cross_entropy(logits, labels.flatten(), **options).view(labels.shape)
    if reduction == "none":
        return losses
    return losses.sum() / (1 if reduction == "sum" else (labels != ignore_index).sum().clamp(min=1))


# int8


def _quantised(draw: Draw, n: int, k: int) -> tuple[Tensor, Tensor]:
    group_size = draw.choice((None, None, 1, 4, 32))
    qweight = draw.integers([n, k], -127, 128, torch.int8)
    groups = 1 if group_size is None else -(-k // group_size)
    scale = torch.rand(n, groups, generator=draw.generator) / 100
    return qweight, draw.laid_out(
        scale
        if group_size is not None and draw.chance(0.7) and groups > 1
        else scale[:, :1].flatten()
        if groups == 1
        else scale
    )


def _dequantised(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a [N, K] weight rounded to `dtype`."""
    columns = qweight.shape[1]
    scale = scale[:, None] if scale.dim() == 1 else scale
    size = 1
    while size * scale.shape[1] < columns:
        size *= 2
    wide = torch.promote_types(dtype, torch.float32)
    return (qweight.to(wide) * scale.to(wide).repeat_interleave(size, 1)[:, :columns]).to(dtype)


def _packed(draw: Draw, n: int, k: int) -> pg.PackedInt8Weight:
    return pg.pack_int8(*_quantised(draw, n, k))


def _floats(weight: Any, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    if isinstance(weight, pg.PackedInt8Weight):
        _require(scale is None)
        return _dequantised(*weight.unpack(), dtype)
    return _dequantised(weight, scale, dtype)


def _int8_slack(x: Tensor, *weights: pg.PackedInt8Weight, activations: str) -> float:
    """The kernels round x to 16 bits of its largest value. With int8 activations, some values may be one level off."""
    weights = tuple(weight for weight in weights if weight.shape[0])
    if not x.numel() or not weights:
        return 0.0
    floats = [_dequantised(*weight.unpack(), torch.float64).abs() for weight in weights]
    largest = x.double().abs().max().item()
    if activations == "int8":
        return 4 * largest / 127 * max(weight.max().item() for weight in floats)
    return largest * 2.0**-15 * max(weight.sum(1).max().item() for weight in floats)


def _rounded(x: Tensor, activations: str) -> Tensor:
    if activations == "keep":
        return x
    _require(activations == "int8")
    wide = x.float()
    step = wide.abs().amax(-1, keepdim=True) / 127
    return ((wide / step.where(step > 0, 1.0)).round() * step).to(
        x.dtype if x.dtype == torch.float64 else torch.float32
    )


def quantize_int8(draw: Draw) -> Call:
    n, k, dtype = draw.choice(SIZES), draw.choice(WIDTHS), draw.choice(FLOATS)
    weight = draw.tensor([n, k], dtype)
    arguments = {"weight": weight, "group_size": draw.choice((None, 1, 2, 32, 1024))}
    return _quantising(pg.quantize_int8, arguments)


def quantize_int8_native(draw: Draw) -> Call:
    n, k, dtype = draw.choice(SIZES), draw.choice(WIDTHS), draw.choice(EXTENSION_FLOATS)
    return _quantising(
        OPS.quantize_int8_native,
        {"weight": draw.tensor([n, k], dtype), "group_size": min(k, draw.choice((1, 2, 32, 1024)))},
    )


def _quantising(op: Callable[..., Any], arguments: dict[str, Any]) -> Call:
    def call(weight: Tensor, group_size: int | None) -> Any:
        qweight, scale = op(weight, group_size=group_size)
        size = int(min(group_size or weight.shape[1], weight.shape[1]))
        spread = scale.reshape(len(scale), -(-weight.shape[1] // size)).repeat_interleave(size, 1)[:, : weight.shape[1]]
        return scale.double(), qweight.double() * spread.double()

    def definition(weight: Tensor, group_size: int | None) -> Any:
        columns = weight.shape[1]
        size = int(min(group_size or columns, columns))
        padded = F.pad(weight.double(), (0, -columns % size)).unflatten(1, (-(-columns // size), size))
        scale = padded.abs().amax(-1) / 127
        levels = (padded / scale.where(scale > 0, 1.0)[..., None]).round() * scale[..., None]
        return scale if group_size is not None or op is not pg.quantize_int8 else scale[:, 0], levels.flatten(1)[
            :, :columns
        ]

    weight = arguments["weight"]
    slack = weight.double().abs().max().item() / 127 if weight.numel() else 0.0
    return Call(call, arguments, definition, slack=slack * 1.01)


def pack_int8(draw: Draw) -> Call:
    qweight, scale = _quantised(draw, draw.choice(SIZES), draw.choice(WIDTHS))

    def call(qweight: Tensor, scale: Tensor) -> Any:
        return pg.pack_int8(qweight, scale).unpack()

    def definition(qweight: Tensor, scale: Tensor) -> Any:
        return qweight, scale.float()

    return Call(call, {"qweight": qweight, "scale": scale}, definition)


def packed_rows(draw: Draw) -> Call:
    n = draw.choice(SIZES[1:])
    indices = draw.integers(draw.rows(1)[:-1], 0, n, draw.choice((torch.int32, torch.int64)))
    arguments, weight = {"indices": indices, "dtype": draw.choice(FLOATS)}, _packed(draw, n, draw.choice(WIDTHS))

    def definition(indices: Tensor, dtype: torch.dtype) -> Tensor:
        _require(not indices.numel() or int(indices.min()) >= 0)
        return _floats(weight, dtype)[indices.long()]

    return Call(weight.rows, arguments, definition)


def _activations(draw: Draw) -> str:
    return draw.choice(("keep", "keep", "int8"))


def int8_linear(draw: Draw) -> Call:
    n, k, dtype = draw.choice(SIZES), draw.choice(WIDTHS), draw.choice(FLOATS)
    qweight, scale = _quantised(draw, n, k)
    packed = pg.pack_int8(qweight, scale)
    arguments: dict[str, Any] = {
        "x": draw.tensor(draw.rows(k), dtype),
        "weight": packed,
        "scale": None,
        "bias": draw.choice((None, draw.tensor([n], draw.choice(FLOATS)))),
        "activations": _activations(draw),
        "out_dtype": draw.choice((None, None, torch.float32)),
    }
    if draw.chance(0.5):
        arguments |= {"weight": qweight, "scale": scale}
    slack = _int8_slack(arguments["x"], packed, activations=arguments["activations"])
    return Call(
        pg.int8_linear, arguments, _int8_linear, () if arguments["activations"] == "int8" else ("x", "bias"), slack * 4
    )


def _int8_linear(
    x: Tensor, weight: Any, scale: Any = None, bias: Any = None, activations: str = "keep", out_dtype: Any = None
) -> Tensor:
    _require(x.is_floating_point())
    rows = _rounded(x, activations)
    y = rows @ _floats(weight, rows.dtype, scale).T
    if bias is not None:
        _require(bias.shape == y.shape[-1:])
        y = y + bias
    return y.to(out_dtype or x.dtype)


def int8_projections(draw: Draw) -> Call:
    k, dtype = draw.choice(WIDTHS), draw.choice(FLOATS)
    weights = [_packed(draw, draw.choice(SIZES), k) for _ in range(draw.choice((1, 2, 3)))]
    biases = [draw.choice((None, draw.tensor(weight.shape[:1], dtype))) for weight in weights]
    arguments = {
        "x": draw.tensor(draw.rows(k), dtype),
        "weights": weights,
        "biases": draw.choice((None, biases)),
        "activations": _activations(draw),
    }

    def definition(x: Tensor, weights: Any, biases: Any, activations: str) -> Any:
        biases = [None] * len(weights) if biases is None else biases
        return [_int8_linear(x, w, bias=b, activations=activations) for w, b in zip(weights, biases, strict=True)]

    slack = _int8_slack(arguments["x"], *weights, activations=arguments["activations"])
    return Call(pg.int8_projections, arguments, definition, slack=slack)


def int8_geglu(draw: Draw) -> Call:
    n, k, dtype = draw.choice(SIZES), draw.choice(WIDTHS), draw.choice(FLOATS)
    gate, up = _packed(draw, n, k), _packed(draw, n, k)
    arguments: dict[str, Any] = {
        "x": draw.tensor(draw.rows(k), dtype, 0.3),
        "gate": gate,
        "up": up,
        "activations": _activations(draw),
    }

    def definition(x: Tensor, gate: Any, up: Any, activations: str) -> Tensor:
        return _geglu(_int8_linear(x, gate, activations=activations), _int8_linear(x, up, activations=activations))

    slack = _int8_slack(arguments["x"], gate, up, activations=arguments["activations"])
    most = (
        max((_int8_linear(arguments["x"].double(), w).abs().max().item() for w in (gate, up)), default=0.0)
        if slack
        else 0.0
    )
    return Call(pg.int8_geglu, arguments, definition, slack=slack * (2 * most + 2))


def int8_topk(draw: Draw) -> Call:
    n, columns, dtype = draw.choice(SIZES[1:]), draw.choice(WIDTHS), draw.choice(FLOATS)
    arguments = {
        "x": draw.tensor(draw.rows(columns), dtype),
        "weight": _packed(draw, n, columns),
        "k": draw.integer(1, n),
        "softcap": draw.choice((None, 5.0)),
        "log_probs": draw.chance(0.5),
        "activations": _activations(draw),
    }

    def call(**given: Any) -> Any:
        values, indices = pg.int8_topk(**given)
        scores = _scores(**given)
        return values.to(scores.dtype), scores.gather(-1, indices)

    def definition(**given: Any) -> Any:
        values = _scores(**given).sort(-1, descending=True).values[..., : given["k"]]
        return values, values

    slack = _int8_slack(arguments["x"], arguments["weight"], activations=arguments["activations"])
    return Call(call, arguments, definition, slack=3 * slack)


def _scores(x: Tensor, weight: Any, k: int, softcap: float | None, log_probs: bool, activations: str) -> Tensor:
    y = _int8_linear(x, weight, activations=activations).to(torch.promote_types(x.dtype, torch.float32))
    y = y if softcap is None else softcap * torch.tanh(y / softcap)
    return y.log_softmax(-1) if log_probs else y


# The ops below, whose weights are in the extension's layout


def _layout_arguments(weight: pg.PackedInt8Weight) -> tuple[Tensor, Tensor]:
    return weight._operands("native")


def unpack_int8(draw: Draw) -> Call:
    weight = _packed(draw, draw.choice(SIZES), draw.choice(WIDTHS))
    data, scale = _layout_arguments(weight)
    n, k = weight.shape
    arguments = {"data": data, "scale": scale, "n": n, "k": k, "group_size": weight.group_size}
    return Call(OPS.unpack_int8, arguments, _as_packed(weight, lambda: weight._unpacked()))


def _as_packed(weight: pg.PackedInt8Weight, result: Callable[[], Any]) -> Callable[..., Any]:
    """Return a definition for an unchanged weight. An argument that contradicts the weight must be refused."""
    same = [*_layout_arguments(weight), *weight.shape, weight.group_size]

    def definition(data: Tensor, scale: Tensor, n: int, k: int, group_size: int) -> Any:
        _require_same((data, scale, n, k, group_size), same)
        return result()

    return definition


def _require_same(given: Sequence[Any], packed: Sequence[Any]) -> None:
    """Numbers and shapes must be the packed weight's own. Other bytes are another weight, and valid."""
    for a, b in zip(given, packed, strict=True):
        if not isinstance(b, Tensor):
            if a != b:
                raise NoDefinition
            continue
        _require(isinstance(a, Tensor) and a.numel() == b.numel() and a.is_floating_point() == b.is_floating_point())
        if not torch.equal(a.flatten().double(), b.flatten().double()):
            raise NoDefinition


def pack_int8_raw(draw: Draw) -> Call:
    weight = _packed(draw, draw.choice(SIZES), draw.choice(WIDTHS))
    qweight, scale = (draw.laid_out(tensor) for tensor in weight._unpacked())
    arguments = {"qweight": qweight, "scale": scale, "group_size": weight.group_size}

    def call(qweight: Tensor, scale: Tensor, group_size: int) -> Any:
        return OPS.unpack_int8(*OPS.pack_int8(qweight, scale, group_size), *qweight.shape, group_size)

    def definition(qweight: Tensor, scale: Tensor, group_size: int) -> Any:
        _require(qweight.dtype == torch.int8 and scale.shape == (len(qweight), -(-qweight.shape[1] // group_size)))
        return qweight, scale.float()

    return Call(call, arguments, definition)


def int8_rows(draw: Draw) -> Call:
    weight = _packed(draw, draw.choice(SIZES[1:]), draw.choice(WIDTHS))
    data, scale = _layout_arguments(weight)
    n, k = weight.shape
    arguments = {
        "data": data,
        "scale": scale,
        "indices": draw.integers([draw.choice(SIZES)], 0, n, torch.int64),
        "n": n,
        "k": k,
        "group_size": weight.group_size,
    }

    def definition(data: Tensor, scale: Tensor, indices: Tensor, n: int, k: int, group_size: int) -> Tensor:
        _require(not indices.numel() or int(indices.min()) >= 0)
        rows = _as_packed(weight, lambda: _floats(weight, torch.float32))(data, scale, n, k, group_size)
        return rows[indices.long()]

    return Call(OPS.int8_rows, arguments, definition)


def _raw(name: str, draw: Draw) -> Call:
    """Draw int8_linear, its gradient, int8_projections, int8_geglu or int8_topk on a weight in the extension's layout."""
    n, k, dtype = draw.choice(SIZES[1:]), draw.choice(WIDTHS), draw.choice(EXTENSION_FLOATS)
    weight = _packed(draw, n, k)
    data, scale = _layout_arguments(weight)
    x, keep = draw.tensor([draw.choice(SIZES), k], dtype, 0.3), draw.chance(0.7)
    bias = draw.choice((None, draw.tensor([n], draw.choice(FLOATS))))
    common = {"group_size": weight.group_size, "int8_activations": not keep}
    arguments: dict[str, Any] = {
        "int8_linear": {
            "x": x,
            "weight": data,
            "scale": scale,
            "bias": bias,
            "n": n,
            **common,
            "backend": "native",
            "out_dtype": dtype,
        },
        "int8_linear_backward": {
            **{"grad": draw.tensor([draw.choice(SIZES), n], dtype), "weight": data, "scale": scale},
            **{"columns": k, "group_size": weight.group_size, "backend": "native"},
        },
        "int8_projections": {"x": x, "weights": [data], "scales": [scale], "biases": [bias], "sizes": [n], **common},
        "int8_geglu": {
            **{"x": x, "gate": data, "gate_scale": scale, "up": data, "up_scale": scale, "n": n},
            **common,
            "backend": "native",
        },
        "int8_topk": {
            **{"x": x, "weight": data, "scale": scale, "n": n, **common},
            **{"k": draw.integer(1, n), "softcap": None, "log_probs": False, "backend": "native"},
        },
    }[name]
    about = {"weight", "scale", "gate", "gate_scale", "up", "up_scale", "n", "group_size", "columns", "backend"}
    same = {key: value for key, value in arguments.items() if key in about}

    def definition(**given: Any) -> Any:
        for key in ("weights", "scales", "sizes"):
            if key in given:
                _require_same(given[key], arguments_of[key])
        _require_same([given[key] for key in same], list(same.values()))
        if given.get("softcap") is not None and given["softcap"] < 1e-30:
            raise NoDefinition
        if name == "int8_linear_backward":
            if given["grad"].shape[-1] != n:
                raise NoDefinition
            return given["grad"] @ _floats(weight, given["grad"].dtype)
        x, activations = given["x"], "int8" if given["int8_activations"] else "keep"
        _require(x.is_floating_point())
        y = _int8_linear(x, weight, activations=activations)
        if name == "int8_linear":
            y = _int8_linear(x, weight, bias=given["bias"], activations=activations)
            return y if x.dtype == torch.float64 else y.to(given["out_dtype"])
        if name == "int8_projections":
            return [_int8_linear(x, weight, bias=bias, activations=activations) for bias in given["biases"]]
        if name == "int8_geglu":
            return _geglu(y, y)
        return (
            _scores(x, weight, given["k"], given["softcap"], bool(given["log_probs"]), activations)
            .sort(-1, descending=True)
            .values[:, : given["k"]]
        )

    arguments_of = dict(arguments)
    slack = 4 * max(_int8_slack(x, weight, activations=activations) for activations in ("keep", "int8"))
    op = getattr(OPS, name)
    return Call((lambda **given: op(**given)[0]) if name == "int8_topk" else op, arguments, definition, slack=slack * 3)


# Modules and settings


def quantize_(draw: Draw) -> Call:
    columns = draw.choice(WIDTHS)
    x = draw.tensor(draw.rows(columns), torch.float32)
    arguments = {
        "model": nn.Sequential(nn.Linear(columns, draw.choice(WIDTHS), bias=draw.chance(0.5))),
        "mode": "int8",
        "group_size": draw.choice((None, 1, 32)),
    }
    exact = arguments["model"](x).detach()

    def call(model: Any, mode: str, group_size: int | None) -> Tensor:
        return pg.quantize_(model, mode, group_size=group_size)(x)

    slack = exact.abs().max().item() * 0.1 + 0.1 if exact.numel() else 0.0
    return Call(call, arguments, lambda **given: exact, slack=slack)


def backend(draw: Draw) -> Call:
    def call(name: str) -> Tensor:
        with pg.backend(name):
            return torch.ones(())

    def definition(name: str) -> Tensor:
        _require(name in ("auto", "triton", "native", "reference"))
        return torch.ones(())

    return Call(call, {"name": draw.choice(("auto", "reference", "native"))}, definition, names=("backend",))


class NoDefinition(Exception):
    """Return a call whose result is arbitrary; only crashes are failures."""


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError("no such call")


_PUBLIC = (
    *(rms_norm, layer_norm, geglu, geglu_mlp, apply_rotary, apply_rotary_to_cache, prefix_lm_attention),
    *(prefix_lm_attention_varlen, linear_cross_entropy, quantize_int8, pack_int8, packed_rows, int8_linear),
    *(int8_projections, int8_geglu, int8_topk, quantize_, backend),
)
_REGISTERED = (
    *(rms_norm_native, geglu_native, geglu_native_backward, apply_rotary_to_cache_native, quantize_int8_native),
    *(pack_int8_raw, unpack_int8, int8_rows),
)
_INT8_OPS = ("int8_linear", "int8_linear_backward", "int8_projections", "int8_geglu", "int8_topk")
CALLS: dict[str, Callable[[Draw], Call]] = {
    **{function.__name__: function for function in _PUBLIC},
    **{f"torch.ops.{function.__name__}": function for function in _REGISTERED},
    **{f"torch.ops.{name}": (lambda draw, name=name: _raw(name, draw)) for name in _INT8_OPS},
}
"""A function for each op that draws a call."""
