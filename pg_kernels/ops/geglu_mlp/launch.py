"""geglu_mlp with Triton kernels: its own, or PyTorch's products with geglu's between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pg_kernels.ops._common import devices
from pg_kernels.ops.geglu_mlp import tiles


def forward(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, keep_projections: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [M, N], and with `keep_projections` x · gateᵀ and x · upᵀ [M, F] for backward (else empty tensors).

    Recomputing a projection in backward would cost a matrix product. Their GeGLU is not kept: backward reads both projections
    anyway and recomputes it in the same pass over memory.
    """
    m, k, n = *x.shape, gate_weight.shape[0]
    chosen = tiles.choose(m, k, n, x.dtype, devices.device_of(x))
    if chosen is not None and not keep_projections:
        y = F.linear(_geglu_gemm(x, gate_weight, up_weight, chosen), down_weight)
        return y, x.new_empty(0), x.new_empty(0)
    gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
    y = F.linear(torch.ops.pg_kernels.geglu_triton(gate, up), down_weight)
    return (y, gate, up) if keep_projections else (y, x.new_empty(0), x.new_empty(0))


def _geglu_gemm(x: Tensor, gate_weight: Tensor, up_weight: Tensor, chosen: tiles.Tiles) -> Tensor:
    """Return gelu(x · gateᵀ) · (x · upᵀ), [M, F], for x [M, K] and weights [F, K]."""
    from pg_kernels.ops.geglu_mlp import kernels

    x, gate_weight, up_weight = (
        tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (x, gate_weight, up_weight)
    )
    m, k, n = *x.shape, gate_weight.shape[0]
    y = x.new_empty(m, n)
    if not y.numel():
        return y
    with devices.on_device_of(x):
        kernels.geglu_gemm_kernel[(-(-m // chosen.block_m) * -(-n // chosen.block_n),)](
            x_ptr=x,
            gate_ptr=gate_weight,
            up_ptr=up_weight,
            y_ptr=y,
            M=m,
            N=n,
            K=k,
            stride_xm=x.stride(0),
            stride_gate_n=gate_weight.stride(0),
            stride_up_n=up_weight.stride(0),
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            BLOCK_K=chosen.block_k,
            GROUP_M=chosen.group_m,
            EVEN_K=k % chosen.block_k == 0,
            UPCAST=devices.upcasts_dot_operands(x),
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            enable_fp_fusion=True,
        )
    return y
