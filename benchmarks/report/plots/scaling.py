"""How time grows with one size, a panel for each op, mode and size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from pg_kernels.benchmarks.report.growth import AXES, Series, fixed_sizes, series
from pg_kernels.benchmarks.report.plots.style import Style, label_major_ticks, new_figure, set_title, styles
from pg_kernels.benchmarks.report.results import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 12
"""The most panels in one scaling figure."""
UNITS = {
    "tokens": "tokens (number)",
    "batch": "batch (examples)",
    "vocabulary": "vocabulary (entries)",
    "resolution": "resolution (pixels)",
}


def scalings(run: Run) -> dict[str, tuple[str, Figure]]:
    panels = _panels(run)
    if not panels:
        return {}
    if len(panels) <= MOST_PANELS:
        return {"scaling.png": ("Scaling", _scaling(run, panels, "sizes"))}
    figures = {}
    for axis in AXES:
        of_axis = [panel for panel in panels if panel[0].axis == axis]
        pages = [of_axis[start : start + MOST_PANELS] for start in range(0, len(of_axis), MOST_PANELS)]
        for number, page in enumerate(pages, 1):
            part = f", {number} of {len(pages)}" if len(pages) > 1 else ""
            name = f"scaling-{axis}{f'-{number}' if part else ''}.png"
            figures[name] = (f"Scaling with {axis}{part}", _scaling(run, page, f"{axis}{part}"))
    return figures


def _panels(run: Run) -> list[list[Series]]:
    """Return, for each axis, op and mode, the contenders' series on the same cases: those with the most points."""
    groups: dict[tuple[str, str, str, str, str], list[Series]] = {}
    for found in series(run):
        key = (found.axis, found.op, found.mode, found.dtype, fixed_sizes(found))
        groups.setdefault(key, []).append(found)
    chosen: dict[tuple[str, ...], list[Series]] = {}
    for key, group in groups.items():
        chosen[key[:3]] = max(chosen.get(key[:3], group), group, key=_points)
    return list(chosen.values())


def _points(group: Sequence[Series]) -> tuple[int, int]:
    return max(len(found.points) for found in group), len(group)


def _scaling(run: Run, panels: Sequence[Sequence[Series]], what: str) -> Figure:
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    most = max(len(group) for group in panels)
    figure = new_figure(1.0 + lines * (3.0 + 0.17 * most))
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, group in zip(grid.flat, panels):
        _panel(axes, group, styles(run))
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    set_title(figure, f"How time grows with {what}", run, [row for group in panels for _, row in group[0].points])
    return figure


def _panel(axes: Axes, group: Sequence[Series], look: Mapping[str, Style]) -> None:
    from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullFormatter, NullLocator

    first = group[0]
    axes.set_xscale("log")
    axes.set_yscale("log")
    for found in group:
        style = look[found.contender]
        axes.plot(
            [value for value, _ in found.points],
            [row.p50 for _, row in found.points],
            color=style.color,
            marker=style.marker,
            markersize=4,
            linestyle="-" if style.ours else "--",
            label=f"{found.contender}: exponent {found.exponent:.2f}",
        )
    values = sorted({value for found in group for value, _ in found.points})
    axes.xaxis.set_major_locator(FixedLocator(_apart(values)))
    axes.xaxis.set_minor_locator(NullLocator())
    label_major_ticks(lambda value: f"{value:,.0f}", axes.xaxis)
    slowest, fastest = (choose(row.p50 for found in group for _, row in found.points) for choose in (max, min))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if slowest < 50 * fastest else (1,)))
    axes.yaxis.set_major_formatter(EngFormatter("s"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.set_xlabel(UNITS[first.axis], fontsize=8)
    axes.set_ylabel("time (s)", fontsize=8)
    sizes = fill(fixed_sizes(first), 42)
    axes.set_title(f"{first.op}, {first.mode}, {first.dtype}\n{sizes}", fontsize=8)
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.18), fontsize=8, frameon=False)


def _apart(values: Sequence[int]) -> list[float]:
    """Return the rising values that leave room for each other's labels on a logarithmic axis."""
    width = math.log(values[-1] / values[0])
    kept = [values[-1]]
    for value in reversed(values[:-1]):
        if math.log(kept[-1] / value) >= 0.19 * width:
            kept.append(value)
    return [float(value) for value in reversed(kept)]
