"""int8_linear and the C++ extension: alignment, batches, threads, instruction sets, and torch in the same process."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import needs_extension, randn
from torch import Tensor

from pg_kernels import backend as use_backend
from pg_kernels import int8_linear, pack_int8, quantize_int8

OP = "int8_linear"
ACTIVATIONS = ["keep", "int8"]
BOUNDS = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 2.5e-3}


def weights(n: int, k: int, group_size: int | None, device: str) -> tuple[Tensor, Tensor]:
    """Return a quantised weight whose products with normal numbers are of order 1, and its scales."""
    with use_backend("auto"):  # the test's backend is for int8_linear only
        return quantize_int8(randn(n, k, device=device) * k**-0.5, group_size=group_size)


def assert_equal_up_to_order(backend: str, actual: Tensor, expected: Tensor) -> None:
    """Compare bit for bit for the C++ kernels on CPUs. Other kernels add in an order that depends on the number of rows."""
    if (backend, actual.device.type) == ("native", "cpu"):
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_misaligned(device: str, backend: str, dtype: torch.dtype, activations: str) -> None:
    """Tensors are contiguous, but begin one element after the start of an allocation."""

    def moved(tensor: Tensor) -> Tensor:
        return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)

    x, (qweight, scale) = randn(3, 70, device=device, dtype=dtype), weights(17, 70, 32, device)
    bias = randn(17, device=device)
    expected = int8_linear(x, qweight, scale, bias, activations=activations)
    y = int8_linear(moved(x), moved(qweight), moved(scale), moved(bias), activations=activations)
    assert_equal_up_to_order(backend, y, expected)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("group_size", [None, 128])
def test_a_row_does_not_depend_on_its_batch(
    device: str, backend: str, dtype: torch.dtype, group_size: int | None, activations: str
) -> None:
    packed = pack_int8(*weights(65, 588, group_size, device))
    x = randn(17, 588, device=device, dtype=dtype)
    whole = int8_linear(x, packed, activations=activations)
    for m in (0, 8, 16):
        assert_equal_up_to_order(backend, int8_linear(x[m], packed, activations=activations), whole[m])
    assert_equal_up_to_order(backend, int8_linear(x[3:10], packed, activations=activations), whole[3:10])


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_the_number_of_threads_changes_nothing(device: str, backend: str, activations: str) -> None:
    """Results do not depend on the number of threads, and the op does not change it."""
    packed = pack_int8(*weights(257, 588, None, device))
    x = randn(16, 588, device=device)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(int8_linear(x, packed, activations=activations))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_equal_up_to_order(backend, result, results[0])


@pytest.mark.parametrize("k", [588, 4304])
@pytest.mark.parametrize("factor", [100, 1000])
def test_int8_activations_with_outliers(device: str, backend: str, dtype: torch.dtype, factor: int, k: int) -> None:
    """Every row is as accurate as its levels allow, beside a much larger row and with much larger channels."""
    qweight, scale = weights(256, k, None, device)
    x = randn(4, k, device=device)
    x[1] *= factor
    x[2, ::100] *= factor
    x = x.to(dtype)
    step = x.float().abs().amax(-1, keepdim=True) / 127
    levels = (x.float() / step).round().double()
    expected = levels * step.double() @ (qweight.double() * scale.double()[:, None]).T
    y = int8_linear(x, qweight, scale, activations="int8")
    errors = (y.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.max().item() <= BOUNDS[dtype]


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_autocast_leaves_the_bias_alone(device: str, backend: str, activations: str) -> None:
    """The bias is added in fp32. In fp16 it would be 127, and the result 0."""
    one = torch.ones(1, 1, device=device)
    with torch.autocast(device, torch.float16):
        y = int8_linear(-127 * one, one.to(torch.int8), one[0], 127 * one[0] + 2**-8, activations=activations)
    assert y.dtype == torch.float16 and y.item() == 2**-8


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


MULTIPLY = """
import torch
from pg_kernels import backend, int8_linear
with backend("native"):
    y = int8_linear(torch.ones(2, 5), torch.full((3, 5), 2, dtype=torch.int8), torch.ones(3))
