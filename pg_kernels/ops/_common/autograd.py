"""Whether autograd or a function transform sees a call, and the error for second derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Return whether gradients (backward or forward mode) or a function transform must see operations on these tensors."""
    recorded = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return recorded or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_function_transformed() -> bool:
    """Return whether a function transform or a tracer is active.

    The choice of an implementation must not depend on tensor values then.
    """
    return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0


def refuse_second_derivative(op: str) -> None:
    """Raise RuntimeError in a backward pass that autograd records (create_graph=True).

    A backward op has no autograd of its own, so terms of the second derivative would be missing silently. `once_differentiable`
    does not suffice: it checks only whether the incoming gradients require gradients.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: it has no second derivative (create_graph=True)")
