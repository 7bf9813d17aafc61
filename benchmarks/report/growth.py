"""How time grows with one size at a time, compared with how the work grows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from statistics import linear_regression

from pg_kernels.benchmarks.report.results import Row, Run
from pg_kernels.benchmarks.report.text import duration, markdown_table

AXES = ("tokens", "batch", "vocabulary", "resolution")
FEWEST_VALUES = 3
"""A power law fits any two points, so a series needs more."""

Fixed = tuple[tuple[str, int | str], ...]


@dataclass(frozen=True)
class Series:
    """One contender on cases that differ in one size only."""

    op: str
    mode: str
    dtype: str
    contender: str
    axis: str
    fixed: Mapping[str, int | str]
    """The sizes that stay fixed. A size that equals the axis at every point (self-attention's queries) holds the axis's name."""
    points: tuple[tuple[int, Row], ...]
    """The axis's values in rising order, with their rows."""

    @cached_property
    def exponent(self) -> float:
        """Return the least-squares slope of log time over log value."""
        return slope([(value, row.p50) for value, row in self.points])

    @cached_property
    def last_exponent(self) -> float:
        """Return the slope between the two largest values. At small values, overhead hides the growth."""
        return slope([(value, row.p50) for value, row in self.points[-2:]])


def series(run: Run) -> list[Series]:
    """Return all series of the run's timed rows, by axis and then in the order of the suite."""
    groups: dict[tuple[str, str, str, str, str, Fixed], dict[int, Row]] = {}
    for axis in AXES:
        for row in run.rows:
            value = row.sizes.get(axis)
            if row.status != "timed" or not isinstance(value, int) or value < 1:
                continue
            for fixed in _fixed(row.sizes, axis, value):
                key = (row.op, row.mode, row.dtype, row.contender, axis, fixed)
                groups.setdefault(key, {}).setdefault(value, row)
    return [
        Series(op, mode, dtype, contender, axis, dict(fixed), tuple(sorted(points.items())))
        for (op, mode, dtype, contender, axis, fixed), points in groups.items()
        if len(points) >= FEWEST_VALUES
    ]


def _fixed(sizes: Mapping[str, int | str], axis: str, value: int) -> Iterator[Fixed]:
    """Yield all ways to split the other sizes: a size that happens to equal the axis may be fixed or may grow along."""
    others = sorted((name, size) for name, size in sizes.items() if name != axis)
    yield from product(*([(name, size), (name, axis)] if size == value else [(name, size)] for name, size in others))


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the exponent p of the power law y ~ x^p that fits positive points best (least squares in logarithms)."""
    return linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points]).slope


_HEADER = ["op", "mode", "dtype", "contender", "axis", "other sizes", "time at each value"]
_HEADER += ["exponent", "of the bound", "last two", "of the bound"]


def table(run: Run) -> str:
    """Return our series and the baselines' as a Markdown list with their rooflines' exponents. Empty if there are no series."""
    shown = [found for found in series(run) if found.points[0][1].ours or found.points[0][1].baseline]
    lines = [_cells(run, found) for found in shown]
    return markdown_table(_HEADER, lines) if lines else ""


def _cells(run: Run, found: Series) -> tuple[str, ...]:
    bounds = [(value, run.bound_s(row)) for value, row in found.points]
    smallest, largest = found.points[0][0], found.points[-1][0]
    return (
        found.op,
        found.mode,
        found.dtype,
        found.contender,
        f"{found.axis} {smallest:,}–{largest:,}",
        fixed_sizes(found),
        ", ".join(f"{value:,}: {duration(row.p50)}" for value, row in found.points),
        f"{found.exponent:.2f}",
        _bound_exponent(bounds),
        f"{found.last_exponent:.2f}",
        _bound_exponent(bounds[-2:]),
    )


def fixed_sizes(found: Series) -> str:
    """Return a text of the sizes that all points of a series share."""
    return ", ".join(
        str(size) if name == "model" else f"{name} = {size}" if size == found.axis else f"{name} {size}"
        for name, size in sorted(found.fixed.items(), key=lambda item: item[0] != "model")
    )


def _bound_exponent(bounds: Sequence[tuple[int, float]]) -> str:
    return f"{slope(bounds):.2f}" if all(bound > 0 for _, bound in bounds) else "–"
