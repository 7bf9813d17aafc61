"""Stored runs as pictures: speed-ups, the roofline, and how time grows with size."""

from __future__ import annotations

import os
from pathlib import Path

from pg_kernels.benchmarks.report.plots.roofline import rooflines
from pg_kernels.benchmarks.report.plots.scaling import scalings
from pg_kernels.benchmarks.report.plots.speedup import speedups
from pg_kernels.benchmarks.report.plots.style import DPI
from pg_kernels.benchmarks.report.results import Run
from pg_kernels.model.files import temporary_sibling


def draw(run: Run, folder: Path) -> dict[str, str]:
    """Draw a run into a folder and return the file names by title. Figures without data are not drawn."""
    figures = {**speedups(run), **rooflines(run), **scalings(run)}
    for name, (_, figure) in figures.items():
        with temporary_sibling(folder / name) as temporary:
            figure.savefig(temporary, dpi=DPI)
            os.replace(temporary, folder / name)
    return {title: name for name, (title, _) in figures.items()}
