"""Compare two runs to tell whether a change made an op slower. Unchanged contenders measure the machine's noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from pg_kernels.benchmarks.report.results import Row, Run
from pg_kernels.benchmarks.report.text import markdown_table, times

SMALLEST_CHANGE = 0.05
"""Changes below 5 % are never reported, however quiet the machine was."""
MARGIN = 2.0
"""A row has changed if it moved by more than this many times the noise."""
NORMAL = 2 * 1.4826
"""The factor from a median absolute deviation to a 95 % interval of a normal distribution. It is robust against outliers."""


@dataclass(frozen=True)
class Change:
    """One contender on one case in two runs. Each time is relative to the case's baseline in the same round."""

    before: Row
    after: Row
    ratio: float
    """Time after / time before. 1 means no change."""
    limit: float
    """The factor by which the ratio may differ from 1 before it counts as a change."""

    @property
    def verdict(self) -> str:
        if self.ratio > self.limit:
            return "slower"
        return "faster" if self.ratio < 1 / self.limit else "same"


@dataclass(frozen=True)
class Comparison:
    """All our rows that both runs timed."""

    changes: tuple[Change, ...]
    controls: int
    """The number of rows of other packages, unaffected by our changes, in both runs."""
    spread: float
    """The factor within which nearly all unaffected rows stayed: two standard deviations, estimated robustly."""
    drift: float
    """Median ratio of the baselines' own times: the drift of the machine, which the comparison removes."""
    notes: tuple[str, ...]

    def of(self, verdict: str) -> list[Change]:
        return [change for change in self.changes if change.verdict == verdict]


def compare(before: Run, after: Run) -> Comparison:
    """Compare two runs of the suite on one device. Raises ValueError if they share no rows.

    The speed of a machine drifts, so a row is compared by its ratio to its case's baseline, round by round. The contenders
    that are not ours show how much such ratios vary by chance. A row of ours has changed if it moved by more than `MARGIN`
    times the largest of: their spread over all cases, their spread in its own case (where the baseline may have moved),
    and the uncertainty of its own medians.
    """
    if before.device != after.device:
        raise ValueError(f"runs of different devices cannot be compared: {before.device!r} and {after.device!r}")
    pairs = _pairs(before, after)
    if not any(row.ours for row, _ in pairs):
        raise ValueError(f"{before.path} and {after.path} have no timed case of ours in common")
    baselines = [math.log(b.p50 / a.p50) for a, b in pairs if a.baseline]
    drift = median(baselines) if baselines else 0.0
    shifts = [(a, b, *_shift(before, after, a, b, drift)) for a, b in pairs if not a.baseline]
    controls: dict[str, list[float]] = {}
    for a, _, shift, _ in shifts:
        if not a.ours:
            controls.setdefault(a.case, []).append(abs(shift))
    every = [shift for found in controls.values() for shift in found]
    spread = NORMAL * median(every) if every else 0.0
    changes = []
    for a, b, shift, uncertainty in shifts:
        if a.ours:
            in_case = median(controls.get(a.case, [0.0]))
            limit = max(math.log1p(SMALLEST_CHANGE), MARGIN * max(spread, in_case, uncertainty))
            changes.append(Change(a, b, math.exp(shift), math.exp(limit)))
    return Comparison(
        tuple(changes), len(every), math.exp(spread), math.exp(drift), tuple(_notes(before, after, len(every)))
    )


def markdown(comparison: Comparison, before: Run, after: Run) -> str:
    """Return the comparison as text: what changed, and the smallest change that it could detect."""
    limits = sorted(change.limit for change in comparison.changes)
    lines = [
        f"Before: {before.commit} ({before.date[:16]}), after: {after.commit} ({after.date[:16]}), on {after.device}.",
        "",
        f"{comparison.controls} rows of other packages moved by up to {_percent(comparison.spread)} (two standard deviations): "
        "that is the spread of unchanged code. The baselines' own times moved by "
        f"{_percent(comparison.drift, signed=True)} (median); rows are compared relative to them.",
        f"Smallest change that would have been seen: {_percent(limits[0])} at best, {_percent(median(limits))} in the median, "
        f"{_percent(limits[-1])} at worst.",
        *(f"Note: {note}" for note in comparison.notes),
        "",
    ]
    for verdict in ("slower", "faster"):
        found = sorted(comparison.of(verdict), key=lambda change: -abs(math.log(change.ratio)))
        lines.append(f"{len(found)} of {len(comparison.changes)} rows {verdict}{':' if found else '.'}")
        if found:
            cells = [
                (c.after.op, c.after.mode, c.after.shape, _contender(c), times(c.ratio), f"±{_percent(c.limit)}")
                for c in found
            ]
            lines += ["", markdown_table(("op", "mode", "shape", "contender", "time", "limit"), cells), ""]
    return "\n".join(lines).rstrip() + "\n"


def _pairs(before: Run, after: Run) -> list[tuple[Row, Row]]:
    """Return the rows of both runs by case and contender. Our default contender is compared even if its backend changed."""
    pairs = []
    older = before.cases()
    for case, rows in after.cases().items():
        earlier = {row.contender: row for row in _timed(older.get(case, []))}
        default = next((row for row in older.get(case, []) if row.ours), None)
        for index, row in enumerate(_timed(rows)):
            other = earlier.get(row.contender)
            if index == 0 and row.ours and default is not None and default.status == "timed":
                other = default
            if other is not None:
                pairs.append((other, row))
    return pairs


def _timed(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.status == "timed"]


def _shift(before: Run, after: Run, a: Row, b: Row, drift: float) -> tuple[float, float]:
    """Return log(time after / time before), relative to the baseline, and its uncertainty."""
    earlier, uncertain_a = _relative(before, a)
    later, uncertain_b = _relative(after, b)
    absolute = before.baseline(a.case) is None or after.baseline(b.case) is None
    return later - earlier - (drift if absolute else 0.0), math.hypot(uncertain_a, uncertain_b)


def _relative(run: Run, row: Row) -> tuple[float, float]:
    """Return the median over the rounds of log(time / baseline's time), and half its 95 % interval.

    Without a baseline it is the median of log(time).
    """
    baseline = run.baseline(row.case)
    times = np.log(row.samples)
    if baseline is not None:
        shared = min(len(row.samples), len(baseline.samples))
        times = times[:shared] - np.log(baseline.samples[:shared])
    # An interval between two order statistics holds for any distribution, also a bimodal one.
    times, outside = np.sort(times), max(0, math.floor((len(times) - 1.96 * math.sqrt(len(times))) / 2))
    return float(np.median(times)), float(times[-1 - outside] - times[outside]) / 2


def _notes(before: Run, after: Run, controls: int) -> list[str]:
    changed = {
        name: (before.versions.get(name, "none"), after.versions.get(name, "none"))
        for name in sorted({*before.versions, *after.versions})
        if name != "pg_kernels" and before.versions.get(name) != after.versions.get(name)
    }
    notes = [
        f"{name} was {old} and is {new}: the spread holds that change too." for name, (old, new) in changed.items()
    ]
    if controls < 10:
        notes.append(f"only {controls} unchanged rows to measure the spread by; small runs find chance changes.")
    return notes


def _contender(change: Change) -> str:
    before, after = change.before.contender, change.after.contender
    return after if before == after else f"{before} → {after}"


def _percent(factor: float, *, signed: bool = False) -> str:
    return f"{100 * (factor - 1):{'+' if signed else ''}.1f} %"
