from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_accurate,
    assert_any_layout,
    assert_autocasts,
    assert_compiles,
    assert_frozen_inputs,
    assert_pure,
    assert_same,
    assert_within,
    gelu_tanh,
    leaves,
    randn,
    run,
)
from torch import Tensor

from pg_kernels import backend as use_backend
from pg_kernels import geglu_mlp
from pg_kernels.nn import GeGLUMLP
from pg_kernels.ops._common import devices
from pg_kernels.ops.geglu_mlp import tiles
from pg_kernels.ops.geglu_mlp.tiles import Tiles

OP = "geglu_mlp"
NAMES = ("x", "gate_weight", "up_weight", "down_weight")


def definition(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    return (gelu_tanh(x @ gate_weight.mT) * (x @ up_weight.mT)) @ down_weight.mT


def inputs_of(rows: tuple[int, ...], device: str, sizes: tuple[int, int, int] = (16, 32, 16)) -> list[Tensor]:
    """Draw x and the three weights for sizes (K, F, N), scaled so that outputs are of order 1."""
    k, f, n = sizes
    return [
        randn(*rows, k, device=device),
        randn(f, k, device=device) / k**0.5,
        randn(f, k, device=device) / k**0.5,
        randn(n, f, device=device) / max(f, 1) ** 0.5,
    ]


@pytest.mark.parametrize("rows", [(), (1,), (5,), (2, 3), (129,), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("sizes", [(16, 32, 16), (64, 128, 64), (40, 72, 24), (1, 3, 2), (130, 257, 66)], ids=str)
def test_values_and_gradients(
    device: str, backend: str, dtype: torch.dtype, rows: tuple[int, ...], sizes: tuple[int, int, int]
) -> None:
    assert_accurate(geglu_mlp, definition, inputs_of(rows, device, sizes), dtype)


@pytest.mark.backends("triton")
@pytest.mark.parametrize(
    "chosen",
    [Tiles(16, 32, 32, 1, 4, 2), Tiles(32, 16, 64, 8, 4, 2), *tiles.candidates(9, devices.INTERPRETER)],
    ids=lambda chosen: f"{chosen.block_m}x{chosen.block_n}x{chosen.block_k}",
)
@pytest.mark.parametrize("sizes", [(64, 128, 64), (40, 72, 24), (1, 3, 2), (130, 257, 66)], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 17, 70])
def test_geglu_gemm_kernel(
    device: str,
    dtype: torch.dtype,
    backend: str,
    rows: int,
    sizes: tuple[int, int, int],
    chosen: Tiles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Force the fused kernel, which runs only if it was tuned, at sizes around the boundaries of its tiles."""
    monkeypatch.setattr(tiles, "choose", lambda *_: chosen)
    inputs = [tensor.to(dtype) for tensor in inputs_of((rows,), device, sizes)]
    with torch.no_grad():
        ours, plain, exact = geglu_mlp(*inputs), definition(*inputs), definition(*(t.double() for t in inputs))
    assert_within(ours, plain, exact)


def test_no_hidden_units(device: str, backend: str) -> None:
    inputs = inputs_of((3,), device, (8, 0, 4))
    outputs, gradients = run(geglu_mlp, inputs)
    torch.testing.assert_close(outputs[0], torch.zeros(3, 4, device=device))
    torch.testing.assert_close(gradients[0], torch.zeros(3, 8, device=device))


def test_one_weight_in_two_places(device: str, backend: str) -> None:
    x, weight, _, down = inputs_of((4,), device)
    assert_same(
        run(lambda x, w, d: geglu_mlp(x, w, w, d), [x, weight, down]),
        run(lambda x, w, d: geglu_mlp(x, w, w.clone(), d), [x, weight, down]),
    )
    assert_same(
        run(lambda x, w: geglu_mlp(x, w, w, w.T), [x, weight]),
        run(lambda x, w: geglu_mlp(x, w, w.clone(), w.T.contiguous()), [x, weight]),
    )


def test_any_layout(device: str, backend: str) -> None:
    assert_any_layout(geglu_mlp, inputs_of((2, 3), device))


def test_pure(device: str, backend: str) -> None:
    assert_pure(geglu_mlp, inputs_of((2, 3), device))


def test_frozen_inputs(device: str, backend: str) -> None:
    assert_frozen_inputs(geglu_mlp, inputs_of((2, 3), device))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_casts_all_four(device: str, backend: str, low: torch.dtype) -> None:
    inputs = inputs_of((5,), device)
    assert_autocasts(geglu_mlp, inputs, low)
    with torch.autocast(device, low):
        mixed = geglu_mlp(inputs[0].to(low), *inputs[1:])
    torch.testing.assert_close(mixed, geglu_mlp(*(tensor.to(low) for tensor in inputs)), rtol=0, atol=0)


def test_compiles(device: str, backend: str) -> None:
    assert_compiles(geglu_mlp, inputs_of((2, 3), device))


def test_compiles_under_autocast(device: str, backend: str) -> None:
    def step(*inputs: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return geglu_mlp(*inputs)

    assert_compiles(step, inputs_of((2, 3), device))


@pytest.mark.parametrize("rows", [(3,), (0,), (2, 3)], ids=str)
def test_opcheck(device: str, backend: str, rows: tuple[int, ...]) -> None:
    inputs = inputs_of(rows, device)
    if backend != "triton":
        op = torch.ops.pg_kernels.geglu_mlp if backend == "reference" else torch.ops.pg_kernels.geglu_mlp_native
        torch.library.opcheck(op.default, leaves(*inputs))
    else:
        inputs[0] = inputs[0].reshape(-1, inputs[0].shape[-1])
        torch.library.opcheck(torch.ops.pg_kernels.geglu_mlp_triton.default, (*leaves(*inputs), True))
        torch.library.opcheck(torch.ops.pg_kernels.geglu_mlp_triton.default, (*inputs, False))


def test_gradcheck_of_the_reference() -> None:
    inputs = [tensor.double().requires_grad_() for tensor in inputs_of((3,), "cpu", (4, 5, 3))]
    with use_backend("reference"):
        assert torch.autograd.gradcheck(geglu_mlp, inputs)


def test_module_takes_replaced_projections(device: str, backend: str) -> None:
    """The module calls a projection that has its own forward, as adapters and quantised layers have."""

    class Doubled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = GeGLUMLP(8, 16).to(device)
    x = randn(3, 8, device=device)
    torch.testing.assert_close(
        module(x), geglu_mlp(x, module.gate_proj.weight, module.up_proj.weight, module.down_proj.weight)
    )
    doubled = Doubled(16, 8, bias=False, device=device)
    doubled.load_state_dict(module.down_proj.state_dict())
    expected = 2 * module(x)
    module.down_proj = doubled
    torch.testing.assert_close(module(x), expected)


GOOD = dict(zip(NAMES, inputs_of((2,), "cpu", (4, 6, 3)), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": GOOD["x"].int()}, TypeError, r"^x: expected float32, float16 or bfloat16, got torch.int32"),
        ({"up_weight": None}, TypeError, r"^up_weight: expected a tensor, got NoneType"),
        ({"gate_weight": None}, TypeError, r"^gate_weight: expected a tensor, got NoneType"),
        (
            {"down_weight": GOOD["down_weight"].half()},
            TypeError,
            r"^down_weight: has dtype torch.float16, but x has torch.float32",
        ),
        ({"x": torch.ones(2, 0)}, ValueError, r"^x: expected shape \[..., N\] with N >= 1"),
        ({"x": torch.ones(2, 5)}, ValueError, r"^gate_weight: expected shape \[F, 5\] .*, got \[6, 4\]"),
        ({"gate_weight": torch.ones(6)}, ValueError, r"^gate_weight: expected shape \[F, 4\] .*, got \[6\]"),
        ({"up_weight": torch.ones(5, 4)}, ValueError, r"^up_weight: expected shape \[6, 4\] .*, got \[5, 4\]"),
        ({"down_weight": torch.ones(6, 3)}, ValueError, r"^down_weight: expected shape \[N, 6\] .*, got \[6, 3\]"),
        ({"up_weight": GOOD["up_weight"].to("meta")}, ValueError, r"^up_weight: is on meta, but x is on cpu"),
    ],
)
def test_errors(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        geglu_mlp(**{**GOOD, **change})
