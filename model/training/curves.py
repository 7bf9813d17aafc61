"""Loss curves of training runs, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..files import temporary_sibling
from .log import LOG, read_log

_SMOOTHING = 0.03


def draw_losses(folders: Sequence[Path], output: Path) -> None:
    """Draw the loss of every step, and its moving average, in one panel for each run.

    Args:
        folders: the runs' folders, each with the trainer's `log.jsonl`.
        output: a file that matplotlib can write, such as .png or .svg.

    Raises ModuleNotFoundError without matplotlib (extra: train), OSError or ValueError for a folder without a log.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = [(folder.name, *_losses(folder / LOG)) for folder in folders]
    figure = Figure(figsize=(4 * len(runs), 3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, (name, steps, losses) in zip(panels, runs, strict=True):
        axes.plot(steps, losses, color="0.8", linewidth=0.7)
        axes.plot(steps, _smoothed(losses), color="tab:blue", linewidth=1.5)
        axes.set(title=name, xlabel="step", yscale="log")
        axes.grid(color="0.9")
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter("{x:g}")
    panels[0].set_ylabel("loss")
    with temporary_sibling(output) as temporary:
        figure.savefig(temporary, dpi=100)
        temporary.replace(output)


def _losses(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a training run leaves it in its folder")
    values = [(line["step"], line["loss"]) for line in read_log(path) if line["kind"] == "train"]
    if not values:
        raise ValueError(f"{path}: it holds no step")
    steps, losses = np.array(values).T
    return steps, losses


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Return the moving average; at the begin, over the values there are."""
    averages = np.empty_like(values)
    average = 0.0
    for number, value in enumerate(values, start=1):
        average += max(_SMOOTHING, 1 / number) * (value - average)
        averages[number - 1] = average
    return averages
