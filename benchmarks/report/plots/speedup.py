"""Bars of each contender's speed-up over the baseline, case by case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from pg_kernels.benchmarks.report.plots.style import Style, label_major_ticks, new_figure, set_title, slug, styles
from pg_kernels.benchmarks.report.results import Row, Run
from pg_kernels.benchmarks.report.text import times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CASES = 25
"""The most cases in one speed-up figure."""


@dataclass(frozen=True)
class Bars:
    """One case: its baseline and the rows timed beside it."""

    baseline: Row
    others: tuple[Row, ...]


def speedups(run: Run) -> dict[str, tuple[str, Figure]]:
    cases = _bars(run)
    if len(cases) <= MOST_CASES:
        return {"speedup.png": ("Speed-up over the baseline", _speedup(run, cases, ""))} if cases else {}
    figures = {}
    for op in dict.fromkeys(case.baseline.op for case in cases):
        of_op = [case for case in cases if case.baseline.op == op]
        pages = [of_op[start : start + MOST_CASES] for start in range(0, len(of_op), MOST_CASES)]
        for number, page in enumerate(pages, 1):
            part = f", {number} of {len(pages)}" if len(pages) > 1 else ""
            name = f"speedup-{slug(op)}{f'-{number}' if part else ''}.png"
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
    figure = new_figure(inches + 1.7 + 0.2 * math.ceil(len(contenders) / 3))
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
    set_title(figure, what, run, [case.baseline for case in cases])
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
    label_major_ticks(multiple, axes.xaxis)
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
