"""Selection of backends, tested on a made-up op and on the real ones."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import pg_kernels
from pg_kernels import backend, backends
from pg_kernels.model.training import trainer

OPS = {
    "apply_rotary",
    "geglu",
    "geglu_mlp",
    "layer_norm",
    "linear_cross_entropy",
    "prefix_lm_attention",
    "rms_norm",
}


@pytest.fixture
def triton_needs_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Register a made-up op with a triton backend for CUDA tensors and without a native backend. The value is its name."""
    monkeypatch.setattr(backends, "_registered", {})
    backends.register_backend("made_up", "triton", lambda device_type: None if device_type == "cuda" else "needs a GPU")
    yield "made_up"


def test_auto_takes_the_first_that_can_run(triton_needs_cuda: str) -> None:
    assert backends.select(triton_needs_cuda, "cuda") == "triton"
    assert backends.select(triton_needs_cuda, "cpu") == "reference"
    backends.register_backend(triton_needs_cuda, "native", lambda device_type: None)
    assert backends.select(triton_needs_cuda, "cuda") == "triton"
    assert backends.select(triton_needs_cuda, "cpu") == "native"
    with backend("auto"):
        assert backends.select(triton_needs_cuda, "cpu") == "native"


def test_the_interpreter_must_be_asked_for(triton_needs_cuda: str) -> None:
    backends.register_backend(triton_needs_cuda, "triton", lambda device_type: None)
    assert backends.select(triton_needs_cuda, "cpu") == "reference"
    with backend("triton"):
        assert backends.select(triton_needs_cuda, "cpu") == "triton"
    assert backends.available(triton_needs_cuda, "cpu") == ["reference"]
    assert backends.available(triton_needs_cuda, "cpu", interpreted=True) == ["triton", "reference"]
    _, reasons = backends.explain("cpu")[triton_needs_cuda]
    assert reasons["triton"] == "on the CPU it is Triton's interpreter, which must be asked for"


def test_unsupported_arguments_and_slower_backends(triton_needs_cuda: str) -> None:
    """Auto skips a backend that does not support the arguments, and one that is slower than another."""
    unsupported = {"triton": "too long"}
    assert backends.select(triton_needs_cuda, "cuda", unsupported) == "reference"
    assert backends.select(triton_needs_cuda, "cuda", avoid=("triton",)) == "reference"
    with backend("triton"):
        assert backends.select(triton_needs_cuda, "cuda", avoid=("triton",)) == "triton"
        with pytest.raises(RuntimeError, match="made_up cannot run on backend 'triton' with cuda tensors: too long"):
            backends.select(triton_needs_cuda, "cuda", unsupported)


def test_a_named_backend_is_strict(triton_needs_cuda: str) -> None:
    with backend("triton"):
        assert backends.select(triton_needs_cuda, "cuda") == "triton"
        with pytest.raises(RuntimeError, match="made_up cannot run on backend 'triton' with cpu tensors: needs a GPU"):
            backends.select(triton_needs_cuda, "cpu")
    with backend("native"), pytest.raises(RuntimeError, match="made_up cannot run .*: no native implementation"):
        backends.select(triton_needs_cuda, "cuda")
    with backend("reference"):
        assert backends.select(triton_needs_cuda, "cuda") == "reference"


def test_blocks_nest_and_end(triton_needs_cuda: str) -> None:
    with backend("reference"):
        with backend("auto"):
            assert backends.select(triton_needs_cuda, "cuda") == "triton"
        assert backends.select(triton_needs_cuda, "cuda") == "reference"
        with pytest.raises(ZeroDivisionError), backend("triton"):
            raise ZeroDivisionError
        assert backends.select(triton_needs_cuda, "cuda") == "reference"
    assert backends.select(triton_needs_cuda, "cuda") == "triton"


def test_each_thread_has_its_own() -> None:
    """The blocks of two threads overlap, and the block that begins first ends first. Workers of a pool do not inherit a block."""
    entered, left = threading.Event(), threading.Event()

    def first() -> str:
        with backend("reference"):
            assert entered.wait(10)
            inside = backends.requested()
        left.set()
        return inside + backends.requested()

    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(first)
        with backend("native"):
            entered.set()
            assert left.wait(10)
            assert backends.requested() == "native"
            assert pool.submit(backends.requested).result() == "auto"
        assert other.result() == "referenceauto"
        assert backends.requested() == pool.submit(backends.requested).result() == "auto"


