"""Did a change make an op slower? Two runs against each other, measured by what the machine did to code that did not change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from pg_kernels.benchmarks.report.results import Row, Run
from pg_kernels.benchmarks.report.text import markdown_table, times

SMALLEST_CHANGE = 0.05
"""Nothing below 5 % is called a change, however quiet the machine was."""
MARGIN = 2.0
"""How far beyond the spread of the unchanged a row has to be."""
NORMAL = 2 * 1.4826
"""From the median size of deviations to what 95 % of them stay within, were they normal. Few big ones do not move it."""


@dataclass(frozen=True)
class Change:
    """One contender on one case in two runs, each time relative to the case's baseline in the same rounds."""

    before: Row
    after: Row
    ratio: float
    """Time after / time before, 1 when nothing changed."""
    limit: float
    """How far the ratio may be from 1, as a factor, before it counts."""

    @property
    def verdict(self) -> str:
        if self.ratio > self.limit:
            return "slower"
        return "faster" if self.ratio < 1 / self.limit else "same"


@dataclass(frozen=True)
class Comparison:
    """All rows of ours that both runs timed, and the spread that they were judged by."""

    changes: tuple[Change, ...]
    controls: int
    """How many rows of other packages, which no change of ours can touch, were in both runs."""
    spread: float
    """The factor that nearly all of those stayed within: two standard deviations, estimated so that few odd ones do not count."""
    drift: float
    """Median ratio of the baselines' own times: what the machine did between the runs, and what the comparison leaves out."""
    notes: tuple[str, ...]

    def of(self, verdict: str) -> list[Change]:
        return [change for change in self.changes if change.verdict == verdict]


def compare(before: Run, after: Run) -> Comparison:
    """Compare two runs of the suite on one device; ValueError when they have nothing in common to compare.

    Times drift with the machine, so a row is compared by its ratio to the baseline of its case, round by round. What such
    ratios do by chance is seen on the contenders that are not ours: a row of ours has changed when it moved by more than
    `MARGIN` times their spread, the one over all cases, the one in its own case (where the baseline may have moved), and the
    uncertainty of its own medians.
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
    """The comparison for people: what changed, and how small a change it could have seen."""
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
    """The rows of both runs by case and contender; what we run by default is compared even where its backend changed."""
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
    """The logarithm of time after over time before, relative to the baseline, and how uncertain it is."""
    earlier, uncertain_a = _relative(before, a)
    later, uncertain_b = _relative(after, b)
    absolute = before.baseline(a.case) is None or after.baseline(b.case) is None
    return later - earlier - (drift if absolute else 0.0), math.hypot(uncertain_a, uncertain_b)


def _relative(run: Run, row: Row) -> tuple[float, float]:
    """Median over the rounds of log(time / baseline's time), or of log(time) without one; and half of its 95 % interval."""
    baseline = run.baseline(row.case)
    times = np.log(row.samples)
    if baseline is not None:
        shared = min(len(row.samples), len(baseline.samples))
        times = times[:shared] - np.log(baseline.samples[:shared])
    # The interval between two of the sorted values holds the median whatever the distribution, also one of two modes.
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
