"""The public function linear_cross_entropy, and registration with PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pg_kernels.backends import register_backend, select
from pg_kernels.ops._common import checks, devices
from pg_kernels.ops._common.autograd import refuse_second_derivative
from pg_kernels.ops._common.registration import define_opaque
from pg_kernels.ops.linear_cross_entropy import launch, reference


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Compute the cross entropy of hidden · weightᵀ against labels without materialising the [tokens, V] logits.

    Ignored tokens cost nothing. Labels are not shifted.

    Args:
        hidden: [..., D], fp32, fp16 or bf16. Under autocast hidden and weight are cast.
        weight: [V, D], the output head, in hidden's dtype.
        labels: [...] (hidden's leading dimensions), int64, in [0, V) or ignore_index.
        ignore_index: the label of tokens that do not count.
        softcap: replace logits by softcap · tanh(logits / softcap).
        label_smoothing: probability in [0, 1) that is spread evenly over the vocabulary, as in
            torch.nn.functional.cross_entropy.
        reduction: "mean" over the tokens that count (0 if there are none), "sum" or "none".

    Returns:
        The loss in fp32: a scalar, or [...] for "none", with 0 where ignored.

    Raises:
        TypeError: hidden or weight is not floating-point, their dtypes differ, or labels are not int64.
        ValueError: shapes or devices do not match, reduction, label_smoothing or softcap is invalid, or a label is outside the
            vocabulary. Labels are checked on the CPU only. On a GPU and in a compiled graph such a label makes the loss NaN.

    Source: Wijmans et al., https://arxiv.org/abs/2411.09009 (the idea of not storing the logits).
    """
    checks.check_float(hidden=hidden, weight=weight)
    checks.check_row("hidden", hidden)
    checks.check_shape("weight", weight, ["V", hidden.shape[-1]], " (D is hidden's last dimension)")
    if weight.shape[0] == 0:
        raise ValueError("weight: the vocabulary is empty")
    checks.check_shape("labels", labels, list(hidden.shape[:-1]), " (hidden's leading dimensions)")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {labels.dtype}")
    checks.check_device(hidden=hidden, weight=weight, labels=labels)
    checks.check_positive(softcap=softcap)
    checks.check_int(ignore_index=ignore_index)
    checks.check_number(label_smoothing=label_smoothing)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean', 'sum' or 'none'")
    if checks.values_are_free(labels):
        wrong = labels[((labels < 0) | (labels >= weight.shape[0])) & (labels != ignore_index)]
        if len(wrong):
            raise ValueError(
                f"labels: {int(wrong[0])} is neither in [0, {weight.shape[0]}) nor ignore_index {ignore_index}"
            )
    hidden, weight = checks.autocast(hidden, weight)
    checks.check_same(hidden=hidden, weight=weight)
    backend = select("linear_cross_entropy", hidden.device.type, {"triton": devices.unsupported_reason(hidden)})
    losses, _ = torch.ops.pg_kernels.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        ignore_index,
        softcap,
        label_smoothing,
        backend,
    )
    if reduction == "none":
        return losses.reshape(labels.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum().clamp(min=1)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    implementation = reference if backend == "reference" else launch
    return implementation.forward(hidden, weight, labels, ignore_index, softcap, label_smoothing)


def _backward(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lses: Tensor,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    backend: str,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    implementation = reference if backend == "reference" else launch
    options = (ignore_index, softcap, label_smoothing, needs_hidden, needs_weight)
    return implementation.backward(grad_losses, hidden, weight, labels, lses, *options)


def _fake_forward(hidden: Tensor, weight: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    losses = hidden.new_empty(labels.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return losses, torch.empty_like(losses)


def _fake_backward(grad_losses: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    needs_hidden, needs_weight = rest[-2:]
    return (
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            losses, lses = torch.ops.pg_kernels.linear_cross_entropy(hidden, weight, labels, *options)
        ctx.options = options
        ctx.save_for_backward(hidden, weight, labels, lses)
        ctx.mark_non_differentiable(lses)
        return losses, lses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_cross_entropy")
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        grad_hidden, grad_weight = torch.ops.pg_kernels.linear_cross_entropy_backward(
            grad_losses, *ctx.saved_tensors, *ctx.options, needs_hidden, needs_weight
        )
        return (
            grad_hidden if needs_hidden else None,
            grad_weight if needs_weight else None,
            None,
            None,
            None,
            None,
            None,
        )


_FORWARD_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor labels, int ignore_index, float? softcap, float label_smoothing, str backend"
)
_BACKWARD_ARGUMENTS = (
    "Tensor grad_losses, Tensor hidden, Tensor weight, Tensor labels, Tensor lses, int ignore_index, float? softcap, "
    "float label_smoothing, str backend, bool needs_hidden, bool needs_weight"
)
register_backend("linear_cross_entropy", "triton", devices.unavailable_reason)
define_opaque(
    f"linear_cross_entropy({_FORWARD_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _LinearCrossEntropy.apply,
)
define_opaque(f"linear_cross_entropy_backward({_BACKWARD_ARGUMENTS}) -> (Tensor, Tensor)", _backward, _fake_backward)
