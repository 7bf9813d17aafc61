"""Resource usage of every Triton kernel, found by compiling it ahead of time. No GPU is needed, and no kernel runs."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import pg_kernels
from pg_kernels import backend
from pg_kernels.benchmarks.kernels.tuning import OPS, Place, Site, choosing, sites
from pg_kernels.ops._common import devices
from pg_kernels.ops._common.devices import Device
from pg_kernels.ops.int8_linear import launch as int8_launch
from pg_kernels.ops.int8_linear.product import Int8Product

DEVICES = {
    "sm_80": Device("NVIDIA A100-SXM4-80GB", (8, 0), 108),
    "sm_90": Device("NVIDIA H100 80GB HBM3", (9, 0), 132),
    "sm_100": Device("NVIDIA B200", (10, 0), 148),
}


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TABLE_HEAD = """\
| op | kernel | launch | target | registers | spilled bytes | shared memory | limit | products | loads |
| --- | --- | --- | --- | --: | --: | --: | --: | --- | --- |"""


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    id: str
    """A hash of everything that determines the machine code: source, types, constants, options, target and compiler."""
    op: str
    name: str
    launch: str
    """Dtype, block sizes and options, which distinguish the compilations of one kernel."""
    target: str
    registers: int
    """Registers per thread."""
    spills: int
    """Bytes of local memory per thread that hold spilled registers."""
    shared: int
    """Bytes of shared memory per program."""
    shared_limit: int
    products: str
    """The matrix-product instruction: wgmma, tcgen05 or mma (tensor cores), or fma. Empty if the kernel has no matrix product."""
    loads: str
    """How tiles are copied to shared memory without passing through registers: TMA or cp.async. Empty if they are not."""

    @property
    def faults(self) -> list[str]:
        """Return the reasons why the kernel must not be shipped."""
        found = [f"spills {self.spills} bytes"] if self.spills else []
        if self.shared > self.shared_limit:
            found.append(f"{self.shared} bytes of shared memory, the limit is {self.shared_limit}")
        return found

    @property
    def table_row(self) -> str:
        """Return the kernel's row of the Markdown table whose header is `TABLE_HEAD`."""
        return (
            f"| {self.op} | {self.name} | {self.launch} | {self.target} | {self.registers} | {self.spills} | "
            f"{self.shared:,} | {self.shared_limit:,} | {self.products} | {self.loads} |"
        )


