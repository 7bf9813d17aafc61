"""Numbers and tables as text for people."""

from __future__ import annotations

import math
from collections.abc import Sequence


def duration(seconds: float) -> str:
    """Format seconds with three significant digits in a suitable unit."""
    return scaled(seconds, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)))


def scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    """Format with three significant digits in the largest unit that gives at least 1, or else in the last unit."""
    value = float(f"{value:.3g}")  # round first, so that 999.9 becomes 1.00 of the next unit
    name, size = next((unit for unit in units if value >= unit[1]), units[-1])
    return f"{three_digits(value / size)} {name}"


def three_digits(value: float) -> str:
    """Format with three significant digits, no exponent, and trailing zeros kept."""
    value = float(f"{value:.3g}")
    whole = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, 2 - whole)}f}"


def times(ratio: float | None) -> str:
    """Format a speed-up."""
    return "–" if ratio is None else f"{ratio:.2f}×" if ratio >= 0.1 else f"{three_digits(ratio)}×"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. Cells are escaped."""
    lines = [header, ["---"] * len(header), *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    """Escape text for a cell of a Markdown table: replace bars and line breaks."""
    return " ".join(text.replace("|", r"\|").split())
