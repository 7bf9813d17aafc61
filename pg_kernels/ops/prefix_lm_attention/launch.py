"""Launches of the Triton kernels: outputs, grids, strides, tiles and tensor descriptors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pg_kernels.ops._common import devices
from pg_kernels.ops.prefix_lm_attention import tiles


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    prefix_lens: Tensor | None,
    kv_starts: Tensor | None,
    kv_lens: Tensor | None,
    q_starts: Tensor | None,
    cu_seqlens: Tensor | None,
    int_lengths: Sequence[int],
    causal: bool,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Return out [B, H, Sq, D] (in memory [B, Sq, H, D]) and the scores' lse to base 2, fp32 [B, Hkv, Sq · H / Hkv]."""
    from pg_kernels.ops.prefix_lm_attention import kernels

    out, lse = empty_outputs(q, k)
    if not out.numel():
        return out, lse
    if cu_seqlens is not None:
        out.fill_(float("nan"))  # for tokens that are in no sequence, or beyond max_seqlen
    q, k, v = (_with_adjacent_elements(tensor) for tensor in (q, k, v))
    sizes, device = _sizes(cu_seqlens, int_lengths, q, k, v), devices.device_of(q)
    chosen = tiles.choose("forward", q.shape[3], k.element_size(), sizes.num_rows, device)
    num_row_blocks, num_kv_heads = -(-sizes.num_rows // chosen.block_m), k.shape[1]
    num_splits = 1
    if num_row_blocks == 1 and cu_seqlens is None:
        num_programs = num_row_blocks * sizes.batch * num_kv_heads
        num_splits = tiles.num_splits(num_programs, k.shape[2], chosen.block_n, device)
    partial_out, partial_lse = out, lse
    if num_splits > 1:
        partial_out = out.new_empty(num_splits, *out.transpose(1, 2).shape, dtype=torch.float32).transpose(2, 3)
        partial_lse = lse.new_empty(num_splits, *lse.shape)
    with devices.on_device_of(q):
        kernels.attn_fwd_kernel[(num_row_blocks, sizes.batch * num_kv_heads, num_splits)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            **_tma_descriptors(k, v, chosen),
            k_scale_ptr=k_scale,
            v_scale_ptr=v_scale,
            out_ptr=partial_out,
            lse_ptr=partial_lse,
            **_length_arguments(prefix_lens, kv_starts, kv_lens, q_starts, cu_seqlens, int_lengths),
            q_strides=sizes.strides(q),
            k_strides=sizes.strides(k),
            v_strides=sizes.strides(v),
            scale_strides=(0, 0, 0) if k_scale is None else k_scale.stride(),
            out_strides=(*sizes.strides(partial_out[0] if num_splits > 1 else out), partial_out.stride(0)),
            lse_strides=(*sizes.lse_strides(lse), partial_lse.stride(0)),
            q_len=q.shape[2],
            kv_len=k.shape[2],
            num_kv_heads=num_kv_heads,
            scale=scale,
            softcap=softcap,
            window=window,
            **_constants(q, sizes, chosen),
            NUM_SPLITS=num_splits,
            CAUSAL=causal,
        )
        if num_splits > 1:
            kernels.attn_fwd_combine_kernel[(lse.numel(),)](
                partial_out_ptr=partial_out,
                partial_lse_ptr=partial_lse,
                out_ptr=out,
                lse_ptr=lse,
                partial_strides=(*sizes.strides(partial_out[0]), partial_out.stride(0)),
                out_strides=sizes.strides(out),
                num_rows=sizes.num_rows,
                num_kv_heads=num_kv_heads,
                HEADS_PER_KV=sizes.heads_per_kv,
                STRIDE_UNIT=sizes.stride_unit,
                HEAD_DIM=q.shape[3],
                BLOCK_D=_next_power_of_two(q.shape[3]),
                NUM_SPLITS=num_splits,
                BLOCK_SPLITS=_next_power_of_two(num_splits),
                num_warps=4,
                enable_fp_fusion=True,
            )
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    prefix_lens: Tensor | None,
    kv_starts: Tensor | None,
    kv_lens: Tensor | None,
    q_starts: Tensor | None,
    cu_seqlens: Tensor | None,
    int_lengths: Sequence[int],
    causal: bool,
    scale: float,
    softcap: float | None,
    window: int | None,
    needs_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v. Without `needs_kv` those of k and v are empty."""
    from pg_kernels.ops.prefix_lm_attention import kernels

    grad_q, grad_k, grad_v = empty_gradients(grad_out, q, k, v, needs_kv)
    if not q.numel() or not k.numel() or cu_seqlens is not None:
        for gradient in (grad_q, grad_k, grad_v):
            gradient.zero_()
    if not q.numel() or not k.numel():
        return grad_q, grad_k, grad_v
    grad_out, q, k, v, out = (_with_adjacent_elements(tensor) for tensor in (grad_out, q, k, v, out))
    sizes, device = _sizes(cu_seqlens, int_lengths, q, k, v, grad_out, out), devices.device_of(q)
    delta = torch.empty_like(lse)
    shared_arguments = {
        **_length_arguments(prefix_lens, kv_starts, kv_lens, q_starts, cu_seqlens, int_lengths),
        "grad_out_ptr": grad_out,
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "grad_out_strides": sizes.strides(grad_out),
        "q_strides": sizes.strides(q),
        "k_strides": sizes.strides(k),
        "v_strides": sizes.strides(v),
        "lse_strides": sizes.lse_strides(lse),
        "q_len": q.shape[2],
        "kv_len": k.shape[2],
        "num_kv_heads": k.shape[1],
        "scale": scale,
        "softcap": softcap,
        "window": window,
        "CAUSAL": causal,
    }
    grid_heads = sizes.batch * k.shape[1]
    with devices.on_device_of(q):
        chosen = tiles.choose("backward_dq", q.shape[3], q.element_size(), sizes.num_rows, device)
        kernels.attn_bwd_dq_kernel[(-(-sizes.num_rows // chosen.block_m), grid_heads)](
            **shared_arguments,
            out_ptr=out,
            grad_q_ptr=grad_q,
            out_strides=sizes.strides(out),
            grad_q_strides=sizes.strides(grad_q),
            **_constants(q, sizes, chosen),
        )
        if needs_kv:
            chosen = tiles.choose("backward_dkv", q.shape[3], q.element_size(), sizes.num_rows, device)
            kernels.attn_bwd_dkv_kernel[(-(-sizes.max_kv_len(k) // chosen.block_n), grid_heads)](
                **shared_arguments,
                grad_k_ptr=grad_k,
                grad_v_ptr=grad_v,
                grad_k_strides=sizes.strides(grad_k),
                grad_v_strides=sizes.strides(grad_v),
                **_constants(q, sizes, chosen),
            )
    return grad_q, grad_k, grad_v


def empty_outputs(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Allocate out and lse of `forward`. Takes all its arguments, to be its fake implementation."""
    batch, heads, q_len, head_dim = q.shape
    out = q.new_empty(batch, q_len, heads, head_dim).transpose(1, 2)
    return out, q.new_empty(batch, k.shape[1], q_len * (heads // k.shape[1]), dtype=torch.float32)


def empty_gradients(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the gradients of `backward`. Takes all its arguments, `needs_kv` last, to be its fake implementation."""
    grad_q, grad_k, grad_v = (t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v))
    return (grad_q, grad_k, grad_v) if rest[-1] else (grad_q, q.new_empty(0), q.new_empty(0))


@dataclass(frozen=True)
class _Sizes:
    batch: int
    """Examples; packed sequences count as examples."""
    heads_per_kv: int
    num_rows: int
    """Query rows per KV head: Sq · heads_per_kv; with packed sequences, of the longest one."""
    is_packed: bool
    stride_unit: int
    """A divisor of all strides. The kernels take strides in multiples of it."""

    def strides(self, tensor: Tensor) -> tuple[int, int, int]:
        """Return the strides of batch, head and row, in units. Packed sequences have a batch stride of 0 and use offsets."""
        batch, head, row = (stride // self.stride_unit for stride in tensor.stride()[:3])
        return 0 if self.is_packed else batch, head, row

    def lse_strides(self, lse: Tensor) -> tuple[int, int]:
        """Return the strides of batch and KV head, in elements."""
        return 0 if self.is_packed else lse.stride(0), lse.stride(1)

    def max_kv_len(self, k: Tensor) -> int:
        return self.num_rows // self.heads_per_kv if self.is_packed else k.shape[2]


def _sizes(cu_seqlens: Tensor | None, int_lengths: Sequence[int], q: Tensor, k: Tensor, *others: Tensor) -> _Sizes:
    heads_per_kv = q.shape[1] // k.shape[1]
    strides = [q.shape[3], *(stride for tensor in (q, k, *others) for stride in tensor.stride()[:3])]
    stride_unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    if cu_seqlens is not None:
        return _Sizes(len(cu_seqlens) - 1, heads_per_kv, int_lengths[4] * heads_per_kv, True, stride_unit)
    return _Sizes(q.shape[0], heads_per_kv, q.shape[2] * heads_per_kv, False, stride_unit)


def _length_arguments(
    prefix_lens: Tensor | None,
    kv_starts: Tensor | None,
    kv_lens: Tensor | None,
    q_starts: Tensor | None,
    cu_seqlens: Tensor | None,
    int_lengths: Sequence[int],
) -> dict[str, Any]:
    """Return the lengths as arguments of the kernels, which read the tensors without strides."""
    lengths = {
        "prefix_lens_ptr": prefix_lens,
        "kv_starts_ptr": kv_starts,
        "kv_lens_ptr": kv_lens,
        "q_starts_ptr": q_starts,
        "cu_seqlens_ptr": cu_seqlens,
    }
    arguments: dict[str, Any] = {name: t if t is None else t.contiguous() for name, t in lengths.items()}
    return {**arguments, "int_lengths": tuple(int_lengths[:4])}


def _constants(q: Tensor, sizes: _Sizes, chosen: tiles.Tiles) -> dict[str, Any]:
    block_d, block_d_tail = tiles.head_dim_blocks(q.shape[3], q.element_size())
    return {
        "HEADS_PER_KV": sizes.heads_per_kv,
        "STRIDE_UNIT": sizes.stride_unit,
        "HEAD_DIM": q.shape[3],
        "BLOCK_D": block_d,
        "BLOCK_D_TAIL": block_d_tail,
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "UPCAST": devices.upcasts_dot_operands(q),
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
        "enable_fp_fusion": True,
    }


def _tma_descriptors(k: Tensor, v: Tensor, chosen: tiles.Tiles) -> dict[str, Any]:
    """Return TMA descriptors of k and v, or None for each if the tiles or the tensors' layout rule TMA out."""
    names = ("k_desc", "k_tail_desc", "v_desc", "v_tail_desc")
    if not (chosen.use_tma and all(map(_supports_tma, (k, v)))):
        return dict.fromkeys(names)
    from triton.tools.tensor_descriptor import TensorDescriptor

    blocks = tiles.head_dim_blocks(k.shape[3], k.element_size())
    descriptors = [
        TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, chosen.block_n, block]) if block else None
        for t in (k, v)
        for block in blocks
    ]
    return dict(zip(names, descriptors, strict=True))


def _supports_tma(tensor: Tensor) -> bool:
    """Return whether a tensor is floating-point, every row begins at a multiple of 16 bytes, and no dimension is expanded."""
    strides = [stride * tensor.element_size() for stride in tensor.stride()[:3]]
    is_aligned = tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 and stride > 0 for stride in strides)
    return is_aligned and tensor.is_floating_point()


def _with_adjacent_elements(tensor: Tensor) -> Tensor:
    """Return the tensor, or a contiguous copy if elements along its last dimension are not adjacent."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _next_power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
