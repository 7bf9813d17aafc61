"""int8_projections, int8_geglu, int8_topk and the rows of a packed weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import DEVICES, assert_compiles, randn
from torch import Tensor

from pg_kernels import PackedInt8Weight, int8_geglu, int8_linear, int8_projections, int8_topk, pack_int8, quantize_int8
from pg_kernels import backend as use_backend

OP = "int8_linear"
ACTIVATIONS = ["keep", "int8"]
# Relative Frobenius error of gelu_tanh(gate) · up. Without a fused kernel gate and up are rounded first.
BOUNDS = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def packed(n: int, k: int, group_size: int | None = None, device: str = "cpu") -> PackedInt8Weight:
    with use_backend("auto"):
        return pack_int8(*quantize_int8(randn(n, k, device=device) * k**-0.5, group_size=group_size))


def dequantized(weight: PackedInt8Weight) -> Tensor:
    return weight.rows(torch.arange(weight.shape[0], device=weight.device), torch.float64)


# Rows


@pytest.mark.parametrize("group_size", [None, 1, 2, 32])
@pytest.mark.parametrize("shape", [(1, 1), (15, 70), (64, 64), (65, 33), (130, 588)], ids=str)
def test_rows(shape: tuple[int, int], group_size: int | None) -> None:
    qweight, scale = quantize_int8(randn(*shape), group_size=group_size)
    columns = torch.arange(shape[1]) // (group_size or shape[1])
    expected = qweight.float() * scale.view(shape[0], -1)[:, columns]
    indices = torch.randint(0, shape[0], (3, 5))
    weight = pack_int8(qweight, scale)
    assert torch.equal(weight.rows(indices), expected[indices])
    assert torch.equal(weight.rows(indices, torch.bfloat16), expected[indices].bfloat16())
    assert torch.equal(weight.rows(indices.int()), expected[indices])
    assert weight.rows(indices[:0]).shape == (0, 5, shape[1])


@pytest.mark.parametrize("index", [-1, 3])
def test_row_indices_out_of_range(index: int) -> None:
    for weight in (GOOD, PackedInt8Weight(GOOD.shape, 70, *quantize_int8(randn(3, 70), group_size=128), False)):
        with pytest.raises(ValueError, match=rf"^indices: expected numbers in \[0, 3\), got {min(index, 1)} to"):
            weight.rows(torch.tensor([1, index]))
    with pytest.raises(TypeError, match="^indices: expected int32 or int64, got torch.float32"):
        GOOD.rows(torch.ones(2))


# Top-k


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("log_probs", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 5), (64, 64), (1000, 1), (1000, 70), (1000, 300)])
def test_topk(
    device: str,
    backend: str,
    dtype: torch.dtype,
    n: int,
    k: int,
    softcap: float | None,
    log_probs: bool,
    activations: str,
) -> None:
    weight = packed(n, 70, 32, device)
    x = randn(2, 5, 70, device=device, dtype=dtype)
    values, indices = int8_topk(x, weight, k, softcap=softcap, log_probs=log_probs, activations=activations)
    with use_backend("reference"):
        exact = int8_linear(x.float(), weight, activations=activations).double()
    exact = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    exact = exact.log_softmax(-1) if log_probs else exact
    assert values.dtype == torch.float32 and indices.dtype == torch.int64 and values.shape == (2, 5, k)
    # The values are the k largest, in order, and lie at the indices.
    torch.testing.assert_close(values.double(), exact.sort(descending=True).values[..., :k], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(values.double(), exact.gather(-1, indices), rtol=1e-4, atol=1e-3)
    assert bool((values.diff() <= 0).all()) and all(len(set(row.tolist())) == k for row in indices.view(-1, k))


def test_topk_of_equal_logits_and_nan(device: str, backend: str) -> None:
    levels = torch.tensor([1, 3, 3, 2, 3], dtype=torch.int8, device=device)[:, None].repeat(40, 1)
    weight = pack_int8(levels, torch.ones(200, device=device))
    values, indices = int8_topk(torch.ones(1, 1, device=device), weight, 4)
    assert indices.tolist() == [[1, 2, 4, 6]] and values.tolist() == [[3.0] * 4]
    values, indices = int8_topk(torch.full((1, 1), float("nan"), device=device), weight, 2, log_probs=True)
    assert indices.tolist() == [[0, 1]] and bool(values.isnan().all())


@pytest.mark.backends("native")
def test_topk_does_not_depend_on_threads_and_batch(device: str, backend: str) -> None:
    weight, x = packed(5000, 70), randn(400, 70)
    threads = torch.get_num_threads()
    expected = int8_topk(x, weight, 9, log_probs=True)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows in (slice(None), slice(5, 6), slice(380, 400)):
                for actual, wanted in zip(int8_topk(x[rows], weight, 9, log_probs=True), expected, strict=True):
                    assert torch.equal(actual, wanted[rows])
    finally:
        torch.set_num_threads(threads)


def test_topk_orders_logits_with_equal_log_probabilities(device: str, backend: str) -> None:
    weight = pack_int8(torch.eye(4, dtype=torch.int8, device=device), torch.ones(4, device=device))
    x = torch.tensor([[20.0, 20.001, 0.0, 0.0]], device=device)
    assert int8_topk(x, weight, 2, log_probs=True)[1].tolist() == [[1, 0]]


def test_log_probabilities_of_large_logits(device: str, backend: str) -> None:
    """exp of these logits would be infinite, or zero for all."""
    weight = pack_int8(
        torch.tensor([[100], [99], [-100]], dtype=torch.int8, device=device), torch.ones(3, device=device)
    )
    for sign in (1.0, -1.0):
        values, _ = int8_topk(torch.full((1, 1), 10 * sign, device=device), weight, 2, log_probs=True)
        torch.testing.assert_close(values[0, 0], torch.tensor(0.0, device=device), rtol=0, atol=1e-4)


# Several projections of one input


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("group_size", [None, 32])
def test_projections_equal_int8_linear_of_each_weight(
    device: str, backend: str, dtype: torch.dtype, group_size: int | None, activations: str
) -> None:
    weights = [packed(n, 70, group_size, device) for n in (128, 1, 65)]
    biases = [None, randn(1, device=device), randn(65, device=device, dtype=dtype)]
    x = randn(2, 5, 70, device=device, dtype=dtype)
    outputs = int8_projections(x, weights, biases, activations=activations)
    for y, weight, bias in zip(outputs, weights, biases, strict=True):
        assert torch.equal(y, int8_linear(x, weight, bias=bias, activations=activations))


def test_projections_with_different_group_sizes(device: str, backend: str) -> None:
    weights = [packed(16, 70, group_size, device) for group_size in (None, 32)]
    x = randn(3, 70, device=device)
    for y, weight in zip(int8_projections(x, weights), weights, strict=True):
        assert torch.equal(y, int8_linear(x, weight))


def test_projections_have_gradients(device: str, backend: str) -> None:
    weights = [packed(n, 70, None, device) for n in (16, 33)]
    x = randn(3, 70, device=device).requires_grad_()
    bias = randn(16, device=device).requires_grad_()
    outputs = int8_projections(x, weights, [bias, None])
    cotangents = [randn(*y.shape, device=device) for y in outputs]
    gradients = torch.autograd.grad(outputs, [x, bias], cotangents)
    expected = sum(c.double() @ dequantized(w) for c, w in zip(cotangents, weights, strict=True))
    torch.testing.assert_close(gradients[0].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[1], cotangents[0].sum(0))


@pytest.mark.parametrize("shape", [(70,), (0, 70), (2, 0, 70)], ids=str)
def test_projection_shapes(device: str, backend: str, shape: tuple[int, ...]) -> None:
    weights = [packed(n, 70, None, device) for n in (16, 33)]
    x = randn(*shape, device=device)
    assert [y.shape for y in int8_projections(x, weights)] == [(*shape[:-1], 16), (*shape[:-1], 33)]
    assert int8_geglu(x, weights[0], weights[0]).shape == (*shape[:-1], 16)


# GeGLU


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("n", [1, 64, 100])
def test_geglu(device: str, backend: str, dtype: torch.dtype, n: int, group_size: int | None, activations: str) -> None:
    gate, up = (packed(n, 70, group_size, device) for _ in range(2))
    x = randn(2, 9, 70, device=device, dtype=dtype)
    y = int8_geglu(x, gate, up, activations=activations)
    assert y.dtype == dtype and y.shape == (2, 9, n)
    with use_backend("reference"):
        left, right = (int8_linear(x.double(), w, activations=activations) for w in (gate, up))
    exact = torch.nn.functional.gelu(left, approximate="tanh") * right
    assert ((y.double() - exact).norm() / exact.norm()).item() <= BOUNDS[dtype]


def test_geglu_far_from_zero(device: str, backend: str) -> None:
    """gelu_tanh is 0 far below zero and the identity far above, without overflow in between."""
    one = pack_int8(torch.ones(1, 1, dtype=torch.int8, device=device), torch.ones(1, device=device))
    x = torch.tensor([[-1e30], [-1e4], [-30.0], [0.0], [30.0], [1e4]], device=device)
    y = int8_geglu(x, one, one)
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 900.0, 1e8], device=device)
    torch.testing.assert_close(y[:, 0], expected, rtol=1e-4, atol=1e-30)
    assert bool(int8_geglu(torch.full((1, 1), -torch.inf, device=device), one, one).isnan())


@pytest.mark.parametrize("device", DEVICES)
def test_geglu_has_gradients(device: str) -> None:
    gate, up = (packed(33, 70, None, device) for _ in range(2))
    x = randn(3, 70, device=device).requires_grad_()
    (ours,) = torch.autograd.grad(int8_geglu(x, gate, up).sum(), x)
    wide = x.detach().double().requires_grad_()
    left, right = (wide @ dequantized(w).T for w in (gate, up))
    (exact,) = torch.autograd.grad((torch.nn.functional.gelu(left, approximate="tanh") * right).sum(), wide)
    assert ((ours.double() - exact).norm() / exact.norm()).item() <= 5e-4


# Compilation and errors


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_compiles(device: str, activations: str) -> None:
    weights = [packed(33, 70, 32, device) for _ in range(2)]

    def everything(x: Tensor) -> Tensor:
        left, right = int8_projections(x, weights, activations=activations)
        best, _ = int8_topk(x, weights[0], 33, activations=activations)
        return left + right + int8_geglu(x, *weights, activations=activations) + best

    x = randn(2, 3, 70, device=device)
    assert_compiles(everything, [x])
    with torch.no_grad():
        compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), everything(x))


@pytest.mark.backends("native")
@pytest.mark.parametrize("m", [0, 3])
def test_opcheck(device: str, backend: str, m: int) -> None:
    weights = [packed(33, 70, 32, device) for _ in range(2)]
    data, scales = [w._data for w in weights], [w._scale for w in weights]
    x, ops = randn(m, 70, device=device), torch.ops.pg_kernels
    torch.library.opcheck(ops.int8_projections.default, (x, data, scales, [None, randn(33)], [33, 33], 32, False))
    torch.library.opcheck(ops.int8_geglu.default, (x, data[0], scales[0], data[1], scales[1], 33, 32, True, "native"))
    qweight, scale = weights[0].unpack()
    torch.library.opcheck(ops.int8_topk.default, (x, data[0], scales[0], 33, 32, False, 4, 2.0, True, "native"))
    torch.library.opcheck(ops.int8_rows.default, (data[0], scales[0], torch.arange(m), 33, 70, 32))
    torch.library.opcheck(ops.pack_int8.default, (qweight, scale, 32))
    torch.library.opcheck(ops.unpack_int8.default, (data[0], scales[0], 33, 70, 32))


def layout(**changes: Any) -> dict[str, Any]:
    """Return the registered ops' arguments for a weight [33, 70] in groups of 32, with some changes."""
    weight = packed(33, 70, 32)
    return {"data": weight._data, "scale": weight._scale, "n": 33, "group_size": 32, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 49},
        {"n": -1},
        {"group_size": 0},
        {"group_size": 64},
        {"data": packed(33, 66, 32)._data},
        {"data": packed(33, 70, 32)._data.view(torch.int8)},
        {"data": packed(33, 70, 32)._data.repeat_interleave(2)[::2]},
        {"scale": packed(33, 70)._scale},
        {"scale": packed(33, 70, 32)._scale.double()},
    ],
    ids=lambda changes: "-".join(changes),
)
@pytest.mark.backends("native")
def test_buffers_of_another_weight(device: str, backend: str, changes: dict[str, Any]) -> None:
    """The registered ops refuse buffers of other sizes: the extension would read past them."""
    ops, x = torch.ops.pg_kernels, torch.ones(2, 70)
    data, scale, n, group_size = layout(**changes).values()
    for call in (
        lambda: ops.int8_linear(x, data, scale, None, n, group_size, False, "native", torch.float32),
        lambda: ops.int8_projections(x, [data], [scale], [None], [n], group_size, False),
        lambda: ops.int8_geglu(x, data, scale, data, scale, n, group_size, False, "native"),
        lambda: ops.int8_topk(x, data, scale, n, group_size, False, 1, None, False, "native"),
        lambda: ops.int8_rows(data, scale, torch.tensor([0]), n, 70, group_size),
        lambda: ops.unpack_int8(data, scale, n, 70, group_size),
    ):
        with pytest.raises((ValueError, RuntimeError), match="expected"):
            call()


