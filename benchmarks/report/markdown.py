"""Stored runs as Markdown: a summary, every contender on every case, what was not timed and why, and how cost grows."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import util
from pathlib import Path
from statistics import geometric_mean, median
from urllib.parse import quote

from pg_kernels.benchmarks.report import growth
from pg_kernels.benchmarks.report.plots import draw
from pg_kernels.benchmarks.report.results import Row, Run
from pg_kernels.benchmarks.report.text import duration, markdown_table, scaled, times
from pg_kernels.model.files import write_atomically

REPEATED = 3
"""A skip reason that at least this many cases share is stated once instead of in each case."""

_LEGEND = """\
Times are per call: the median, and the 20th to 80th percentile. Speed-ups are medians of the rounds that two contenders shared;
the fastest contender of a case is bold. *Roofline* is the least time that the run's own ceilings allow for the bytes and the
arithmetic of the op's definition, as a share of the median; *reached* counts the same bytes or arithmetic. *Host* is the time a
call keeps the host busy, *memory* the most that a call held beyond its inputs, *error* the deviation from the definition in units
of what is allowed."""


def markdown(runs: Sequence[Run], plots: Mapping[str, str] = {}) -> str:
    """Return the report on runs, one after the other. `plots` maps titles to file names relative to the report."""
    blocks = ["# Benchmarks", _LEGEND]
    if plots:
        blocks.append("\n".join(f"- [{title}]({quote(name)})" for title, name in plots.items()))
    for run in runs:
        blocks += _blocks(run)
    return "\n\n".join(blocks) + "\n"


def write(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write `report.md` and its plots into a folder and return their paths. Plots need matplotlib."""
    plots: dict[str, str] = {}
    if util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: the report has no plots", file=sys.stderr)
    else:
        for index, run in enumerate(runs, 1):
            part, label = ("", "") if len(runs) == 1 else (f"run-{index}/", f"{run.device}, {date(run)}: ")
            plots |= {f"{label}{title}": f"{part}{name}" for title, name in draw(run, folder / part).items()}
    report = folder / "report.md"
    write_atomically(report, markdown(runs, plots).encode())
    return [report, *(folder / name for name in plots.values())]


# --- what the reports and the README share


def date(run: Run) -> str:
    """Return the run's date and time, to the minute."""
    return run.date[:16].replace("T", " ")


def versions(run: Run) -> str:
    return ", ".join(f"{name} {version}" for name, version in run.versions.items())


def timed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.status == "timed"]


def default(rows: Sequence[Row]) -> Row | None:
    """Return what users get by default in a case: the first of our rows that was timed."""
    return next((row for row in timed(rows) if row.ours), None)


def baseline(rows: Sequence[Row]) -> Row | None:
    """Return the row that the case's other rows are compared with."""
    return next((row for row in timed(rows) if row.baseline), None)


def best_other(rows: Sequence[Row]) -> Row | None:
    """Return the fastest row of a case that is not ours."""
    return min((row for row in timed(rows) if not row.ours), key=lambda row: row.p50, default=None)


def roofline_share(run: Run, row: Row) -> float | None:
    """Return the share of a row's time that its bytes and FLOPs account for, or None if they were not counted."""
    return run.bound_s(row) / row.p50 or None


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


# --- one run


def _blocks(run: Run) -> list[str]:
    blocks = [
        f"## {run.device}",
        f"{date(run)}, commit {run.commit}; {versions(run)}.",
        f"`{run.command}`",
        _ceilings(run),
        "### Summary",
        _summary(run),
    ]
    repeated = _repeated(run)
    lines: dict[str, list[tuple[str, ...]]] = {}
    for rows in run.cases().values():
        lines.setdefault(rows[0].op, []).extend(_lines(run, rows, repeated))
    for op, table in lines.items():
        if table:
            blocks += [f"### {op}", markdown_table(_HEADER, table)]
    if repeated:
        blocks += ["### Not timed", _not_timed(repeated)]
    grown = growth.table(run)
    if grown:
        blocks += ["### Growth", _GROWTH_LEGEND, grown]
    return blocks


_GROWTH_LEGEND = """\
An exponent of 1 is time in proportion to the size, 2 to its square. Where it is above that of the bound, the contender grows
faster than the work; at small sizes overhead makes it smaller, so the last two values are also taken alone."""


def _ceilings(run: Run) -> str:
    ceilings = run.ceilings
    rates = [f"{name} {_flops(rate)}" for name, rate in ceilings.flops_per_s.items() if rate]
    return (
        f"Ceilings, measured in the same run: copy {_bytes(ceilings.copy_bytes_per_s)}, "
        f"read {_bytes(ceilings.read_bytes_per_s)}; matrix products: {', '.join(rates) or 'none'}."
    )


