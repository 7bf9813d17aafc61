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
from pg_kernels import rms_norm

OP = "rms_norm"
SHAPES = [(5, 7), (2, 3, 64), (1, 2048), (1,), (4, 1), (3, 1152), (257, 127), (0, 16), (2, 0, 16)]


def definition(x: Tensor, weight: Tensor, eps: float = 1e-6, weight_offset: float = 1.0) -> Tensor:
    mean_square = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return x / (mean_square + eps) ** 0.5 * (weight_offset + weight)


def with_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm(x, weight, residual=residual)


@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    device: str, backend: str, dtype: torch.dtype, shape: tuple[int, ...], weight_offset: float
) -> None:
    inputs = [randn(*shape, device=device), randn(shape[-1], device=device)]
    assert_accurate(
        lambda x, weight: rms_norm(x, weight, 1e-5, weight_offset=weight_offset),
        lambda x, weight: definition(x, weight, 1e-5, weight_offset),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("shape", [(3, 5, 96), (1, 2304), (0, 8)], ids=str)
def test_residual_equals_two_separate_ops(
    device: str, backend: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    inputs = [randn(*shape, device=device, dtype=dtype) for _ in range(2)] + [
        randn(shape[-1], device=device, dtype=dtype)
    ]

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return definition(x + residual, weight), x + residual

    y, total = with_residual(*inputs)
    torch.testing.assert_close(total, inputs[0] + inputs[1], **one_rounding(backend, device, dtype))
    torch.testing.assert_close(y, rms_norm(total, inputs[2]))
    assert_accurate(with_residual, plain, inputs, dtype)


def test_gradients_with_only_one_output_used(device: str, backend: str) -> None:
    inputs = [randn(4, 32, device=device), randn(4, 32, device=device), randn(32, device=device)]
    assert_same(
        run(lambda *tensors: with_residual(*tensors)[0], inputs),
        run(lambda x, residual, weight: rms_norm(x + residual, weight), inputs),
    )
    x, residual = (tensor.clone().requires_grad_() for tensor in inputs[:2])
    with_residual(x, residual, inputs[2])[1].sum().backward()
    for tensor in (x, residual):
        torch.testing.assert_close(tensor.grad, torch.ones_like(x))


def test_statistics_do_not_overflow_in_fp16(device: str, backend: str) -> None:
    x = randn(4, 512, device=device).sign() * 60_000
    weight = torch.zeros(512, device=device, dtype=torch.float16)
    x.requires_grad_()
    y = rms_norm(x.half(), weight)
    torch.testing.assert_close(y, x.sign().half(), rtol=1e-3, atol=0)
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_one_plus_weight_is_added_in_fp32(device: str, backend: str) -> None:
    """1 + 2⁻¹⁰ would be 1 in bf16, the weight's dtype."""
    x = torch.ones(2, 16, device=device)
    y = rms_norm(x, torch.full((16,), 2.0**-10, device=device, dtype=torch.bfloat16))
    torch.testing.assert_close(y, torch.full_like(y, 1 + 2.0**-10), rtol=1e-6, atol=0)


def test_eps_dominates_for_tiny_rows(device: str, backend: str) -> None:
    x = torch.full((2, 8), 1e-6, device=device)
    weight = torch.zeros(8, device=device)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), x * 1e3, rtol=1e-5, atol=0)
    torch.testing.assert_close(rms_norm(torch.zeros_like(x), weight), torch.zeros_like(x), rtol=0, atol=0)


@pytest.mark.parametrize("columns", [8192, 8193, 32768])
def test_long_rows(device: str, backend: str, columns: int) -> None:
    """With more than 8192 columns the backward kernel reads a row in blocks."""
    inputs = [randn(3, columns, device=device) for _ in range(2)] + [randn(columns, device=device)]
    assert_accurate(
        with_residual, lambda x, residual, w: (definition(x + residual, w), x + residual), inputs, torch.float32
    )


