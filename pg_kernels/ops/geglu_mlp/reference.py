"""geglu_mlp in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pg_kernels.ops.geglu.reference import geglu


def geglu_mlp(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """Compute down(gelu_tanh(gate(x)) · up(x)) for x [..., K]."""
    return F.linear(geglu(F.linear(x, gate_weight), F.linear(x, up_weight)), down_weight)
