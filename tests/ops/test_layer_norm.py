from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_accurate,
    assert_any_layout,
    assert_compiles,
    assert_frozen_inputs,
    assert_pure,
    assert_same,
    leaves,
    one_rounding,
    randn,
    run,
)
from torch import Tensor

from pg_kernels import backend as use_backend
from pg_kernels import layer_norm

OP = "layer_norm"
SHAPES = [(5, 7), (2, 3, 64), (1, 2048), (16,), (4, 2), (3, 1152), (257, 127), (0, 16), (2, 0, 16)]


def definition(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    size = x.shape[-1]
    centred = x - x.sum(-1, keepdim=True) / size
    variance = (centred * centred).sum(-1, keepdim=True) / size
    return centred / (variance + eps) ** 0.5 * weight + bias


def with_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return layer_norm(x, weight, bias, residual=residual)


def inputs_of(shape: tuple[int, ...], device: str, *, residual: bool = False) -> list[Tensor]:
    shapes = [shape, shape, shape[-1:], shape[-1:]] if residual else [shape, shape[-1:], shape[-1:]]
    return [randn(*size, device=device) for size in shapes]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(device: str, backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_accurate(
        lambda x, weight, bias: layer_norm(x, weight, bias, 1e-2),
        lambda x, weight, bias: definition(x, weight, bias, 1e-2),
        inputs_of(shape, device),
        dtype,
        in_torch=lambda x, weight, bias: torch.nn.functional.layer_norm(x, weight.shape, weight, bias, 1e-2),
    )


@pytest.mark.parametrize("shape", [(3, 5, 96), (1, 1152), (0, 8)], ids=str)
def test_residual_equals_two_separate_ops(
    device: str, backend: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    inputs = [tensor.to(dtype) for tensor in inputs_of(shape, device, residual=True)]

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return definition(x + residual, weight, bias), x + residual

    y, total = with_residual(*inputs)
    torch.testing.assert_close(total, inputs[0] + inputs[1], **one_rounding(backend, device, dtype))
    torch.testing.assert_close(y, layer_norm(total, *inputs[2:]))
    assert_accurate(with_residual, plain, inputs, dtype)


def test_statistics_do_not_overflow_in_fp16(device: str, backend: str) -> None:
    x = (randn(4, 512, device=device).sign() * 60_000).requires_grad_()
    ones, zeros = (torch.full((512,), value, device=device, dtype=torch.float16) for value in (1.0, 0.0))
    y = layer_norm(x.half(), ones, zeros)
    signs = x.detach().double().sign()
    expected = definition(signs, ones.double(), zeros.double(), eps=0.0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_variance_survives_a_large_mean(device: str, backend: str) -> None:
    """In fp32 the error of E[x²] − E[x]² would exceed the variance."""
    x = randn(4, 256, device=device).round(decimals=1) + 2.0**14
    ones, zeros = torch.ones(256, device=device), torch.zeros(256, device=device)
    torch.testing.assert_close(
        layer_norm(x, ones, zeros).double(), definition(x.double(), ones.double(), zeros.double()), rtol=5e-3, atol=5e-3
    )


def test_constant_rows_give_the_bias(device: str, backend: str) -> None:
    bias = randn(32, device=device)
    y = layer_norm(torch.full((3, 32), 5.0, device=device), torch.ones(32, device=device), bias)
    torch.testing.assert_close(y, bias.expand(3, 32))


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_another_dtype(device: str, backend: str, parameter_dtype: torch.dtype) -> None:
    x, weight, bias = inputs_of((6, 48), device)
    inputs = [x.half().requires_grad_(), *(t.to(parameter_dtype).requires_grad_() for t in (weight, bias))]
    y = layer_norm(*inputs)
    y.sum().backward()
    assert y.dtype == torch.float16
    assert all(t.grad is not None and t.grad.dtype == t.dtype for t in inputs)
    torch.testing.assert_close(y.double(), definition(*(t.double() for t in inputs)), rtol=1e-3, atol=1e-3)


def test_residual_of_a_wider_dtype(device: str, backend: str) -> None:
    x, residual, weight, bias = inputs_of((3, 16), device, residual=True)
    y, total = layer_norm(x.half(), weight, bias, residual=residual)
    assert y.dtype == total.dtype == torch.float32
    torch.testing.assert_close(total, x.half().float() + residual)


def test_any_layout(device: str, backend: str) -> None:
    assert_any_layout(layer_norm, inputs_of((3, 5, 24), device))
    assert_any_layout(with_residual, inputs_of((3, 5, 24), device, residual=True))


def test_one_tensor_in_two_places(device: str, backend: str) -> None:
    inputs = inputs_of((4, 24), device)
    assert_same(
        run(lambda x, w, b: layer_norm(x, w, b, residual=x), inputs),
        run(lambda x, w, b: layer_norm(x, w, b, residual=x.clone()), inputs),
    )
    assert_same(
        run(lambda x, w: layer_norm(x, w, w), inputs[:2]), run(lambda x, w: layer_norm(x, w, w.clone()), inputs[:2])
    )


def test_pure(device: str, backend: str) -> None:
    assert_pure(layer_norm, inputs_of((3, 24), device))
    assert_pure(with_residual, inputs_of((3, 24), device, residual=True))


def test_frozen_inputs(device: str, backend: str) -> None:
    assert_frozen_inputs(layer_norm, inputs_of((3, 24), device))
    assert_frozen_inputs(with_residual, inputs_of((3, 24), device, residual=True))


def test_autocast_changes_nothing(device: str, backend: str) -> None:
    x, weight, bias = inputs_of((3, 24), device)
    expected = layer_norm(x.bfloat16(), weight, bias)
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(layer_norm(x.bfloat16(), weight, bias), expected, rtol=0, atol=0)
        y, total = layer_norm(x.bfloat16(), weight, bias, residual=x)
    assert y.dtype == total.dtype == torch.float32


def test_compiles(device: str, backend: str) -> None:
    assert_compiles(layer_norm, inputs_of((2, 5, 32), device))
    assert_compiles(with_residual, inputs_of((2, 5, 32), device, residual=True))


@pytest.mark.backends("reference", "triton")
@pytest.mark.parametrize("shape", [(3, 16), (0, 16), (2, 3, 16)], ids=str)
def test_opcheck(device: str, backend: str, shape: tuple[int, ...]) -> None:
    x, residual, weight, bias = leaves(*inputs_of(shape, device, residual=True))
    ops = torch.ops.pg_kernels
    if backend == "reference":
        torch.library.opcheck(ops.layer_norm.default, (x, weight, bias, 1e-6))
        torch.library.opcheck(ops.add_layer_norm.default, (x, residual, weight, bias, 1e-6))
    else:
        torch.library.opcheck(ops.layer_norm_triton.default, (x, residual, weight, bias, 1e-6))
        torch.library.opcheck(ops.layer_norm_triton.default, (x, None, weight, bias, 1e-6))
        mean, rstd = torch.zeros(shape[:-1], device=device), torch.ones(shape[:-1], device=device)
        x, residual, weight = (tensor.detach() for tensor in (x, residual, weight))
        for total, needs_parameters in ((residual, True), (None, False)):
            torch.library.opcheck(
                ops.layer_norm_triton_backward.default, (x, total, residual, weight, mean, rstd, needs_parameters)
            )


def test_gradcheck_of_the_reference() -> None:
    x, residual, weight, bias = (t.double().requires_grad_() for t in inputs_of((3, 6), "cpu", residual=True))
    with use_backend("reference"):
        assert torch.autograd.gradcheck(layer_norm, (x, weight, bias))
        assert torch.autograd.gradcheck(with_residual, (x, residual, weight, bias))


X, PARAMETER = torch.ones(2, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X.int()}, TypeError, r"^x: expected float32, float16 or bfloat16, got torch.int32"),
        ({"bias": PARAMETER.long()}, TypeError, r"^bias: expected float32.* got torch.int64"),
        ({"bias": None}, TypeError, r"^bias: expected a tensor, got NoneType"),
        ({"residual": [1.0]}, TypeError, r"^residual: expected a tensor, got list"),
        ({"x": torch.ones(2, 0)}, ValueError, r"^x: expected shape \[..., N\] with N >= 1, got \[2, 0\]"),
        ({"weight": torch.ones(5)}, ValueError, r"^weight: expected shape \[4\] .*, got \[5\]"),
        ({"bias": torch.ones(2, 4)}, ValueError, r"^bias: expected shape \[4\] .*, got \[2, 4\]"),
        ({"residual": torch.ones(1, 4)}, ValueError, r"^residual: expected shape \[2, 4\] .*, got \[1, 4\]"),
        ({"bias": PARAMETER.to("meta")}, ValueError, r"^bias: is on meta, but x is on cpu"),
        ({"residual": X.to("meta")}, ValueError, r"^residual: is on meta, but x is on cpu"),
        ({"eps": 0.0}, ValueError, r"^eps: expected a positive number, got 0.0"),
    ],
)
def test_errors(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer_norm(**{"x": X, "weight": PARAMETER, "bias": PARAMETER, **change})
