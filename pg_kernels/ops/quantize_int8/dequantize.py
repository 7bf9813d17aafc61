from __future__ import annotations

from torch import Tensor


def dequantize_int8(qweight: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Multiply int8 [N, K] by its scales [N, ceil(K / group_size)]: fp32 [N, K]."""
    return qweight.float() * scale.repeat_interleave(group_size, 1)[:, : qweight.shape[1]]