def test_each_asyncio_task_has_its_own() -> None:
    async def task(name: str, turns: int) -> list[str]:
        with backend(name):
            seen = [backends.requested()]
            for _ in range(turns):
                await asyncio.sleep(0)
                seen.append(backends.requested())
        return seen

    async def main() -> list[list[str]]:
        return await asyncio.gather(task("reference", 1), task("native", 3))

    assert asyncio.run(main()) == [["reference"] * 2, ["native"] * 4]
    assert backends.requested() == "auto"


def test_a_layer_is_recomputed_on_its_forwards_backend() -> None:
    """The recomputation runs in another thread, as on a GPU, where autograd has its own thread."""
    asked = []

    def op(x: torch.Tensor) -> torch.Tensor:
        asked.append(backends.requested())
        return pg_kernels.geglu(x, x)

    x = torch.ones(3, requires_grad=True)
    with backend("reference"):
        y = trainer._recomputed(op, x)
    thread = threading.Thread(target=y.sum().backward)
    thread.start()
    thread.join()
    assert asked == ["reference", "reference"] and x.grad is not None


@pytest.mark.parametrize("name", ["cuda", "Triton", "", None])
def test_unknown_names(name: str) -> None:
    expected = r"^backend: got .*, expected one of 'auto', 'triton', 'native', 'reference'"
    with pytest.raises(ValueError, match=expected), backend(name):
        pass


def test_explain(triton_needs_cuda: str) -> None:
    assert backends.explain("cuda") == {"made_up": ("triton", {})}
    reasons = {"triton": "needs a GPU", "native": "no native implementation"}
    assert backends.explain("cpu") == {"made_up": ("reference", reasons)}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_op_has_a_backend_on_every_device(device_type: str) -> None:
    table = backends.explain(device_type)
    assert table.keys() >= OPS
    for op, (chosen, reasons) in table.items():
        assert chosen in backends.BACKENDS
        assert chosen not in reasons and all(reasons.values()), op
        assert backends.select(op, device_type) == chosen
        with backend("reference"):
            assert backends.select(op, device_type) == "reference"


def test_the_public_functions_select_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op raises an error for a backend that is unavailable."""
    for op in OPS:
        monkeypatch.setitem(backends._registered[op], "native", lambda device_type: "not built")
    row, heads = torch.ones(2, 4), torch.ones(1, 1, 2, 4)
    calls = {
        "apply_rotary": (heads, heads, torch.arange(2)),
        "geglu": (row, row),
        "geglu_mlp": (row, torch.ones(3, 4), torch.ones(3, 4), torch.ones(4, 3)),
        "layer_norm": (row, row[0], row[0]),
        "linear_cross_entropy": (row, row, torch.zeros(2, dtype=torch.int64)),
        "prefix_lm_attention": (heads, heads, heads),
        "rms_norm": (row, row[0]),
    }
    assert calls.keys() == OPS
    for op, arguments in calls.items():
        getattr(pg_kernels, op)(*arguments)
        with backend("native"), pytest.raises(RuntimeError, match=f"^{op} cannot run on backend 'native'.*: not built"):
            getattr(pg_kernels, op)(*arguments)


def test_a_compiled_function_follows_the_block() -> None:
    """Each call runs the graph that was traced for its thread's block. The function may contain a block of its own."""
    traced, ran = [], []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        traced.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        ops = traced[-1]

        def run(*arguments: torch.Tensor) -> Any:
            ran.append(ops)
            return graph(*arguments)

        return run

    def step(x: torch.Tensor) -> torch.Tensor:
        with backend("reference"):
            y = pg_kernels.geglu(x, x)
        return pg_kernels.geglu(y, y)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=record)
    x, native = torch.ones(3), "native" if "native" in backends.available("geglu", "cpu") else "reference"
    names = {"reference": "pg_kernels.geglu", "native": "pg_kernels.geglu_native"}
    graphs = {name: [names["reference"], names[native if name == "auto" else name]] for name in ("auto", "reference")}
    with ThreadPoolExecutor(1) as pool:
        for name in ("auto", "reference", "auto", "reference"):
            with backend(name):
                torch.testing.assert_close(compiled(x), step(x))
                torch.testing.assert_close(pool.submit(compiled, x).result(), step(x))
            assert ran == [graphs[name], graphs["auto"]]
            ran.clear()
    assert backends.requested() == "auto"
    assert len(traced) == 3  # outside all blocks, in backend("auto") and in backend("reference")


def test_importing_and_loading_import_neither_the_compiler_nor_triton() -> None:
    """These modules would take most of the time and memory of a start."""
    heavy = "torch._dynamo", "torch._inductor", "triton", "sympy", "transformers", "matplotlib"
    load = "pg_kernels.model.PaliGemma.from_pretrained(pg_kernels.model.EMBEDDED_CHECKPOINT, quantize='int8')"
    code = f"import sys, pg_kernels.model.cli; {load}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
