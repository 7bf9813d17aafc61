"""The definitions of the products with int8 weights, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from pg_kernels.ops.quantize_int8.dequantize import dequantize_int8


def int8_linear(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, group_size: int, int8_activations: bool
) -> Tensor:
    """Compute x [M, K] · (qweight [N, K] · scale [N, groups])ᵀ + bias [N] in fp32 (float64 for float64 x), downcast last."""
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
    """Return the k largest logits of each row of x, fp32 [M, k], and their indices; of equal ones the lower index first."""
    y = int8_linear(
        x.to(torch.promote_types(x.dtype, torch.float32)), qweight, scale, None, group_size, int8_activations
    )
    return topk_of_logits(y, k, softcap, log_probs)


def topk_of_logits(y: Tensor, k: int, softcap: float | None, log_probs: bool) -> tuple[Tensor, Tensor]:
    """Return the k largest of logits y [M, N] and their indices, as `int8_topk`."""
    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    # Sort before the log-sum-exp is subtracted: the subtraction could make different logits equal.
    values, indices = y.sort(dim=-1, descending=True, stable=True)
    if log_probs:
        values = values - y.logsumexp(-1, keepdim=True)
    return values[:, :k].float(), indices[:, :k].contiguous()


def input_grad(grad: Tensor, qweight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Compute grad [M, N] · (qweight · scale): [M, K]. A scale can exceed fp16's range, so only the sum is cast down."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    with torch.autocast(grad.device.type, enabled=False):
        return (grad.to(wide) @ dequantize_int8(qweight, scale, group_size).to(wide)).to(grad.dtype)


def _int8_by_int8(x: Tensor, qweight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Quantise each row of x as `quantize_int8` does, and multiply integers. float64 holds their sums exactly."""
    row_scale = x.abs().amax(-1, keepdim=True) / 127.0
    row_scale = row_scale.where(x.isfinite().all(-1, keepdim=True), float("nan"))
    qx = torch.round(x / row_scale.where(row_scale > 0, 1.0)).clamp(-127, 127)
    y = x.new_zeros(x.shape[0], qweight.shape[0])
    groups = zip(qx.split(group_size, 1), qweight.split(group_size, 1), scale.unbind(1), strict=True)
    for qx_group, qweight_group, group_scale in groups:
        y += (qx_group.double() @ qweight_group.double().T).to(x.dtype) * group_scale.to(x.dtype)
    return y * row_scale
