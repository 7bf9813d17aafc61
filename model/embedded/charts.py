"""Bar and line charts, drawn by matplotlib, with the numbers that they show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .world import Random

LABELS = (
    ("A", "B", "C", "D", "E"),
    ("Mon", "Tue", "Wed", "Thu", "Fri"),
    ("Q1", "Q2", "Q3", "Q4"),
    ("Jan", "Feb", "Mar", "Apr", "May"),
)
SCALES = (1, 10)
"""The value of one of the ten steps of the value axis."""

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:cyan", "black")
_FONTS = ("DejaVu Sans", "DejaVu Serif", "STIXGeneral")
_DPI = 100


@dataclass(frozen=True)
class Chart:
    """A chart of kind "bar" or "line". Values are whole numbers, by label from left to right."""

    image: Image.Image
    kind: str
    values: dict[str, int]


class Charts:
    """Draw charts on one canvas. Creating a canvas takes longer than drawing.

    Raises ModuleNotFoundError without matplotlib (this package's `train` extra).
    """

    def __init__(self) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "charts need the package `matplotlib`: pip install matplotlib, or install this package's `train` extra"
            ) from error
        self._figure: Any = Figure(dpi=_DPI)
        self._canvas = FigureCanvasAgg(self._figure)

    def draw(self, rng: Random, image_size: int) -> Chart:
        """Draw a chart of three to five values from 1 to 10 steps of an axis whose step is one of `SCALES`."""

        def pick(choices: Any) -> Any:
            return choices[int(rng.random() * len(choices))]

        kind, scale, labels = pick(("bar", "bar", "line")), pick(SCALES), pick(LABELS)
        labels = labels[: 3 + int(rng.random() * (len(labels) - 2))]
        values = [scale * (1 + int(10 * rng.random())) for _ in labels]
        colours = [pick(_COLOURS)] * len(labels)
        if rng.random() < 0.4:
            colours = [pick(_COLOURS) for _ in labels]
        points = 72 / _DPI * image_size / 224  # one pixel of 224
        self._figure.clear()
        self._figure.set_size_inches(image_size / _DPI, image_size / _DPI)
        axes = self._figure.add_axes((0.155, 0.1, 0.82, 0.86))
        font = {"fontfamily": pick(_FONTS), "fontsize": (14 + 2 * rng.random()) * points}
        if kind == "bar":
            axes.bar(labels, values, color=colours, width=0.45 + 0.4 * rng.random(), zorder=2)
        else:
            axes.plot(
                labels, values, color=colours[0], marker=pick("osD^"), markersize=8 * points, linewidth=3 * points
            )
            axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.set_ylim(0, 10.5 * scale)
        ticks = [step * scale for step in range(0, 11, 2)]
        axes.set_yticks(ticks, [str(tick) for tick in ticks], **font)
        axes.set_xticks(range(len(labels)), labels, **font)
        axes.tick_params(length=2 * points, pad=2 * points)
        if rng.random() < 0.7:
            axes.grid(axis="y", linewidth=points, color="0.8", zorder=0)
        if rng.random() < 0.5:
            axes.spines[["top", "right"]].set_visible(False)
        axes.set_facecolor(pick(("white", "white", "#f2f2f2", "#eef3fa")))
        self._canvas.draw()
        image = Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB")
        return Chart(image, kind, dict(zip(labels, values, strict=True)))
