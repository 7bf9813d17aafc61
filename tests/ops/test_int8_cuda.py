"""The CUDA kernels of int8_linear, compiled for a CPU: every thread runs, and tensor cores and copies are emulated.

`emulator/cuda` replaces the headers with the GPU's instructions. A device is a number: 80 is an A100, 90 an H100. On 180 and
190, the same GPUs, copies run at once instead of as late as the kernel allows.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pybind11
import pytest
import torch
import torch.nn.functional as F
from helpers import randn
from torch import Tensor

from pg_kernels import backend, quantize_int8
from pg_kernels.ops._common import extension
from pg_kernels.ops.int8_linear import cuda, reference, tiles
from pg_kernels.ops.int8_linear.product import Int8Product

ROOT = Path(__file__).parents[2]
# End the process at a misaligned address, an index past an array, or undefined arithmetic. Traps need no library.
CHECKS = "-fsanitize=alignment,bounds,null,shift,signed-integer-overflow -fsanitize-undefined-trap-on-error"
BOUNDS = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 2.5e-3}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulator needs g++")
    path = tmp_path_factory.mktemp("emulator") / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    folders = [ROOT / "tests/ops/emulator", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    sources = [*(ROOT / "csrc/cuda").glob("*.cu"), ROOT / "csrc/cuda/bindings.cpp"]
    flags = ["-std=c++17", "-O1", *CHECKS.split(), "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command = [compiler, *flags, "-DPG_KERNELS_CUDA_MODULE=_cuda", *(f"-I{folder}" for folder in folders)]
    subprocess.run([*command, "-x", "c++", *map(str, sources), "-o", str(path)], check=True)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[80, 90, 180, 190])
def gpu(request: pytest.FixtureRequest, emulator: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Send launches to an emulated GPU. Return its number."""
    monkeypatch.setattr(extension, "_cuda", emulator)
    monkeypatch.setattr(cuda, "_device_and_stream", lambda tensor: {"device": request.param, "stream": 0})
    with backend("auto"):
        yield request.param


def quantized(n: int, k: int, group_size: int | None = None) -> tuple[Tensor, Tensor, int]:
    """Return a weight whose products with normal numbers are of order 1, its scales [N, groups] and its group size."""
    qweight, scale = quantize_int8(randn(n, k) * k**-0.5, group_size=group_size)
    return qweight, scale if scale.dim() == 2 else scale[:, None], min(group_size or k, k)


