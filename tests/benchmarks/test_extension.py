"""The CUDA extension's machine code: what is in it fits the GPUs it is for."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from pg_kernels.benchmarks.__main__ import main
from pg_kernels.benchmarks.resources import TABLE_HEAD

pytest.importorskip("triton")
needs_cuda_extension = pytest.mark.skipif(
    find_spec("pg_kernels._cuda") is None, reason="the CUDA extension is not built; PG_KERNELS_CUDA=1 builds it"
)


@needs_cuda_extension
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_nothing_spills_and_tensor_cores_multiply(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resources", "--extension", "--target", target]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(TABLE_HEAD)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:]]
    units = {(name, launch.split(", ")[0]): (products, loads) for _, name, launch, *_, products, loads in rows}
    types = ("BFloat16", "Float16", "Int8")
    expected = {("few_rows (C++)", of): ("mma", "") for of in types}
    expected |= {("many_rows (C++)", of): ("mma", "cp.async") for of in types}
    if target == "sm_90":
        expected |= {("many_rows_sm90 (C++)", of): ("wgmma", "TMA") for of in types}
    assert {key: value for key, value in units.items() if value[0]} == expected


@needs_cuda_extension
def test_a_target_without_machine_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resources", "--extension", "--target", "sm_100"]) == 0
    assert capsys.readouterr().out == f"{TABLE_HEAD}\n"


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("pg_kernels.benchmarks.extension.find_spec", lambda name: None)
    assert main(["resources", "--extension"]) == 1
    assert "pg_kernels._cuda is not built: install with PG_KERNELS_CUDA=1" in capsys.readouterr().err
