"""Comparing runs: changes are found; noise and the machine's drift are not changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pg_kernels.benchmarks.__main__ import main
from pg_kernels.benchmarks.report.compare import compare, markdown
from pg_kernels.benchmarks.report.results import Ceilings, Row, Run

CONTENDERS = {"pg_kernels native": 0.5, "pg_kernels reference": 1.2, "eager": 1.0, "torch.compile": 0.6, "SDPA": 0.7}


def run(seed: int, *, drift: float = 1.0, slowed: dict[str, float] | None = None, cases: int = 12) -> Run:
    """Return twelve cases whose times drift together by up to 2x between rounds and scatter by 3 % each."""
    random = np.random.default_rng(seed)
    rows = []
    for case in range(cases):
        machine = drift * 1e-3 * (case + 1) * random.uniform(1, 2, size=20)
        for name, factor in CONTENDERS.items():
            factor *= (slowed or {}).get(f"{case}/{name}", 1.0) * random.normal(1, 0.01)
            rows.append(
                Row(
                    case=f"case {case}",
                    op="rms_norm",
                    mode="forward",
                    shape=f"batch {case}",
                    sizes={"batch": case},
                    dtype="bfloat16",
                    contender=name,
                    ours=name.startswith("pg"),
                    baseline=name == "eager",
                    status="timed",
                    samples=tuple(machine * factor * random.normal(1, 0.03, size=20)),
                )
            )
    return Run(
        path=Path("run.json"),
        device="a CPU",
        device_type="cpu",
        machine={},
        versions={"torch": "2.13"},
        commit="0123456789ab",
        command="pytest",
        date="2026-01-02T03:04:05",
        ceilings=Ceilings(1e9, 1e9, {}),
        rows=tuple(rows),
    )


def changed(run: Run, change: Callable[[Row], Row]) -> Run:
    return replace(run, rows=tuple(change(row) for row in run.rows))


@pytest.mark.parametrize("seed", range(5))
def test_two_runs_of_the_same_code_show_no_change(seed: int) -> None:
    comparison = compare(run(2 * seed), run(2 * seed + 1))
    assert len(comparison.changes) == 24 and comparison.controls == 24
    assert {change.verdict for change in comparison.changes} == {"same"}
    assert 1.0 < comparison.spread < 1.1


@pytest.mark.parametrize(("factor", "verdict"), [(1.25, "slower"), (0.75, "faster")])
def test_a_changed_op_is_found_and_nothing_else(factor: float, verdict: str) -> None:
    comparison = compare(run(1), run(2, slowed={"3/pg_kernels native": factor}))
    (found,) = comparison.of(verdict)
    assert (found.after.case, found.after.contender) == ("case 3", "pg_kernels native")
    assert found.ratio == pytest.approx(factor, rel=0.05)
    assert sum(change.verdict != "same" for change in comparison.changes) == 1
    text = markdown(comparison, run(1), run(2))
    assert f"1 of 24 rows {verdict}:" in text and "| batch 3 | pg_kernels native |" in text


def test_a_machine_that_became_slower_is_no_change() -> None:
    comparison = compare(run(1), run(2, drift=1.7))
    assert {change.verdict for change in comparison.changes} == {"same"}
    assert comparison.drift == pytest.approx(1.7, rel=0.1)
    assert "moved by +" in markdown(comparison, run(1), run(2))


def test_without_a_baseline_times_are_compared_less_the_machines_drift() -> None:
    def without(row: Row) -> Row:
        if row.case == "case 5" and row.baseline:
            return replace(row, status="skipped", reason="not installed", samples=())
        return row

    comparison = compare(changed(run(1), without), changed(run(2, drift=1.7), without))
    assert {change.verdict for change in comparison.changes} == {"same"}


def test_a_noisy_machine_raises_the_limit() -> None:
    random = np.random.default_rng(0)

    def shaken(row: Row) -> Row:
        if row.baseline:
            return row
        return replace(row, samples=tuple(np.array(row.samples) * np.exp(random.normal(0, 0.2))))

    quiet, noisy = compare(run(1), run(2)), compare(run(1), changed(run(2), shaken))
    assert noisy.spread > 1.2 > quiet.spread
    assert min(change.limit for change in noisy.changes) > max(change.limit for change in quiet.changes)


def test_what_we_run_by_default_is_compared_across_backends() -> None:
    def without_native(row: Row) -> Row:
        return row if row.contender != "pg_kernels native" else replace(row, case="elsewhere")

    before = changed(run(1), without_native)
    before = replace(before, rows=tuple(row for row in before.rows if row.case != "elsewhere"))
    faster = compare(before, run(2)).of("faster")
    assert len(faster) == 12
    assert "pg_kernels reference → pg_kernels native" in markdown(compare(before, run(2)), before, run(2))


def test_other_devices_and_empty_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="different devices"):
        compare(run(1), replace(run(2), device="another CPU"))
    with pytest.raises(ValueError, match="in common"):
        compare(run(1), replace(run(2), rows=()))


def test_new_versions_are_said() -> None:
    after = replace(run(2), versions={"torch": "2.14"})
    assert "torch was 2.13 and is 2.14" in markdown(compare(run(1), after), run(1), after)


def test_the_command_fails_when_something_is_slower(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    runs = {"a": run(1), "b": run(2), "c": run(3, slowed={"0/pg_kernels native": 1.5})}
    monkeypatch.setattr(Run, "load", lambda path: runs[str(path)])
    assert main(["compare", "a", "b"]) == 0
    assert "0 of 24 rows slower." in capsys.readouterr().out
    assert main(["compare", "a", "c"]) == 1
    assert main(["compare", "a", "a"]) == 0


def test_a_file_that_is_no_run_is_named(tmp_path: Path, capsys) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 1
    assert "run.json is not a stored run" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "missing")]) == 1
    assert "missing" in capsys.readouterr().err
