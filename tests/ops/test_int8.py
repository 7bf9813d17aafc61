"""quantize_int8, pack_int8 and int8_linear."""

from __future__ import annotations

import copy
import ctypes
import mmap
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from helpers import (
    assert_any_layout,
    assert_autocasts,
    assert_compiles,
    assert_frozen_inputs,
    assert_pure,
    assert_within,
    leaves,
    needs_extension,
    randn,
    run,
    shifted,
    transposed,
)
from torch import Tensor

from pg_kernels import PackedInt8Weight, int8_linear, pack_int8, quantize_int8
from pg_kernels import backend as use_backend
from pg_kernels.backends import available

OP = "int8_linear"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COLUMNS = [1, 3, 4, 63, 70, 588, 1152, 4304]
ROWS = [1, 15, 16, 65, 1152]
GROUPS = [None, 1, 32, 128]
# Inductor finds cached graphs by the names of their ops: a cached graph could contain an older backward pass.
WITHOUT_CACHES = torch._inductor.config.patch(force_disable_caches=True)
# Relative Frobenius error: 5e-4 for the product, more where rounding the output to its dtype costs more.
BOUNDS = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 2.5e-3}


def quantized(n: int, k: int, group_size: int | None = None, device: str = "cpu") -> tuple[Tensor, Tensor]:
    with use_backend("reference"):
        qweight, scale = quantize_int8(randn(n, k) * 0.02, group_size=group_size)
    return qweight.to(device), scale.to(device)


