"""Triton kernels of geglu_mlp. M = tokens, N = hidden units of the MLP, K = inner size: x [M, K], both weights [N, K]."""

from __future__ import annotations

import triton
import triton.language as tl

from pg_kernels.ops._common.jit_functions import gelu


@triton.jit
def geglu_gemm_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_gate_n,
    stride_up_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute a tile [BLOCK_M, BLOCK_N] of gelu(x · gateᵀ) · (x · upᵀ).

    Both products share the loads of x, and neither is written to memory.
    """
    num_blocks_m, num_blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP_M * num_blocks_n)
    group_size = tl.minimum(num_blocks_m - group * GROUP_M, GROUP_M)
    block_m = group * GROUP_M + (program % (GROUP_M * num_blocks_n)) % group_size
    block_n = (program % (GROUP_M * num_blocks_n)) // group_size

    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # Clamp indices past the end: unmasked loads are faster, and these results are never stored.
    clamped_m = tl.minimum(offs_m, M - 1).to(tl.int64)
    clamped_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    x_tile = x_ptr + clamped_m[:, None] * stride_xm + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    gate_tile = gate_ptr + clamped_n[None, :] * stride_gate_n + offs_k[:, None]  # [BLOCK_K, BLOCK_N]
    up_tile = up_ptr + clamped_n[None, :] * stride_up_n + offs_k[:, None]  # [BLOCK_K, BLOCK_N]

    acc_gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        if EVEN_K:
            x, gate, up = tl.load(x_tile + start), tl.load(gate_tile + start), tl.load(up_tile + start)
        else:
            mask = start + offs_k < K
            x = tl.load(x_tile + start, mask=mask[None, :], other=0.0)
            gate = tl.load(gate_tile + start, mask=mask[:, None], other=0.0)
            up = tl.load(up_tile + start, mask=mask[:, None], other=0.0)
        if UPCAST:
            x, gate, up = x.to(tl.float32), gate.to(tl.float32), up.to(tl.float32)
        acc_gate = tl.dot(x, gate, acc_gate, input_precision="ieee")
        acc_up = tl.dot(x, up, acc_up, input_precision="ieee")

    out = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]  # [BLOCK_M, BLOCK_N]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(out, (gelu(acc_gate) * acc_up).to(y_ptr.dtype.element_ty), mask=mask)
