"""`int8_topk`: the top-k logits of an int8 output head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pg_kernels.ops._common import checks
from pg_kernels.ops._common.registration import define_opaque
from pg_kernels.ops.int8_linear import cpu, reference
from pg_kernels.ops.int8_linear.dispatch import check_native, multiply, prepare
from pg_kernels.ops.int8_linear.packed import PackedInt8Weight
from pg_kernels.ops.int8_linear.product import Int8Product

_UINT32_MAX = 2**32 - 1
_MAX_CPU_K = 256
"""The largest k for which the CPU kernel keeps the top k while it multiplies. It inserts one by one into a sorted list."""


def int8_topk(
    x: Tensor,
    weight: PackedInt8Weight,
    k: int = 1,
    *,
    softcap: float | None = None,
    log_probs: bool = False,
    activations: str = "keep",
) -> tuple[Tensor, Tensor]:
    """Compute the top-k logits x · (weight · scale)ᵀ of an int8 output head without materialising the logits.

    Args:
        x: [..., K], fp32, fp16 or bf16. Under autocast x is cast.
        weight: packed, [N, K].
        k: in [1, N].
        softcap: a positive c turns every logit y into c · tanh(y / c).
        log_probs: return log-probabilities over all N instead of logits.
        activations: as for `int8_linear`.

    Returns:
        Values, fp32 [..., k], the largest first, and their indices in [0, N), int64 [..., k]. Of equal values the lower index
        comes first; NaN counts as the largest. Without gradients.

    Raises:
        TypeError, ValueError: as `int8_linear`; ValueError for a k out of range or a softcap that is not positive.
    """
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k: expected an int, got {type(k).__name__}")
    checks.check_bool(log_probs=log_probs)
    checks.check_positive(softcap=softcap)
    x, backend = prepare(x.detach() if isinstance(x, Tensor) else x, [weight], [None], activations)
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k: expected a number in [1, {weight.shape[0]}] (the weight's N), got {k}")
    values, indices = torch.ops.pg_kernels.int8_topk(
        x.reshape(-1, x.shape[-1]),
        *weight._operands(backend),
        weight.shape[0],
        weight.group_size,
        activations == "int8",
        k,
        softcap,
        log_probs,
        backend,
    )
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


def _forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    n: int,
    group_size: int,
    int8_activations: bool,
    k: int,
    softcap: float | None,
    log_probs: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    checks.check_shape("x", x, ["M", "K"])
    if not 1 <= k <= n:
        raise ValueError(f"k: expected a number in [1, {n}], got {k}")
    if backend == "reference":
        return reference.int8_topk(x, weight, scale, group_size, int8_activations, k, softcap, log_probs)
    product = Int8Product([weight], [scale], [None], [n], group_size, int8_activations, torch.float32)
    if backend == "native" and x.device.type == "cpu" and k <= _MAX_CPU_K:
        check_native(x, product)
        return cpu.topk(x, product, k, softcap, log_probs)
    (logits,) = multiply(x, product, backend)
    return _topk_of_logits(logits, k, softcap, log_probs)


def _topk_of_logits(y: Tensor, k: int, softcap: float | None, log_probs: bool) -> tuple[Tensor, Tensor]:
    """Compute the top k of fp32 logits y [M, N] as `reference.topk_of_logits` does, without sorting them all."""
    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    if k == 1:
        values, indices = y.max(-1, keepdim=True)
    else:
        # Order by int64 keys of (value, −index): fp32 bits that compare as integers above, 2^32 − 1 − index below.
        bits = (y + 0.0).view(torch.int32)  # −0 becomes 0
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(y.isnan(), 0x7FFFFFFF)
        index_keys = torch.arange(_UINT32_MAX, _UINT32_MAX - y.shape[1], -1, device=y.device)
        keys = (ordered.long() << 32) + index_keys
        indices = _UINT32_MAX - (keys.topk(k).values & _UINT32_MAX)
        values = y.gather(1, indices)
    return values - y.logsumexp(-1, keepdim=True) if log_probs else values, indices


def _fake(
    x: Tensor, weight: Tensor, scale: Tensor, n: int, group_size: int, int8_activations: bool, k: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), k, dtype=torch.float32), x.new_empty(len(x), k, dtype=torch.int64)


# Without gradients. The weight is in the extension's layout with backend "native", else int8 [N, K].
define_opaque(
    "int8_topk(Tensor x, Tensor weight, Tensor scale, SymInt n, SymInt group_size, bool int8_activations, int k, "
    "float? softcap, bool log_probs, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
)
