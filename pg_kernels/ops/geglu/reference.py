"""geglu in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute gelu_tanh(gate) · up in fp32 with one downcast at the end."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.gelu(gate.to(wide), approximate="tanh") * up.to(wide)).to(gate.dtype)