def spread(scale: Tensor, k: int, group_size: int | None) -> Tensor:
    """Return the scale of every element of the weight, [N, K]."""
    if group_size is None:
        return scale[:, None].expand(-1, k)
    return scale[:, torch.arange(k, device=scale.device) // group_size]


def dequantized(qweight: Tensor, scale: Tensor, group_size: int | None = None) -> Tensor:
    return qweight.double() * spread(scale, qweight.shape[1], group_size).double()


def frobenius(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


# quantize_int8


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("k", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_error_is_half_a_level_at_most(dtype: torch.dtype, k: int, group_size: int | None) -> None:
    weight = randn(15, k, dtype=dtype)
    qweight, scale = quantize_int8(weight, group_size=group_size)
    assert qweight.dtype == torch.int8 and scale.dtype == torch.float32
    assert qweight.shape == weight.shape
    assert scale.shape == ((15,) if group_size is None else (15, -(-k // group_size)))
    assert int(qweight.int().abs().max()) == 127
    steps = spread(scale, k, group_size).double()
    # The quotient is rounded to fp32 first, with an error of up to 127 · 2⁻²⁴.
    assert bool(((weight.double() - qweight.double() * steps).abs() <= steps * (0.5 + 2**-16)).all())


def test_scales_are_fp32_quotients() -> None:
    """The scale is the largest magnitude / 127 in fp32, also for bf16 weights: bf16 scales would be off by 2⁻⁹."""
    weight = randn(8, 70, dtype=torch.bfloat16)
    torch.testing.assert_close(quantize_int8(weight)[1], weight.float().abs().amax(1) / 127, rtol=0, atol=0)


def test_levels_are_symmetric_and_ties_go_to_even() -> None:
    qweight, scale = quantize_int8(torch.tensor([[-127.0, 127.0, 0.5, 1.5, -2.5, -0.4]]))
    assert qweight.tolist() == [[-127, 127, 0, 2, -2, 0]] and scale.tolist() == [1.0]


def test_groups_are_quantised_independently() -> None:
    weight = randn(5, 70)
    qweight, scale = quantize_int8(weight, group_size=32)
    for index, part in enumerate(weight.split(32, dim=1)):
        alone, alone_scale = quantize_int8(part)
        assert torch.equal(qweight[:, 32 * index :][:, : part.shape[1]], alone)
        assert torch.equal(scale[:, index], alone_scale)


@pytest.mark.parametrize("group_size", [None, 4])
def test_zeros_have_scale_zero(group_size: int | None) -> None:
    weight = randn(3, 8)
    weight[1] = 0
    qweight, scale = quantize_int8(weight, group_size=group_size)
    assert not qweight[1].any() and not scale[1].any()
    assert bool((scale[[0, 2]] > 0).all())


@pytest.mark.parametrize("layout", [transposed, shifted])
def test_quantising_any_layout(layout: Callable[[Tensor], Tensor]) -> None:
    weight = randn(6, 40)
    for actual, expected in zip(
        quantize_int8(layout(weight), group_size=16), quantize_int8(weight, group_size=16), strict=True
    ):
        assert torch.equal(actual, expected) and actual.is_contiguous()


def test_quantising_no_rows() -> None:
    qweight, scale = quantize_int8(torch.ones(0, 5), group_size=2)
    assert qweight.shape == (0, 5) and scale.shape == (0, 3)


@pytest.mark.parametrize(
    ("compiler", "k", "group_size"),
    [("aot_eager", 63, 32), ("aot_eager", 64, 32), ("aot_eager", 70, None), ("inductor", 588, 128)],
)
def test_quantising_compiles(compiler: str, k: int, group_size: int | None) -> None:
    """Also with a short last group, for which Inductor compiles the plain definition wrongly."""
    weight = randn(15, k).requires_grad_()
    compiled = torch.compile(lambda w: quantize_int8(w, group_size=group_size), fullgraph=True, backend=compiler)
    with WITHOUT_CACHES:
        outputs = compiled(weight)
    for actual, expected in zip(outputs, quantize_int8(weight, group_size=group_size), strict=True):
        assert torch.equal(actual, expected)
        assert actual.is_contiguous() and not actual.requires_grad


@pytest.mark.parametrize("group_size", [32, 70])
def test_opcheck_of_quantising(group_size: int) -> None:
    for op in (torch.ops.pg_kernels.quantize_int8, torch.ops.pg_kernels.quantize_int8_native):
        torch.library.opcheck(op.default, (randn(5, 70), group_size))


@needs_extension
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("k", [*COLUMNS, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_quantising_agrees_bit_for_bit(dtype: torch.dtype, k: int, group_size: int | None) -> None:
    weight = randn(9, k, dtype=dtype)
    weight[3], weight[4] = 0, weight[4] * 1e-6
    with use_backend("reference"):
        expected = quantize_int8(weight, group_size=group_size)
    with use_backend("native"):
        for actual, wanted in zip(quantize_int8(weight, group_size=group_size), expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", available("quantize_int8", "cpu"))
def test_weights_that_are_not_finite(name: str, value: float) -> None:
    weight = torch.ones(2, 3)
    weight[1, 2] = value
    with use_backend(name), pytest.raises(ValueError, match=r"^weight: holds NaN or infinity"):
        quantize_int8(weight)


@pytest.mark.parametrize(
    ("weight", "group_size", "error", "message"),
    [
        (None, None, TypeError, r"^weight: expected a tensor, got NoneType"),
        (torch.ones(2, 3).int(), None, TypeError, r"^weight: expected float32, float16 or bfloat16, got torch.int32"),
        (torch.ones(3), None, ValueError, r"^weight: expected shape \[N, K\], got \[3\]"),
        (torch.ones(3, 0), None, ValueError, r"^weight: expected shape \[..., N\] with N >= 1, got \[3, 0\]"),
        (torch.ones(2, 3), 0, ValueError, r"^group_size: expected a power of two, got 0"),
        (torch.ones(2, 3), -2, ValueError, r"^group_size: expected a power of two, got -2"),
        (torch.ones(2, 3), 96, ValueError, r"^group_size: expected a power of two, got 96"),
        (torch.ones(2, 3), 64.0, TypeError, r"^group_size: expected an int, got float"),
        (torch.ones(2, 3), True, TypeError, r"^group_size: expected an int, got bool"),
    ],
)
def test_quantising_errors(weight: Any, group_size: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_int8(weight, group_size=group_size)


# pack_int8


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("k", [1, 3, 4, 63, 70, 1152])
@pytest.mark.parametrize("n", [1, 15, 16, 65])
def test_packing_loses_nothing(n: int, k: int, group_size: int | None) -> None:
    qweight, scale = quantized(n, k, group_size)
    packed = pack_int8(qweight, scale)
    assert packed.shape == (n, k) and packed.device == qweight.device
    # A group size of K or more is one scale per row.
    assert packed.group_size == (k if group_size is None or group_size >= k else group_size)
    for copied in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        for actual, expected in zip(copied.unpack(), (qweight, scale), strict=True):
            assert actual.dtype == expected.dtype and torch.equal(actual, expected)


def test_a_packed_weight_as_an_object() -> None:
    packed = pack_int8(*quantized(3, 70, 32))
    assert repr(packed) == "PackedInt8Weight([3, 70], group_size=32, device='cpu')"
    assert packed == packed and packed != copy.deepcopy(packed)
    assert {packed: 1}[packed] == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qweight": [[1]]}, TypeError, r"^qweight: expected a tensor, got list"),
        ({"qweight": torch.ones(3, 70)}, TypeError, r"^qweight: expected torch.int8, got torch.float32"),
        ({"scale": None}, TypeError, r"^scale: expected a tensor, got NoneType"),
        ({"scale": torch.ones(3).half()}, TypeError, r"^scale: expected torch.float32, got torch.float16"),
        ({"qweight": torch.ones(3, dtype=torch.int8)}, ValueError, r"^qweight: expected shape \[N, K\], got \[3\]"),
        ({"qweight": torch.ones(3, 0, dtype=torch.int8)}, ValueError, r"^qweight: .* with N >= 1, got \[3, 0\]"),
        ({"scale": torch.ones(70)}, ValueError, r"^scale: expected shape \[3\] .*, got \[70\]"),
        ({"scale": torch.ones(70, 3)}, ValueError, r"^scale: expected shape \[3, groups\] .*, got \[70, 3\]"),
        ({"scale": torch.ones(3, 0)}, ValueError, r"^scale: 0 groups cannot share 70 columns"),
        ({"scale": torch.ones(3, 4)}, ValueError, r"^scale: 4 groups cannot share 70 columns in powers of two"),
        ({"scale": torch.ones(3, 71)}, ValueError, r"^scale: 71 groups cannot share 70 columns"),
        ({"scale": torch.ones(3, device="meta")}, ValueError, r"^scale: is on meta, but qweight is on cpu"),
        ({"scale": torch.tensor([1.0, float("nan"), 1.0])}, ValueError, r"^scale: holds NaN or infinity"),
        ({"scale": torch.tensor([1.0, float("inf"), 1.0])}, ValueError, r"^scale: holds NaN or infinity"),
    ],
)
def test_packing_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"qweight": torch.ones(3, 70, dtype=torch.int8), "scale": torch.ones(3)}
    with pytest.raises(error, match=message):
        pack_int8(**{**good, **change})


# int8_linear: values


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("k", COLUMNS)
def test_values(device: str, backend: str, dtype: torch.dtype, k: int, n: int, group_size: int | None) -> None:
    """Compare with float64 on the same int8 weight and scales."""
    qweight, scale = quantized(n, k, group_size, device)
    x, bias = randn(17, k, device=device, dtype=dtype), randn(n, device=device, dtype=dtype)
    y = int8_linear(x, pack_int8(qweight, scale), bias=bias)
    assert y.dtype == dtype and y.shape == (17, n)
    exact = x.double() @ dequantized(qweight, scale, group_size).T + bias.double()
    assert frobenius(y, exact) <= BOUNDS[dtype]


@pytest.mark.parametrize("group_size", [1, 4, 64])
def test_short_last_group(device: str, backend: str, dtype: torch.dtype, group_size: int) -> None:
    qweight, scale = quantized(16, 70, group_size, device)
    # Make a wrong scale for the last columns visible.
    scale[:, -1] *= 50
    x = randn(5, 70, device=device, dtype=dtype)
    assert (
        frobenius(int8_linear(x, qweight, scale), x.double() @ dequantized(qweight, scale, group_size).T)
        <= BOUNDS[dtype]
    )


@pytest.mark.parametrize("factor", [100, 1000])
def test_outliers(device: str, backend: str, dtype: torch.dtype, factor: int) -> None:
    """Every single row is within bounds, with one large row among them, and with six large columns."""
    qweight, scale = quantized(65, 1152, None, device)
    weight = dequantized(qweight, scale)
    x = randn(16, 1152, device=device)
    x[3] *= factor
    columns = randn(16, 1152, device=device)
    columns[:, ::192] *= factor
    for case in (x.to(dtype), columns.to(dtype)):
        y = int8_linear(case, qweight, scale)
        for row, exact in zip(y, case.double() @ weight.T, strict=True):
            assert frobenius(row, exact) <= BOUNDS[dtype]


@needs_extension
@pytest.mark.parametrize("activations", ["keep", "int8"])
@pytest.mark.parametrize("m", [0, 1, 3, 16, 17])
def test_a_row_does_not_depend_on_the_batch(m: int, activations: str) -> None:
    qweight, scale = quantized(65, 588, 64)
    x = randn(17, 588)
    with use_backend("native"):
        everything = int8_linear(x, qweight, scale, activations=activations)
        assert torch.equal(int8_linear(x[:m], qweight, scale, activations=activations), everything[:m])
        assert torch.equal(int8_linear(x[17 - m :], qweight, scale, activations=activations), everything[17 - m :])


@pytest.mark.parametrize("activations", ["keep", "int8"])
@pytest.mark.parametrize("shape", [(70,), (0, 70), (1, 70), (2, 3, 70), (2, 0, 70)], ids=str)
def test_shapes(device: str, backend: str, shape: tuple[int, ...], activations: str) -> None:
    qweight, scale = quantized(15, 70, 32, device)
    x, bias = randn(*shape, device=device), randn(15, device=device)
    y = int8_linear(x, qweight, scale, bias, activations=activations)
    rows = int8_linear(x.reshape(-1, 70), pack_int8(qweight, scale), bias=bias, activations=activations)
    assert y.shape == (*shape[:-1], 15)
    torch.testing.assert_close(y.reshape(-1, 15), rows)


def test_no_outputs(device: str, backend: str) -> None:
    qweight, scale = torch.ones(0, 4, dtype=torch.int8, device=device), torch.ones(0, device=device)
    assert int8_linear(randn(3, 4, device=device), qweight, scale).shape == (3, 0)


def test_scale_comes_before_the_downcast(device: str, backend: str) -> None:
    """127 · 1000 exceeds fp16's range; 0.001 times it does not, nor does the gradient, whose terms cancel."""
    qweight = torch.full((2, 4), 127, dtype=torch.int8, device=device)
    scale = torch.tensor([1000.0, -1000.0], device=device)
    x = torch.full((1, 4), 1e-3, dtype=torch.float16, device=device, requires_grad=True)
    y = int8_linear(x, qweight, scale)
    torch.testing.assert_close(y, torch.tensor([[508.2, -508.2]], dtype=torch.float16, device=device))
    y.backward(torch.full_like(y, 1e-3))
    assert x.grad is not None and x.grad.tolist() == [[0.0] * 4]


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_native_conversions(dtype: torch.dtype) -> None:
    """Every 16-bit number converts to fp32 and back unchanged, and fp32 numbers round as in PyTorch."""
    one = torch.ones(1, 1, dtype=torch.int8)
    everything = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[:, None]
    ties = everything.float()[everything.isfinite()]
    halfway = (ties.double() * (1 + torch.finfo(dtype).eps / 2)).float()
    tiny = (ties.double() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2).float()
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20_000,), generator=generator).to(torch.int32).view(torch.float32)
    scale = torch.cat((halfway, tiny, bits[bits.isfinite()], torch.tensor([65519.0, 65520.0, 65536.0, 3.4e38])))
    scale = scale[scale.isfinite()]
    with use_backend("native"):
        torch.testing.assert_close(
            int8_linear(everything, one, torch.ones(1)), everything, rtol=0, atol=0, equal_nan=True
        )
        rounded = int8_linear(torch.ones(1, 1, dtype=dtype), one.expand(len(scale), 1), scale)[0]
    torch.testing.assert_close(rounded, scale.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activations", ["keep", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite(
    device: str, backend: str, dtype: torch.dtype, value: float, activations: str
) -> None:
    """NaN and infinity appear in the outputs of their row, and in no other row."""
    qweight, scale = torch.ones(16, 70, dtype=torch.int8, device=device), torch.ones(16, device=device)
    x = randn(5, 70, device=device, dtype=dtype)
    clean = int8_linear(x, qweight, scale, activations=activations)
    x[2, 40] = value
    y = int8_linear(x, qweight, scale, activations=activations)
    expected = torch.full_like(y[2], value if activations == "keep" else float("nan"))
    torch.testing.assert_close(y[2], expected, equal_nan=True)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(y[others], clean[others])


# int8_linear with int8 activations


@pytest.mark.parametrize("k", [*COLUMNS, 16384])
def test_integer_sums_are_exact(device: str, backend: str, k: int) -> None:
    """Rows of integers with a largest magnitude of 127 are their own levels, so y is an exact sum of integers."""
    generator = torch.Generator().manual_seed(k)
    levels = torch.randint(-127, 128, (17, k), generator=generator)
    levels[:, 0] = 127
    qweight = torch.randint(-127, 128, (65, k), generator=generator).to(torch.int8)
    y = int8_linear(levels.float().to(device), qweight.to(device), torch.ones(65, device=device), activations="int8")
    torch.testing.assert_close(y.cpu(), (levels @ qweight.long().T).float(), rtol=0, atol=0)


@pytest.mark.parametrize("k", [16384, 140_000])
@pytest.mark.parametrize("activations", ["keep", "int8"])
def test_extremes(device: str, backend: str, activations: str, k: int) -> None:
    """Every operand is an extreme of int8, also −128, which quantize_int8 never returns. 140,000 products exceed int32."""
    x = torch.full((2, k), 127.0, device=device)
    x[1] = -127
    qweight = torch.tensor([[127], [-127], [-128]], dtype=torch.int8, device=device).expand(3, k)
    y = int8_linear(x, qweight, torch.ones(3, device=device), activations=activations)
    exact = x.double() @ qweight.double().T
    if activations == "int8":
        assert torch.equal(y, exact.float())
    else:
        assert frobenius(y, exact) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("n", [1, 16, 65])
@pytest.mark.parametrize("k", [1, 3, 70, 588, 1152])
def test_int8_activations(
    device: str, backend: str, dtype: torch.dtype, k: int, n: int, group_size: int | None
) -> None:
    """Compare with the definition of the levels, multiplied in float64."""
    qweight, scale = quantized(n, k, group_size, device)
    x, bias = randn(17, k, device=device, dtype=dtype), randn(n, device=device)
    x[5] = 0
    x[6] *= 1000
    step = x.float().abs().amax(1, keepdim=True) / 127
    levels = torch.round(torch.where(step > 0, x.float() / step, 0.0))
    product = (levels.double() * step.double()) @ dequantized(qweight, scale, group_size).T
    y = int8_linear(x, qweight, scale, bias, activations="int8")
    exact = product + bias.double()
    # Allow one rounding to the output's dtype, and a few fp32 roundings of the groups' products, which may cancel.
    parts = [
        (part @ weight.T).abs()
        for part, weight in zip(
            (levels.double() * step.double()).split(group_size or k, 1),
            dequantized(qweight, scale, group_size).split(group_size or k, 1),
            strict=True,
        )
    ]
    fp32 = 4 * torch.finfo(torch.float32).eps * (sum(parts) + bias.double().abs())
    assert bool(((y.double() - exact).abs() <= fp32 + torch.finfo(dtype).eps / 2 * exact.abs()).all())


# int8_linear: gradients, layouts, compilation


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("shape", [(2, 3, 70), (1, 70), (0, 70)], ids=str)
def test_gradients(
    device: str, backend: str, dtype: torch.dtype, shape: tuple[int, ...], group_size: int | None
) -> None:
    qweight, scale = quantized(15, 70, group_size, device)
    weight = dequantized(qweight, scale, group_size)

    def definition(x: Tensor, bias: Tensor) -> Tensor:
        return x @ weight.to(x.dtype).T + bias

    def op(x: Tensor, bias: Tensor) -> Tensor:
        return int8_linear(x, qweight, scale, bias)

    inputs = [randn(*shape, device=device, dtype=dtype), randn(15, device=device, dtype=dtype)]
    ours, plain, exact = (
        run(op, inputs)[1],
        run(definition, inputs)[1],
        run(definition, [t.double() for t in inputs])[1],
    )
    for gradient, low, expected in zip(ours, plain, exact, strict=True):
        assert gradient.dtype == dtype
        assert_within(gradient, low, expected)


def test_gradients_are_sums_in_fp32(device: str, backend: str) -> None:
    """The bound is below the error of a weight rounded to bf16, which adds as much as rounding the result."""
    qweight, scale = quantized(300, 1152, None, device)
    x = randn(16, 1152, device=device, dtype=torch.bfloat16).requires_grad_()
    cotangent = randn(16, 300, device=device, dtype=torch.bfloat16)
    int8_linear(x, qweight, scale).backward(cotangent)
    assert x.grad is not None
    assert frobenius(x.grad, cotangent.double() @ dequantized(qweight, scale)) <= 1.9e-3


def test_int8_activations_pass_gradients_through(device: str, backend: str) -> None:
    qweight, scale = quantized(15, 70, None, device)
    gradients = []
    for activations in ("keep", "int8"):
        x = randn(1, 70, device=device).requires_grad_()
        int8_linear(x, qweight, scale, activations=activations).backward(torch.ones(1, 15, device=device))
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("group_size", [None, 2])
def test_gradcheck_of_the_reference(group_size: int | None) -> None:
    qweight, scale = quantized(3, 5, group_size)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x, bias: int8_linear(x, qweight, scale, bias),
            [randn(2, 5, dtype=torch.float64).requires_grad_(), randn(3, dtype=torch.float64).requires_grad_()],
        )


@pytest.mark.parametrize("activations", ["keep", "int8"])
def test_any_layout(device: str, backend: str, activations: str) -> None:
    qweight, scale = quantized(15, 24, 8, device)
    inputs = [randn(3, 5, 24, device=device), randn(15, device=device)]

    def op(x: Tensor, bias: Tensor) -> Tensor:
        return int8_linear(x, qweight, scale, bias, activations=activations)

    assert_any_layout(op, inputs)
    for layout in (transposed, shifted):
        y = int8_linear(inputs[0], layout(qweight), layout(scale), inputs[1], activations=activations)
        torch.testing.assert_close(y, op(*inputs))


def test_pure_and_frozen(device: str, backend: str) -> None:
    qweight, scale = quantized(15, 24, 8, device)
    before = [tensor.clone() for tensor in (qweight, scale)]
    inputs = [randn(3, 24, device=device), randn(15, device=device)]

    def op(x: Tensor, bias: Tensor) -> Tensor:
        return int8_linear(x, qweight, scale, bias)

    assert_pure(op, inputs)
    assert_frozen_inputs(op, inputs)
    assert torch.equal(qweight, before[0]) and torch.equal(scale, before[1])


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device: str, backend: str, low: torch.dtype) -> None:
    """Autocast casts x, not the weight: a weight rounded to bf16 would add as much error as rounding the result."""
    qweight, scale = quantized(300, 1152, None, device)
    x = randn(16, 1152, device=device)
    assert_autocasts(lambda x: int8_linear(x, qweight, scale), [x], low)
    with torch.autocast(device, low):
        y = int8_linear(x, qweight, scale)
    assert y.dtype == low
    assert frobenius(y, x.to(low).double() @ dequantized(qweight, scale).T) <= 1.9e-3


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("activations", ["keep", "int8"])
def test_compiles(device: str, backend: str, activations: str, group_size: int | None) -> None:
    qweight, scale = quantized(15, 70, group_size, device)
    inputs = [randn(2, 3, 70, device=device), randn(15, device=device)]
    assert_compiles(lambda x, b: int8_linear(x, qweight, scale, b, activations=activations).square(), inputs)


def test_compiles_with_a_packed_weight(device: str, backend: str) -> None:
    class Layer(torch.nn.Module):
        def __init__(self, weight: PackedInt8Weight) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return int8_linear(x, self.weight)

    layer = Layer(pack_int8(*quantized(15, 70, 32, device)))
    assert_compiles(layer, [randn(3, 70, device=device)])


def test_compiles_with_inductor(device: str, backend: str) -> None:
    """With a short last group: if Inductor could see into the op, it would read past the end of the scales."""
    qweight, scale = quantized(15, 70, 32, device)
    with WITHOUT_CACHES:
        assert_compiles(lambda x: int8_linear(x, qweight, scale).square(), [randn(3, 70, device=device)], "inductor")


@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("m", [0, 3])
def test_opcheck(device: str, backend: str, m: int, biased: bool, int8_activations: bool) -> None:
    qweight, scale = quantized(15, 70, 32, device)
    x, bias = leaves(randn(m, 70, device=device), randn(15, device=device) if biased else None)
    weight, packed_scale = pack_int8(qweight, scale)._operands(backend)
    arguments = (x, weight, packed_scale, bias, 15, 32, int8_activations, backend, torch.float32)
    torch.library.opcheck(torch.ops.pg_kernels.int8_linear.default, arguments)


@pytest.mark.parametrize("m", [0, 3])
def test_opcheck_of_the_gradient(device: str, backend: str, m: int) -> None:
    qweight, scale = quantized(15, 70, 32, device)
    arguments = (randn(m, 15, device=device), *pack_int8(qweight, scale)._operands(backend), 70, 32, backend)
    torch.library.opcheck(torch.ops.pg_kernels.int8_linear_backward.default, arguments)


def test_no_second_derivative(device: str, backend: str) -> None:
    x = randn(2, 70, device=device).requires_grad_()
    y = int8_linear(x, *quantized(15, 70, None, device))
    with pytest.raises(RuntimeError, match="^int8_linear: it has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


# int8_linear: the extension


@needs_extension
@pytest.mark.parametrize("wanted", ["sse9", "Scalar", "scalar "])
def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setenv("PG_KERNELS_ISA", wanted)
    message = rf"PG_KERNELS_ISA is '{wanted}'; this CPU has: .*scalar"
    with use_backend("native"), pytest.raises(ValueError, match=message):
        int8_linear(randn(2, 4), *quantized(3, 4))


@needs_extension
def test_portable_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from pg_kernels import _C

    monkeypatch.setenv("PG_KERNELS_ISA", "scalar")
    assert _C.instruction_set() == "scalar"
    monkeypatch.setenv("PG_KERNELS_ISA", "")
    assert _C.instruction_set()


class Guarded:
    """Copies tensors to memory that ends at a protected page."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._mprotect = libc.mprotect
        self._mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._kept: list[Any] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        end = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(-1, end + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        guard = address + end
        assert self._mprotect(guard, mmap.PAGESIZE, 0) == 0, ctypes.get_errno()
        copied = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=end - size)
        self._kept.append(pages)
        return copied.view(tensor.shape).copy_(tensor)


@needs_extension
@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize("k", [1, 3, 63, 70, 588])
@pytest.mark.parametrize("n", [1, 15, 17, 65])
def test_native_stays_inside_its_memory(n: int, k: int, int8_activations: bool) -> None:
    from pg_kernels import _C

    guard = Guarded()
    packed = pack_int8(*quantized(n, k, 32))
    x, bias = randn(3, k), randn(n)
    tensors = {"x": x, "data": packed._data, "scale": packed._scale, "bias": bias, "y": torch.zeros(3, n)}
    guarded = {name: guard(tensor) for name, tensor in tensors.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in guarded.items()}
    weight = (n, addresses["data"], addresses["scale"], addresses["bias"], addresses["y"])
    options = {"type": 0, "int8_activations": int8_activations, "geglu": False, "top": None}
    _C.int8_linear(x=addresses["x"], m=3, k=k, group=min(32, k), weights=[weight], **options)
    with use_backend("native"):
        expected = int8_linear(x, packed, bias=bias, activations="int8" if int8_activations else "keep")
    assert torch.equal(guarded["y"], expected)


# int8_linear: errors

GOOD: dict[str, Any] = {
    "x": torch.ones(2, 70),
    "weight": torch.ones(3, 70, dtype=torch.int8),
    "scale": torch.ones(3),
    "bias": torch.ones(3),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, r"^x: expected a tensor, got NoneType"),
        ({"x": torch.ones(2, 70).int()}, TypeError, r"^x: expected float32, float16 or bfloat16, got torch.int32"),
        ({"weight": None}, TypeError, r"^weight: expected a tensor, got NoneType"),
        ({"weight": torch.ones(3, 70)}, TypeError, r"^weight: expected torch.int8, got torch.float32"),
        ({"scale": [1.0]}, TypeError, r"^scale: expected a tensor, got list"),
        ({"scale": torch.ones(3).double()}, TypeError, r"^scale: expected torch.float32, got torch.float64"),
        ({"bias": 1.0}, TypeError, r"^bias: expected a tensor, got float"),
        ({"bias": torch.ones(3).int()}, TypeError, r"^bias: expected float32, float16 or bfloat16, got torch.int32"),
        ({"x": torch.ones(())}, ValueError, r"^x: expected shape \[..., 70\] .*, got \[\]"),
        ({"x": torch.ones(2, 69)}, ValueError, r"^x: expected shape \[..., 70\] .*, got \[2, 69\]"),
        ({"weight": torch.ones(70, dtype=torch.int8)}, ValueError, r"^weight: expected shape \[N, K\], got \[70\]"),
        ({"scale": torch.ones(4)}, ValueError, r"^scale: expected shape \[3\] \(weight's N\).*, got \[4\]"),
        ({"bias": torch.ones(4)}, ValueError, r"^bias: expected shape \[3\] .*, got \[4\]"),
        ({"bias": torch.ones(1, 3)}, ValueError, r"^bias: expected shape \[3\] .*, got \[1, 3\]"),
        ({"scale": None}, ValueError, r"^scale: needed with a weight that is not packed"),
        ({"weight": pack_int8(GOOD["weight"], GOOD["scale"])}, ValueError, r"^scale: a packed weight has its own"),
        ({"x": torch.ones(2, 70, device="meta")}, ValueError, r"^weight: is on cpu, but x is on meta"),
        ({"scale": torch.ones(3, device="meta")}, ValueError, r"^scale: is on meta, but weight is on cpu"),
        ({"bias": torch.ones(3, device="meta")}, ValueError, r"^bias: is on meta, but x is on cpu"),
        ({"activations": "int4"}, ValueError, r"^activations: got 'int4', expected 'keep' or 'int8'"),
        ({"activations": None}, ValueError, r"^activations: got None, expected 'keep' or 'int8'"),
    ],
)
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_errors(change: dict[str, Any], error: type[Exception], message: str, name: str) -> None:
    with use_backend(name), pytest.raises(error, match=message):
        int8_linear(**{**GOOD, **change})