@pytest.mark.backends("triton")
def test_rows_too_long_for_registers(device: str, backend: str) -> None:
    x, weight = torch.ones(1, 32769, device=device), torch.zeros(32769, device=device)
    with use_backend("auto"):
        torch.testing.assert_close(rms_norm(x, weight), x)
    with pytest.raises(RuntimeError, match="rows of 32769 are longer than 32768"):
        rms_norm(x, weight)


@pytest.mark.backends("triton")
def test_float64_runs_on_the_reference_only(device: str, backend: str) -> None:
    x, weight = torch.ones(1, 8, device=device, dtype=torch.float64), torch.zeros(8, device=device)
    with use_backend("auto"):
        assert rms_norm(x, weight).dtype == torch.float64
    with pytest.raises(RuntimeError, match="float64 runs on backend 'reference' only"):
        rms_norm(x, weight)


def test_weight_gradient_is_deterministic(device: str, backend: str) -> None:
    """There are more rows than programs, so that the order of sums matters."""
    x, weight, grad = (
        randn(700, 48, device=device),
        randn(48, device=device).requires_grad_(),
        randn(700, 48, device=device),
    )
    first, second = (torch.autograd.grad(rms_norm(x, weight), weight, grad)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_weight_of_another_dtype(device: str, backend: str, weight_dtype: torch.dtype) -> None:
    x = randn(6, 48, device=device, dtype=torch.float16).requires_grad_()
    weight = randn(48, device=device, dtype=weight_dtype).requires_grad_()
    y = rms_norm(x, weight)
    y.sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (torch.float16, torch.float16, weight_dtype)
    torch.testing.assert_close(y.double(), definition(x.double(), weight.double()), rtol=1e-3, atol=1e-3)


def test_residual_of_a_wider_dtype(device: str, backend: str) -> None:
    x, residual = randn(3, 16, device=device, dtype=torch.float16), randn(3, 16, device=device)
    y, total = rms_norm(x, torch.zeros(16, device=device), residual=residual)
    assert y.dtype == total.dtype == torch.float32
    torch.testing.assert_close(total, x.float() + residual)


def test_any_layout(device: str, backend: str) -> None:
    assert_any_layout(rms_norm, [randn(3, 5, 24, device=device), randn(24, device=device)])
    assert_any_layout(
        with_residual, [randn(3, 5, 24, device=device), randn(3, 5, 24, device=device), randn(24, device=device)]
    )


def test_one_tensor_in_two_places(device: str, backend: str) -> None:
    x, weight = randn(4, 24, device=device), randn(24, device=device)
    assert_same(
        run(lambda x, w: rms_norm(x, w, residual=x), [x, weight]),
        run(lambda x, w: rms_norm(x, w, residual=x.clone()), [x, weight]),
    )
    assert_same(run(lambda x: rms_norm(x, x), [weight]), run(lambda x: rms_norm(x, x.clone()), [weight]))


def test_pure(device: str, backend: str) -> None:
    assert_pure(rms_norm, [randn(3, 24, device=device), randn(24, device=device)])
    assert_pure(with_residual, [randn(3, 24, device=device), randn(3, 24, device=device), randn(24, device=device)])


def test_frozen_inputs(device: str, backend: str) -> None:
    assert_frozen_inputs(rms_norm, [randn(3, 24, device=device), randn(24, device=device)])
    assert_frozen_inputs(
        with_residual, [randn(3, 24, device=device), randn(3, 24, device=device), randn(24, device=device)]
    )


def test_autocast_changes_nothing(device: str, backend: str) -> None:
    x, weight = randn(3, 24, device=device, dtype=torch.bfloat16), randn(24, device=device)
    expected = rms_norm(x, weight)
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(rms_norm(x, weight), expected, rtol=0, atol=0)
        y, total = rms_norm(x, weight, residual=x.float())
    assert y.dtype == total.dtype == torch.float32


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles(device: str, backend: str, compiler: str) -> None:
    assert_compiles(
        with_residual,
        [randn(2, 5, 32, device=device), randn(2, 5, 32, device=device), randn(32, device=device)],
        compiler,
    )


def test_compiles_for_any_length(device: str, backend: str) -> None:
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager", dynamic=True)
    weight = randn(32, device=device)
    for length in (5, 6, 17):
        x = randn(2, length, 32, device=device)
        assert_same(run(compiled, [x, weight]), run(rms_norm, [x, weight]))


@pytest.mark.parametrize("shape", [(3, 16), (0, 16), (2, 3, 16)], ids=str)
def test_opcheck(device: str, backend: str, shape: tuple[int, ...]) -> None:
    x, residual, weight = leaves(randn(*shape, device=device), randn(*shape, device=device), randn(16, device=device))
    ops = torch.ops.pg_kernels
    if backend == "reference":
        torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-6, 1.0))
        torch.library.opcheck(ops.add_rms_norm.default, (x, residual, weight, 1e-6, 0.0))
    else:
        forward, backward = (getattr(ops, f"rms_norm_{backend}{of}").default for of in ("", "_backward"))
        torch.library.opcheck(forward, (x, residual, weight, 1e-6, 0.0))
        torch.library.opcheck(forward, (x, None, weight, 1e-6, 1.0))
        rstd = torch.ones(shape[:-1], device=device)
        x, residual, weight = (tensor.detach() for tensor in (x, residual, weight))
        for total, needs_weight in ((residual, True), (None, False)):
            torch.library.opcheck(backward, (x, total, residual, weight, rstd, 1.0, needs_weight))


