"""`pg-kernels bench`: the suite's cases in a terminal, with nothing stored."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from pg_kernels.benchmarks.cases.catalogue import OPS, WHOLE_MODEL_OPS, select
from pg_kernels.benchmarks.measure.machine import ceilings, device_name
from pg_kernels.benchmarks.measure.runner import FULL, QUICK, Suite
from pg_kernels.benchmarks.report.results import Ceilings, Row
from pg_kernels.benchmarks.report.text import duration, times

NAMES = (*OPS, *WHOLE_MODEL_OPS)


def bench(ops: Sequence[str], device: torch.device, *, full: bool) -> None:
    """Run and print the quick cases of some ops, or with `full` all their cases. Without ops, run all but the whole model's.

    Raises ValueError for an op that the suite does not have.
    """
    for op in ops:
        if op not in NAMES:
            raise ValueError(f"no benchmark is named {op!r}; there are {', '.join(NAMES)}")
    cases = select(full=full, ops=tuple(ops), whole_models=bool(ops))
    print(f"{device_name(device)}: measuring its bandwidth and matrix rates", file=sys.stderr)
    limits = ceilings(device)
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in limits.flops_per_s.items() if rate)
    print(
        f"copy {limits.copy_bytes_per_s / 1e9:.1f} GB/s, read {limits.read_bytes_per_s / 1e9:.1f} GB/s; GFLOP/s: {rates}"
    )
    suite = Suite(device, FULL if full else QUICK, limits)
    for case in tqdm(cases, unit="case", disable=None):
        rows = suite.run(case)
        tqdm.write(f"\n{case.op} {case.mode}, {case.dtype}, {case.shape}")
        for line in _lines(rows, limits):
            tqdm.write(line)


def _lines(rows: Sequence[Row], limits: Ceilings) -> list[str]:
    """Return a line for each contender; for contenders that were not timed, with the reason."""
    baseline = next((row for row in rows if row.baseline and row.status == "timed"), None)
    width = max(len(row.contender) for row in rows)
    lines = []
    for row in rows:
        if row.status != "timed":
            lines.append(f"  {row.contender:{width}}  {row.status}: {row.reason}")
            continue
        speedup = times(row.speedup_over(baseline)) if baseline else ""
        share = limits.bound_s(row) / row.p50
        spread = f"({duration(row.p20)} to {duration(row.p80)})"
        lines.append(
            f"  {row.contender:{width}}  {duration(row.p50):>8} {spread:24} {speedup:>7}  {share:4.0%} of the roofline"
        )
    return lines
