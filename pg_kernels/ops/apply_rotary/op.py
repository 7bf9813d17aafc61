from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pg_kernels.backends import register_backend, select
from pg_kernels.ops._common import checks, devices, extension
from pg_kernels.ops._common.autograd import refuse_second_derivative
from pg_kernels.ops._common.extension import _C, FLOAT_CODES
from pg_kernels.ops._common.registration import define_composite, define_opaque
from pg_kernels.ops.apply_rotary import reference, tiles

_FEW_TOKENS = 64
"""For more than these PyTorch's functions, with threads and vectors for sines, are faster than the C++ kernel."""


def _rotate(q: Tensor, k: Tensor, positions: Tensor, theta: float, inverse: bool) -> tuple[Tensor, Tensor]:
    q_out, k_out = _fake_rotate(q, k)
    _launch((q, k, None), positions, theta, (q_out, k_out, None), None, inverse=inverse)
    return q_out, k_out


def _fake_rotate(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _to_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    theta: float,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_positions: Tensor,
) -> Tensor:
    q_out = torch.empty_like(q)
    _launch((q, k, v), positions, theta, (q_out, k_cache, v_cache), cache_positions, inverse=False)
    return q_out


def _to_cache_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    theta: float,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_positions: Tensor,
) -> Tensor:
    # It takes addresses: the sizes must fit, whoever calls, and within a compiled graph nobody has looked at the cache_positions.
    extension.check(q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    checks.check_integer(positions=positions, cache_positions=cache_positions)
    positions, cache_positions = (t[0] if t.dim() == 2 and len(t) == 1 else t for t in (positions, cache_positions))
    positions = _checked(q, k, positions, theta)
    cache_positions = _checked_cache(q, k, v, k_cache, v_cache, cache_positions)
    if q.shape[3] > extension.LONGEST_HEAD:
        raise ValueError(f"q: expected heads of at most {extension.LONGEST_HEAD}, got {q.shape[3]}")
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError("k_cache: expected caches whose rows are contiguous")
    _check_cache_positions(cache_positions, k_cache)
    q_out = q.new_empty(q.shape)
    batch, _, length, dim = q.shape
    tokens = (batch, length)
    # Kept until the call is over.
    positions, cache_positions = (t.expand(tokens).to(torch.int64).contiguous() for t in (positions, cache_positions))
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    frequencies = _frequencies(dim, theta)
    _C.rotary(
        q=extension.heads(q),
        k=extension.heads(k),
        v=extension.heads(v),
        q_out=extension.heads(q_out),
        k_cache=extension.heads(k_cache),
        v_cache=extension.heads(v_cache),
        positions=positions.data_ptr(),
        cache_positions=cache_positions.data_ptr(),
        frequencies=frequencies.data_ptr(),
        batch=batch,
        length=length,
        dim=dim,
        type=FLOAT_CODES[q.dtype],
        cache_type=FLOAT_CODES[k_cache.dtype],
    )
    return q_out


@cache
def _frequencies(dim: int, theta: float) -> Tensor:
    """fp32 [D / 2]"""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _launch(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    positions: Tensor,
    theta: float,
    outputs: tuple[Tensor, Tensor, Tensor | None],
    cache_positions: Tensor | None,
    *,
    inverse: bool,
) -> None:
    from pg_kernels.ops.apply_rotary import kernels

    (q, k, v), (q_out, k_out, v_out) = inputs, outputs
    batch, heads, length, dim = q.shape
    tokens, heads_in_all = batch * length, heads + k.shape[1]
    if not tokens or not heads_in_all:
        return
    step = _short(-2.0 / dim * math.log2(theta))
    device = devices.device_of(q)
    chosen = tiles.choose(dim, device)
    blocks = -(-tokens // chosen.tokens)
    heads_per_program = tiles.heads_per_program(blocks, heads_in_all, device)
    with devices.on_device_of(q):
        kernels.rotate[(blocks, -(-heads_in_all // heads_per_program))](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            positions_ptr=positions,
            cache_positions_ptr=cache_positions,
            q_out_ptr=q_out,
            k_out_ptr=k_out,
            v_out_ptr=v_out,
            tokens=tokens,
            length=length,
            capacity=k_out.shape[2],
            heads_per_program=heads_per_program,
            q_strides=q.stride(),
            k_strides=k.stride(),
            v_strides=(k if v is None else v).stride(),
            positions_strides=_shared(positions, batch),
            cache_positions_strides=(0, 0) if cache_positions is None else _shared(cache_positions, batch),
            q_out_strides=q_out.stride(),
            k_out_strides=k_out.stride(),
            v_out_strides=(k_out if v_out is None else v_out).stride(),
            step=step,
            step_rest=-2.0 / dim * math.log2(theta) - step,
            Q_HEADS=heads,
            K_HEADS=k.shape[1],
            DIM=dim,
            HALF=chosen.half,
            TOKENS=chosen.tokens,
            INVERSE=inverse,
            num_warps=chosen.warps,
            enable_fp_fusion=True,
        )


def _short(number: float) -> float:
    """The number to 12 bits, whose product with an integer of up to 12 bits is exact in fp32."""
    mantissa, exponent = math.frexp(number)
    return math.ldexp(round(mantissa * 4096), exponent - 12)


def _shared(numbers: Tensor, batch: int) -> tuple[int, int]:
    """Strides of numbers [B or 1, S] over B and S."""
    return numbers.expand(batch, -1).stride()  # type: ignore[return-value]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, positions: Tensor, theta: float, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(positions)
        ctx.theta, ctx.inverse = theta, inverse
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.pg_kernels.apply_rotary_triton(q, k, positions, theta, inverse)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("apply_rotary")
        (positions,) = ctx.saved_tensors
        grads = torch.ops.pg_kernels.apply_rotary_triton(grad_q, grad_k, positions, ctx.theta, not ctx.inverse)
        return *grads, None, None, None


register_backend("apply_rotary", "triton", devices.unavailable_reason)
register_backend("apply_rotary_to_cache", "triton", devices.unavailable_reason)
register_backend("apply_rotary_to_cache", "native", extension.unavailable_reason)
define_composite(
    "apply_rotary(Tensor q, Tensor k, Tensor positions, float theta) -> (Tensor, Tensor)", reference.apply_rotary
)
define_opaque(
    "apply_rotary_triton(Tensor q, Tensor k, Tensor positions, float theta, bool inverse) -> (Tensor, Tensor)",
    _rotate,
    _fake_rotate,
    _Rotate.apply,
)
_TO_CACHE = (
    "(Tensor q, Tensor k, Tensor v, Tensor positions, float theta, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor cache_positions) -> Tensor"
)
define_opaque(
    f"apply_rotary_to_cache{_TO_CACHE}", reference.apply_rotary_to_cache, lambda q, *rest: torch.empty_like(q)
)
define_opaque(f"apply_rotary_to_cache_triton{_TO_CACHE}", _to_cache, lambda q, *rest: torch.empty_like(q))
define_opaque(f"apply_rotary_to_cache_native{_TO_CACHE}", _to_cache_native, lambda q, *rest: q.new_empty(q.shape))


def apply_rotary(q: Tensor, k: Tensor, positions: Tensor, *, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys, in the half-split form: element i is paired with i + D/2.

    Args:
        q: [B, H, S, D], fp32, fp16 or bf16, D even.
        k: [B, Hkv, S, D], q's dtype.
        positions: [S] or [B, S], int32 or int64.
        theta: base of the angles' geometric series.

    Returns:
        The rotated q and k, new tensors.

    Raises:
        TypeError: q or k not floating-point or of two dtypes, positions not integers.
        ValueError: shapes or devices that do not fit, an odd D, theta not positive.

    Source: Su et al., https://arxiv.org/abs/2104.09864; the half-split form as in Gemma's original code.
    """
    positions = _checked(q, k, positions, theta)
    if select("apply_rotary", q.device.type, {"triton": devices.unsupported_reason(q)}) == "triton":
        return torch.ops.pg_kernels.apply_rotary_triton(q, k, positions, theta, False)
    return torch.ops.pg_kernels.apply_rotary(q, k, positions, theta)


def apply_rotary_to_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_positions: Tensor,
    *,
    theta: float = 10_000.0,
) -> Tensor:
    """Rotate queries and keys as `apply_rotary` does, and write keys and values into a cache: for generation, without gradients.

    Args:
        q: [B, H, S, D], fp32, fp16 or bf16, D even.
        k, v: [B, Hkv, S, D], q's dtype.
        positions: [S] or [B, S], int32 or int64.
        k_cache, v_cache: [B, Hkv, capacity, D], of one floating-point dtype; written in place.
        cache_positions: [S] or [B, S], int32 or int64: where in the cache each token goes, in [0, capacity).
        theta: base of the angles' geometric series.

    Returns:
        The rotated q, a new tensor.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes or devices that do not fit, an odd D, theta not positive; a slot outside the cache (looked at on the
            CPU only; on a GPU nothing is written there, and the token's q becomes NaN).
        RuntimeError: gradients would have to flow through the cache.
    """
    positions = _checked(q, k, positions, theta)
    cache_positions = _checked_cache(q, k, v, k_cache, v_cache, cache_positions)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v, k_cache, v_cache)):
        raise RuntimeError(
            "apply_rotary_to_cache: gradients do not flow through a cache; call it under torch.no_grad()"
        )
    if checks.values_are_free(cache_positions):
        _check_cache_positions(cache_positions, k_cache)
    native = extension.unsupported_reason(q, k_cache)
    if q.shape[3] > extension.LONGEST_HEAD or k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        native = f"heads longer than {extension.LONGEST_HEAD}, or caches whose rows are not contiguous"
    unsupported = {"triton": devices.unsupported_reason(q, k_cache), "native": native}
    # It turns one token after the other, for decoding.
    avoid = ("native",) if q.shape[0] * q.shape[2] > _FEW_TOKENS else ()
    backend = select("apply_rotary_to_cache", q.device.type, unsupported, avoid)
    name = "apply_rotary_to_cache" if backend == "reference" else f"apply_rotary_to_cache_{backend}"
    return getattr(torch.ops.pg_kernels, name)(q, k, v, positions, theta, k_cache, v_cache, cache_positions)


def _check_cache_positions(cache_positions: Tensor, cache: Tensor) -> None:
    numbers = cache_positions.flatten().tolist()
    wrong = [slot for slot in numbers if not 0 <= slot < cache.shape[2]]
    if wrong:
        raise ValueError(f"cache_positions: {wrong[0]} is outside the cache's [0, {cache.shape[2]})")


def _checked(q: Tensor, k: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Check what both functions take, and give the positions as [B or 1, S]."""
    checks.check_float(q=q, k=k)
    checks.check_integer(positions=positions)
    checks.check_shape("q", q, ["B", "H", "S", "D"])
    batch, _, length, dim = q.shape
    if dim % 2 or dim == 0:
        raise ValueError(f"q: the head dimension must be even, got {dim}")
    checks.check_shape("k", k, [batch, "Hkv", length, dim], " (q's but for the heads)")
    checks.check_same(q=q, k=k)
    checks.check_device(q=q, k=k, positions=positions)
    checks.check_positive(theta=theta)
    return _per_token("positions", positions, q)


def _checked_cache(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_positions: Tensor
) -> Tensor:
    """Check what is written into a cache, and give the cache_positions as [B or 1, S]."""
    checks.check_shape("v", v, list(k.shape), " (k's)")
    checks.check_same(q=q, v=v)
    checks.check_float(k_cache=k_cache, v_cache=v_cache)
    checks.check_shape("k_cache", k_cache, [*k.shape[:2], "capacity", k.shape[3]], " (k's but for the capacity)")
    checks.check_shape("v_cache", v_cache, list(k_cache.shape), " (k_cache's)")
    checks.check_same(k_cache=k_cache, v_cache=v_cache)
    checks.check_integer(cache_positions=cache_positions)
    checks.check_device(q=q, k_cache=k_cache, cache_positions=cache_positions)
    return _per_token("cache_positions", cache_positions, q)


def _per_token(name: str, numbers: Tensor, q: Tensor) -> Tensor:
    """Check numbers [S] or [B, S], and give them as [1 or B, S]."""
    batch, _, length, _ = q.shape
    if numbers.dim() == 1:
        checks.check_shape(name, numbers, [length], " (q's S) or [B, S]")
        return numbers[None]
    checks.check_shape(name, numbers, [batch, length], " (q's B and S) or [S]")
    return numbers
