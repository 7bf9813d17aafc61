"""Stored runs as pictures: speed-ups, the roofline, and how time grows with size."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from pg_kernels.benchmarks.report.growth import AXES, Series, fixed_sizes, series
from pg_kernels.benchmarks.report.results import Row, Run
from pg_kernels.benchmarks.report.text import three_digits, times
from pg_kernels.model.files import temporary_sibling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DPI = 150
WIDTH = 10.0
"""Width of a figure in inches. Text of 8 points is readable when the picture is shown 1000 pixels wide."""
MOST_CASES = 25
"""The most cases in one speed-up figure."""
MOST_PANELS = 12
"""The most panels in one scaling figure."""

OURS = ("#0072B2", "#56B4E9", "#003C5E", "#9AD0F5")
OTHERS = ("#E69F00", "#009E73", "#D55E00", "#CC79A7", "#F0E442", "#6A3D9A", "#882255", "#999933")
"""Okabe and Ito's colour-blind safe colours and a few more. Ours are blue."""
BASELINE = "#8C8C8C"
MARKERS = "osD^vPX*<>hp"


def draw(run: Run, folder: Path) -> dict[str, str]:
    """Draw a run into a folder and return the file names by title. Figures without data are not drawn."""
    figures = {**_speedups(run), **_rooflines(run), **_scalings(run)}
    for name, (_, figure) in figures.items():
        with temporary_sibling(folder / name) as temporary:
            figure.savefig(temporary, dpi=DPI)
            os.replace(temporary, folder / name)
    return {title: name for name, (title, _) in figures.items()}


# --- what the figures share


@dataclass(frozen=True)
class Style:
    """How a contender is drawn in all figures of a run."""

    color: str
    hatch: str
    marker: str
    ours: bool


