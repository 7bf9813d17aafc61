"""The public function geglu, and registration with PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pg_kernels.backends import register_backend, select
from pg_kernels.ops._common import checks, devices, extension
from pg_kernels.ops._common.autograd import refuse_second_derivative
from pg_kernels.ops._common.registration import define_composite, define_opaque
from pg_kernels.ops.geglu import cpu, launch, reference


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Apply a gated linear unit with the tanh form of GELU elementwise: gelu_tanh(gate) · up.

    Args:
        gate, up: of one shape [...] and dtype: fp32, fp16 or bf16.

    Returns:
        A new tensor of that shape and dtype.

    Raises:
        TypeError: a dtype is not floating-point, or the dtypes differ.
        ValueError: shapes or devices differ.

    Source: Shazeer, https://arxiv.org/abs/2002.05202.
    """
    checks.check_tensor(gate=gate)
    checks.check_float(gate=gate, up=up)
    checks.check_shape("up", up, list(gate.shape), " (gate's)")
    checks.check_same(gate=gate, up=up)
    unsupported = {"triton": devices.unsupported_reason(gate), "native": extension.unsupported_reason(gate)}
    backend = select("geglu", gate.device.type, unsupported)
    if backend == "reference":
        return torch.ops.pg_kernels.geglu(gate, up)
    return getattr(torch.ops.pg_kernels, f"geglu_{backend}")(gate, up)


def _fake_forward(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor, with_product: bool) -> tuple[Tensor, Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape), gate.new_empty(gate.shape if with_product else 0)


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, gate: Tensor, up: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y = getattr(torch.ops.pg_kernels, f"geglu_{backend}")(gate, up)
        ctx.backend = backend
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("geglu")
        _, needs_gate, needs_up = ctx.needs_input_grad
        op = getattr(torch.ops.pg_kernels, f"geglu_{ctx.backend}_backward")
        grad_gate, grad_up, _ = op(grad, *ctx.saved_tensors, False)
        return None, grad_gate if needs_gate else None, grad_up if needs_up else None


register_backend("geglu", "triton", devices.unavailable_reason)
register_backend("geglu", "native", extension.unavailable_reason)
define_composite("geglu(Tensor gate, Tensor up) -> Tensor", reference.geglu)
for _backend, _implementation in {"triton": launch, "native": cpu}.items():
    define_opaque(
        f"geglu_{_backend}(Tensor gate, Tensor up) -> Tensor",
        _implementation.forward,
        _fake_forward,
        partial(_GeGLU.apply, _backend),
    )
    define_opaque(
        f"geglu_{_backend}_backward(Tensor grad, Tensor gate, Tensor up, bool with_product) -> (Tensor, Tensor, Tensor)",
        _implementation.backward,
        _fake_backward,
    )
