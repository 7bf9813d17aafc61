from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def quantize_int8(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round weight [N, K] to 255 symmetric levels per group of columns: int8 [N, K] and fp32 [N, ceil(K / group_size)]."""
    n, k = weight.shape
    groups = -(-k // group_size)
    padded = F.pad(weight.float(), (0, groups * group_size - k)).view(n, groups, group_size)
    scale = padded.abs().amax(-1) / 127.0
    levels = torch.round(padded / scale.where(scale > 0, 1.0)[..., None]).clamp(-127, 127)
    return levels.flatten(1)[:, :k].to(torch.int8).contiguous(), scale
