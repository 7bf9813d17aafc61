"""The ops under test: inputs, the plain PyTorch version, and the arithmetic of the definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pg_kernels as pg

Sizes = Mapping[str, Any]
Inputs = Mapping[str, Any]
"""Tensors, and sizes that are not tensors, by argument name."""
Build = Callable[[Inputs], "partial[Any]"]
"""Does all one-time work and returns the call to time. Raises ValueError if the contender does not support the inputs."""


class Draw:
    """Draws reproducible random tensors on one device in one dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        # The meta device has only shapes, and no generator.
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """Draw Gaussian values [*shape]."""
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        return values.normal_(std=std, generator=self.generator)

    def matrix(self, outputs: int, inputs: int) -> Tensor:
        """Draw a weight [outputs, inputs] that preserves the variance of its input."""
        return self.normal(outputs, inputs, std=inputs**-0.5)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Draw uniform int64 in [0, high), [*shape]."""
        return torch.randint(high, shape, device=self.device, generator=self.generator)

    def filled(self, value: int, *shape: int) -> Tensor:
        """Return int32 [*shape] filled with one value."""
        return torch.full(shape, value, dtype=torch.int32, device=self.device)


@dataclass(frozen=True)
class Op:
    """What the suite needs of an op. Inputs are drawn by argument name; inputs in `trained` get a gradient."""

    draw: Callable[[Sizes, Draw], dict[str, Any]]
    ours: Build
    eager: Build
    """The baseline in plain PyTorch, with all one-time work of a model done beforehand."""
    tiny: Sizes
    """A shape so small that a call only costs its overhead."""
    outputs: Callable[[Sizes], int]
    """Returns the number of output elements."""
    trained: tuple[str, ...] = ()
    flops: Callable[[Sizes], int] | None = None
    """Returns the FLOPs of the matrix products in the definition's forward pass. A backward pass has twice as many."""
    scratch: Callable[[Sizes], int] = lambda sizes: 0
    """Returns the number of intermediate elements of a plain implementation."""
    input_bytes: Callable[[Sizes], int] | None = None
    """Returns the bytes of the op's inputs, if their dtype differs from the drawn tensors'."""
    definition: Build | None = None
    """Computes the values that outputs are compared with. Default: `ours` on the reference backend with wider inputs."""
    comparable: Callable[[Any], Any] = lambda outputs: outputs
    """Maps outputs to values on which two right implementations agree."""


def call(function: Callable[..., Any]) -> Build:
    """Return a Build that passes the inputs to a function unchanged."""
    return lambda inputs: partial(function, **inputs)


# --- norms, rotary, activation: bound by bytes


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (normed * (1.0 + weight.float())).type_as(x)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, weight), total


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


