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
    gelu_tanh,
    leaves,
    randn,
    run,
)
from torch import Tensor

from pg_kernels import backend as use_backend
from pg_kernels import geglu

OP = "geglu"
SHAPES = [(), (1,), (5, 7), (2, 3, 64), (1, 16384), (257, 127), (0, 16), (3, 0)]


def definition(gate: Tensor, up: Tensor) -> Tensor:
    return gelu_tanh(gate) * up


def pair(shape: tuple[int, ...], device: str) -> list[Tensor]:
    return [randn(*shape, device=device), randn(*shape, device=device)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(device: str, backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_accurate(geglu, definition, pair(shape, device), dtype)


def test_it_is_the_tanh_form(device: str, backend: str) -> None:
    """At 2 the tanh form gives 1.95459769, the erf form 1.95449974."""
    y = geglu(torch.full((8,), 2.0, device=device), torch.ones(8, device=device))
    torch.testing.assert_close(y, torch.full_like(y, 1.9545977), rtol=1e-6, atol=0)


def test_far_from_zero(device: str, backend: str) -> None:
    """gelu(±100) is 100 and 0 with slopes 1 and 0, although gate³ overflows in fp16."""
    gate = torch.tensor([100.0, -100.0], device=device, dtype=torch.float16).requires_grad_()
    up = torch.tensor([2.0, 2.0], device=device, dtype=torch.float16).requires_grad_()
    y = geglu(gate, up)
    y.sum().backward()
    assert y.tolist() == [200.0, 0.0]
    assert gate.grad is not None and gate.grad.tolist() == [2.0, 0.0]
    assert up.grad is not None and up.grad.tolist() == [100.0, 0.0]


def test_halves_of_one_tensor(device: str, backend: str) -> None:
    both = randn(3, 5, 32, device=device)
    assert_same(
        run(lambda t: geglu(*t.chunk(2, dim=-1)), [both]),
        run(lambda t: geglu(*(half.contiguous() for half in t.chunk(2, dim=-1))), [both]),
    )


def test_one_tensor_in_two_places(device: str, backend: str) -> None:
    x = randn(4, 24, device=device)
    assert_same(run(lambda x: geglu(x, x), [x]), run(lambda x: geglu(x, x.clone()), [x]))


def test_any_layout(device: str, backend: str) -> None:
    assert_any_layout(geglu, pair((3, 5, 24), device))


def test_pure(device: str, backend: str) -> None:
    assert_pure(geglu, pair((3, 24), device))


def test_frozen_inputs(device: str, backend: str) -> None:
    assert_frozen_inputs(geglu, pair((3, 24), device))


def test_autocast_changes_nothing(device: str, backend: str, dtype: torch.dtype) -> None:
    gate, up = (tensor.to(dtype) for tensor in pair((3, 24), device))
    expected = geglu(gate, up)
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(geglu(gate, up), expected, rtol=0, atol=0)


def test_compiles(device: str, backend: str) -> None:
    assert_compiles(geglu, pair((2, 5, 32), device))


@pytest.mark.parametrize("shape", [(3, 16), (0, 16), (2, 3, 16)], ids=str)
def test_opcheck(device: str, backend: str, shape: tuple[int, ...]) -> None:
    gate, up = pair(shape, device)
    if backend == "reference":
        torch.library.opcheck(torch.ops.pg_kernels.geglu.default, leaves(gate, up))
    else:
        ops = torch.ops.pg_kernels
        torch.library.opcheck(getattr(ops, f"geglu_{backend}").default, leaves(gate, up))
        for with_product in (False, True):
            torch.library.opcheck(getattr(ops, f"geglu_{backend}_backward").default, (gate, gate, up, with_product))


def test_gradcheck_of_the_reference() -> None:
    with use_backend("reference"):
        assert torch.autograd.gradcheck(geglu, [tensor.double().requires_grad_() for tensor in pair((3, 4), "cpu")])


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (None, torch.ones(2), TypeError, r"^gate: expected a tensor, got NoneType"),
        (torch.ones(2), 1.0, TypeError, r"^up: expected a tensor, got float"),
        (
            torch.ones(2).int(),
            torch.ones(2),
            TypeError,
            r"^gate: expected float32, float16 or bfloat16, got torch.int32",
        ),
        (torch.ones(2), torch.ones(2).half(), TypeError, r"^up: has dtype torch.float16, but gate has torch.float32"),
        (torch.ones(2, 3), torch.ones(3), ValueError, r"^up: expected shape \[2, 3\] .*, got \[3\]"),
        (torch.ones(2), torch.ones(2, device="meta"), ValueError, r"^up: is on meta, but gate is on cpu"),
    ],
)
def test_errors(gate: Tensor, up: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        geglu(gate, up)