assert y.tolist() == [[10.0] * 3] * 2
"""


@needs_extension
def test_the_environment_chooses_an_instruction_set() -> None:
    assert python(MULTIPLY, PG_KERNELS_ISA="scalar").returncode == 0
    done = python(MULTIPLY, PG_KERNELS_ISA="mmx")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ValueError: PG_KERNELS_ISA is 'mmx'; this CPU has: ")


def instruction_sets() -> list[str]:
    try:
        return importlib.import_module("pg_kernels._C").instruction_sets()
    except ImportError:
        return []


@needs_extension
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("group_size", [None, 1, 32, 128])
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (15, 3), (16, 4), (63, 63), (64, 70), (65, 588), (112, 1152), (130, 2304)]
)
def test_instruction_sets_agree_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, n: int, k: int, group_size: int | None, activations: str
) -> None:
    """Results do not depend on the instruction set, nor on the number of rows."""
    most = 385 if n * k < 5000 else 65  # the kernel takes 384 rows at a time
    packed, x = pack_int8(*weights(n, k, group_size, "cpu")), randn(most, k)
    x[3], x[5, k // 2], x[7] = 0, float("nan"), x[7] * 1e-38
    with use_backend("native"):
        expected = int8_linear(x, packed, activations=activations)
        for name in instruction_sets():
            monkeypatch.setenv("PG_KERNELS_ISA", name)
            for m in (*range(10), 15, 16, most - 2, most - 1, most):
                y = int8_linear(x[:m], packed, activations=activations)
                assert torch.equal(y.view(torch.int32), expected[:m].view(torch.int32)), (name, m)


@needs_extension
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("shape", [(4304, 1152), (1152, 4304), (1152, 588), (65, 16384)], ids=str)
def test_instruction_sets_at_the_models_shapes(
    monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    qweight, scale = weights(*shape, None, "cpu")
    x = randn(5, shape[1], dtype=dtype)
    monkeypatch.setenv("PG_KERNELS_ISA", name)
    with use_backend("native"):
        y = int8_linear(x, qweight, scale)
    exact = x.double() @ (qweight.double() * scale.double()[:, None]).T
    assert ((y.double() - exact).norm() / exact.norm()).item() <= BOUNDS[dtype]


@needs_extension
def test_sums_stay_in_registers() -> None:
    """A compiler that keeps sums in memory makes the product several times slower. No other test detects it."""
    if "avx512_vnni" not in instruction_sets() or shutil.which("objdump") is None:
        pytest.skip("needs objdump, and an x86 CPU with AVX-512 VNNI")
    path = importlib.import_module("pg_kernels._C").__file__
    listing = subprocess.run(["objdump", "-dC", "--no-show-raw-insn", path], capture_output=True, text=True, check=True)
    functions = re.split(r"^[0-9a-f]+ <", listing.stdout, flags=re.MULTILINE)
    products = [body for body in functions if re.match(r"void .*multiply<.*Avx512Vnni", body)]
    assert products and all("vpdpbusd" in body for body in products)
    for body in products:
        assert not re.search(r"mm\d+,.*\(%[re][sb]p|\(%[re][sb]p\),%[xyz]mm", body), body.splitlines()[0]


LOAD_ALONE = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("pg_kernels._C", {path!r})
extension = importlib.util.module_from_spec(importlib.util.spec_from_loader("pg_kernels._C", loader))
loader.exec_module(extension)
assert extension.instruction_set() and "torch" not in sys.modules
"""

RUNTIMES = """
import os, re
if os.path.exists("/proc/self/maps"):
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps}
    runtimes = {path for path in paths if re.match(r"lib(gomp|omp|iomp5)[-.]", os.path.basename(path))}
    assert len(runtimes) == 1, runtimes
"""


@needs_extension
@pytest.mark.parametrize("first", ["extension", "torch"])
def test_the_extension_and_torch_in_either_order(first: str) -> None:
    """Both load, and torch's OpenMP runtime is the only one in the process: a second one would oversubscribe the cores."""
    path = importlib.import_module("pg_kernels._C").__file__
    done = python((LOAD_ALONE.format(path=path) if first == "extension" else "import torch") + MULTIPLY + RUNTIMES)
    assert done.returncode == 0, done.stderr