def compile_all(
    target: str,
    dtypes: Sequence[torch.dtype],
    ops: Sequence[str] = (),
    *,
    known: Collection[str] = (),
    met: set[str] | None = None,
) -> Iterator[Kernel]:
    """Compile all launches that `ops` (default: all) can choose at the models' and at extreme shapes; yield each kernel once.

    Kernels whose ids are in `known` are not compiled. The ids of all kernels, known or not, are added to `met`.

    Raises ValueError for an op without Triton kernels, and RuntimeError if Triton cannot compile.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"no Triton kernels in {op!r}; there are {', '.join(OPS)}")
    if find_spec("triton") is None:
        raise RuntimeError("triton is not installed")
    device = DEVICES[target]
    compiling = _compiling_instead_of_running(device, known, set() if met is None else met)
    with devices.compile_for(device), backend("triton"), compiling as compiled:
        for dtype in dtypes:
            place = Place(torch.device("cpu"), device, dtype, small=True)
            for site in itertools.chain(sites(place), _extremes(place)):
                if ops and site.op not in ops:
                    continue
                call = site.prepare()
                for choice in (None, *site.candidates):
                    with choosing(site, choice):
                        call()
                yield from (_examined(site.op, target, device, dtype, *launched) for launched in compiled)
                compiled.clear()


def _extremes(place: Place) -> Iterator[Site]:
    """Yield launches that `sites` leaves out because their tiles are fixed: other shapes and other arguments."""

    def site(op: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Site:
        return Site(op, "", (), lambda: partial(_forward_and_backward, function, *args, **kwargs))

    draw = place.draw
    for columns in (1, 100, 8192, 8193, 32768):
        x, weight, residual = draw(16, columns, grad=True), draw(columns, grad=True), draw(16, columns, grad=True)
        yield site("rms_norm", pg_kernels.rms_norm, x, weight)
        yield site("rms_norm", pg_kernels.rms_norm, x, weight.detach(), residual=residual)
        if columns <= 8192:
            yield site("layer_norm", pg_kernels.layer_norm, x, weight, draw(columns, grad=True))
    for dim in (2, 72, 256):
        q, k, v = draw(2, 8, 16, dim, grad=True), draw(2, 2, 16, dim), draw(2, 2, 16, dim)
        positions = torch.arange(16)
        yield site("apply_rotary", pg_kernels.apply_rotary, q, k, positions)
        for length in (1, 16):
            now = (tensor.detach()[:, :, :length] for tensor in (q, k, v))
            caches = (torch.zeros_like(k), torch.zeros_like(v), positions[:length])
            yield site("apply_rotary", pg_kernels.apply_rotary_to_cache, *now, positions[:length], *caches)
    for columns in (1, 300, 2048):
        yield site("geglu", pg_kernels.geglu, *draw(16, 2 * columns, grad=True).chunk(2, dim=-1))
    yield site("geglu_mlp", pg_kernels.geglu_mlp, draw(16, 64, grad=True), *(draw(64, 64, grad=True) for _ in range(3)))
    yield from _int8_extremes(place)
    for tokens, width in ((16, 100), (512, 256)):
        loss = partial(pg_kernels.linear_cross_entropy, softcap=30.0, label_smoothing=0.1)
        labels = torch.randint(0, 300, (tokens,))
        yield site("linear_cross_entropy", loss, draw(tokens, width, grad=True), draw(300, width), labels)
    for dim in (96, 256) if place.dtype == torch.float32 else (64, 96, 128, 256):
        lengths = {"prefix_lens": torch.tensor([20]), "kv_lens": torch.tensor([60]), "softcap": 50.0, "window": 32}
        for queries in (8, 64):  # backward's tiles do not depend on the number of queries
            tensors = [draw(1, h, n, dim, grad=queries == 64) for h, n in ((4, queries), (2, 64), (2, 64))]
            yield site("prefix_lm_attention", pg_kernels.prefix_lm_attention, *tensors, **lengths)


def _ready(call: Callable[[], object]) -> Callable[[], Callable[[], object]]:
    return lambda: call


def _int8_extremes(place: Place) -> Iterator[Site]:
    """Yield int8 products with odd sizes, groups of columns, both kinds of activations, and their gradients."""
    for rows in (1, 40, 300) if place.dtype != torch.float32 else (1, 300):
        x, bias = place.draw(rows, 588), place.draw(64)
        for group in (588, 64, 8) if rows > 1 else (588, 64):
            q = torch.ones(64, 588, dtype=torch.int8)
            scale = torch.ones(64, -(-588 // group))
            for int8_activations in (False,) if place.dtype == torch.float32 else (False, True):
                for weights in (1, 2):
                    lists = [q] * weights, [scale] * weights, [bias] * weights, [64] * weights
                    product = Int8Product(*lists, group, int8_activations, place.dtype, geglu=weights == 2)
                    yield Site("int8_linear", "", (), _ready(partial(int8_launch.multiply, x, product)))
            gradient = partial(int8_launch.input_grad, place.draw(rows, 64), q, scale, group)
            yield Site("int8_linear", "", (), _ready(gradient))


def _forward_and_backward(function: Callable[..., Tensor | tuple[Tensor, ...]], *args: Any, **kwargs: Any) -> None:
    outputs = function(*args, **kwargs)
    recorded = [out for out in (outputs if isinstance(outputs, tuple) else [outputs]) if out.requires_grad]
    if recorded:
        torch.autograd.backward(recorded, [torch.ones_like(out) for out in recorded])


@contextmanager
def _compiling_instead_of_running(
    device: Device, known: Collection[str], met: set[str]
) -> Iterator[list[tuple[str, Any, dict[str, Any], str]]]:
    """Make launches compile for `device` instead of running; list each new kernel's id, kernel, launch arguments and ptxas log.

    Launches of kernels in `known` do nothing. All ids are added to `met`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: the interpreter compiles nothing")
    target = GPUTarget("cuda", device.capability[0] * 10 + device.capability[1], 32)

    class NoGPU:
        """The calls that Triton makes to a driver before it compiles."""

        def get_current_target(self) -> GPUTarget:
            return target

        def get_current_device(self) -> str:
            return (
                device.name
            )  # the key of Triton's in-memory cache, so that compilations for several targets do not collide

        def get_current_stream(self, device: object) -> int:
            return 0

    compiled: list[tuple[str, Any, dict[str, Any], str]] = []
    asked: list[str] = []
    run, active = JITFunction.run, driver._active

    def compile_only(self: JITFunction, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> Any:
        asked.clear()
        log = io.StringIO()
        with redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if log.getvalue():  # empty if the kernel was compiled before or is known
            compiled.append((asked[0], kernel, kwargs, log.getvalue()))
        return kernel

    def is_known(*, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
        """Tell Triton's hook whether the kernel is known. True makes Triton skip the compilation."""
        asked.append(_id(fn.jit_function, compile, target, triton.__version__))
        met.add(asked[0])
        return asked[0] in known

    knobs = triton.knobs
    before = knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile
    knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = (
        True  # a kernel from the disk cache has no ptxas log
    )
    knobs.runtime.jit_cache_hook = is_known
    JITFunction.run = compile_only
    driver.set_active(NoGPU())
    try:
        yield compiled
    finally:
        JITFunction.run = run
        knobs.runtime.jit_cache_hook = None
        knobs.nvidia.dump_ptxas_log, knobs.compilation.always_compile = before
        driver._active = active  # `reset_active` would look for a GPU


def _id(function: Any, compilation: Mapping[str, Any], target: object, version: str) -> str:
    texts = [
        *(function.cache_key, str(target), version),
        *(f"{name}: {value}" for name, value in sorted(compilation["signature"].items())),
        *sorted(f"{place}: {value}" for place, value in compilation["constants"].items()),
        *(str(compilation[name]) for name in ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion", "configs")),
    ]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _examined(
    op: str,
    target: str,
    device: Device,
    dtype: torch.dtype,
    id: str,
    kernel: Any,
    constants: Mapping[str, Any],
    assembler_log: str,
) -> Kernel:
    blocks = [f"{name}={value}" for name, value in constants.items() if name.isupper() and name not in ("M", "N", "K")]
    given = sorted(name for name, value in constants.items() if name.endswith("_ptr") and value is None)
    options = [f"without {name.removesuffix('_ptr')}" for name in given]
    return Kernel(
        id=id,
        op=op,
        name=kernel.name,
        launch=", ".join(
            [
                str(dtype).removeprefix("torch."),
                *blocks,
                *options,
                f"warps={kernel.metadata.num_warps}",
                f"stages={kernel.metadata.num_stages}",
                # Triton compiles a new version for other strides and alignments.
                id[:6],
            ]
        ),
        target=target,
        registers=_number(r"Used (\d+) registers", assembler_log),
        spills=_number(r"(\d+) bytes spill stores", assembler_log),
        shared=kernel.metadata.shared,
        shared_limit=device.shared_memory,
        products=_products(kernel.asm["ptx"], kernel.asm["ttgir"]),
        loads=_loads(kernel.asm["ptx"]),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern!r} in the assembler's log: {text}"
    return int(found[1])


def _products(ptx: str, ttgir: str) -> str:
    for name, pattern in (("wgmma", "wgmma.mma_async"), ("tcgen05", "tcgen05.mma"), ("mma", "mma.sync")):
        if pattern in ptx:
            return name
    return "fma" if "tt.dot" in ttgir else ""


def _loads(ptx: str) -> str:
    if "cp.async.bulk.tensor" in ptx:
        return "TMA"
    return "cp.async" if "cp.async" in ptx else ""