def styles(run: Run) -> dict[str, Style]:
    """Return a style for each contender of the run, timed or not, so that it is the same in every figure."""
    found: dict[str, Style] = {}
    counts = {True: 0, False: 0}
    for row in run.rows:
        if row.contender in found:
            continue
        if row.baseline:
            found[row.contender] = Style(BASELINE, "", "x", False)
            continue
        colors, index = OURS if row.ours else OTHERS, counts[row.ours]
        counts[row.ours] += 1
        hatch = ("", "///", "...")[index // len(colors) % 3]
        found[row.contender] = Style(colors[index % len(colors)], hatch, MARKERS[index % len(MARKERS)], row.ours)
    return found


def _title(figure: Figure, what: str, run: Run, rows: Sequence[Row]) -> None:
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in rows))
    figure.suptitle(f"{what}\n{fill(f'{run.device} – {dtypes}', 100)}", fontsize=11)


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _plain(ticks: Callable[[float], str], axis: Axis) -> None:
    """Label an axis's major ticks by `text`, and its minor ticks not at all."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: ticks(value)))
    axis.set_minor_formatter(NullFormatter())


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")


# --- speed-up over the baseline


@dataclass(frozen=True)
class Bars:
    """One case: its baseline and the rows timed beside it."""

    baseline: Row
    others: tuple[Row, ...]


def _speedups(run: Run) -> dict[str, tuple[str, Figure]]:
    cases = _bars(run)
    if len(cases) <= MOST_CASES:
        return {"speedup.png": ("Speed-up over the baseline", _speedup(run, cases, ""))} if cases else {}
    figures = {}
    for op in dict.fromkeys(case.baseline.op for case in cases):
        of_op = [case for case in cases if case.baseline.op == op]
        pages = [of_op[start : start + MOST_CASES] for start in range(0, len(of_op), MOST_CASES)]
        for number, page in enumerate(pages, 1):
            part = f", {number} of {len(pages)}" if len(pages) > 1 else ""
            name = f"speedup-{_slug(op)}{f'-{number}' if part else ''}.png"
            figures[name] = (f"Speed-up over the baseline: {op}{part}", _speedup(run, page, part))
    return figures


def _bars(run: Run) -> list[Bars]:
    """Return the cases with timed rows, grouped by op."""
    found = []
    for rows in run.cases().values():
        baseline = next((row for row in rows if row.baseline and row.status == "timed"), None)
        others = tuple(row for row in rows if row.status == "timed" and row is not baseline)
        if baseline is not None and others:
            found.append(Bars(baseline, others))
    ops = list(dict.fromkeys(case.baseline.op for case in found))
    return sorted(found, key=lambda case: ops.index(case.baseline.op))


BAR, LINE, GAP = 0.17, 0.17, 0.12
"""Heights of a bar, of a line of text, and of the gap between cases, in inches."""


def _speedup(run: Run, cases: Sequence[Bars], part: str) -> Figure:
    several = len({case.baseline.dtype for case in cases}) > 1
    labels = [_case_label(case.baseline, several) for case in cases]
    heights = [max(BAR * len(case.others), LINE * (label.count("\n") + 1)) + GAP for case, label in zip(cases, labels)]
    ops = list(dict.fromkeys(case.baseline.op for case in cases))
    look = styles(run)
    contenders = [name for name in look if any(row.contender == name for case in cases for row in case.others)]
    heading = 2 * LINE if len(ops) > 1 else 0.0
    inches = sum(heights) + heading * len(ops)
    figure = _figure(inches + 1.7 + 0.2 * math.ceil(len(contenders) / 3))
    axes = figure.add_subplot()

    ticks: list[tuple[float, str]] = []
    top, lowest, highest = GAP / 2, 0.7, 1.5
    for index, (case, label, height) in enumerate(zip(cases, labels, heights)):
        if heading and (index == 0 or case.baseline.op != cases[index - 1].baseline.op):
            ticks.append((top + heading / 2, case.baseline.op))
            top += heading
        ticks.append((top + height / 2, label))
        first = top + height / 2 - BAR * (len(case.others) - 1) / 2
        for position, row in enumerate(case.others):
            low, high = _bar(axes, first + BAR * position, row, case.baseline, look[row.contender])
            lowest, highest = min(lowest, low), max(highest, high)
        top += height
    axes.set_ylim(top + GAP / 2, 0)
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=8)
    for tick in axes.get_yticklabels():
        if tick.get_text() in ops:
            tick.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    _ratio_axis(axes, lowest, highest)
    baselines = ", ".join(dict.fromkeys(case.baseline.contender for case in cases))
    axes.set_xlabel(f"speed-up over the baseline, {baselines} (times; whiskers: 20th to 80th percentile of the rounds)")
    axes.set_ylabel("case")
    what = f"Speed-up over the baseline{f': {ops[0]}{part}' if len(ops) == 1 else ''}"
    _title(figure, what, run, [case.baseline for case in cases])
    _bar_legend(figure, {name: look[name] for name in contenders})
    return figure


def _case_label(row: Row, with_dtype: bool) -> str:
    return fill(f"{row.shape}, {row.mode}{f', {row.dtype}' if with_dtype else ''}", 42, break_on_hyphens=False)


def _bar(axes: Axes, at: float, row: Row, baseline: Row, style: Style) -> tuple[float, float]:
    """Draw one bar from 1× to its speed-up and return both ends."""
    ratios = np.array([theirs / own for theirs, own in zip(baseline.samples, row.samples)])
    low, middle, high = (float(np.percentile(ratios, share)) for share in (20, 50, 80))
    axes.barh(
        at,
        middle - 1,
        height=0.85 * BAR,
        left=1,
        color=style.color,
        hatch=style.hatch,
        edgecolor="black",
        linewidth=0.3,
    )
    axes.plot([low, high], [at, at], color="black", linewidth=0.8, marker="|", markersize=4)
    faster = middle >= 1
    axes.annotate(
        times(middle),
        (max(high, 1.0) if faster else min(low, 1.0), at),
        xytext=(4 if faster else -4, 0),
        textcoords="offset points",
        ha="left" if faster else "right",
        va="center",
        fontsize=8,
    )
    return low, high


def _ratio_axis(axes: Axes, lowest: float, highest: float) -> None:
    from matplotlib.ticker import FixedLocator

    octaves = math.log2(highest / lowest)
    room = 2 ** (0.12 * octaves)  # room for the numbers beside the bars
    axes.set_xscale("log", base=2)
    axes.set_xlim(lowest / room, highest * room)
    step = math.ceil((octaves + 1) / 9)
    powers = range(math.ceil(math.log2(lowest / room) / step) * step, math.floor(math.log2(highest * room)) + 1, step)
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in powers]))
    _plain(multiple, axes.xaxis)
    axes.axvline(1, color="black", linewidth=1)
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)


def multiple(ratio: float) -> str:
    """Format a power of two the way people write it: ½×, 4×, 1/16×."""
    if ratio >= 1:
        return f"{ratio:g}×"
    return f"{ {2: '½', 4: '¼', 8: '⅛'}.get(round(1 / ratio), f'1/{1 / ratio:g}') }×"


def _bar_legend(figure: Figure, look: Mapping[str, Style]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=style.color, hatch=style.hatch, edgecolor="black", linewidth=0.3, label=name)
        for name, style in look.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


# --- roofline


def _rooflines(run: Run) -> dict[str, tuple[str, Figure]]:
    rows = [row for row in run.rows if row.status == "timed" and row.bytes]
    computing, moving = [row for row in rows if row.flops], [row for row in rows if not row.flops]
    if not rows:
        return {}
    groups = list(dict.fromkeys((row.op, row.mode) for row in moving))
    heights = [6.0] * bool(computing) + [1.2 + 0.24 * len(groups)] * bool(moving)
    figure = _figure(sum(heights) + 1.2)
    panels = iter(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights).flat)
    _title(figure, "Roofline: what was reached of what the machine can do", run, rows)
    if computing:
        _rates(next(panels), run, computing)
    if moving:
        _bandwidths(next(panels), run, moving, groups)
    return {"roofline.png": ("Roofline", figure)}


def _rates(axes: Axes, run: Run, rows: Sequence[Row]) -> None:
    """Draw FLOP/s over arithmetic intensity, under the machine's ceilings."""
    ceilings = {name: rate for name, rate in run.ceilings.flops_per_s.items() if rate}
    bandwidth = run.ceilings.bytes_per_s
    reached = [row.flops / row.p50 for row in rows]
    unit, scale = ("TFLOP/s", 1e12) if max([*ceilings.values(), *reached]) >= 1e13 else ("GFLOP/s", 1e9)
    intensities = [row.flops / row.bytes for row in rows] + [rate / bandwidth for rate in ceilings.values()]
    left, right = min(intensities) / 3, max(intensities) * 3

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    # The memory slope ends at the highest ceiling, or at the right edge if no ceiling is known.
    end = max(ceilings.values(), default=right * bandwidth) / bandwidth
    axes.plot([left, end], [left * bandwidth / scale, end * bandwidth / scale], color="black", linewidth=1.2)
    for rate in ceilings.values():
        axes.plot([rate / bandwidth, right], [rate / scale] * 2, color="black", linewidth=1.2)
    markers = dict(zip(dict.fromkeys(row.op for row in rows), MARKERS * len(rows)))
    for row in rows:
        at = row.flops / row.bytes, row.flops / row.p50 / scale
        axes.plot(*at, linestyle="none", marker=markers[row.op], markersize=6, **_fill(row.ours))
    axes.set_ylim(
        bottom=min(min(reached), left * bandwidth) / scale / 2, top=max([*ceilings.values(), *reached]) / scale * 2
    )
    _label_ceilings(axes, ceilings, scale, unit)
    _label_slope(axes, bandwidth, scale, left, end)
    _plain(lambda value: f"{value:,g}", axes.xaxis)
    _plain(lambda value: f"{value:,g}", axes.yaxis)
    axes.set_xlabel("arithmetic intensity (FLOP/byte)")
    axes.set_ylabel(f"reached ({unit})")
    axes.grid(linewidth=0.4, alpha=0.6)
    _marker_legend(axes, markers)


