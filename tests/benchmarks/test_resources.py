"""Every launch that the Triton kernels can choose compiles for GPUs that are not here, and fits them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from pg_kernels.benchmarks.__main__ import main
from pg_kernels.benchmarks.resources import DEVICES, TABLE_HEAD, Kernel
from pg_kernels.benchmarks.tuning import OPS

pytest.importorskip("triton")
TENSOR_CORES = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
ROWS = {
    # The block size that is the number of rows of a kernel's matrix products.
    ("geglu_mlp", "gate_up"): "ROWS",
    ("int8_linear", "product"): "FEATURES",
    ("int8_linear", "input_gradient"): "TOKENS",
    ("linear_cross_entropy", "forward"): "TOKENS",
    ("linear_cross_entropy", "logit_gradients"): "TOKENS",
    ("prefix_lm_attention", "forward"): "ROWS",
    ("prefix_lm_attention", "backward_q"): "ROWS",
    ("prefix_lm_attention", "backward_kv"): "KEYS",
}


def resources(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    """In a process of its own: here the kernels are the interpreter's."""
    command = [sys.executable, "-m", "pg_kernels.benchmarks", "resources", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def rows(text: str) -> list[dict[str, str]]:
    head, rule, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    assert set("".join(rule)) <= set("-:")
    return [dict(zip(head, line, strict=True)) for line in lines]


# Each takes a minute: fp16 gets the same tiles as bf16, and fp32 the same on every target.
@pytest.mark.parametrize(("target", "dtype"), [*((target, "bfloat16") for target in DEVICES), ("sm_90", "float32")])
def test_all_launches_fit(target: str, dtype: str) -> None:
    done = resources("--target", target, "--dtype", dtype)
    assert (done.returncode, done.stderr) == (0, "")
    kernels = rows(done.stdout)
    assert {kernel["op"] for kernel in kernels} == set(OPS)
    assert {kernel["spilled bytes"] for kernel in kernels} == {"0"}
    for kernel in kernels:
        launch = dict(option.split("=") for option in kernel["launch"].split(", ") if "=" in option)
        rows_at_once = int(launch.get(ROWS.get((kernel["op"], kernel["kernel"]), ""), 0))
        many_scales = launch.get("GROUPS") == "many" or launch.get("MANY") == "True"  # in one block of the sum
        if kernel["products"] and (dtype == "float32" or many_scales):
            assert kernel["products"] == "fma", kernel
        elif kernel["products"]:
            # wgmma and tcgen05 multiply 64 rows at least.
            assert kernel["products"] == (TENSOR_CORES[target] if rows_at_once >= 64 else "mma"), kernel
    loads = {k["loads"] for k in kernels if (k["op"], k["kernel"]) == ("prefix_lm_attention", "forward")}
    assert ("TMA" in loads) == (dtype == "bfloat16" and target != "sm_80")
    multiplying = {(kernel["op"], kernel["kernel"]) for kernel in kernels if kernel["products"]}
    assert multiplying == ROWS.keys() - ({("geglu_mlp", "gate_up")} if dtype == "float32" else set())


def a_kernel(*, spills: int = 0, shared: int = 0) -> Kernel:
    return Kernel("geglu", "forward", "bfloat16", "sm_80", 32, spills, shared, 100, "", "")


@pytest.mark.parametrize(
    ("kernel", "faults"),
    [
        (a_kernel(shared=100), []),
        (a_kernel(spills=4), ["spills 4 bytes"]),
        (a_kernel(shared=101), ["101 bytes of shared memory, the limit is 100"]),
    ],
)
def test_faults(
    kernel: Kernel, faults: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernel.faults == faults
    monkeypatch.setattr("pg_kernels.benchmarks.__main__.compile_all", lambda *options: [kernel])
    assert main(["resources", "--target", "sm_80"]) == len(faults)
    out, err = capsys.readouterr()
    assert out == f"{TABLE_HEAD}\n{kernel.table_row}\n"
    assert err == "".join(f"geglu forward for sm_80 (bfloat16): {fault}\n" for fault in faults)


def test_errors() -> None:
    done = resources("rms_norms")
    assert done.returncode == 1
    assert "benchmarks: error: no Triton kernels in 'rms_norms'; there are rms_norm, layer_norm, " in done.stderr
    done = resources("rms_norm", interpret="1")
    assert done.returncode == 1
    assert "benchmarks: error: TRITON_INTERPRET is set: the interpreter compiles nothing" in done.stderr
