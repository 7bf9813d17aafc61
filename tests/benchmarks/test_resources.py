"""Every launch that the Triton kernels can choose compiles for GPUs that are absent, and fits their limits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pg_kernels.benchmarks.__main__ import main
from pg_kernels.benchmarks.kernels.extension import sources_id
from pg_kernels.benchmarks.kernels.manifest import MANIFEST, read
from pg_kernels.benchmarks.kernels.resources import DEVICES, TABLE_HEAD, Kernel
from pg_kernels.benchmarks.kernels.tuning import OPS

pytest.importorskip("triton")
TENSOR_CORES = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
ROWS = {
    # The block size that is the number of rows of a kernel's matrix products.
    ("geglu_mlp", "geglu_gemm_kernel"): "BLOCK_M",
    ("int8_linear", "int8_gemm_kernel"): "BLOCK_N",
    ("int8_linear", "int8_input_grad_kernel"): "BLOCK_M",
    ("linear_cross_entropy", "linear_cross_entropy_fwd_kernel"): "BLOCK_M",
    ("linear_cross_entropy", "linear_cross_entropy_logit_grad_kernel"): "BLOCK_M",
    ("prefix_lm_attention", "attn_fwd_kernel"): "BLOCK_M",
    ("prefix_lm_attention", "attn_bwd_dq_kernel"): "BLOCK_M",
    ("prefix_lm_attention", "attn_bwd_dkv_kernel"): "BLOCK_N",
}


def benchmarks(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own. In this process, kernels belong to the interpreter."""
    command = [sys.executable, "-m", "pg_kernels.benchmarks", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return read(MANIFEST)


def test_the_manifest_is_up_to_date(kernels: list[Kernel], tmp_path: Path) -> None:
    """The manifest holds exactly the launches that can be chosen. Compiling a few of them again gives the same rows."""
    again = tmp_path / "kernels.csv"
    triton_kernels = [kernel for kernel in kernels if not kernel.name.endswith("(C++)")]
    left_out = {kernel.id for kernel in triton_kernels[:: len(triton_kernels) // 8]}
    lines = MANIFEST.read_text().splitlines(keepends=True)
    again.write_text("".join(line for line in lines if line.partition(",")[0] not in left_out))
    done = benchmarks("manifest", str(again))
    assert done.returncode == 0, done.stderr
    assert again.read_text().splitlines() == MANIFEST.read_text().splitlines(), (
        "`make test-kernels` brings it up to date"
    )


@pytest.mark.parametrize(("target", "dtype"), [*((target, "bfloat16") for target in DEVICES), ("sm_90", "float32")])
def test_all_launches_fit(target: str, dtype: str, kernels: list[Kernel]) -> None:
    chosen = [k for k in kernels if k.target == target and k.launch.startswith(dtype)]
    assert {kernel.op for kernel in chosen} == set(OPS)
    assert not any(kernel.faults for kernel in chosen)
    for kernel in chosen:
        launch = dict(option.split("=") for option in kernel.launch.split(", ") if "=" in option)
        rows_at_once = int(launch.get(ROWS.get((kernel.op, kernel.name), ""), 0))
        per_column_scales = launch.get("SCALES") == "per_column"
        if kernel.products and (dtype == "float32" or per_column_scales):
            assert kernel.products == "fma", kernel
        elif kernel.products:
            # wgmma and tcgen05 multiply at least 64 rows.
            assert kernel.products == (TENSOR_CORES[target] if rows_at_once >= 64 else "mma"), kernel
    loads = {k.loads for k in chosen if (k.op, k.name) == ("prefix_lm_attention", "attn_fwd_kernel")}
    assert ("TMA" in loads) == (dtype == "bfloat16" and target != "sm_80")
    multiplying = {(kernel.op, kernel.name) for kernel in chosen if kernel.products}
    assert multiplying == ROWS.keys() - ({("geglu_mlp", "geglu_gemm_kernel")} if dtype == "float32" else set())


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_tensor_cores_multiply_in_the_extension(target: str, kernels: list[Kernel]) -> None:
    chosen = [kernel for kernel in kernels if kernel.target == target and kernel.name.endswith("(C++)")]
    assert {kernel.id for kernel in chosen} == {sources_id()}
    assert not any(kernel.faults for kernel in chosen)
    units = {(kernel.name, kernel.launch.split(", ")[0]): (kernel.products, kernel.loads) for kernel in chosen}
    types = ("BFloat16", "Float16", "Int8")
    expected = {("few_rows (C++)", of): ("mma", "") for of in types}
    expected |= {("many_rows (C++)", of): ("mma", "cp.async") for of in types}
    if target == "sm_90":
        expected |= {("many_rows_sm90 (C++)", of): ("wgmma", "TMA") for of in types}
    assert {key: value for key, value in units.items() if value[0]} == expected


def a_kernel(*, spills: int = 0, shared: int = 0) -> Kernel:
    return Kernel("id", "geglu", "forward", "bfloat16", "sm_80", 32, spills, shared, 100, "", "")


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
    done = benchmarks("resources", "rms_norms")
    assert done.returncode == 1
    assert "benchmarks: error: no Triton kernels in 'rms_norms'; there are rms_norm, layer_norm, " in done.stderr
    done = benchmarks("resources", "rms_norm", interpret="1")
    assert done.returncode == 1
    assert "benchmarks: error: TRITON_INTERPRET is set: the interpreter compiles nothing" in done.stderr