def multiply(x: Tensor, *product: Any, **options: Any) -> list[Tensor]:
    return cuda.multiply(x, Int8Product(*product, **options))


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    """Copy a tensor to memory between two protected pages, right after the first or right before the second."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    pages = max(1, -(-size // page))
    memory = torch.frombuffer(mmap.mmap(-1, (pages + 2) * page), dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (0, pages + 1):
        address = ctypes.c_void_p(memory.data_ptr() + guard * page)
        assert libc.mprotect(address, ctypes.c_size_t(page), 0) == 0, ctypes.get_errno()  # PROT_NONE
    start = (pages + 1) * page - size if at_end else page
    return memory[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def frobenius(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("k", [1, 31, 32, 70, 588])
@pytest.mark.parametrize("n", [0, 1, 16, 65])
def test_packing_loses_nothing(n: int, k: int) -> None:
    qweight = torch.randint(-128, 128, (n, k)).to(torch.int8)
    for group_size in (k, 32, 64):
        scale = randn(n, -(-k // group_size))
        packed = cuda.pack(qweight, scale, group_size)
        assert tuple(map(len, packed)) == cuda.packed_sizes(n, k, group_size)
        for actual, expected in zip(cuda.unpack(*packed, n, k, group_size), (qweight, scale), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("out", [torch.float32, None])
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "dtype"),
    [
        # few_rows: up to 8 and up to 16 rows, with N just below and above a multiple of 16.
        (1, 16, 64, None, torch.bfloat16),
        (1, 15, 70, None, torch.float16),
        (3, 17, 588, None, torch.bfloat16),
        (8, 33, 1152, 128, torch.float16),
        (9, 65, 588, None, torch.bfloat16),
        (16, 48, 256, 32, torch.bfloat16),
        # many_rows: tiles of 64 and 128 rows; on Hopper 128 and 144, with several rounds of its pipeline.
        (17, 65, 588, None, torch.float16),
        (64, 130, 160, 64, torch.bfloat16),
        (128, 257, 2056, None, torch.bfloat16),
        (140, 72, 1152, None, torch.float16),
        (145, 20, 300, 32, torch.bfloat16),
        # fp32 is three products of bfloat16.
        (2, 17, 70, None, torch.float32),
        (33, 17, 70, 32, torch.float32),
    ],
)
def test_values(
    gpu: int, m: int, n: int, k: int, group_size: int | None, dtype: torch.dtype, out: torch.dtype | None
) -> None:
    """Compare with float64 on the same int8 weight and scales."""
    qweight, scale, group = quantized(n, k, group_size)
    x, bias = randn(m, k, dtype=dtype), randn(n, dtype=dtype)
    data, scales = cuda.pack(qweight, scale, group)
    (y,) = multiply(x, [data], [scales], [bias], [n], group, False, out or dtype)
    exact = reference.int8_linear(x.double(), qweight, scale, bias.double(), group, False)
    assert y.dtype == (out or dtype) and y.shape == (m, n)
    # Products of a 16-bit x are exact: only the fp32 sums are rounded.
    assert frobenius(y, exact) <= (1e-6 if y.dtype == torch.float32 else BOUNDS[y.dtype])


@pytest.mark.parametrize(
    ("m", "n", "k", "group_size"),
    [
        (1, 17, 70, None),
        (16, 33, 588, None),
        (4, 48, 256, 64),
        (70, 65, 300, None),
        (129, 65, 2080, None),
        (20, 17, 96, 32),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_int8_activations(gpu: int, dtype: torch.dtype, m: int, n: int, k: int, group_size: int | None) -> None:
    """Compare with the reference: integer sums are exact, only the scales are multiplied in another order."""
    qweight, scale, group = quantized(n, k, group_size)
    x = randn(m, k, dtype=dtype)
    x[0] *= 100
    data, scales = cuda.pack(qweight, scale, group)
    (y,) = multiply(x, [data], [scales], [None], [n], group, True, torch.float32)
    assert frobenius(y, reference.int8_linear(x.float(), qweight, scale, None, group, True).double()) <= 5e-7


@pytest.mark.parametrize("m", [2, 17, 130])
def test_integer_sums_are_exact(gpu: int, m: int) -> None:
    """Rows with a largest magnitude of 127 are their own levels. Blocks that share a sum give the same integers."""
    k, n = 4096, 20
    levels = torch.randint(-127, 128, (m, k))
    levels[:, 0] = 127
    levels[1] = 127
    qweight = torch.randint(-128, 128, (n, k)).to(torch.int8)
    qweight[3] = -128
    data, scales = cuda.pack(qweight, torch.ones(n, 1), k)
    (y,) = multiply(levels.float(), [data], [scales], [None], [n], k, True, torch.float32)
    assert torch.equal(y, (levels @ qweight.long().T).float())


@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("m", [1, 9, 17, 65, 130])
def test_geglu(gpu: int, m: int, group_size: int | None, int8_activations: bool) -> None:
    n, k = 70, 300
    x = randn(m, k, dtype=torch.bfloat16)
    weights = [quantized(n, k, group_size) for _ in range(2)]
    packed = [cuda.pack(*weight) for weight in weights]
    data, scales = zip(*packed, strict=True)
    group = weights[0][2]
    (y,) = multiply(x, data, scales, [None, None], [n, n], group, int8_activations, torch.float32, geglu=True)
    gate, up = (
        reference.int8_linear(x.float(), qweight, scale, None, group, int8_activations).double()
        for qweight, scale, _ in weights
    )
    assert frobenius(y, F.gelu(gate, approximate="tanh") * up) <= 2e-6


@pytest.mark.parametrize("m", [1, 20, 130])
def test_several_weights(gpu: int, m: int) -> None:
    """Multiply one input by more weights than a launch takes, of different sizes, with blocks that share sums."""
    k, sizes = 512, [64, 17, 1, 40, 33]
    x = randn(m, k, dtype=torch.float16)
    weights = [quantized(n, k) for n in sizes]
    data, scales = zip(*(cuda.pack(*weight) for weight in weights), strict=True)
    biases = [randn(n) if n != 17 else None for n in sizes]
    together = multiply(x, data, scales, biases, sizes, k, False, torch.float16)
    for y, n, (qweight, scale, _), bias in zip(together, sizes, weights, biases, strict=True):
        assert y.shape == (m, n)
        exact = reference.int8_linear(x.double(), qweight, scale, None if bias is None else bias.double(), k, False)
        assert frobenius(y, exact) <= BOUNDS[torch.float16]


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize("m", [1, 9, 65, 130])
def test_memory_bounds(gpu: int, m: int, int8_activations: bool, at_end: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protected pages around every buffer end the process at an access out of bounds."""
    n, k = 17, 588
    qweight, scale, group = quantized(n, k)
    x, bias = randn(m, k, dtype=torch.float16), randn(n, dtype=torch.float16)
    exact = reference.int8_linear(x.double(), qweight, scale, bias.double(), group, int8_activations)
    aligned, new_empty = cuda._aligned, Tensor.new_empty
    monkeypatch.setattr(cuda, "_aligned", lambda x: guarded(aligned(x), at_end))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: guarded(new_empty(*args, **kwargs), at_end))
    x, bias, data, scales = (guarded(t, at_end) for t in (x, bias, *cuda.pack(qweight, scale, group)))
    (y,) = multiply(x, [data], [scales], [bias], [n], group, int8_activations, torch.float16)
    assert frobenius(y, exact) <= BOUNDS[torch.float16]
    assert torch.equal(cuda.dequantize(data, scales, n, k, group, torch.float32), qweight.float() * scale)
    assert torch.equal(
        cuda.dequantize_rows(data, scales, torch.tensor([16]), n, k, group), qweight[16:].float() * scale[16:]
    )


