"""Which implementation runs, on an op made up for the test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import pg_kernels
from pg_kernels import backend, backends

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
    """An op with a triton backend for CUDA tensors, and no native one."""
    monkeypatch.setattr(backends, "_offers", {})
    backends.offer("made_up", "triton", lambda device_type: None if device_type == "cuda" else "needs a GPU")
    yield "made_up"


def test_auto_takes_the_first_that_can_run(triton_needs_cuda: str) -> None:
    assert backends.select(triton_needs_cuda, "cuda") == "triton"
    assert backends.select(triton_needs_cuda, "cpu") == "reference"
    backends.offer(triton_needs_cuda, "native", lambda device_type: None)
    assert backends.select(triton_needs_cuda, "cuda") == "triton"
    assert backends.select(triton_needs_cuda, "cpu") == "native"
    with backend("auto"):
        assert backends.select(triton_needs_cuda, "cpu") == "native"


def test_the_interpreter_must_be_asked_for(triton_needs_cuda: str) -> None:
    backends.offer(triton_needs_cuda, "triton", lambda device_type: None)
    assert backends.select(triton_needs_cuda, "cpu") == "reference"
    with backend("triton"):
        assert backends.select(triton_needs_cuda, "cpu") == "triton"
    assert backends.available(triton_needs_cuda, "cpu") == ["reference"]
    assert backends.available(triton_needs_cuda, "cpu", interpreted=True) == ["triton", "reference"]
    _, reasons = backends.explain("cpu")[triton_needs_cuda]
    assert reasons["triton"] == "on the CPU it is Triton's interpreter, which must be asked for"


def test_obstacles_and_slower_backends(triton_needs_cuda: str) -> None:
    """What this call's arguments rule out, and what another backend does faster."""
    obstacle = {"triton": "too long"}
    assert backends.select(triton_needs_cuda, "cuda", obstacle) == "reference"
    assert backends.select(triton_needs_cuda, "cuda", avoid=("triton",)) == "reference"
    with backend("triton"):
        assert backends.select(triton_needs_cuda, "cuda", avoid=("triton",)) == "triton"
        with pytest.raises(RuntimeError, match="made_up cannot run on backend 'triton' with cuda tensors: too long"):
            backends.select(triton_needs_cuda, "cuda", obstacle)


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


def test_the_public_functions_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op refuses a backend that it does not have, before anything runs."""
    for op in OPS:
        monkeypatch.setitem(backends._offers[op], "native", lambda device_type: "not built")
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
    """The choice is made while tracing, so another choice must trace again."""
    seen = []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.append(graph)
        return graph

    def step(x: torch.Tensor) -> torch.Tensor:
        return pg_kernels.geglu(x, x)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=record)
    x = torch.ones(3)
    for name in ("auto", "reference", "auto", "reference"):
        with backend(name):
            torch.testing.assert_close(compiled(x), step(x))
    assert len(seen) == 2


def test_importing_and_loading_take_neither_the_compiler_nor_triton_along() -> None:
    """They are most of the time and the memory that a start would take."""
    heavy = "torch._dynamo", "torch._inductor", "triton", "sympy", "transformers", "matplotlib"
    load = "pg_kernels.model.PaliGemma.from_pretrained(pg_kernels.model.EMBEDDED_CHECKPOINT, quantize='int8')"
    code = f"import sys, pg_kernels.model.cli; {load}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
