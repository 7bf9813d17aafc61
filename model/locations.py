"""`<loc>` and `<seg>` text to boxes and masks, back, and onto the image."""

from __future__ import annotations

import math
import operator
import re
import string
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .segmentation import CODES_PER_MASK, MaskVQVAE, paste

Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

# Consecutive tokens, with optional white space before <seg>; then the label.
_RUN = re.compile(
    r"(?P<tokens><(?:loc[0-9]{4}|seg[0-9]{3})>(?:\s*<seg[0-9]{3}>|<loc[0-9]{4}>)*)[\s,]*(?P<label>[^<>;]*)"
)
_OBJECT = re.compile(
    rf"(?P<locations>(?:<loc[0-9]{{4}}>){{4}})(?:\s*(?P<codes>(?:<seg[0-9]{{3}}>){{{CODES_PER_MASK}}}))?"
)
_OBJECTS = re.compile(f"(?:{_OBJECT.pattern})+".replace("?P<locations>", "?:").replace("?P<codes>", "?:"))
_NUM_LOCATIONS = 1024
_NUM_CODES = 128
_LARGEST_SIDE = 2**31

# Okabe and Ito's colours, which colour-blind readers can distinguish, without black and yellow.
_PALETTE = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0))
_MASK_OPACITY = 0.45


@dataclass(frozen=True, eq=False)
class Detection:
    """One object: its label, its box x1, y1, x2, y2 in pixels, and if segmented its mask, bool [H, W].

    `score` is how sure a model is of the object, from 0 to 1; None if that is not known.
    """

    label: str
    box: Box
    mask: np.ndarray | None = None
    score: float | None = None


def parse(
    text: str, size: tuple[int, int], *, scale: float = 1023, mask_decoder: MaskVQVAE | None = None
) -> list[Detection]:
    """Read the objects of an answer to "detect …" or "segment …".

    Args:
        text: contains objects, each four `<loc>` (y1, x1, y2, x2), sixteen or no `<seg>`, and a label, which ends at the next
            token or ";". White space and commas around the label are removed.
        size: width and height of the image in pixels.
        scale: the location of the far edge: 1023 as in training, 1024 as in the public demo.
        mask_decoder: turns codes into masks; without it masks are None.

    Returns:
        The objects in the order of the text. Malformed objects and boxes without area are left out.

    Raises:
        TypeError: `text` is not a string, or `size` not a pair of integers.
        ValueError: `size` or `scale` is not positive.
    """
    return [detection for _, detection in parse_places(text, size, scale=scale, mask_decoder=mask_decoder)]


def parse_places(
    text: str, size: tuple[int, int], *, scale: float = 1023, mask_decoder: MaskVQVAE | None = None
) -> Iterator[tuple[int, Detection]]:
    """Yield the objects of `parse`, each with its start position in the text."""
    if not isinstance(text, str):
        raise TypeError(f"text: a string is expected, got {type(text).__name__}")
    width, height = check_size(size)
    _check_scale(scale)
    for run in _RUN.finditer(text):
        if _OBJECTS.fullmatch(run["tokens"]) is None:
            continue
        for found in _OBJECT.finditer(text, run.start("tokens"), run.end("tokens")):
            y1, x1, y2, x2 = locations = _numbers(found["locations"])
            codes = _numbers(found["codes"] or "")
            if max(locations) >= _NUM_LOCATIONS or max(codes, default=0) >= _NUM_CODES or y2 <= y1 or x2 <= x1:
                continue
            box = (x1 / scale * width, y1 / scale * height, x2 / scale * width, y2 / scale * height)
            mask = None
            if codes and mask_decoder is not None:
                mask = paste(mask_decoder.decode(np.array([codes]))[0], box, (width, height))
            label = run["label"].rstrip(f",{string.whitespace}").strip() if found.end() == run.end("tokens") else ""
            yield found.start(), Detection(label, box, mask)


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """Return a mask, bool [H, W], as COCO's run lengths: pixels column by column, alternately outside and inside."""
    pixels = np.concatenate(([False], mask.astype(bool).flatten(order="F"), [False]))
    edges = np.flatnonzero(pixels[1:] != pixels[:-1])
    counts = np.diff(np.concatenate(([0], edges, [mask.size]))).tolist()
    return {"size": list(mask.shape), "counts": counts if counts[-1] or len(counts) == 1 else counts[:-1]}