@pytest.mark.parametrize(
    ("device", "m", "n", "splits"),
    [
        (80, 16, 20, 1),  # few rows: warps share the sums
        (80, 17, 20, 8),  # two blocks of 64 tokens on each of 8 multiprocessors, limited by 4 lines of x a block
        (80, 17, 520, 3),
        (80, 128, 520, 1),  # one block of 128 tokens
        (90, 144, 520, 2),  # a tile of 144 tokens, not two of 128
        (90, 256, 520, 1),
    ],
)
def test_num_splits(emulator: Any, device: int, m: int, n: int, splits: int) -> None:
    options = {"k": 2048, "group": 2048, "int8_activations": False, "geglu": False}
    assert emulator.num_splits(m=m, sizes=[n], device=device, **options) == splits


def test_nothing_to_multiply(gpu: int) -> None:
    data, scales = cuda.pack(*quantized(5, 40))
    assert multiply(randn(0, 40), [data], [scales], [None], [5], 40, False, torch.float32)[0].shape == (0, 5)
    data, scales = cuda.pack(torch.ones(0, 40, dtype=torch.int8), torch.ones(0, 1), 40)
    assert multiply(randn(3, 40), [data], [scales], [None], [0], 40, False, torch.float32)[0].shape == (3, 0)


@pytest.mark.parametrize("int8_activations", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("m", [5, 20, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_not_finite(gpu: int, dtype: torch.dtype, m: int, value: float, int8_activations: bool) -> None:
    """NaN and infinity appear in the outputs of their row, and in no other row."""
    data, scales = cuda.pack(torch.ones(16, 70, dtype=torch.int8), torch.ones(16, 1), 70)
    x = randn(m, 70, dtype=dtype)
    arguments = ([data], [scales], [None], [16], 70, int8_activations, torch.float32)
    (clean,) = multiply(x, *arguments)
    x[2, 40] = value
    (y,) = multiply(x, *arguments)
    torch.testing.assert_close(y[2], torch.full((16,), float("nan") if int8_activations else value), equal_nan=True)
    assert torch.equal(y[:2], clean[:2]) and torch.equal(y[3:], clean[3:])


def test_a_row_of_zeros(gpu: int) -> None:
    data, scales = cuda.pack(*quantized(17, 70))
    for int8_activations in (False, True):
        arguments = ([data], [scales], [None], [17], 70, int8_activations, torch.float32)
        assert not multiply(torch.zeros(3, 70, dtype=torch.float16), *arguments)[0].any()


@pytest.mark.parametrize("layout", ["strided", "misaligned"])
def test_layouts(gpu: int, layout: str) -> None:
    x, weight = randn(3, 64, dtype=torch.bfloat16), quantized(17, 64)
    data, scales = cuda.pack(*weight)
    arguments = ([data], [scales], [None], [17], 64, False, torch.float32)
    (expected,) = multiply(x, *arguments)
    assert cuda._aligned(x) is x  # no copy: it would be one more launch
    moved = x.T.contiguous().T if layout == "strided" else torch.cat((x.new_zeros(1), x.flatten()))[1:].view(3, 64)
    assert torch.equal(multiply(moved, *arguments)[0], expected)


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("k", [40, 70, 300])
def test_dequantising(gpu: int, k: int, group_size: int | None) -> None:
    qweight, scale, group = quantized(37, k, group_size)
    data, scales = cuda.pack(qweight, scale, group)
    exact = qweight.float() * scale.repeat_interleave(group, 1)[:, :k]
    indices = torch.tensor([36, 0, 8, 17, 17])
    assert torch.equal(cuda.dequantize_rows(data, scales, indices, 37, k, group), exact[indices])
    out_of_range = cuda.dequantize_rows(data, scales, torch.tensor([-1, 37, 3, 2**40]), 37, k, group)
    assert out_of_range[[0, 1, 3]].isnan().all() and torch.equal(out_of_range[2], exact[3])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(cuda.dequantize(data, scales, 37, k, group, dtype), exact.to(dtype))


def test_many_rows_run_on_cublas(gpu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    qweight, scale, group = quantized(37, 70)
    x, bias = randn(9, 70, dtype=torch.bfloat16), randn(37)
    data, scales = cuda.pack(qweight, scale, group)
    monkeypatch.setattr(tiles, "prefers_cublas", lambda m, device: m >= 9)
    monkeypatch.setattr(extension._cuda, "int8_linear", None)
    (y,) = multiply(x, [data], [scales], [bias], [37], group, False, torch.bfloat16)
    exact = reference.int8_linear(x.double(), qweight, scale, bias.double(), group, False)
    # cuBLAS rounds the weights, the bias and the result to bf16.
    assert y.dtype == torch.bfloat16 and frobenius(y, exact) <= 2 * BOUNDS[torch.bfloat16]


def test_unsupported_reason() -> None:
    x = randn(2, 64)
    assert cuda.unsupported_reason(x, 64, 64) is None and cuda.unsupported_reason(x, 32, 64) is None
    assert cuda.unsupported_reason(x, 16, 64) == "groups of 16 columns are not a multiple of 32"
    assert "float64" in str(cuda.unsupported_reason(x.double(), 64, 64))
