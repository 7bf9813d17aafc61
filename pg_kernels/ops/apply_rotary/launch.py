"""Launches of the rotary kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pg_kernels.ops._common import devices
from pg_kernels.ops.apply_rotary import tiles


def rotate(q: Tensor, k: Tensor, positions: Tensor, theta: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return q and k rotated by their positions [B or 1, S], or back with `inverse`."""
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    _launch((q, k, None), positions, theta, (q_out, k_out, None), None, inverse=inverse)
    return q_out, k_out


def rotate_to_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    theta: float,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_positions: Tensor,
) -> Tensor:
    """Return the rotated q [B, H, S, D]; write the rotated k and v into the caches."""
    q_out = torch.empty_like(q)
    _launch((q, k, v), positions, theta, (q_out, k_cache, v_cache), cache_positions, inverse=False)
    return q_out


def _launch(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    positions: Tensor,
    theta: float,
    outputs: tuple[Tensor, Tensor, Tensor | None],
    cache_positions: Tensor | None,
    *,
    inverse: bool,
) -> None:
    from pg_kernels.ops.apply_rotary import kernels

    (q, k, v), (q_out, k_out, v_out) = inputs, outputs
    batch, q_heads, seq_len, head_dim = q.shape
    num_tokens, num_heads = batch * seq_len, q_heads + k.shape[1]
    if not num_tokens or not num_heads:
        return
    exponent_step = -2.0 / head_dim * math.log2(theta)
    rounded_step = _round_to_12_bits(exponent_step)
    device = devices.device_of(q)
    chosen = tiles.choose(head_dim, device)
    num_blocks = -(-num_tokens // chosen.block_m)
    heads_per_program = tiles.heads_per_program(num_blocks, num_heads, device)
    with devices.on_device_of(q):
        kernels.rotary_kernel[(num_blocks, -(-num_heads // heads_per_program))](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            positions_ptr=positions,
            cache_positions_ptr=cache_positions,
            q_out_ptr=q_out,
            k_out_ptr=k_out,
            v_out_ptr=v_out,
            num_tokens=num_tokens,
            seq_len=seq_len,
            capacity=k_out.shape[2],
            heads_per_program=heads_per_program,
            q_strides=q.stride(),
            k_strides=k.stride(),
            v_strides=(k if v is None else v).stride(),
            positions_strides=_strides(positions, batch),
            cache_positions_strides=(0, 0) if cache_positions is None else _strides(cache_positions, batch),
            q_out_strides=q_out.stride(),
            k_out_strides=k_out.stride(),
            v_out_strides=(k_out if v_out is None else v_out).stride(),
            exponent_step=rounded_step,
            exponent_step_rest=exponent_step - rounded_step,
            Q_HEADS=q_heads,
            K_HEADS=k.shape[1],
            HEAD_DIM=head_dim,
            BLOCK_M=chosen.block_m,
            BLOCK_D=chosen.block_d,
            INVERSE=inverse,
            num_warps=chosen.num_warps,
            enable_fp_fusion=True,
        )


def _round_to_12_bits(number: float) -> float:
    """Round to 12 bits: the product with an integer of up to 12 bits is then exact in fp32."""
    mantissa, exponent = math.frexp(number)
    return math.ldexp(round(mantissa * 4096), exponent - 12)


def _strides(numbers: Tensor, batch: int) -> tuple[int, int]:
    """Return the strides of numbers [B or 1, S] over B and S."""
    return numbers.expand(batch, -1).stride()  # type: ignore[return-value]
