"""The `torch.ops.pg_kernels` namespace in which every op is registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("pg_kernels", "DEF")


def define_composite(schema: str, definition: Callable[..., Any]) -> None:
    """Register an op that is made of PyTorch ops. Autograd, fake tensors and torch.compile look through it."""
    LIBRARY.define(schema)
    LIBRARY.impl(schema.partition("(")[0], definition, "CompositeImplicitAutograd")


def define_opaque(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
) -> None:
    """Register an op that torch.compile must not look into.

    `fake` returns empty outputs of the right shapes and dtypes. `autograd` is the op's kernel for tensors that require gradients.
    """
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pg_kernels::{name}", fake, lib=LIBRARY)
    if autograd is not None:
        LIBRARY.impl(name, autograd, "Autograd")
