from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_accurate,
    assert_any_layout,
    assert_autocasts,
    assert_compiles,
    assert_frozen_inputs,
    assert_pure,
    assert_same,
    every_other,
    leaves,
    randn,
    run,
)
from torch import Tensor

from pg_kernels import backend as use_backend
from pg_kernels import linear_cross_entropy
from pg_kernels.ops.linear_cross_entropy import reference, tiles

OP = "linear_cross_entropy"
VOCABULARY = 33


def definition(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Compute the loss from log-probabilities, one token at a time."""
    rows, tokens = hidden.reshape(-1, hidden.shape[-1]), labels.flatten().tolist()
    losses = []
    for row, label in zip(rows, tokens, strict=True):
        if label == ignore_index:
            losses.append((row * 0).sum())
            continue
        logits = weight @ row
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_probabilities = logits - logits.exp().sum().log()
        losses.append(
            -(1 - label_smoothing) * log_probabilities[label] - label_smoothing / len(weight) * log_probabilities.sum()
        )
    each = torch.stack(losses) if losses else rows.sum(-1)
    if reduction == "none":
        return each.reshape(labels.shape)
    total = each.sum() + weight.sum() * 0
    return total if reduction == "sum" else total / max(1, sum(label != ignore_index for label in tokens))


def inputs_of(
    rows: tuple[int, ...], device: str, *, dim: int = 16, vocabulary: int = VOCABULARY
) -> tuple[list[Tensor], Tensor]:
    """Draw hidden and weight, and labels of which about a quarter are ignored."""
    labels = torch.randint(0, vocabulary, rows)
    labels[torch.rand(rows) < 0.25] = -100
    return [randn(*rows, dim, device=device), randn(vocabulary, dim, device=device) / dim**0.5], labels.to(device)


@pytest.fixture(params=[None, 1, 3 * VOCABULARY], ids=["one_chunk", "chunks_of_1", "chunks_of_3"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(reference, "CHUNK_ELEMENTS", request.param)
        monkeypatch.setattr(tiles, "CHUNK_BYTES", request.param)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"softcap": 1.5},
    {"label_smoothing": 0.3},
    {"ignore_index": 5},
    {"softcap": 2.0, "label_smoothing": 0.1, "reduction": "sum", "ignore_index": 0},
]


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", [(10,), (2, 5)], ids=str)
def test_values_and_gradients(
    device: str, backend: str, dtype: torch.dtype, rows: tuple[int, ...], options: dict[str, Any]
) -> None:
    inputs, labels = inputs_of(rows, device)
    labels = labels.where(labels != -100, options.get("ignore_index", -100))

    def op(hidden: Tensor, weight: Tensor) -> Tensor:
        loss = linear_cross_entropy(hidden, weight, labels, **options)
        assert loss.dtype == torch.float32
        return loss.to(dtype)  # assert_accurate compares in the definition's dtype

    assert_accurate(op, lambda hidden, weight: definition(hidden, weight, labels, **options), inputs, dtype)


@pytest.mark.parametrize(
    "sizes", [{"vocabulary": 1}, {"vocabulary": 1000, "dim": 72}, {"vocabulary": 257, "dim": 1}], ids=str
)
@pytest.mark.parametrize("rows", [(), (1,), (130,), (0,), (2, 0)], ids=str)
def test_sizes(device: str, backend: str, rows: tuple[int, ...], sizes: dict[str, int]) -> None:
    inputs, labels = inputs_of(rows, device, **sizes)
    assert_accurate(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, label_smoothing=0.1),
        lambda hidden, weight: definition(hidden, weight, labels, label_smoothing=0.1),
        inputs,
        torch.float32,
    )


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("ignore_index", [-100, 3, -1])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_matches_torch(device: str, backend: str, ignore_index: int, label_smoothing: float, reduction: str) -> None:
    inputs, labels = inputs_of((12,), device)
    labels = labels.where(labels != -100, ignore_index)
    options: dict[str, Any] = dict(ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
    assert_same(
        run(lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, **options), inputs),
        run(lambda hidden, weight: F.cross_entropy(hidden @ weight.T, labels, **options), inputs),
    )


def test_chunked_reference_equals_the_definition() -> None:
    """reference.linear_cross_entropy, which holds all logits, defines the op. The reference backend computes in chunks."""
    (hidden, weight), labels = inputs_of((12,), "cpu")
    for softcap, smoothing in itertools.product((None, 2.0), (0.0, 0.2)):
        each = reference.linear_cross_entropy(hidden, weight, labels, -100, softcap, smoothing)
        chunked, _ = reference.forward(hidden, weight, labels, -100, softcap, smoothing)
        torch.testing.assert_close(chunked, each)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [(6,), (0,)], ids=["all_ignored", "no_tokens"])
def test_no_token_counts(device: str, backend: str, dtype: torch.dtype, rows: tuple[int, ...], reduction: str) -> None:
    inputs, labels = inputs_of(rows, device)
    labels.fill_(-100)
    outputs, gradients = run(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, reduction=reduction),
        [tensor.to(dtype) for tensor in inputs],
    )
    assert outputs[0].shape == (labels.shape if reduction == "none" else ())
    for tensor in (*outputs, *gradients):
        assert not tensor.any()


def test_ignored_tokens_touch_nothing(device: str, backend: str) -> None:
    """The hidden states of ignored tokens may be NaN."""
    (hidden, weight), labels = inputs_of((10,), device)
    ignored = labels == -100
    assert ignored.any()
    _, (expected_hidden, expected_weight) = run(lambda h, w: linear_cross_entropy(h, w, labels), [hidden, weight])
    expected = linear_cross_entropy(hidden, weight, labels)
    hidden[ignored] = float("nan")
    outputs, gradients = run(lambda h, w: linear_cross_entropy(h, w, labels), [hidden, weight])
    assert_same((outputs, gradients), ([expected], [expected_hidden, expected_weight]))
    assert not gradients[0][ignored].any()


def test_large_logits(device: str, backend: str) -> None:
    """exp(1000) overflows even in fp64."""
    hidden, weight = torch.eye(4, device=device) * 1000, torch.eye(4, device=device)
    labels = torch.tensor([0, 1, 2, 0], device=device)
    losses = linear_cross_entropy(hidden, weight, labels, reduction="none")
    torch.testing.assert_close(losses, torch.tensor([0.0, 0.0, 0.0, 1000.0], device=device))


@pytest.mark.usefixtures("chunks")
def test_tied_embedding(device: str, backend: str) -> None:
    """A parameter that is both embedding and head gets the sum of both gradients."""
    _, labels = inputs_of((10,), device)
    tokens = torch.randint(0, VOCABULARY, (10,), device=device)
    weight = randn(VOCABULARY, 16, device=device)
    assert_same(
        run(lambda w: linear_cross_entropy(F.embedding(tokens, w), w, labels), [weight]),
        run(lambda w: definition(F.embedding(tokens, w), w, labels), [weight]),
    )


def test_one_tensor_in_two_places(device: str, backend: str) -> None:
    weight, labels = randn(16, 16, device=device), torch.arange(16, device=device)
    assert_same(
        run(lambda w: linear_cross_entropy(w, w, labels), [weight]),
        run(lambda w: linear_cross_entropy(w, w.clone(), labels), [weight]),
    )


def largest_allocation(device: str, step: Callable[[], None]) -> int:
    """Return the bytes of the largest tensor that an operation in `step` allocates."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    usage = "self_device_memory_usage" if device == "cuda" else "self_cpu_memory_usage"
    return max(getattr(event, usage) for event in profile.events())


def test_logits_are_never_materialised(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocabulary, dim = 256, 4096, 8
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 16 * vocabulary)
    monkeypatch.setattr(tiles, "CHUNK_BYTES", 16 * vocabulary * 4)
    (hidden, weight), labels = inputs_of((tokens,), device, dim=dim, vocabulary=vocabulary)
    hidden.requires_grad_()
    weight.requires_grad_()

    def step(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> int:
        return largest_allocation(device, lambda: loss(hidden, weight, labels).backward())

    logits = tokens * vocabulary * 4
    assert step(lambda h, w, labels: F.cross_entropy(h @ w.T, labels)) >= logits
    assert step(linear_cross_entropy) <= logits // 8


def test_frozen_weight_costs_no_gradient(device: str, backend: str) -> None:
    (hidden, weight), labels = inputs_of((4,), device, dim=64, vocabulary=2048)
    hidden.requires_grad_()

    def step() -> None:
        linear_cross_entropy(hidden, weight, labels).backward()

    assert largest_allocation(device, step) < weight.numel() * weight.element_size()
    weight.requires_grad_()
    assert largest_allocation(device, step) >= weight.numel() * weight.element_size()


def test_frozen_inputs(device: str, backend: str) -> None:
    inputs, labels = inputs_of((6,), device)
    assert_frozen_inputs(lambda hidden, weight: linear_cross_entropy(hidden, weight, labels), inputs)


def test_any_layout(device: str, backend: str) -> None:
    inputs, labels = inputs_of((3, 5), device)
    for reduction in ("mean", "none"):
        assert_any_layout(
            lambda hidden, weight, r=reduction: linear_cross_entropy(hidden, weight, labels, reduction=r), inputs
        )
    expected = linear_cross_entropy(*inputs, labels)
    for same in (every_other(labels), labels.T.contiguous().T):
        torch.testing.assert_close(linear_cross_entropy(*inputs, same), expected, rtol=0, atol=0)


def test_shifted_views(device: str, backend: str) -> None:
    """A language model's loss compares hidden[:, :-1] with labels[:, 1:]."""
    inputs, labels = inputs_of((3, 5), device)
    assert_same(
        run(lambda h, w: linear_cross_entropy(h[:, :-1], w, labels[:, 1:]), inputs),
        run(lambda h, w: linear_cross_entropy(h[:, :-1].contiguous(), w, labels[:, 1:].contiguous()), inputs),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_pure(device: str, backend: str, reduction: str) -> None:
    inputs, labels = inputs_of((6,), device)
    before, version = labels.clone(), labels._version
    assert_pure(
        lambda h, w: linear_cross_entropy(h, w, labels, softcap=3.0, label_smoothing=0.1, reduction=reduction), inputs
    )
    assert torch.equal(labels, before) and labels._version == version


def test_second_derivatives_are_refused(device: str, backend: str) -> None:
    (hidden, weight), labels = inputs_of((6,), device)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    with pytest.raises(RuntimeError, match="^linear_cross_entropy: it has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_casts_both(device: str, backend: str, low: torch.dtype) -> None:
    inputs, labels = inputs_of((6,), device)
    assert_autocasts(lambda hidden, weight: linear_cross_entropy(hidden, weight, labels), inputs, low)
    with torch.autocast(device, low):
        mixed = linear_cross_entropy(inputs[0].to(low), inputs[1], labels)
    torch.testing.assert_close(mixed, linear_cross_entropy(*(t.to(low) for t in inputs), labels), rtol=0, atol=0)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles(device: str, backend: str, compiler: str) -> None:
    inputs, labels = inputs_of((2, 5), device)
    for options in ({}, {"softcap": 2.0, "label_smoothing": 0.1, "reduction": "none"}):
        assert_compiles(
            lambda hidden, weight, o=options: linear_cross_entropy(hidden, weight, labels, **o), inputs, compiler
        )


def test_compiles_with_a_tied_weight_under_autocast(device: str, backend: str) -> None:
    tokens, labels = (torch.randint(0, VOCABULARY, (10,), device=device) for _ in range(2))

    def step(weight: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return linear_cross_entropy(F.embedding(tokens, weight), weight, labels)

    assert_compiles(step, [randn(VOCABULARY, 16, device=device)])


def test_compiles_for_any_number_of_tokens(device: str, backend: str) -> None:
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 6, 17):
        inputs, labels = inputs_of((tokens,), device)
        assert_same(
            run(lambda h, w, labels=labels: compiled(h, w, labels), inputs),
            run(lambda h, w, labels=labels: linear_cross_entropy(h, w, labels), inputs),
        )


@pytest.mark.parametrize("label", [VOCABULARY, -1, -101, 2**40])
def test_labels_outside_the_vocabulary_raise_on_the_cpu(label: int) -> None:
    inputs, labels = inputs_of((2, 3), "cpu")
    labels[1, 1] = label
    with pytest.raises(ValueError, match=rf"^labels: {label} is neither in \[0, {VOCABULARY}\) nor ignore_index -100"):
        linear_cross_entropy(*inputs, labels)


@pytest.mark.parametrize("label", [VOCABULARY, -1, -101, 2**40])
def test_labels_outside_the_vocabulary_give_nan_when_unchecked(device: str, backend: str, label: int) -> None:
    inputs, labels = inputs_of((6,), device)
    labels[:] = torch.arange(6)
    labels[2] = label

    def each(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, reduction="none")

    compiled = torch.compile(each, fullgraph=True, backend="aot_eager") if device == "cpu" else each
    outputs, gradients = run(lambda hidden, weight: compiled(hidden, weight, labels), inputs)
    assert outputs[0][2].isnan() and outputs[0].isnan().sum() == 1
    assert gradients[0][2].isnan().all() and gradients[0].isnan().sum() == gradients[0].shape[1]


@pytest.mark.parametrize("options", [(-100, None, 0.0), (3, 2.0, 0.1)], ids=str)
@pytest.mark.parametrize("tokens", [6, 0])
def test_opcheck(device: str, backend: str, tokens: int, options: tuple[Any, ...]) -> None:
    inputs, labels = inputs_of((tokens,), device)
    hidden, weight = inputs
    options = (*options, backend)
    ops = torch.ops.pg_kernels
    _, lses = ops.linear_cross_entropy(hidden, weight, labels, *options)
    gradients = torch.ones(tokens, device=device)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            ops.linear_cross_entropy_backward.default, (gradients, hidden, weight, labels, lses, *options, *needs)
        )
    torch.library.opcheck(ops.linear_cross_entropy.default, (*leaves(hidden, weight), labels, *options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck_of_the_reference(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 2 * 7)
    inputs, labels = inputs_of((5,), "cpu", dim=3, vocabulary=7)
    labels = labels.where(labels != -100, options.get("ignore_index", -100))
    with use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, **options),
            [tensor.double().requires_grad_() for tensor in inputs],
        )


HIDDEN, WEIGHT, LABELS = torch.ones(2, 3, 4), torch.ones(5, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": HIDDEN.int()}, TypeError, r"^hidden: expected float32, float16 or bfloat16, got torch.int32"),
        ({"hidden": None}, TypeError, r"^hidden: expected a tensor, got NoneType"),
        ({"weight": None}, TypeError, r"^weight: expected a tensor, got NoneType"),
        ({"labels": [[0]]}, TypeError, r"^labels: expected a tensor, got list"),
        ({"weight": WEIGHT.half()}, TypeError, r"^weight: has dtype torch.float16, but hidden has torch.float32"),
        ({"labels": LABELS.int()}, TypeError, r"^labels: expected int64, got torch.int32"),
        ({"hidden": torch.ones(())}, ValueError, r"^hidden: expected shape \[..., N\] with N >= 1, got \[\]"),
        ({"weight": WEIGHT[0]}, ValueError, r"^weight: expected shape \[V, 4\] .*, got \[4\]"),
        ({"weight": torch.ones(5, 3)}, ValueError, r"^weight: expected shape \[V, 4\] .*, got \[5, 3\]"),
        ({"weight": WEIGHT[:0]}, ValueError, r"^weight: the vocabulary is empty"),
        ({"labels": LABELS[0]}, ValueError, r"^labels: expected shape \[2, 3\] .*, got \[3\]"),
        ({"labels": LABELS.flatten()}, ValueError, r"^labels: expected shape \[2, 3\] .*, got \[6\]"),
        ({"weight": WEIGHT.to("meta")}, ValueError, r"^weight: is on meta, but hidden is on cpu"),
        ({"labels": LABELS.to("meta")}, ValueError, r"^labels: is on meta, but hidden is on cpu"),
        ({"softcap": 0.0}, ValueError, r"^softcap: expected a positive number, got 0.0"),
        ({"label_smoothing": 1.0}, ValueError, r"^label_smoothing: expected a number in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, ValueError, r"^label_smoothing: expected a number in \[0, 1\), got -0.1"),
        ({"reduction": "max"}, ValueError, r"^reduction: got 'max', expected 'mean', 'sum' or 'none'"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, **change})