def object_score(probabilities: Iterable[float]) -> float:
    """Return an object's score from the probabilities of its four location tokens: their geometric mean.

    It ranks like their product, the probability of the box. It is no probability that the object is right: neighbouring
    locations share the probability of a good box.
    """
    return math.prod(probabilities) ** 0.25


def _check_scale(scale: float) -> None:
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: {scale}; it must be positive")


def _check_box(name: str, box: Box) -> Box:
    if len(box) != 4 or not all(-math.inf < edge < math.inf for edge in box):
        raise ValueError(f"{name}: box {box} is not four finite numbers")
    return box


def check_size(size: object) -> tuple[int, int]:
    """Return an image's width and height; TypeError or ValueError if they are not two positive integers."""
    try:
        width, height = (operator.index(side) for side in size)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise TypeError(f"size: width and height as integers are expected, got {size!r:.80}") from error
    if not 0 < width < _LARGEST_SIDE or not 0 < height < _LARGEST_SIDE:
        raise ValueError(f"size: {size!r:.80}; width and height must be positive, and below {_LARGEST_SIDE}")
    return width, height


def format_boxes(
    objects: Sequence[Detection],
    size: tuple[int, int],
    *,
    scale: float = 1023,
    mask_encoder: MaskVQVAE | None = None,
) -> str:
    """Return the answer that `parse` reads, for training data.

    Args:
        objects: boxes in pixels, clipped to the image; labels without "<", ">" or ";", and without commas at either end.
        size: width and height of the image in pixels.
        scale: as in `parse`.
        mask_encoder: turns masks into codes; without it masks are not written.

    Raises:
        ValueError: `parse` would not read a label back, a box has no area at this resolution or an edge that is not finite, or
            `size` or `scale` is not positive.
    """
    width, height = check_size(size)
    _check_scale(scale)
    parts = []
    for index, detection in enumerate(objects):
        if re.search("[<>;\n]|^\\s*,|,\\s*$", detection.label):
            raise ValueError(
                f"objects[{index}]: label {detection.label!r} holds one of < > ; or a line break, or a comma at an end"
            )
        x1, y1, x2, y2 = _check_box(f"objects[{index}]", detection.box)
        edges = (y1 / height, x1 / width, y2 / height, x2 / width)
        locations = [min(max(round(edge * scale), 0), _NUM_LOCATIONS - 1) for edge in edges]
        if locations[2] <= locations[0] or locations[3] <= locations[1]:
            raise ValueError(f"objects[{index}]: box {detection.box} has no area in an image of {width}×{height}")
        codes = []
        if detection.mask is not None and mask_encoder is not None:
            codes = mask_encoder.encode(detection.mask, detection.box).tolist()
        tokens = "".join(f"<loc{n:04d}>" for n in locations) + "".join(f"<seg{n:03d}>" for n in codes)
        parts.append(f"{tokens} {detection.label}".rstrip())
    return " ; ".join(parts)


