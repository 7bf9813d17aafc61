"""The suite as users run it: pytest-benchmark stores it, the report and the comparison read it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pg_kernels.benchmarks import bench
from pg_kernels.benchmarks.__main__ import main
from pg_kernels.benchmarks.cases.catalogue import Case
from pg_kernels.benchmarks.contenders import ops as contenders
from pg_kernels.benchmarks.report.readme import summary, tables
from pg_kernels.benchmarks.report.results import Ceilings, Run
from pg_kernels.model.cli import main as pg_kernels_main

ROOT = Path(__file__).parents[2]
OP = "layer_norm"


def test_a_run_is_stored_reported_and_compared(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/suite", "-p", "no:xdist", "--op", OP, "--on", "cpu"]
    command += ["--benchmark-quiet", f"--benchmark-json={folder / 'run.json'}", "-p", "small_ceilings"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(tmp_path)
    # Some processors take most of a minute for a large 16-bit product.
    (tmp_path / "small_ceilings.py").write_text(
        "from pg_kernels.benchmarks.measure.machine import _SIDES\n_SIDES['cpu'] = 256\n"
    )
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    run = Run.load(folder)
    assert {row.op for row in run.rows} == {OP}
    assert {row.status for row in run.rows} <= {"timed", "skipped"}
    assert run.rows[0].ours and run.rows[0].samples
    assert run.device_type == "cpu" and "threads" in run.device
    assert run.versions["torch"] and f"--op {OP}" in run.command
    assert run.ceilings.flops_per_s["float32"] > 0

    content = json.loads((folder / "run.json").read_text())
    stored = {benchmark["name"]: benchmark["stats"] for benchmark in content["benchmarks"]}
    for row in run.rows:
        if row.status == "timed":
            stats = stored[f"test_contender[{row.name}]"]
            assert stats["median"] == pytest.approx(row.p50) and stats["rounds"] == len(row.samples) >= 5
    assert "node" not in content["machine_info"]
    assert content["machine_info"]["cpu"] and content["commit_info"] and content["datetime"]

    assert main(["report", str(folder), "--out", str(tmp_path)]) == 0
    assert OP in (tmp_path / "report.md").read_text()
    assert (tmp_path / "speedup.png").is_file()
    assert main(["compare", str(folder), str(folder)]) == 0
    ours = [row for row in run.rows if row.ours and row.status == "timed"]
    assert f"0 of {len(ours)} rows slower." in capsys.readouterr().out


def test_bench_prints_cases(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    small = Case("geglu", "forward", "bfloat16", "small", {"batch": 1, "tokens": 2, "hidden": 64})
    limits = Ceilings(1e10, 2e10, {"float32": 1e12, "int8": 0.0})
    monkeypatch.setattr(bench, "select", lambda **options: [small])
    monkeypatch.setattr(bench, "ceilings", lambda device: limits)
    monkeypatch.setattr(contenders, "_compile", lambda function: function)
    assert pg_kernels_main(["bench", "geglu", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "copy 10.0 GB/s, read 20.0 GB/s; GFLOP/s: float32 1000"
    assert "geglu forward, bfloat16, small" in lines
    assert any(line.startswith("  eager ") and "1.00×" in line and "of the roofline" in line for line in lines)
    assert any(line.startswith("  pg_kernels reference ") for line in lines)
    assert any("Liger-Kernel" in line and "skipped: " in line for line in lines)


def test_bench_refuses_an_unknown_op(capsys) -> None:
    assert pg_kernels_main(["bench", "softmax"]) == 1
    assert "no benchmark is named 'softmax'; there are rms_norm" in capsys.readouterr().err


def test_published_tables_are_up_to_date() -> None:
    def published(page: Path) -> str:
        text = page.read_text(encoding="utf-8")
        return text.partition("<!-- performance: begin -->\n")[2].partition("<!-- performance: end -->")[0]

    stored = [Run.load(path) for path in sorted((ROOT / "benchmarks" / "results").glob("*/run.json"))]
    page = ROOT / "docs" / "performance.md"
    assert stored and published(page) == tables(stored, page.parent)
    assert published(ROOT / "README.md") == summary(stored[0], ROOT)
    assert 8 <= published(ROOT / "README.md").count("\n| ") - 2 <= 10
