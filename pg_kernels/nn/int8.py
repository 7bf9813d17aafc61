"""Modules with int8 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pg_kernels.ops.int8_linear import int8_linear, pack_int8
from pg_kernels.ops.quantize_int8 import check_group_size, quantize_int8


class _Int8Module(nn.Module):
    """A module with an int8 weight that is not a parameter: frozen, never cast, laid out for its device.

    A state_dict has `weight`, int8 [N, K], and `weight_scale`, fp32 [N] or [N, groups], for every layout.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        group_size: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_group_size(group_size)
        self.group_size = group_size
        with torch.device(torch.get_default_device() if device is None else device):
            self.weight = pack_int8(
                torch.zeros(rows, columns, dtype=torch.int8), torch.zeros(rows, dtype=torch.float32)
            )
        self.weight.dtype = dtype or torch.get_default_dtype()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the output, or of the bias. Modules that share a weight share it."""
        return self.weight.dtype

    def set_weight(self, weight: Tensor, scale: Tensor | None = None) -> None:
        """Set int8 [N, K] with its fp32 scale, or quantise floats [N, K]. The weight moves to their device.

        Raises ValueError for a shape that is not the module's, and what `quantize_int8` and `pack_int8` raise.
        """
        if weight.shape != self.weight.shape:
            raise ValueError(f"weight: expected shape {list(self.weight.shape)}, got {list(weight.shape)}")
        if scale is None:
            weight, scale = quantize_int8(weight, group_size=self.group_size)
        self.weight.replace_(weight, scale)
        if scale.dim() == 1 or scale.shape[1] > 1:  # a single group does not tell its size
            self.group_size = None if scale.dim() == 1 else self.weight.group_size

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device))
        self.weight.move_(moved.device)
        self.weight.dtype = moved.dtype
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"], destination[f"{prefix}weight_scale"] = self.weight.unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        _, _, missing, unexpected, errors = rest
        super()._load_from_state_dict(state_dict, prefix, *rest)  # first, because it calls hooks that may rename keys
        own = (f"{prefix}weight", f"{prefix}weight_scale")
        unexpected[:] = [name for name in unexpected if name not in own]
        weight, scale = (state_dict.get(f"{prefix}{name}") for name in ("weight", "weight_scale"))
        if weight is None:
            missing.append(f"{prefix}weight")
        elif not weight.is_floating_point() and scale is None:
            missing.append(f"{prefix}weight_scale")
        else:
            device = weight.device if self.weight.device.type == "meta" else self.weight.device
            try:
                self.set_weight(weight.detach().to(device), None if scale is None else scale.to(device))
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix}weight cannot be loaded: {error}")


class Int8Linear(_Int8Module):
    """`pg_kernels.int8_linear` as a replacement for nn.Linear. The int8 weight is frozen; input and bias have gradients.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear; the weight starts as zeros, the dtype is the bias's.
        group_size: columns that share a scale in what `set_weight` quantises, a power of two; default: the whole row.
        activations: "keep" or "int8", as for `int8_linear`.

    Raises ValueError for unknown `activations`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group_size: int | None = None,
        activations: str = "keep",
    ) -> None:
        if activations not in ("keep", "int8"):
            raise ValueError(f"activations: got {activations!r}, expected 'keep' or 'int8'")
        super().__init__(out_features, in_features, group_size, device, dtype)
        self.in_features, self.out_features, self.activations = in_features, out_features, activations
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, group_size: int | None = None, activations: str = "keep") -> Int8Linear:
        """Quantise an nn.Linear's weight and share its bias. A weight on the meta device is left unset.

        Raises TypeError and ValueError as `quantize_int8` does for the weight.
        """
        module = cls._replacing(linear, group_size, activations)
        if not linear.weight.is_meta:
            module.set_weight(linear.weight)
        return module

    @classmethod
    def from_torchao(cls, linear: nn.Linear) -> Int8Linear:
        """Copy the int8 weight and scales of an nn.Linear that torchao's `quantize_` has quantised, and share its bias.

        Activations are quantised if torchao quantises them. Raises TypeError for a weight that is not torchao's Int8Tensor,
        ValueError for one that is not symmetric.
        """
        from torchao.quantization import Int8Tensor

        weight = linear.weight.data
        if not isinstance(weight, Int8Tensor):
            raise TypeError(f"linear: expected a weight of torchao's Int8Tensor, got {type(weight).__name__}")
        if weight.zero_point is not None and bool(weight.zero_point.any()):
            raise ValueError("linear: expected symmetric int8, got zero points that are not 0")
        module = cls._replacing(linear, None, "keep" if weight.act_quant_kwargs is None else "int8")
        scale = weight.scale.float().expand(len(weight.qdata), -1)
        module.set_weight(weight.qdata, scale[:, 0] if scale.shape[1] == 1 else scale)
        return module

    def dequantize(self) -> nn.Linear:
        """Return a frozen nn.Linear with the dequantised weight in `dtype` and a copy of the bias."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", self.dtype)
        linear.weight = nn.Parameter(self.weight.dequantize(self.dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)

    @classmethod
    def _replacing(cls, linear: nn.Linear, group_size: int | None, activations: str) -> Int8Linear:
        module = cls(
            linear.in_features,
            linear.out_features,
            False,
            "meta",
            linear.weight.dtype,
            group_size=group_size,
            activations=activations,
        )
        module.bias = linear.bias
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in_features] to [..., out_features]."""
        return int8_linear(x, self.weight, bias=self.bias, activations=self.activations)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, activations={self.activations!r}"
        )


class Int8Embedding(_Int8Module):
    """An nn.Embedding with int8 rows, returned in `dtype`. Its table may also be an Int8Linear's weight.

    Args:
        num_embeddings, embedding_dim, device, dtype: as for nn.Embedding; the rows start as zeros.
        group_size: as for Int8Linear.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group_size: int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, group_size, device, dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, indices: Tensor) -> Tensor:
        """Look up indices [...], int32 or int64, giving [..., embedding_dim]."""
        return self.weight.rows(indices, self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, group_size={self.group_size}"
