"""The roofline: each row's rate under the machine's ceilings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pg_kernels.benchmarks.report.plots.style import MARKERS, OURS, label_major_ticks, new_figure, set_title
from pg_kernels.benchmarks.report.results import Row, Run
from pg_kernels.benchmarks.report.text import three_digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def rooflines(run: Run) -> dict[str, tuple[str, Figure]]:
    rows = [row for row in run.rows if row.status == "timed" and row.bytes]
    computing, moving = [row for row in rows if row.flops], [row for row in rows if not row.flops]
    if not rows:
        return {}
    groups = list(dict.fromkeys((row.op, row.mode) for row in moving))
    heights = [6.0] * bool(computing) + [1.2 + 0.24 * len(groups)] * bool(moving)
    figure = new_figure(sum(heights) + 1.2)
    panels = iter(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights).flat)
    set_title(figure, "Roofline: what was reached of what the machine can do", run, rows)
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
    label_major_ticks(lambda value: f"{value:,g}", axes.xaxis)
    label_major_ticks(lambda value: f"{value:,g}", axes.yaxis)
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