def test_gradcheck_of_the_reference() -> None:
    x, residual, weight = (randn(*shape, dtype=torch.float64).requires_grad_() for shape in [(3, 6), (3, 6), (6,)])
    with use_backend("reference"):
        assert torch.autograd.gradcheck(rms_norm, (x, weight))
        assert torch.autograd.gradcheck(with_residual, (x, residual, weight))
        assert torch.autograd.gradgradcheck(rms_norm, (x, weight))


X, WEIGHT = torch.ones(2, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X.int()}, TypeError, r"^x: expected float32, float16 or bfloat16, got torch.int32"),
        ({"weight": WEIGHT.long()}, TypeError, r"^weight: expected float32.* got torch.int64"),
        ({"residual": X.bool()}, TypeError, r"^residual: expected float32.* got torch.bool"),
        ({"x": [1.0]}, TypeError, r"^x: expected a tensor, got list"),
        ({"x": None}, TypeError, r"^x: expected a tensor, got NoneType"),
        ({"weight": None}, TypeError, r"^weight: expected a tensor, got NoneType"),
        ({"x": torch.ones(())}, ValueError, r"^x: expected shape \[..., N\] with N >= 1, got \[\]"),
        ({"x": torch.ones(2, 0)}, ValueError, r"^x: expected shape \[..., N\] with N >= 1, got \[2, 0\]"),
        ({"weight": torch.ones(5)}, ValueError, r"^weight: expected shape \[4\] .*, got \[5\]"),
        ({"weight": torch.ones(1, 4)}, ValueError, r"^weight: expected shape \[4\] .*, got \[1, 4\]"),
        ({"residual": torch.ones(4)}, ValueError, r"^residual: expected shape \[2, 4\] .*, got \[4\]"),
        ({"weight": WEIGHT.to("meta")}, ValueError, r"^weight: is on meta, but x is on cpu"),
        ({"residual": X.to("meta")}, ValueError, r"^residual: is on meta, but x is on cpu"),
        ({"eps": 0.0}, ValueError, r"^eps: expected a positive number, got 0.0"),
        ({"eps": -1.0}, ValueError, r"^eps: expected a positive number, got -1.0"),
        ({"eps": float("nan")}, ValueError, r"^eps: expected a positive number, got nan"),
    ],
)
def test_errors(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rms_norm(**{"x": X, "weight": WEIGHT, **change})
