"""Write the performance tables of README.md and docs/performance.md from stored runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from pg_kernels.benchmarks.cases.catalogue import WHOLE_MODEL_OPS
from pg_kernels.benchmarks.report.markdown import (
    baseline,
    best_other,
    date,
    default,
    percent,
    roofline_share,
    timed,
    versions,
)
from pg_kernels.benchmarks.report.results import Row, Run
from pg_kernels.benchmarks.report.text import duration, markdown_table, times
from pg_kernels.model.files import write_atomically

BEGIN = "<!-- performance: begin -->"
END = "<!-- performance: end -->"
MODEL = "paligemma-3b"


SUMMARY = (
    "prefill",
    "decode_step",
    "rms_norm",
    "apply_rotary",
    "geglu_mlp",
    "prefix_lm_attention",
    "linear_cross_entropy",
    "int8_linear",
)
"""The ops of README's table (forward). They were chosen independently of their times."""


def update(page: Path, section: str) -> bool:
    """Replace the text between a page's markers. Return whether it changed. Raises ValueError naming a page without markers."""
    text = page.read_bytes().decode("utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    for marker, found in ((BEGIN, begin), (END, end)):
        if not found:
            raise ValueError(f"{page} lacks the marker {marker} of its performance section")
    written = f"{before}{BEGIN}\n{section}{END}{after}"
    if written == text:
        return False
    write_atomically(page, written.encode())
    return True


def summary(run: Run, root: Path) -> str:
    """Return README's table of one run: the whole model, default and int8, and one case of each main op."""
    lines = []
    for rows in largest_cases(run):
        if rows[0].op in SUMMARY and rows[0].mode == "forward":
            shown = [ours for ours in _shown(rows) if ours is None or not ours.contender.endswith("int8-dynamic")]
            cells = [_cells(run, rows, ours) for ours in shown]
            lines += [(op, shape, time, best, ratio) for op, _, shape, time, _, best, ratio, _ in cells]
    table = markdown_table(("op, forward", "shape", "ours", "best other", "ours over it"), lines)
    return f"On {run.device}, torch {run.versions['torch']}, commit {run.commit}, {date(run)}:\n\n{table}\n\n{_source(run, root)}"


def tables(runs: Sequence[Run], root: Path) -> str:
    """Return every op's row of every run, with links relative to the folder `root`."""
    return "\n".join(_table(run, root) for run in runs)


def _table(run: Run, root: Path) -> str:
    header = ("op", "mode", "shape", "ours", "baseline", "best other", "ours over it", "roofline")
    lines = [_cells(run, rows, ours) for rows in largest_cases(run) for ours in _shown(rows)]
    return (
        f"Measured on {run.device} ({versions(run)}, commit {run.commit}, {date(run)}); `{run.command}`:\n\n"
        f"{markdown_table(header, lines)}\n\n{_source(run, root)}"
    )


def _source(run: Run, root: Path) -> str:
    path = Path(os.path.relpath(run.path, root)).as_posix()
    return f"Stored run: [{path}]({quote(path)})\n"


def largest_cases(run: Run) -> list[list[Row]]:
    """Return, for each op and mode, the case of PaliGemma 3B (or of no model) with the most bytes and FLOPs.

    Cases in which at least two others were timed are preferred; a case with one only shows growth. Our own times play no part.
    """
    chosen: dict[tuple[str, str], list[Row]] = {}
    for rows in run.cases().values():
        key = (rows[0].op, rows[0].mode)
        if timed(rows) and rows[0].sizes.get("model", MODEL) == MODEL:
            chosen[key] = max(chosen.get(key, rows), rows, key=_weight)
    return list(chosen.values())


def _weight(rows: Sequence[Row]) -> tuple[bool, int]:
    others = [row for row in timed(rows) if not row.ours]
    return len(others) > 1, rows[0].bytes + rows[0].flops


def _shown(rows: Sequence[Row]) -> Sequence[Row | None]:
    """Return our default row, if any. For whole models, also return the int8 rows."""
    return [row for row in timed(rows) if row.ours] if rows[0].op in WHOLE_MODEL_OPS else [default(rows)]


def _cells(run: Run, rows: Sequence[Row], ours: Row | None) -> tuple[str, ...]:
    first, best = rows[0], best_other(rows)
    kind = "" if ours is None else ours.contender.removeprefix("pg_kernels").strip()
    return (
        first.op,
        first.mode,
        first.shape if first.dtype == "bfloat16" else f"{first.shape}, {first.dtype}",
        (f"{kind}, " if kind.startswith("int8") else "") + duration(ours.p50)
        if ours
        else next((row.status for row in rows if row.ours), "–"),
        _named(baseline(rows)),
        _named(best),
        times(ours.speedup_over(best) if ours and best else None),
        percent(roofline_share(run, ours) if ours else None),
    )


def _named(row: Row | None) -> str:
    return "–" if row is None else f"{row.contender}, {duration(row.p50)}"
