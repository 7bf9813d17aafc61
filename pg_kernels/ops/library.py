"""The `torch.ops.pg_kernels` namespace that every op registers itself in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("pg_kernels", "DEF")


def define_composite(schema: str, definition: Callable[..., Any]) -> None:
    """Register an op by its plain PyTorch definition, from which autograd, fake tensors and torch.compile derive theirs."""
    LIBRARY.define(schema)
    LIBRARY.impl(schema.partition("(")[0], definition, "CompositeImplicitAutograd")


def define_opaque(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
) -> None:
    """Register an op that torch.compile must not look into: its implementation, its shapes, and its autograd kernel."""
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pg_kernels::{name}", fake, lib=LIBRARY)
    if autograd is not None:
        LIBRARY.impl(name, autograd, "Autograd")


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether gradients of either kind, or a function transform, must see what happens to these tensors."""
    recorded = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return recorded or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_transformed() -> bool:
    """Whether a function transform or a tracer is at work, for which numbers must not decide what runs."""
    return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0


def refuse_second_derivative(op: str) -> None:
    """Raise in a backward pass that is itself recorded: the op below has no autograd, and would leave out terms without a word.

    `once_differentiable` would not do: it looks at the incoming gradients alone.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: it has no second derivative (create_graph=True)")
