"""The built-in model at every task: one picture each, with its answer, on one sheet."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from .. import EMBEDDED_CHECKPOINT
from ..images import load_image
from ..locations import label_font
from ..paligemma import PaliGemma
from ..processor import Processor
from ..training.data import Example, JsonLines

SAMPLES = EMBEDDED_CHECKPOINT / "samples" / "samples.jsonl"

_COLUMNS = 4
_SIDE = 280  # of a picture on the sheet, in pixels
_GAP = 16
_TEXT = 92  # height under a picture: two lines of the prompt and two of the answer
_LARGE, _SMALL = 16, 13  # of letters


def answers(model: PaliGemma, processor: Processor, examples: Sequence[Example], max_new_tokens: int = 64) -> list[str]:
    """Return the model's greedy answer to each example."""
    return [
        processor.decode(
            model.generate(**processor([list(example.images)], [example.prefix]), max_new_tokens=max_new_tokens)
        )[0]
        for example in examples
    ]


def sheet(processor: Processor, examples: Sequence[Example], texts: Sequence[str]) -> Image.Image:
    """Draw the examples' images with boxes and masks, and prompts and answers below. Two images stand side by side."""
    cells = [_cell(processor, example, text) for example, text in zip(examples, texts, strict=True)]
    rows = -(-len(cells) // _COLUMNS)
    step = (_SIDE + _GAP, _SIDE + _TEXT + _GAP)
    canvas = Image.new("RGB", (_COLUMNS * step[0] + _GAP, rows * step[1] + _GAP), "white")
    for number, cell in enumerate(cells):
        canvas.paste(cell, (_GAP + number % _COLUMNS * step[0], _GAP + number // _COLUMNS * step[1]))
    return canvas


def _cell(processor: Processor, example: Example, text: str) -> Image.Image:
    cell = Image.new("RGB", (_SIDE, _SIDE + _TEXT), "white")
    pictures = [load_image(path) for path in example.images]
    found = processor.parse(text, size=pictures[-1].size)
    pictures[-1] = processor.draw(pictures[-1], found)
    width = (_SIDE - _GAP * (len(pictures) - 1) // 2) // len(pictures)
    for number, picture in enumerate(pictures):
        height = round(width * picture.height / picture.width)
        place = (number * (width + _GAP // 2), (_SIDE - height) // 2)
        cell.paste(picture.resize((width, height), Image.Resampling.LANCZOS), place)
    pen = ImageDraw.Draw(cell)
    below = _write(pen, _SIDE + 8, example.prefix, _SMALL, (110, 110, 110))
    # Boxes and masks are on the picture already.
    said = "; ".join(thing.label for thing in found) or text.replace("\n", " / ")
    _write(pen, below + 6, said or "(no answer)", _LARGE, (0, 0, 0))
    return cell


def _write(pen: ImageDraw.ImageDraw, top: int, text: str, size: int, colour: tuple[int, int, int]) -> int:
    """Write at most two lines in letters of `size` pixels, as wide as an image. Return the y coordinate where they end."""
    font = label_font(size)
    lines = textwrap.wrap(text, int(_SIDE / font.getlength("abcdefghij ") * 11))[:2]
    for number, line in enumerate(lines):
        pen.text((0, top + number * (size + 4)), line, font=font, fill=colour)
    return top + len(lines) * (size + 4)


def samples(path: Path = SAMPLES) -> list[Example]:
    """Read the shipped samples, one for each task, or other JSON lines of image, prefix and suffix."""
    return JsonLines(path).examples
