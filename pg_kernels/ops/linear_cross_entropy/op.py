from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pg_kernels.backends import register_backend, select
from pg_kernels.ops._common import checks, devices
from pg_kernels.ops._common.autograd import refuse_second_derivative
from pg_kernels.ops._common.registration import define_opaque
from pg_kernels.ops.linear_cross_entropy import reference, tiles

_FORWARD = (
    "Tensor hidden, Tensor weight, Tensor labels, int ignore_index, float? softcap, float label_smoothing, str backend"
)
_BACKWARD = (
    "Tensor grad_losses, Tensor hidden, Tensor weight, Tensor labels, Tensor lses, int ignore_index, float? softcap, "
    "float label_smoothing, str backend, bool needs_hidden, bool needs_weight"
)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Losses [T] and log-sum-exps [T], both fp32; 0 for tokens that do not count."""
    if backend == "reference":
        return reference.forward(hidden, weight, labels, ignore_index, softcap, label_smoothing)
    from pg_kernels.ops.linear_cross_entropy import kernels

    losses, lses = (tensor.zero_() for tensor in _fake_forward(hidden, weight, labels))
    counted = _counted(labels, ignore_index)
    if not len(counted):
        return losses, lses
    rows, weight, targets = hidden[counted], _adjacent(weight), labels[counted]
    (tokens, inner), vocabulary, device = rows.shape, weight.shape[0], devices.device_of(hidden)
    chosen = tiles.choose(tokens, rows.dtype, device)
    token_blocks, word_blocks = -(-tokens // chosen.tokens), -(-vocabulary // chosen.words)
    words_per_split = -(-word_blocks // tiles.splits(token_blocks, word_blocks, device)) * chosen.words
    splits = -(-vocabulary // words_per_split)
    lse_of_splits = losses.new_empty(splits, tokens)
    sum_of_splits = losses.new_empty(splits, tokens) if label_smoothing else None
    picked = losses.new_full((tokens,), float("nan"))
    with devices.on_device_of(hidden):
        kernels.forward[(token_blocks, splits)](
            hidden_ptr=rows,
            weight_ptr=weight,
            labels_ptr=targets,
            lse_ptr=lse_of_splits,
            sum_ptr=sum_of_splits,
            picked_ptr=picked,
            tokens=tokens,
            vocabulary=vocabulary,
            words_per_split=words_per_split,
            inner=inner,
            hidden_stride=rows.stride(0),
            weight_stride=weight.stride(0),
            softcap=softcap,
            TOKENS=chosen.tokens,
            WORDS=chosen.words,
            BLOCK=chosen.inner,
            EVEN=inner % chosen.inner == 0,
            WIDEN=devices.upcasts_dot_operands(rows),
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            enable_fp_fusion=True,
        )
    lse = lse_of_splits.logsumexp(0)
    loss = lse - (1.0 - label_smoothing) * picked
    if sum_of_splits is not None:
        loss -= label_smoothing / vocabulary * sum_of_splits.sum(0)
    loss = loss.where(targets != ignore_index, 0.0)
    return losses.index_copy_(0, counted, loss), lses.index_copy_(0, counted, lse)


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
    """Gradients of hidden [T, D] and weight [V, D]; an unneeded one is empty."""
    if backend == "reference":
        options = (ignore_index, softcap, label_smoothing, needs_hidden, needs_weight)
        return reference.backward(grad_losses, hidden, weight, labels, lses, *options)
    from pg_kernels.ops.linear_cross_entropy import kernels

    counted = _counted(labels, ignore_index)
    rows, weight, targets, lse = hidden[counted], _adjacent(weight), labels[counted], lses[counted]
    scale = reference.label_scale(grad_losses[counted], targets, weight.shape[0]).where(targets != ignore_index, 0.0)
    tokens, inner = rows.shape
    chosen = tiles.choose(tokens, rows.dtype, devices.device_of(hidden))

    def logit_gradients(first: int, last: int) -> Tensor:
        grad = rows.new_empty(tokens, last - first)
        if tokens:
            with devices.on_device_of(rows):
                kernels.logit_gradients[(-(-tokens // chosen.tokens), -(-(last - first) // chosen.words))](
                    hidden_ptr=rows,
                    weight_ptr=weight[first:],
                    labels_ptr=targets,
                    lse_ptr=lse,
                    scale_ptr=scale,
                    grad_ptr=grad,
                    tokens=tokens,
                    words=last - first,
                    first_word=first,
                    inner=inner,
                    hidden_stride=rows.stride(0),
                    weight_stride=weight.stride(0),
                    softcap=softcap,
                    label_smoothing=label_smoothing,
                    smoothing_per_word=label_smoothing / weight.shape[0],
                    TOKENS=chosen.tokens,
                    WORDS=chosen.words,
                    BLOCK=chosen.inner,
                    EVEN=inner % chosen.inner == 0,
                    WIDEN=devices.upcasts_dot_operands(rows),
                    num_warps=chosen.warps,
                    num_stages=chosen.stages,
                    enable_fp_fusion=True,
                )
        return grad

    words = tiles.words_per_chunk(tokens, rows.element_size())
    return reference.gradients_by_words(logit_gradients, words, hidden, counted, weight, needs_hidden, needs_weight)


def _counted(labels: Tensor, ignore_index: int) -> Tensor:
    """Indices of the tokens that count. Their number must be waited for; a CUDA graph, which cannot, takes all tokens."""
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.arange(len(labels), device=labels.device)
    return (labels != ignore_index).nonzero()[:, 0]


def _adjacent(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.contiguous()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            losses, lses = torch.ops.pg_kernels.linear_cross_entropy(hidden, weight, labels, *options)
        ctx.save_for_backward(hidden, weight, labels, lses)
        ctx.options = options
        ctx.mark_non_differentiable(lses)
        return losses, lses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear_cross_entropy")
        needs = ctx.needs_input_grad[:2]
        grads = torch.ops.pg_kernels.linear_cross_entropy_backward(
            grad_losses, *ctx.saved_tensors, *ctx.options, *needs
        )
        return (
            *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)),
            None,
            None,
            None,
            None,
            None,
        )


def _fake_forward(hidden: Tensor, weight: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    losses = hidden.new_empty(labels.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return losses, torch.empty_like(losses)


def _fake_backward(grad_losses: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    needs_hidden, needs_weight = rest[-2:]
    return (
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
    )


register_backend("linear_cross_entropy", "triton", devices.unavailable_reason)
define_opaque(
    f"linear_cross_entropy({_FORWARD}) -> (Tensor, Tensor)", _forward, _fake_forward, _LinearCrossEntropy.apply
)
define_opaque(f"linear_cross_entropy_backward({_BACKWARD}) -> (Tensor, Tensor)", _backward, _fake_backward)


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
    """Cross entropy of hidden · weightᵀ against labels without ever holding the [tokens, V] logits.

    Tokens whose label is ignored cost nothing. Labels are not shifted.

    Args:
        hidden: [..., D], fp32, fp16 or bf16. Under autocast hidden and weight are cast.
        weight: [V, D], the output head, in hidden's dtype.
        labels: [...] as hidden's leading dimensions, int64; in [0, V) or ignore_index.
        ignore_index: the label of tokens that do not count.
        softcap: logits become softcap · tanh(logits / softcap).
        label_smoothing: mass spread evenly over the vocabulary, as in torch.nn.functional.cross_entropy.
        reduction: "mean" over the tokens that count (0 when there are none), "sum", or "none".

    Returns:
        fp32: a scalar, or [...] for "none", 0 where ignored.

    Raises:
        TypeError: hidden or weight not floating-point or of two dtypes, labels not int64.
        ValueError: shapes, devices, reduction, smoothing or softcap that do not fit; a label outside the vocabulary (looked at on
            the CPU only; in a compiled graph and on a GPU it makes the loss NaN).

    Source: Wijmans et al., https://arxiv.org/abs/2411.09009 (the idea of never storing the logits).
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
