"""Which layers may be replaced by one fused product, and how their weights are laid out for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pg_kernels.nn.int8 import Int8Linear
from pg_kernels.ops._common.autograd import needs_autograd
from pg_kernels.ops.int8_linear import int8_projections


def project(x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...]:
    """Return what each linear layer makes of x [..., in_features], computed as one product where possible.

    Int8 layers read and quantise x once. Float layers are one product if `fuse_qkv_` has fused their weights and no
    gradients are needed.
    """
    if not are_plain_int8_linears(layers):
        whole = _fused_weights(x, layers)
        if whole is None:
            return tuple(layer(x) for layer in layers)
        return F.linear(x, *whole).split([layer.out_features for layer in layers], -1)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return int8_projections(x, weights, biases, activations=layers[0].activations)


@torch.no_grad()
def fuse_qkv_(model: nn.Module) -> None:
    """Place the weights of each attention's q_proj, k_proj and v_proj next to each other, so that `project` needs one product.

    Only nn.Linear layers are fused. Parameters stay the same objects with the same values, as parts of one allocation. Moving the
    model undoes the fusion.
    """
    with torch.inference_mode(False):
        for module in model.modules():
            layers = [module._modules.get(name) for name in ("q_proj", "k_proj", "v_proj")]
            if not all(type(layer) is nn.Linear for layer in layers):
                continue
            for name in ("weight", "bias"):
                parts = [getattr(layer, name) for layer in layers]
                alike = all(
                    part is not None and (part.dtype, part.device) == (parts[0].dtype, parts[0].device)
                    for part in parts
                )
                if not alike or _as_one_tensor(parts) is not None:
                    continue
                whole = torch.cat([part.data for part in parts])
                for part, data in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                    part.data = data


def is_plain_linear(layer: nn.Module) -> bool:
    """Return whether `layer` is a plain bias-free nn.Linear, which an op may compute from its `.weight`.

    LoRA layers have a `.weight`, too, and torchao's layers are nn.Linear with a tensor subclass that multiplies differently.
    """
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and not is_traceable_wrapper_subclass(layer.weight)
        and _runs_class_forward(layer)
    )


def is_plain_int8_linear(layer: nn.Module) -> TypeGuard[Int8Linear]:
    """Return whether `layer` is a plain bias-free Int8Linear, which is safe to fuse."""
    return type(layer) is Int8Linear and layer.bias is None and _runs_class_forward(layer)


def are_plain_int8_linears(layers: Sequence[Any]) -> bool:
    """Return whether all layers are plain Int8Linear with the same `activations`."""
    return all(
        type(layer) is Int8Linear and layer.activations == layers[0].activations and _runs_class_forward(layer)
        for layer in layers
    )


def _fused_weights(x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, Tensor | None] | None:
    """Return the weights of fused linear layers, and their biases, as one tensor each; None if they are not fused or watched."""
    plain = all(type(layer) is nn.Linear and _runs_class_forward(layer) for layer in layers)
    if not plain or torch.compiler.is_compiling():
        return None
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if needs_autograd(x, *weights, *biases):
        return None
    weight = _as_one_tensor(weights)
    if weight is None or all(bias is None for bias in biases):
        return None if weight is None else (weight, None)
    bias = None if any(bias is None for bias in biases) else _as_one_tensor(biases)
    return None if bias is None else (weight, bias)


def _as_one_tensor(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return contiguous tensors [n, ...] as one tensor, if each begins in memory where the previous one ends; else None."""
    first = tensors[0]
    if any(type(tensor.data) is not Tensor or tensor.is_meta for tensor in tensors):
        return None  # no memory to look at
    address, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for tensor in tensors:
        alike = (tensor.dtype, tensor.shape[1:]) == (first.dtype, first.shape[1:]) and tensor.is_contiguous()
        if not alike or tensor.data_ptr() != address or tensor.untyped_storage().data_ptr() != storage:
            return None
        address += tensor.nbytes
    return first.detach().as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


def _runs_class_forward(layer: nn.Module) -> bool:
    """Return whether calling `layer` runs only its class's forward.

    Hooks must see the call. Hooks and a replaced forward, such as accelerate's, may load the weight only at the call.
    """
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not hooks and "forward" not in vars(layer)