def draw(image: Image.Image, detections: Sequence[Detection]) -> Image.Image:
    """Return an RGB copy of the image with masks, outlines and labels drawn on it, in one colour for each label.

    Raises:
        ValueError: a mask is not of the image's size, or a box is not four finite numbers.
    """
    for index, detection in enumerate(detections):
        _check_box(f"detections[{index}]", detection.box)
    width, height = image.size
    line = max(1, round(min(width, height) / 150))
    pixels = np.array(image.convert("RGB"))
    colours = _colours(detection.label for detection in detections)
    for index, detection in enumerate(detections):
        if detection.mask is None:
            continue
        if detection.mask.shape != (height, width):
            raise ValueError(f"detections[{index}]: mask {detection.mask.shape}, expected {(height, width)} (H, W)")
        inside = detection.mask > 0
        blended = pixels[inside] * (1 - _MASK_OPACITY) + np.array(colours[detection.label]) * _MASK_OPACITY
        pixels[inside] = blended.round().astype(np.uint8)
        # Draw a contour: a tint is invisible on an object of the same colour.
        core = inside
        for _ in range((line + 1) // 2):
            around = np.pad(core, 1, mode="edge")
            core = core & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
        pixels[inside & ~core] = colours[detection.label]
    canvas = Image.fromarray(pixels)
    pen = ImageDraw.Draw(canvas)
    font = label_font(max(10, min(width, height) / 28))
    for detection in detections:
        x1, y1, x2, y2 = _within(detection.box, image.size)
        pen.rectangle((x1, y1, x2, y2), outline=colours[detection.label], width=line)
    # Draw tags last, so that no outline crosses a text.
    tags: list[Box] = []
    for detection in detections:
        if detection.label:
            tags.append(_draw_tag(pen, detection, colours[detection.label], image.size, font, line + 1, tags))
    return canvas


def label_font(size: float) -> Font:
    """Return a font of `size` pixels: matplotlib's DejaVu Sans if installed, else Pillow's own, which has no "é"."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return ImageFont.load_default(size)
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _draw_tag(
    pen: ImageDraw.ImageDraw,
    detection: Detection,
    colour: Colour,
    size: tuple[int, int],
    font: Font,
    padding: int,
    others: Sequence[Box],
) -> Box:
    x1, y1, _, y2 = _within(detection.box, size)
    left, top, right, bottom = pen.textbbox((0, 0), detection.label, font=font)
    tag_width, tag_height = right - left + 2 * padding, bottom - top + 2 * padding
    # Place the tag above or below the box, where other tags leave room; else inside its upper edge; always inside the image.
    x = max(0, min(x1, size[0] - tag_width))
    inside = max(0, min(y1, size[1] - tag_height))
    for y in (y1 - tag_height, y2 + 1, inside):
        tag = (x, y, x + tag_width, y + tag_height)
        if 0 <= y <= size[1] - tag_height and not any(_meet(tag, other) for other in others):
            break
    pen.rectangle((x, y, x + tag_width - 1, y + tag_height - 1), fill=colour)
    pen.text((x + padding - left, y + padding - top), detection.label, fill=_text_colour(colour), font=font)
    return tag


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _colours(labels: Iterable[str]) -> dict[str, Colour]:
    """Return a colour for each label: the same in every image, unless two labels of one image collide."""
    chosen: dict[str, Colour] = {}
    for label in dict.fromkeys(labels):
        # crc32, because Python's hash of a string differs between runs.
        wanted = zlib.crc32(label.encode("utf-8", "replace")) % len(_PALETTE)
        order = _PALETTE[wanted:] + _PALETTE[:wanted]
        chosen[label] = next((colour for colour in order if colour not in chosen.values()), order[0])
    return chosen


def _text_colour(background: Colour) -> Colour:
    red, green, blue = ((c / 255) ** 2.2 for c in background)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    # WCAG contrast (L1 + .05) / (L2 + .05) is the same for black and white text at a luminance of 0.179.
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


def _within(box: Box, size: tuple[int, int]) -> Box:
    width, height = size
    x1, y1, x2, y2 = box
    x1, x2 = min(max(x1, 0), width - 1), min(max(x2, 0), width - 1)
    y1, y2 = min(max(y1, 0), height - 1), min(max(y2, 0), height - 1)
    return x1, y1, max(x1, x2), max(y1, y2)


def _numbers(tokens: str) -> list[int]:
    return [int(digits) for digits in re.findall("[0-9]+", tokens)]
