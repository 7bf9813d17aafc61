"""The Triton kernels for int8 weights, called as `int8_linear` calls them, compared with the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import DEVICES, gelu_tanh, one_rounding, randn
from torch import Tensor

from pg_kernels.ops._common import devices
from pg_kernels.ops.int8_linear import launch, reference, tiles
from pg_kernels.ops.int8_linear.product import Int8Product
from pg_kernels.ops.int8_linear.tiles import Tiles
from pg_kernels.ops.quantize_int8.reference import quantize_int8

pytestmark = pytest.mark.skipif(devices.unavailable_reason(DEVICES[-1]) is not None, reason="needs triton")
DEVICE = DEVICES[-1]
BOUNDS = {torch.float32: 5e-4, torch.float16: 5e-4, torch.bfloat16: 2.5e-3}
if DEVICE == "cpu":  # Triton's interpreter truncates to bf16
    BOUNDS[torch.bfloat16] = 5e-3


def multiply(x: Tensor, *product: Any, **options: Any) -> list[Tensor]:
    return launch.multiply(x, Int8Product(*product, **options))


def weight_of(n: int, k: int, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Return a random weight, int8 [N, K], and its scales [N, groups]."""
    return quantize_int8(randn(n, k, device=DEVICE) / k**0.5, group_size or k)


def exact(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, group_size: int, int8_activations: bool = False
) -> Tensor:
    return reference.int8_linear(x.double(), q, scale.double(), bias, group_size, int8_activations)


def error(y: Tensor, wanted: Tensor) -> float:
    """Return the relative Frobenius error."""
    assert y.shape == wanted.shape
    return ((y.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("k", [1, 70, 588])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 65), (3, 17), (17, 65), (65, 17)])