GOOD = packed(3, 70)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: int8_projections(x, []), ValueError, "^weights: expected one or more, .*; got 0 and 0"),
        (lambda x: int8_projections(x, [GOOD], []), ValueError, "^weights: .*; got 1 and 0"),
        (lambda x: int8_projections(x, [GOOD], [torch.ones(4)]), ValueError, r"^bias: expected shape \[3\]"),
        (lambda x: int8_projections(x, [GOOD, packed(3, 71)]), ValueError, r"^x: expected shape \[..., 71\]"),
        (lambda x: int8_projections(x.int(), [GOOD]), TypeError, "^x: expected float32, float16 or bfloat16"),
        (
            lambda x: int8_geglu(x, GOOD, packed(4, 70)),
            ValueError,
            r"^up: expected shape \[3, 70\] \(gate's\), got \[4, 70\]",
        ),
        (lambda x: int8_topk(x, GOOD, 0), ValueError, r"^k: expected a number in \[1, 3\] \(the weight's N\), got 0"),
        (lambda x: int8_topk(x, GOOD, 4), ValueError, r"^k: expected a number in \[1, 3\] .*, got 4"),
        (lambda x: int8_topk(x, GOOD, 1.0), TypeError, "^k: expected an int, got float"),
        (lambda x: int8_topk(x, GOOD, softcap=0.0), ValueError, "^softcap: expected a positive number, got 0.0"),
        (
            lambda x: int8_topk(x, GOOD.unpack()[0]),
            TypeError,
            "^weight: expected one that pack_int8 has packed, got Tensor",
        ),
        (lambda x: int8_topk([1.0], GOOD), TypeError, "^x: expected a tensor, got list"),
        (lambda x: int8_geglu(x[:, :69], GOOD, GOOD), ValueError, r"^x: expected shape \[..., 70\]"),
        (lambda x: int8_geglu(x, GOOD, GOOD, activations="int4"), ValueError, "^activations: got 'int4'"),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(2, 70))


def test_a_named_backend_is_strict() -> None:
    with use_backend("native"), pytest.raises(RuntimeError, match="float64 runs on backend 'reference' only"):
        int8_linear(torch.ones(2, 70, dtype=torch.float64), GOOD)


def test_no_rows() -> None:
    empty = pack_int8(torch.ones(0, 4, dtype=torch.int8), torch.ones(0))
    assert empty.dequantize().shape == (0, 4)


def test_forward_derivatives_raise() -> None:
    from torch.autograd import forward_ad

    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        int8_projections(forward_ad.make_dual(torch.ones(2, 70), torch.ones(2, 70)), [GOOD, GOOD])
