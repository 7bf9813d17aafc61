from __future__ import annotations

import torch
from torch import Tensor

from pg_kernels.ops.quantize_int8.reference import dequantize_int8


def int8_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, group_size: int, int8_activations: bool
) -> Tensor:
    """x [M, K] times the transpose of qweight [N, K] · scale [N, groups], plus bias [N]; fp32 until one last downcast."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        if int8_activations:
            y = _int8_by_int8(x.to(wide), qweight, scale, group_size)
        else:
            y = x.to(wide) @ dequantize_int8(qweight, scale, group_size).to(wide).T
        return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def int8_topk(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    group_size: int,
    int8_activations: bool,
    k: int,
    softcap: float | None,
    log_probs: bool,
) -> tuple[Tensor, Tensor]:
    """The k largest products of each row of x, fp32 [M, k], and their places; of equal ones the first."""
    y = int8_linear(
        x.to(torch.promote_types(x.dtype, torch.float32)), qweight, scale, None, group_size, int8_activations
    )
    return largest(y, k, softcap, log_probs)


def largest(y: Tensor, k: int, softcap: float | None, log_probs: bool) -> tuple[Tensor, Tensor]:
    """The same of products y [M, N] that are there."""
    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    # Sorted before the sum is taken off, which could make equals of two that differ.
    values, indices = y.sort(dim=-1, descending=True, stable=True)
    if log_probs:
        values = values - y.logsumexp(-1, keepdim=True)
    return values[:, :k].float(), indices[:, :k].contiguous()


def input_gradient(grad: Tensor, qweight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """grad [M, N] times qweight · scale: [M, K]. A scale can be beyond fp16, so only the sum is cast down."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    with torch.autocast(grad.device.type, enabled=False):
        return (grad.to(wide) @ dequantize_int8(qweight, scale, group_size).to(wide)).to(grad.dtype)


def _int8_by_int8(x: Tensor, qweight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Quantise each row of x as weights are, and multiply integers; float64 holds their sums exactly."""
    row_scale = x.abs().amax(-1, keepdim=True) / 127.0
    row_scale = row_scale.where(x.isfinite().all(-1, keepdim=True), float("nan"))
    levels = torch.round(x / row_scale.where(row_scale > 0, 1.0)).clamp(-127, 127)
    y = x.new_zeros(x.shape[0], qweight.shape[0])
    groups = zip(levels.split(group_size, 1), qweight.split(group_size, 1), scale.unbind(1), strict=True)
    for level, q, group_scale in groups:
        y += (level.double() @ q.double().T).to(x.dtype) * group_scale.to(x.dtype)
    return y * row_scale
