"""Whole models in int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from pg_kernels.modes import ACTIVATIONS
from pg_kernels.nn import Int8Embedding, Int8Linear
from pg_kernels.ops._common.checks import values_are_free
from pg_kernels.ops.quantize_int8 import check_group_size

Model = TypeVar("Model", bound=nn.Module)


def quantize_(
    model: Model,
    mode: str = "int8",
    *,
    group_size: int | None = None,
    skip: Callable[[str, nn.Module], bool] | None = None,
) -> Model:
    """Replace the linear layers of a model by int8 layers, in place. Each float weight is freed as soon as it is replaced.

    Every nn.Linear becomes an `Int8Linear`. An nn.Embedding that shares an nn.Linear's weight becomes an `Int8Embedding` that
    shares the int8 weight. Subclasses, other modules, and the layers of an nn.TransformerEncoderLayer stay as they are.

    Args:
        model: a module that contains linear layers.
        mode: "int8" keeps activations (W8A16); "int8-dynamic" rounds them to int8 by token, too (W8A8).
        group_size: columns that share a scale, a power of two; default: one scale for every row.
        skip: called with each layer's name and the layer; if it returns true, the layer stays float.

    Returns:
        The model.

    Raises:
        TypeError: a model that is not an nn.Module, a group size that is not an int.
        ValueError: an unknown mode, a group size that is not a power of two, weights with NaN or infinity, or a model that is an
            nn.Linear itself (use `Int8Linear.from_linear`). Nothing has been replaced then.
    """
    if not isinstance(mode, str) or mode not in ACTIVATIONS:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
    check_group_size(group_size)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if type(model) is nn.Linear:
        raise ValueError("model: a linear layer cannot replace itself; use Int8Linear.from_linear")
    linears: dict[nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        owner = model.get_submodule(name.rpartition(".")[0])
        if type(module) is not nn.Linear or isinstance(owner, nn.TransformerEncoderLayer):
            continue  # it passes its layers' weights to a fused PyTorch kernel
        if skip is None or not skip(name, module):
            linears.setdefault(module, []).append(name)
    for linear, names in linears.items():
        weight = linear.weight.detach()
        # The largest magnitude is finite if all weights are: one pass.
        if (
            weight.numel()
            and values_are_free(weight)
            and not bool(torch.linalg.vector_norm(weight, torch.inf).isfinite())
        ):
            raise ValueError(f"{names[0]}.weight: holds NaN or infinity, which int8 cannot")
    total = sum(linear.weight.nbytes for linear in linears)
    with tqdm(
        total=total, desc="quantising", unit="B", unit_scale=True, unit_divisor=1024, delay=1.0, disable=None
    ) as bar:
        while linears:
            linear, names = linears.popitem()
            module = Int8Linear.from_linear(linear, group_size=group_size, activations=ACTIVATIONS[mode])
            for name in names:
                _replace(model, name, module)
            for embedding in [other for other in model.modules() if _shares_weight(other, linear)]:
                rows = _embedding(embedding, module)
                for name, other in list(model.named_modules(remove_duplicate=False)):
                    if other is embedding:
                        _replace(model, name, rows)
                del embedding, other
            bar.update(linear.weight.nbytes)
    return model


def _shares_weight(module: nn.Module, linear: nn.Linear) -> bool:
    return type(module) is nn.Embedding and module.weight is linear.weight and module.max_norm is None


def _embedding(embedding: Any, linear: Int8Linear) -> Int8Embedding:
    """Return the replacement of an embedding: an `Int8Embedding` with the weight of the layer that it is tied to."""
    size = (embedding.num_embeddings, embedding.embedding_dim)
    module = Int8Embedding(*size, "meta", embedding.weight.dtype, group_size=linear.group_size)
    module.weight = linear.weight
    return module.train(embedding.training)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