def _bytes(per_s: float) -> str:
    return scaled(per_s, (("GB/s", 1e9),))


def _flops(per_s: float) -> str:
    return scaled(per_s, (("TFLOP/s", 1e12), ("GFLOP/s", 1e9)))


def _summary(run: Run) -> str:
    header = ("op", "mode", "cases", "over the baseline", "over the best other", "won", "lost", "roofline, median")
    table: dict[tuple[str, str], list[list[Row]]] = {}
    for rows in run.cases().values():
        table.setdefault((rows[0].op, rows[0].mode), []).append(rows)
    return markdown_table(header, [(op, mode, *_standing(run, cases)) for (op, mode), cases in table.items()])


def _standing(run: Run, cases: Sequence[Sequence[Row]]) -> tuple[str, ...]:
    """Return a summary of our default contender over the cases of one op and mode."""
    over_baseline, over_best, shares = [], [], []
    for rows in cases:
        ours, base, best = default(rows), baseline(rows), best_other(rows)
        if ours is None:
            continue
        shares.append(roofline_share(run, ours))
        if base is not None:
            over_baseline.append(ours.speedup_over(base))
        if best is not None:
            over_best.append(ours.speedup_over(best))
    counted = [share for share in shares if share is not None]
    return (
        str(len(cases)) if len(shares) == len(cases) else f"{len(shares)} of {len(cases)}",
        times(geometric_mean(over_baseline) if over_baseline else None),
        times(geometric_mean(over_best) if over_best else None),
        str(sum(ratio > 1 for ratio in over_best)),
        str(sum(ratio <= 1 for ratio in over_best)),
        percent(median(counted) if counted else None),
    )


_HEADER = ["shape", "mode", "dtype", "contender", "p50", "p20–p80", "speed-up", "roofline", "reached"]
_HEADER += ["host", "memory", "error"]


def _lines(run: Run, rows: Sequence[Row], repeated: Container[tuple[str, str]]) -> Iterator[tuple[str, ...]]:
    """Return the table's lines of one case, without skip reasons that many cases share."""
    base = baseline(rows)
    ratios = {} if base is None else {row.contender: row.speedup_over(base) for row in timed(rows)}
    fastest = max(ratios, key=lambda contender: ratios[contender], default=None)
    for row in _entries(rows):
        what = (row.shape, row.mode, row.dtype, row.contender)
        if row.status == "timed":
            speedup = times(ratios.get(row.contender))
            yield (*what, *_measured(run, row, f"**{speedup}**" if row.contender == fastest else speedup))
        elif (row.contender, row.reason) not in repeated or row.status != "skipped":
            status = "**wrong**" if row.status == "wrong" else row.status
            yield (*what, f"{status}: {row.reason}", *[""] * 6, _error(row))


def _measured(run: Run, row: Row, speedup: str) -> tuple[str, ...]:
    return (
        duration(row.p50),
        f"{duration(row.p20)}–{duration(row.p80)}",
        speedup,
        percent(roofline_share(run, row)),
        _reached(run, row),
        "" if row.overhead_s is None else duration(row.overhead_s),
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.1f} MiB",
        _error(row),
    )


def _error(row: Row) -> str:
    return "" if row.error is None else f"{row.error:.2g}"


def _reached(run: Run, row: Row) -> str:
    """Return the achieved rate of the op's bound: bytes or FLOPs per second."""
    if run.bound_s(row) > row.bytes / run.ceilings.bytes_per_s:
        return _flops(row.flops / row.p50)
    return _bytes(row.bytes / row.p50) if row.bytes else "–"


def _entries(rows: Sequence[Row]) -> Sequence[Row]:
    """Return the rows of a case, or a single row if the whole case was skipped."""
    if len(rows) > 1 and len({(row.status, row.reason) for row in rows}) == 1 and rows[0].status == "skipped":
        return [replace(rows[0], contender="all")]
    return rows


def _repeated(run: Run) -> dict[tuple[str, str], list[Row]]:
    """Return the skipped rows by contender and reason, for reasons that many cases share. Wrong and failed rows stay out."""
    found: dict[tuple[str, str], list[Row]] = {}
    for rows in run.cases().values():
        for row in _entries(rows):
            if row.status == "skipped":
                found.setdefault((row.contender, row.reason), []).append(row)
    return {key: rows for key, rows in found.items() if len(rows) >= REPEATED}


def _not_timed(repeated: Mapping[tuple[str, str], Sequence[Row]]) -> str:
    lines = [
        (contender, reason, ", ".join(dict.fromkeys(row.op for row in rows)), str(len(rows)))
        for (contender, reason), rows in repeated.items()
    ]
    return markdown_table(("contender", "reason", "ops", "cases"), lines)