def _fill(ours: bool) -> dict[str, Any]:
    if ours:
        return {"markerfacecolor": OURS[0], "markeredgecolor": "black", "markeredgewidth": 0.4, "zorder": 3}
    return {
        "markerfacecolor": "none",
        "markeredgecolor": "#D55E00",
        "markeredgewidth": 1.0,
        "zorder": 4,
    }  # rings do not hide other points


def _label_ceilings(axes: Axes, ceilings: Mapping[str, float], scale: float, unit: str) -> None:
    """Label the matrix rates beside the axes, from the lowest up, each at its line or as close above as there is room."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    room = 0.035  # the share of the axes' height for one line of text
    free = 0.0
    for name, rate in sorted(ceilings.items(), key=lambda item: item[1]):
        height = (math.log(rate / scale) - low) / (high - low)
        free = max(height, free)
        axes.annotate(
            f"{name}: {three_digits(rate / scale)} {unit}",
            (1.0, height),
            xytext=(1.02, free),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "relpos": (0, 0.5)},
        )
        free += room


def _label_slope(axes: Axes, bandwidth: float, scale: float, left: float, end: float) -> None:
    """Label the memory bandwidth along its line."""
    assert axes.figure is not None
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # the angle is known once the axes have their size
    line = [(x, x * bandwidth / scale) for x in (left, end)]
    (x0, y0), (x1, y1) = axes.transData.transform(line)
    axes.annotate(
        f"memory: {three_digits(bandwidth / 1e9)} GB/s",
        (left * (end / left) ** 0.05, left * (end / left) ** 0.05 * bandwidth / scale),
        xytext=(0, 5),
        textcoords="offset points",
        rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)),
        rotation_mode="anchor",
        fontsize=8,
    )


def _marker_legend(axes: Axes, markers: Mapping[str, str]) -> None:
    """Draw a legend below the axes: a marker for each op, a fill for each contender."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="none", marker=marker, color="#555555", label=op) for op, marker in markers.items()
    ]
    handles += [
        Line2D([], [], linestyle="none", marker="o", label=label, **_fill(ours))
        for ours, label in ((True, "ours (filled)"), (False, "others (hollow)"))
    ]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=4, fontsize=8, frameon=False)