def _draw_norm(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    return {
        "x": draw.normal(sizes["batch"], sizes["tokens"], sizes["width"]),
        "weight": draw.normal(sizes["width"], std=0.1),
    }


def _draw_rotary(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    q, k = (_heads(draw, sizes, sizes["tokens"], sizes[heads]) for heads in ("heads", "kv_heads"))
    positions = torch.arange(sizes["tokens"], device=draw.device).expand(sizes["batch"], -1)
    return {"q": q, "k": k, "positions": positions}


def rotary_tables(q: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin [B, S, D] in q's dtype with equal halves, as transformers computes once for all layers."""
    exponents = torch.arange(0, q.shape[-1], 2, device=q.device) / q.shape[-1]
    angles = (positions[..., None] * 10_000.0**-exponents).repeat(1, 1, 2)
    return angles.cos().to(q.dtype), angles.sin().to(q.dtype)


def _build_eager_rotary(inputs: Inputs) -> partial[Any]:
    cos, sin = rotary_tables(inputs["q"], inputs["positions"])
    return partial(_rotary, inputs["q"], inputs["k"], cos[:, None], sin[:, None])


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


# --- matrix products


def _geglu_mlp(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    return F.linear(_geglu(F.linear(x, gate_weight), F.linear(x, up_weight)), down_weight)


def _draw_mlp(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    width, hidden = sizes["width"], sizes["hidden"]
    return {
        "x": draw.normal(sizes["batch"], sizes["tokens"], width),
        "gate_weight": draw.matrix(hidden, width),
        "up_weight": draw.matrix(hidden, width),
        "down_weight": draw.matrix(width, hidden),
    }


def _cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: int | None) -> Tensor:
    logits = F.linear(hidden, weight).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels)


def _draw_cross_entropy(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    return {
        "hidden": draw.normal(sizes["tokens"], sizes["width"]),
        "weight": draw.matrix(sizes["vocabulary"], sizes["width"]),
        "labels": draw.integers(sizes["vocabulary"], sizes["tokens"]),
        "softcap": sizes.get("softcap"),
    }


def _draw_int8(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    return {
        "x": draw.normal(sizes["tokens"], sizes["inputs"]),
        "weight": draw.matrix(sizes["outputs"], sizes["inputs"]),
        "group_size": sizes.get("group"),
    }


def _build_int8(inputs: Inputs, **options: Any) -> partial[Any]:
    packed = pg.pack_int8(*pg.quantize_int8(inputs["weight"], group_size=inputs["group_size"]))
    return partial(pg.int8_linear, inputs["x"], packed, **options)


def build_int8_activations(inputs: Inputs) -> partial[Any]:
    """Return a Build of W8A8."""
    return _build_int8(inputs, activations="int8")


def _build_dense(inputs: Inputs) -> partial[Any]:
    return partial(F.linear, inputs["x"], inputs["weight"])


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise to int8 [N, K] and fp32 scales [N] in plain PyTorch."""
    wide = weight.float()
    scale = wide.abs().amax(1) / 127.0
    return torch.round(wide / scale[:, None]).to(torch.int8), scale


def _dequantized(outputs: tuple[Tensor, Tensor]) -> Tensor:
    # A value halfway between two levels may be rounded to either. The reference's own loss allows half a level of difference.
    return outputs[0] * outputs[1][:, None]


# --- attention


def _heads(draw: Draw, sizes: Sizes, tokens: int, heads: int) -> Tensor:
    """Draw [B, H, S, D] laid out as a projection's output: the heads of a token are adjacent in memory."""
    return draw.normal(sizes["batch"], tokens, heads, sizes["head_dim"]).transpose(1, 2)


def _draw_attention(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    q = _heads(draw, sizes, sizes["queries"], sizes["heads"])
    k, v = (_heads(draw, sizes, sizes["tokens"], sizes["kv_heads"]) for _ in range(2))
    if sizes["queries"] < sizes["tokens"]:  # in a cache, each head's tokens are adjacent
        k, v = k.contiguous(), v.contiguous()
    causal = bool(sizes.get("causal", 1))
    # The model passes one length for each example.
    prefix_lens = draw.filled(sizes["prefix"], sizes["batch"]) if causal else None
    softcap = sizes.get("softcap")
    return {"q": q, "k": k, "v": v, "prefix_lens": prefix_lens, "causal": causal, "softcap": softcap}


def visible_pairs(sizes: Sizes) -> int:
    """Return the number of (query, key) pairs that are visible in one head of one example."""
    queries, tokens, prefix = sizes["queries"], sizes["tokens"], sizes["prefix"]
    if not sizes.get("causal", 1):
        return queries * tokens
    return sum(max(min(prefix, tokens), tokens - queries + i + 1) for i in range(queries))


def dense_mask(inputs: Inputs) -> Tensor | None:
    """Return the prefix-LM mask as a tensor [1, 1, Sq, Skv], true where visible; None if everything is."""
    queries, tokens = inputs["q"].shape[2], inputs["k"].shape[2]
    if not inputs["causal"] or int(inputs["prefix_lens"][0]) >= tokens or queries == 1:
        return None
    device = inputs["q"].device
    position = torch.arange(tokens - queries, tokens, device=device)[:, None]
    key = torch.arange(tokens, device=device)
    return ((key <= position) | (key < inputs["prefix_lens"][0]))[None, None]


def _build_eager_attention(inputs: Inputs) -> partial[Any]:
    visible = dense_mask(inputs)
    mask = None
    if visible is not None:
        low = torch.finfo(inputs["q"].dtype).min
        mask = torch.zeros(visible.shape, dtype=inputs["q"].dtype, device=visible.device).masked_fill(~visible, low)
    return partial(_attention, inputs["q"], inputs["k"], inputs["v"], mask, inputs["softcap"])


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: int | None) -> Tensor:
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _attention_flops(sizes: Sizes) -> int:
    return 4 * sizes["batch"] * sizes["heads"] * sizes["head_dim"] * visible_pairs(sizes)


def _activations(width: str) -> Callable[[Sizes], int]:
    return lambda sizes: sizes["batch"] * sizes["tokens"] * sizes[width]


def _int8_bytes(sizes: Sizes) -> int:
    """Return the bytes of 16-bit activations, int8 weights and their fp32 scales."""
    groups = -(-sizes["inputs"] // sizes.get("group", sizes["inputs"]))
    return 2 * sizes["tokens"] * sizes["inputs"] + sizes["outputs"] * (sizes["inputs"] + 4 * groups)


OPS: dict[str, Op] = {
    "rms_norm": Op(
        _draw_norm,
        call(pg.rms_norm),
        call(_rms_norm),
        {"batch": 1, "tokens": 1, "width": 64},
        _activations("width"),
        ("x", "weight"),
    ),
    "add_rms_norm": Op(
        lambda sizes, draw: {**_draw_norm(sizes, draw), "residual": _draw_norm(sizes, draw)["x"]},
        call(pg.rms_norm),
        call(_add_rms_norm),
        {"batch": 1, "tokens": 1, "width": 64},
        lambda sizes: 2 * _activations("width")(sizes),
        ("x", "weight", "residual"),
    ),
    "layer_norm": Op(
        lambda sizes, draw: {**_draw_norm(sizes, draw), "bias": draw.normal(sizes["width"], std=0.1)},
        call(pg.layer_norm),
        call(_layer_norm),
        {"batch": 1, "tokens": 1, "width": 64},
        _activations("width"),
        ("x", "weight", "bias"),
    ),
    "apply_rotary": Op(
        _draw_rotary,
        call(pg.apply_rotary),
        _build_eager_rotary,
        {"batch": 1, "tokens": 1, "heads": 1, "kv_heads": 1, "head_dim": 32},
        lambda sizes: (sizes["heads"] + sizes["kv_heads"]) * _activations("head_dim")(sizes),
        ("q", "k"),
    ),
    "geglu": Op(
        lambda sizes, draw: {
            name: draw.normal(sizes["batch"], sizes["tokens"], sizes["hidden"]) for name in ("gate", "up")
        },
        call(pg.geglu),
        call(_geglu),
        {"batch": 1, "tokens": 1, "hidden": 64},
        _activations("hidden"),
        ("gate", "up"),
    ),
    "geglu_mlp": Op(
        _draw_mlp,
        call(pg.geglu_mlp),
        call(_geglu_mlp),
        {"batch": 1, "tokens": 1, "width": 64, "hidden": 64},
        _activations("width"),
        ("x", "gate_weight", "up_weight", "down_weight"),
        lambda sizes: 6 * _activations("width")(sizes) * sizes["hidden"],
        lambda sizes: 3 * _activations("hidden")(sizes),
    ),
    "prefix_lm_attention": Op(
        _draw_attention,
        call(pg.prefix_lm_attention),
        _build_eager_attention,
        {"batch": 1, "queries": 1, "tokens": 1, "prefix": 1, "heads": 1, "kv_heads": 1, "head_dim": 32},
        lambda sizes: sizes["batch"] * sizes["heads"] * sizes["queries"] * sizes["head_dim"],
        ("q", "k", "v"),
        _attention_flops,
        lambda sizes: sizes["batch"] * sizes["heads"] * sizes["queries"] * sizes["tokens"],
    ),
    "linear_cross_entropy": Op(
        _draw_cross_entropy,
        call(pg.linear_cross_entropy),
        call(_cross_entropy),
        {"tokens": 1, "width": 64, "vocabulary": 64},
        lambda sizes: 1,
        ("hidden", "weight"),
        lambda sizes: 2 * sizes["tokens"] * sizes["width"] * sizes["vocabulary"],
        lambda sizes: sizes["tokens"] * sizes["vocabulary"],
    ),
    "int8_linear": Op(
        _draw_int8,
        _build_int8,
        _build_dense,
        {"tokens": 1, "inputs": 64, "outputs": 64},
        lambda sizes: sizes["tokens"] * sizes["outputs"],
        flops=lambda sizes: 2 * sizes["tokens"] * sizes["inputs"] * sizes["outputs"],
        input_bytes=_int8_bytes,
        definition=_build_dense,
    ),
    "quantize_int8": Op(
        lambda sizes, draw: {"weight": draw.matrix(sizes["outputs"], sizes["inputs"])},
        call(pg.quantize_int8),
        call(quantize),
        {"inputs": 64, "outputs": 64},
        lambda sizes: sizes["outputs"] * sizes["inputs"],
        comparable=_dequantized,
    ),
}
"""By the name that cases use."""
