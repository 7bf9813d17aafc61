"""Assertions that hold for every op. Each takes the op as a function of its differentiable tensors only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pg_kernels.ops._common import extension

Op = Callable[..., Tensor | tuple[Tensor, ...]]

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

needs_extension = pytest.mark.skipif(
    extension.unavailable_reason("cpu") is not None,
    reason="the C++ extension is not built, which the installation allows",
)


def one_rounding(backend: str, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Return the tolerances for a number that is rounded once: 0, except that Triton's interpreter truncates bf16."""
    return {"rtol": 2.0**-7 if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16) else 0.0, "atol": 0.0}


def randn(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw normal numbers that are the same on every device."""
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def run(op: Op, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the op's outputs, and the inputs' gradients for fixed random cotangents."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = _as_list(op(*leaves))
    return [out.detach() for out in outputs], list(
        torch.autograd.grad(outputs, leaves, [_cotangent(out) for out in outputs])
    )


def assert_accurate(
    op: Op,
    definition: Op,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    in_torch: Op | None = None,
    *,
    order: float = 1.0,
) -> None:
    """Assert that the errors of outputs and gradients in `dtype` are at most twice PyTorch's errors in that dtype.

    Both errors are differences from the definition in float64 on the same rounded inputs, which should be of order 1. PyTorch
    runs the definition, or `in_torch` if it has a function of its own. `order` is the magnitude of intermediate numbers if they
    are larger than the results.
    """
    rounded = [tensor.to(dtype) for tensor in inputs]
    ours, plain = run(op, rounded), run(in_torch or definition, rounded)
    exact = run(definition, [tensor.double() for tensor in rounded])
    for kind, *results in zip(("output", "gradient"), ours, plain, exact, strict=True):
        for index, (our, low, reference) in enumerate(zip(*results, strict=True)):
            assert our.dtype == dtype, f"{kind} {index} has dtype {our.dtype}"
            assert_within(our, low, reference, f"{kind} {index}", order)


def assert_within(our: Tensor, plain: Tensor, exact: Tensor, what: str = "result", order: float = 1.0) -> None:
    """Assert max|our − exact| ≤ 2 · max|plain − exact| + one rounding of the result + 4 fp32 roundings of numbers of `order`."""
    assert our.shape == exact.shape, f"{what} has shape {list(our.shape)}, expected {list(exact.shape)}"
    assert our.isfinite().all(), f"{what} is not finite"
    if not our.numel():
        return
    error, allowed = ((t.double() - exact).abs().max().item() for t in (our, plain))
    atol = torch.finfo(our.dtype).eps * exact.abs().max().item() + 4 * order * torch.finfo(torch.float32).eps
    bound = 2 * allowed + atol
    assert error <= bound, f"{what} is off by {error:.3g}, allowed {bound:.3g}"


def assert_same(actual: tuple[list[Tensor], list[Tensor]], expected: tuple[list[Tensor], list[Tensor]]) -> None:
    """Assert that two runs gave the same dtypes, and the same numbers up to the order of sums."""
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def every_other(tensor: Tensor) -> Tensor:
    return torch.stack((tensor, tensor + 1), dim=-1)[..., 0]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def shifted(tensor: Tensor) -> Tensor:
    """Return a view whose rows are padded and whose start is not aligned."""
    return torch.nn.functional.pad(tensor, (1, 2), value=7.0)[..., 1:-2]


def assert_any_layout(op: Op, inputs: Sequence[Tensor]) -> None:
    """Assert that outputs and gradients do not depend on the strides of inputs and cotangents. Strides include 0."""
    expected = run(op, inputs)
    for layout in (every_other, transposed, shifted):
        assert_same(run(_through(op, [layout] * len(inputs)), inputs), expected)

    firsts = [tensor[:1] for tensor in inputs]
    expands = [lambda first, full=tensor: first.expand(full.shape) for tensor in inputs]
    copies = [lambda first, full=tensor: first.expand(full.shape).contiguous() for tensor in inputs]
    assert_same(run(_through(op, expands), firsts), run(_through(op, copies), firsts))

    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = _as_list(op(*leaves))
    ones = [torch.ones_like(out, memory_format=torch.contiguous_format) for out in outputs]
    wanted = torch.autograd.grad(outputs, leaves, ones, retain_graph=True)
    for other in (lambda one: one.new_ones(()).expand(one.shape), transposed, every_other):
        torch.testing.assert_close(
            torch.autograd.grad(outputs, leaves, [other(one) for one in ones], retain_graph=True), wanted
        )


def assert_pure(op: Op, inputs: Sequence[Tensor]) -> None:
    """Assert that forward and backward modify no input, saved tensor or cotangent: a second backward gives the same gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = _as_list(op(*leaves))
    cotangents = [_cotangent(out) for out in outputs]
    watched = [*leaves, *outputs, *cotangents]
    before = [(tensor._version, tensor.detach().clone()) for tensor in watched]
    first = torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, cotangents)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    for tensor, (version, values) in zip(watched, before, strict=True):
        assert tensor._version == version
        torch.testing.assert_close(tensor.detach(), values, rtol=0, atol=0)
    for given, leaf in zip(inputs, leaves, strict=True):
        torch.testing.assert_close(leaf.detach(), given, rtol=0, atol=0)
    addresses = {tensor.data_ptr() for tensor in leaves if tensor.numel()}
    assert not any(out.data_ptr() in addresses for out in outputs if out.numel()), "an output is an input's memory"


def assert_frozen_inputs(op: Op, inputs: Sequence[Tensor]) -> None:
    """Assert that an input that needs no gradient gets none, and that the other gradients do not change."""
    for chosen, expected in enumerate(run(op, inputs)[1]):
        tensors = [tensor.detach().clone().requires_grad_(i == chosen) for i, tensor in enumerate(inputs)]
        reached = [out for out in _as_list(op(*tensors)) if out.requires_grad]
        torch.autograd.backward(reached, [_cotangent(out) for out in reached])
        torch.testing.assert_close(tensors[chosen].grad, expected)
        assert all(tensor.grad is None for i, tensor in enumerate(tensors) if i != chosen)
    with torch.no_grad():
        assert not any(out.requires_grad for out in _as_list(op(*tensors)))


def assert_autocasts(op: Op, inputs: Sequence[Tensor], low: torch.dtype) -> None:
    """Assert that fp32 tensors under autocast give the results of low-precision tensors, with fp32 gradients."""

    def under_autocast(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        with torch.autocast(tensors[0].device.type, low):
            return op(*tensors)

    outputs, gradients = run(op, [tensor.to(low) for tensor in inputs])
    actual = run(under_autocast, inputs)
    torch.testing.assert_close(actual, (outputs, [gradient.float() for gradient in gradients]), rtol=0, atol=0)


def assert_compiles(op: Op, inputs: Sequence[Tensor], compiler: str = "aot_eager") -> None:
    """Assert that the op compiles into one graph, which gives eager's outputs and gradients."""
    assert_same(run(torch.compile(op, fullgraph=True, backend=compiler), inputs), run(op, inputs))


def leaves(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return floating-point tensors as leaves that require gradients, and other arguments unchanged, for opcheck."""
    return tuple(t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors)


def _through(op: Op, changes: Sequence[Callable[[Tensor], Tensor]]) -> Op:
    return lambda *tensors: op(*(change(tensor) for change, tensor in zip(changes, tensors, strict=True)))


def _as_list(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _cotangent(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(out.numel())
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