def _bandwidths(axes: Axes, run: Run, rows: Sequence[Row], groups: Sequence[tuple[str, str]]) -> None:
    """Draw the memory-bound ops: their bandwidth as a share of the machine's."""
    for row in rows:
        share = 100 * row.bytes / row.p50 / run.ceilings.bytes_per_s
        # Draw ours slightly above the line and others slightly below it, so that equal values stay visible.
        at = groups.index((row.op, row.mode)) + (-0.15 if row.ours else 0.15)
        axes.plot(share, at, linestyle="none", marker="o", markersize=6, **_fill(row.ours))
    axes.axvline(100, color="black", linewidth=1.2)
    axes.set_xlim(left=0, right=max(105.0, axes.get_xlim()[1]))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_yticks(range(len(groups)), [f"{op}, {mode}" for op, mode in groups], fontsize=8)
    axes.set_xlabel(
        f"bandwidth reached (% of {three_digits(run.ceilings.bytes_per_s / 1e9)} GB/s); filled: ours, hollow: others"
    )
    axes.set_ylabel("op without matrix products")
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)


# --- growth

UNITS = {
    "tokens": "tokens (number)",
    "batch": "batch (examples)",
    "vocabulary": "vocabulary (entries)",
    "resolution": "resolution (pixels)",
}


def _scalings(run: Run) -> dict[str, tuple[str, Figure]]:
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
    figure = _figure(1.0 + lines * (3.0 + 0.17 * most))
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, group in zip(grid.flat, panels):
        _panel(axes, group, styles(run))
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    _title(figure, f"How time grows with {what}", run, [row for group in panels for _, row in group[0].points])
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
    _plain(lambda value: f"{value:,.0f}", axes.xaxis)
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
