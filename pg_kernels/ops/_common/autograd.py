"""Whether autograd or a function transform sees a call, and what a backward pass refuses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether gradients of either kind, or a function transform, must see what happens to these tensors."""
    recorded = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return recorded or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_function_transformed() -> bool:
    """Whether a function transform or a tracer is at work, for which numbers must not decide what runs."""
    return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0


def refuse_second_derivative(op: str) -> None:
    """Raise in a backward pass that is itself recorded: the op below has no autograd, and would leave out terms without a word.

    `once_differentiable` would not do: it looks at the incoming gradients alone.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: it has no second derivative (create_graph=True)")
