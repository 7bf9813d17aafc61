"""What all figures share: size, title, ticks, and a style for each contender."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING

from pg_kernels.benchmarks.report.results import Row, Run

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


DPI = 150
WIDTH = 10.0
"""Width of a figure in inches. Text of 8 points is readable when the picture is shown 1000 pixels wide."""
OURS = ("#0072B2", "#56B4E9", "#003C5E", "#9AD0F5")
OTHERS = ("#E69F00", "#009E73", "#D55E00", "#CC79A7", "#F0E442", "#6A3D9A", "#882255", "#999933")
"""Okabe and Ito's colour-blind safe colours and a few more. Ours are blue."""
BASELINE = "#8C8C8C"
MARKERS = "osD^vPX*<>hp"


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


def set_title(figure: Figure, what: str, run: Run, rows: Sequence[Row]) -> None:
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in rows))
    figure.suptitle(f"{what}\n{fill(f'{run.device} – {dtypes}', 100)}", fontsize=11)


def new_figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def label_major_ticks(ticks: Callable[[float], str], axis: Axis) -> None:
    """Label an axis's major ticks by `text`, and its minor ticks not at all."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: ticks(value)))
    axis.set_minor_formatter(NullFormatter())


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")