def test_sizes(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, (q, scale), bias = randn(m, k, device=DEVICE, dtype=dtype), weight_of(n, k), randn(n, device=DEVICE)
    wanted = exact(x, q, scale, bias, k)
    for out_dtype in {dtype, torch.float32}:
        (y,) = multiply(x, [q], [scale], [bias], [n], k, False, out_dtype)
        assert y.dtype == out_dtype
        assert error(y, wanted) <= BOUNDS[out_dtype]


@pytest.mark.parametrize("int8_activations", [False, True], ids=["keep", "int8"])
@pytest.mark.parametrize("group_size", [8, 16, 32, 64, 256])
@pytest.mark.parametrize("m", [3, 65])
def test_groups(m: int, group_size: int, int8_activations: bool) -> None:
    n, k = 33, 300
    x, (q, scale), bias = randn(m, k, device=DEVICE), weight_of(n, k, group_size), randn(n, device=DEVICE)
    scale *= torch.rand_like(scale) + 0.5
    (y,) = multiply(x, [q], [scale], [bias], [n], group_size, int8_activations, torch.float32)
    if int8_activations:  # the reference in fp32: float64 could round x to other levels
        torch.testing.assert_close(y, reference.int8_linear(x, q, scale, bias, group_size, True), rtol=1e-5, atol=1e-5)
    else:
        assert error(y, exact(x, q, scale, bias, group_size)) <= 1e-6


@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("m", [1, 65])
def test_gated(m: int, group_size: int | None) -> None:
    n, k = 65, 588
    x, gate, up = randn(m, k, device=DEVICE), weight_of(n, k, group_size), weight_of(n, k, group_size)
    group = group_size or k
    (y,) = multiply(x, [gate[0], up[0]], [gate[1], up[1]], [None] * 2, [n, n], group, False, x.dtype, geglu=True)
    assert error(y, gelu_tanh(exact(x, *gate, None, group)) * exact(x, *up, None, group)) <= 1e-6
    levels = [reference.int8_linear(x, *weight, None, group, True) for weight in (gate, up)]
    (y,) = multiply(x, [gate[0], up[0]], [gate[1], up[1]], [None] * 2, [n, n], group, True, x.dtype, geglu=True)
    torch.testing.assert_close(y, gelu_tanh(levels[0]) * levels[1], rtol=1e-4, atol=1e-5)


def test_several_weights() -> None:
    x, weights = randn(5, 70, device=DEVICE), [weight_of(n, 70) for n in (17, 1, 0, 64, 33)]
    biases = [None, *(randn(len(q), device=DEVICE, dtype=torch.bfloat16) for q, _ in weights[1:])]
    data, scales = zip(*weights, strict=True)
    outputs = multiply(x, data, scales, biases, [len(q) for q in data], 70, False, x.dtype)
    assert outputs[2].shape == (5, 0)
    for y, (q, scale), bias in zip(outputs, weights, biases, strict=True):
        assert not y.numel() or error(y, exact(x, q, scale, bias, 70)) <= 1e-6
    outputs = multiply(x[:0], data, scales, biases, [len(q) for q in data], 70, False, x.dtype)
    assert [y.shape for y in outputs] == [(0, len(q)) for q in data]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_integer_sums_are_exact(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all scales 1 every result is the exact integer, however many programs share a sum."""
    monkeypatch.setattr(tiles, "num_splits", lambda *_: count)
    m, n, k = 3, 17, 700
    x = torch.randint(-127, 128, (m, k), device=DEVICE).float()
    x[:, 0] = 127
    q = torch.randint(-127, 128, (n, k), device=DEVICE, dtype=torch.int8)
    (y,) = multiply(x, [q], [q.new_ones(n, 1, dtype=torch.float32)], [None], [n], k, True, torch.float32)
    assert y.equal((x.double() @ q.double().T).float())


def test_sums_above_2_to_24() -> None:
    """Sums of ±127 · 127 exceed fp32's exact integers: int32 sums are rounded once, at the end."""
    k = 16384
    x, q = torch.full((1, k), 127.0, device=DEVICE), torch.full((2, k), 127, device=DEVICE, dtype=torch.int8)
    q[1, ::2] = -127
    q[1, 0] = -126
    (y,) = multiply(x, [q], [q.new_ones(2, 1, dtype=torch.float32)], [None], [2], k, True, torch.float32)
    assert y.tolist() == [[127.0 * 127.0 * k, 127.0]]


@pytest.mark.parametrize("int8_activations", [False, True], ids=["keep", "int8"])
def test_split_k(int8_activations: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on how many programs share a sum, and is reproducible bit for bit."""
    n, k = 65, 588
    x, (q, scale), bias = randn(3, k, device=DEVICE), weight_of(n, k), randn(n, device=DEVICE)

    def run(count: int) -> Tensor:
        monkeypatch.setattr(tiles, "num_splits", lambda *_: count)
        return multiply(x, [q], [scale], [bias], [n], k, int8_activations, x.dtype)[0]

    whole = run(1)
    for count in (2, 3, 50):
        torch.testing.assert_close(run(count), whole, rtol=1e-5, atol=1e-5)
        assert run(count).equal(run(count))


def test_num_splits_fills_the_multiprocessors() -> None:
    device = devices.Device("large", (9, 0), 132)
    assert tiles.num_splits(1, 32, 100, device) == 8
    assert tiles.num_splits(1, 32, 4, device) == 2
    assert tiles.num_splits(1, 4019, 100, device) == 1
    assert tiles.num_splits(17, 1, 100, device) == 1


@pytest.mark.parametrize(
    "chosen", [Tiles(16, 64, 32, 1, 4, 2), *tiles.candidates(17, False, devices.INTERPRETER)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tiles(chosen: Tiles, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "choose", lambda *_: chosen)
    x, (q, scale) = randn(70, 300, device=DEVICE, dtype=dtype), weight_of(130, 300)
    (y,) = multiply(x, [q], [scale], [None], [130], 300, False, torch.float32)
    assert error(y, exact(x, q, scale, None, 300)) <= 1e-6


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_levels(dtype: torch.dtype) -> None:
    """Levels equal the reference's: ties to even, a row of zeros, of tiny numbers, and one with an outlier."""
    x = randn(5, 1500, device=DEVICE, dtype=dtype)
    x[0] = 0
    x[1] = (torch.arange(1500, device=DEVICE) % 255 - 127) / 2
    x[1, 0] = 127
    x[2] *= 1e-6
    x[3, 7] = 1000
    levels, scale = launch._quantize_rows(x)
    wide = x.float()
    wanted = wide.abs().amax(-1) / 127
    assert scale.equal(wanted)
    divisor = wanted.where(wanted > 0, 1.0)[:, None]
    assert levels.equal(torch.round(wide / divisor).clamp(-127, 127).to(torch.int8))


@pytest.mark.parametrize("m", [4, 20])
def test_rows_that_are_not_finite(m: int) -> None:
    """With int8 activations every output of such a row is NaN. Other rows do not change."""
    x, (q, scale) = randn(m, 70, device=DEVICE), weight_of(17, 70)
    x[0, 3], x[1, 69], x[2, 0] = float("nan"), float("inf"), -float("inf")
    for int8_activations in (False, True):
        (y,) = multiply(x, [q], [scale], [None], [17], 70, int8_activations, x.dtype)
        plain = reference.int8_linear(x, q, scale, None, 70, int8_activations)
        torch.testing.assert_close(y, plain, equal_nan=True, rtol=1e-5, atol=1e-5)
        assert y[3:].isfinite().all() and y[0].isnan().all()


def test_layouts() -> None:
    x, (q, scale) = randn(20, 70, device=DEVICE), weight_of(17, 70, 32)
    (wanted,) = multiply(x, [q], [scale], [None], [17], 32, False, x.dtype)
    wide = torch.nn.functional.pad(x, (1, 2), value=7.0)[:, 1:-2]
    for other in (wide, x.T.contiguous().T):
        for weight in (q.T.contiguous().T, torch.nn.functional.pad(q, (1, 2), value=7)[:, 1:-2]):
            (y,) = multiply(other, [weight], [scale.T.contiguous().T], [None], [17], 32, False, x.dtype)
            assert y.equal(wanted)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("group_size", [None, 8, 32, 64])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 65, 70), (65, 17, 140)])
def test_input_gradient(m: int, n: int, k: int, group_size: int | None, dtype: torch.dtype) -> None:
    grad, (q, scale) = randn(m, n, device=DEVICE, dtype=dtype), weight_of(n, k, group_size)
    scale *= 1e-4 if dtype == torch.bfloat16 else 10.0
    wanted = reference.input_grad(grad.double(), q, scale.double(), group_size or k)
    y = launch.input_grad(grad, q, scale, group_size or k)
    assert y.dtype == dtype
    assert error(y, wanted) <= BOUNDS[dtype]
    rounding = one_rounding("triton", DEVICE, dtype)["rtol"] or torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), wanted, rtol=rounding, atol=1e-4 * wanted.abs().max().item())


def test_input_gradient_of_empty_tensors() -> None:
    q, scale = weight_of(17, 70)
    assert launch.input_grad(randn(0, 17, device=DEVICE), q, scale, 70).shape == (0, 70)
    assert launch.input_grad(randn(3, 0, device=DEVICE), q[:0], scale[:0], 70).equal(torch.zeros(3, 70, device=DEVICE))
