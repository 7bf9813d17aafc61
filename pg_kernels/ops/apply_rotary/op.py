"""The public functions apply_rotary and apply_rotary_to_cache, and registration with PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pg_kernels.backends import register_backend, select
from pg_kernels.ops._common import checks, devices, extension
from pg_kernels.ops._common.autograd import refuse_second_derivative
from pg_kernels.ops._common.registration import define_composite, define_opaque
from pg_kernels.ops.apply_rotary import arguments, cpu, launch, reference


def apply_rotary(q: Tensor, k: Tensor, positions: Tensor, *, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Apply rotary position embeddings to queries and keys in the half-split form: element i is paired with i + D/2.

    Args:
        q: [B, H, S, D], fp32, fp16 or bf16, D even.
        k: [B, Hkv, S, D], q's dtype.
        positions: [S] or [B, S], int32 or int64.
        theta: base of the angles' geometric series.

    Returns:
        The rotated q and k, new tensors.

    Raises:
        TypeError: q or k is not floating-point, their dtypes differ, or positions are not integers.
        ValueError: shapes or devices do not match, D is odd, or theta is not positive.

    Source: Su et al., https://arxiv.org/abs/2104.09864; the half-split form as in Gemma's original code.
    """
    positions = arguments.check_rotary(q, k, positions, theta)
    backend = select("apply_rotary", q.device.type, {"triton": devices.unsupported_reason(q)})
    if backend == "reference":
        return torch.ops.pg_kernels.apply_rotary(q, k, positions, theta)
    return torch.ops.pg_kernels.apply_rotary_triton(q, k, positions, theta, False)


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
    """Rotate queries and keys as `apply_rotary` does, and write keys and values into a KV cache.

    For generation: gradients do not flow through it.

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
        TypeError: dtypes do not match.
        ValueError: shapes or devices do not match, D is odd, theta is not positive, or a cache position is outside the cache.
            Cache positions are checked on the CPU only. On a GPU nothing is written for such a token, and its q becomes NaN.
        RuntimeError: gradients would have to flow through the cache.
    """
    positions = arguments.check_rotary(q, k, positions, theta)
    cache_positions = arguments.check_cache(q, k, v, k_cache, v_cache, cache_positions)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v, k_cache, v_cache)):
        raise RuntimeError(
            "apply_rotary_to_cache: gradients do not flow through a cache; call it under torch.no_grad()"
        )
    if checks.values_are_free(cache_positions):
        arguments.check_cache_positions(cache_positions, k_cache)
    unsupported = {
        "triton": devices.unsupported_reason(q, k_cache),
        "native": extension.unsupported_reason(q, k_cache),
    }
    if q.shape[3] > extension.LONGEST_HEAD or k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        unsupported["native"] = f"heads longer than {extension.LONGEST_HEAD}, or caches whose rows are not contiguous"
    avoid = ("native",) if q.shape[0] * q.shape[2] > cpu.MAX_TOKENS else ()
    backend = select("apply_rotary_to_cache", q.device.type, unsupported, avoid)
    op = getattr(torch.ops.pg_kernels, "apply_rotary_to_cache" + ("" if backend == "reference" else f"_{backend}"))
    return op(q, k, v, positions, theta, k_cache, v_cache, cache_positions)


def _fake_rotate(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, positions: Tensor, theta: float, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            q_out, k_out = torch.ops.pg_kernels.apply_rotary_triton(q, k, positions, theta, inverse)
        ctx.theta, ctx.inverse = theta, inverse
        ctx.save_for_backward(positions)
        return q_out, k_out

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
    launch.rotate,
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
define_opaque(f"apply_rotary_to_cache_triton{_TO_CACHE}", launch.rotate_to_cache, lambda q, *rest: torch.empty_like(q))
define_opaque(f"apply_rotary_to_cache_native{_TO_CACHE}", cpu.rotate_to_cache, lambda q, *rest: q.new_empty(q.shape))
