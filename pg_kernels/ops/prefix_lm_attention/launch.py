"""Launches of the Triton kernels: grids, strides, tiles and descriptors."""

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
    lengths: Sequence[int],
    causal: bool,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, Sq, D], laid out as [B, Sq, H, D], and the log-sum-exp to base 2 [B, Hkv, Sq · H / Hkv]."""
    from pg_kernels.ops.prefix_lm_attention import kernels

    out, lse = fake_forward(q, k)
    if not out.numel():
        return out, lse
    if cu_seqlens is not None:
        out.fill_(float("nan"))  # tokens outside all sequences, or past max_seqlen, are never stored
    q, k, v = (_with_adjacent_columns(tensor) for tensor in (q, k, v))
    sizes, device = _sizes(cu_seqlens, lengths, q, k, v), devices.device_of(q)
    chosen = tiles.choose("forward", q.shape[3], k.element_size(), sizes.num_rows, device)
    row_blocks = -(-sizes.num_rows // chosen.block_m)
    programs = row_blocks * sizes.batch * k.shape[1]
    num_splits = (
        1
        if row_blocks > 1 or cu_seqlens is not None
        else tiles.num_splits(programs, k.shape[2], chosen.block_n, device)
    )
    partial_out, partial_lse = out, lse
    if num_splits > 1:
        partial_out, partial_lse = (
            t.new_empty(num_splits, *t.shape, dtype=torch.float32) for t in (out.transpose(1, 2), lse)
        )
        partial_out = partial_out.transpose(2, 3)
    with devices.on_device_of(q):
        kernels.attn_fwd_kernel[(row_blocks, sizes.batch * k.shape[1], num_splits)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            **_descriptors(k, v, chosen),
            k_scale_ptr=k_scale,
            v_scale_ptr=v_scale,
            out_ptr=partial_out,
            lse_ptr=partial_lse,
            **_length_arguments(prefix_lens, kv_starts, kv_lens, q_starts, cu_seqlens, lengths),
            q_strides=sizes.strides(q),
            k_strides=sizes.strides(k),
            v_strides=sizes.strides(v),
            scale_strides=(0, 0, 0) if k_scale is None else k_scale.stride(),
            out_strides=(*sizes.strides(partial_out[0] if num_splits > 1 else partial_out), partial_out.stride(0)),
            lse_strides=(*sizes.lse_strides(lse), partial_lse.stride(0)),
            q_len=q.shape[2],
            kv_len=k.shape[2],
            kv_heads=k.shape[1],
            scale=scale,
            softcap=softcap,
            window=window,
            **_constants(q, sizes, chosen),
            NUM_SPLITS=num_splits,
            CAUSAL=causal,
        )
        if num_splits > 1:
            kernels.attn_combine_kernel[(lse.numel(),)](
                partial_out_ptr=partial_out,
                partial_lse_ptr=partial_lse,
                out_ptr=out,
                lse_ptr=lse,
                partial_out_strides=(*sizes.strides(partial_out[0]), partial_out.stride(0)),
                out_strides=sizes.strides(out),
                num_rows=sizes.num_rows,
                kv_heads=k.shape[1],
                HEADS_PER_KV=sizes.heads_per_kv,
                STRIDE_UNIT=sizes.stride_unit,
                HEAD_DIM=q.shape[3],
                BLOCK_D=_power_of_two(q.shape[3]),
                NUM_SPLITS=num_splits,
                BLOCK_SPLITS=_power_of_two(num_splits),
                num_warps=4,
                enable_fp_fusion=True,
            )
    return out, lse


def backward(
    grad: Tensor,
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
    lengths: Sequence[int],
    causal: bool,
    scale: float,
    softcap: float | None,
    window: int | None,
    needs_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v. Without `needs_kv` those of k and v are empty."""
    from pg_kernels.ops.prefix_lm_attention import kernels

    grad_q, grad_k, grad_v = fake_backward(grad, q, k, v, needs_kv)
    if not q.numel() or not k.numel() or cu_seqlens is not None:
        for gradient in (grad_q, grad_k, grad_v):
            gradient.zero_()
    if not q.numel() or not k.numel():
        return grad_q, grad_k, grad_v
    grad, q, k, v, out = (_with_adjacent_columns(tensor) for tensor in (grad, q, k, v, out))
    sizes, device = _sizes(cu_seqlens, lengths, q, k, v, grad, out), devices.device_of(q)
    delta = torch.empty_like(lse)
    common = {
        **_length_arguments(prefix_lens, kv_starts, kv_lens, q_starts, cu_seqlens, lengths),
        "grad_out_ptr": grad,
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "grad_out_strides": sizes.strides(grad),
        "q_strides": sizes.strides(q),
        "k_strides": sizes.strides(k),
        "v_strides": sizes.strides(v),
        "lse_strides": sizes.lse_strides(lse),
        "q_len": q.shape[2],
        "kv_len": k.shape[2],
        "kv_heads": k.shape[1],
        "scale": scale,
        "softcap": softcap,
        "window": window,
        "CAUSAL": causal,
    }
    programs = sizes.batch * k.shape[1]
    with devices.on_device_of(q):
        chosen = tiles.choose("backward_dq", q.shape[3], q.element_size(), sizes.num_rows, device)
        kernels.attn_bwd_dq_kernel[(-(-sizes.num_rows // chosen.block_m), programs)](
            **common,
            out_ptr=out,
            grad_q_ptr=grad_q,
            out_strides=sizes.strides(out),
            grad_q_strides=sizes.strides(grad_q),
            **_constants(q, sizes, chosen),
        )
        if needs_kv:
            chosen = tiles.choose("backward_dkv", q.shape[3], q.element_size(), sizes.num_rows, device)
            kernels.attn_bwd_dkv_kernel[(-(-sizes.longest_kv(k) // chosen.block_n), programs)](
                **common,
                grad_k_ptr=grad_k,
                grad_v_ptr=grad_v,
                grad_k_strides=sizes.strides(grad_k),
                grad_v_strides=sizes.strides(grad_v),
                **_constants(q, sizes, chosen),
            )
    return grad_q, grad_k, grad_v


@dataclass(frozen=True)
class _Sizes:
    """Sizes of one call, and strides as the kernels take them."""

    batch: int
    heads_per_kv: int
    """Query heads that share a KV head."""
    num_rows: int
    """Query rows per KV head: `q_len * heads_per_kv`; with packed sequences, of the longest one."""
    packed: bool
    stride_unit: int
    """All strides are multiples of it; the kernels take strides in this unit."""

    def strides(self, tensor: Tensor) -> tuple[int, int, int]:
        """Return the strides of batch, head and row. Packed sequences have one batch: their rows start at offsets."""
        batch, head, row = (stride // self.stride_unit for stride in tensor.stride()[:3])
        return 0 if self.packed else batch, head, row

    def lse_strides(self, lse: Tensor) -> tuple[int, int]:
        """Return the strides of batch and KV head, in elements."""
        return 0 if self.packed else lse.stride(0), lse.stride(1)

    def longest_kv(self, k: Tensor) -> int:
        """Return the number of keys, of the longest sequence if several are packed."""
        return self.num_rows // self.heads_per_kv if self.packed else k.shape[2]


def _sizes(cu_seqlens: Tensor | None, lengths: Sequence[int], q: Tensor, k: Tensor, *others: Tensor) -> _Sizes:
    group, packed = q.shape[1] // k.shape[1], cu_seqlens is not None
    batch = len(cu_seqlens) - 1 if cu_seqlens is not None else q.shape[0]
    strides = [q.shape[3], *(stride for tensor in (q, k, *others) for stride in tensor.stride()[:3])]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return _Sizes(batch, group, (lengths[4] if packed else q.shape[2]) * group, packed, unit)


def _length_arguments(
    prefix_lens: Tensor | None,
    kv_starts: Tensor | None,
    kv_lens: Tensor | None,
    q_starts: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Sequence[int],
) -> dict[str, Any]:
    tensors = {
        "prefix_lens_ptr": prefix_lens,
        "kv_starts_ptr": kv_starts,
        "kv_lens_ptr": kv_lens,
        "q_starts_ptr": q_starts,
        "cu_seqlens_ptr": cu_seqlens,
    }
    return {
        **{name: None if tensor is None else tensor.contiguous() for name, tensor in tensors.items()},
        "lengths": tuple(lengths[:4]),
    }


def _constants(q: Tensor, sizes: _Sizes, chosen: tiles.Tiles) -> dict[str, Any]:
    block_d0, block_d1 = tiles.head_blocks(q.shape[3], q.element_size())
    return {
        "HEADS_PER_KV": sizes.heads_per_kv,
        "STRIDE_UNIT": sizes.stride_unit,
        "HEAD_DIM": q.shape[3],
        "BLOCK_D0": block_d0,
        "BLOCK_D1": block_d1,
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "UPCAST": devices.upcasts_dot_operands(q),
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
        "enable_fp_fusion": True,
    }


def _descriptors(k: Tensor, v: Tensor, chosen: tiles.Tiles) -> dict[str, Any]:
    """Return the TMA descriptors of k and v, or None for each if the tensors' layout rules TMA out."""
    names = ("k_descriptor0", "k_descriptor1", "v_descriptor0", "v_descriptor1")
    if not (chosen.use_descriptors and all(map(_is_describable, (k, v)))):
        return dict.fromkeys(names)
    from triton.tools.tensor_descriptor import TensorDescriptor

    widths = tiles.head_blocks(k.shape[3], k.element_size())
    given = [
        TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, chosen.block_n, width]) if width else None
        for t in (k, v)
        for width in widths
    ]
    return dict(zip(names, given, strict=True))


def _is_describable(tensor: Tensor) -> bool:
    """Return whether TMA can load a tensor: floating-point, rows at multiples of 16 bytes, no expanded dimension."""
    strides = [stride * tensor.element_size() for stride in tensor.stride()[:3]]
    aligned = tensor.data_ptr() % 16 == 0 and all(stride % 16 == 0 and stride > 0 for stride in strides)
    return aligned and tensor.is_floating_point()


def _with_adjacent_columns(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def fake_forward(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, dim = q.shape
    out = q.new_empty(batch, q_len, heads, dim).transpose(1, 2)
    return out, q.new_empty(batch, k.shape[1], q_len * (heads // k.shape[1]), dtype=torch.float32)


def fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v))
    return (grad_q, grad_k, grad_v) if rest[-1] else (grad_q, q.new_empty(0), q.new_empty(0))
