"""geglu_mlp with PyTorch's matrix products and the C++ extension's geglu."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """Return y [..., N]. Autograd derives its gradients: the products and geglu_native have their own."""
    gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
    return F.linear(torch.ops.pg_kernels.geglu_native(gate, up), down_weight)
