"""Reading the machine code of the installed CUDA extension. The kernels themselves are tested with the manifest."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from pg_kernels.benchmarks.__main__ import main
from pg_kernels.benchmarks.kernels.resources import TABLE_HEAD

pytest.importorskip("triton")
needs_cuda_extension = pytest.mark.skipif(
    find_spec("pg_kernels._cuda") is None, reason="the CUDA extension is not built; PG_KERNELS_CUDA=1 builds it"
)


@needs_cuda_extension
def test_the_installed_library(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resources", "--extension", "--target", "sm_80"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(TABLE_HEAD) and "few_rows (C++)" in out


@needs_cuda_extension
def test_a_target_without_machine_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resources", "--extension", "--target", "sm_100"]) == 0
    assert capsys.readouterr().out == f"{TABLE_HEAD}\n"


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("pg_kernels.benchmarks.kernels.extension.find_spec", lambda name: None)
    assert main(["resources", "--extension"]) == 1
    assert "pg_kernels._cuda is not built: install with PG_KERNELS_CUDA=1" in capsys.readouterr().err
