"""Gemma's MLP as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pg_kernels.nn.configurations import is_gemma2
from pg_kernels.nn.fusion import are_plain_int8_linears, is_plain_linear
from pg_kernels.ops.geglu import geglu
from pg_kernels.ops.geglu_mlp import geglu_mlp
from pg_kernels.ops.int8_linear import int8_geglu


class GeGLUMLP(nn.Module):
    """`pg_kernels.geglu_mlp` with its three projections as submodules, which adapters and quantisers can replace."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    @classmethod
    def from_config(cls, config: Any) -> GeGLUMLP:
        """Build it as transformers builds GemmaMLP and Gemma2MLP. Raises ValueError for other models and activations."""
        activation = config.hidden_activation if is_gemma2(config) else config.hidden_act
        if activation != "gelu_pytorch_tanh":
            raise ValueError(f"config: the activation is {activation!r}, supported is 'gelu_pytorch_tanh'")
        return cls(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., dim] to [..., dim]."""
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        if all(map(is_plain_linear, projections)):
            return geglu_mlp(x, *(projection.weight for projection in projections))
        gate: Any = self.gate_proj
        up: Any = self.up_proj
        if are_plain_int8_linears((gate, up)) and gate.bias is None and up.bias is None:
            return self.down_proj(int8_geglu(x, gate.weight, up.weight, activations=gate.activations))
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))
