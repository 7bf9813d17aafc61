"""The suite as pytest-benchmark sees it: one test for each contender on each case."""

from __future__ import annotations

from typing import Any

import pytest

from pg_kernels.benchmarks.report.results import Row


def test_contender(row: Row, benchmark: Any) -> None:
    benchmark.extra_info.update(row.extra_info())
    if row.status == "skipped":
        pytest.skip(row.reason)
    if row.status != "timed":
        report = pytest.fail if row.ours else pytest.xfail  # other packages' faults are results, ours fail the suite
        report(f"{row.status}: {row.reason}")
    benchmark.pedantic(lambda: None, rounds=len(row.samples), iterations=1)
