"""``<loc>`` and ``<seg>`` text to boxes and masks, back, and onto the image."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .segmentation import CODES_PER_MASK, MaskVQVAE, paste

Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

_OBJECT = re.compile(
    rf"\s*(?P<locations>(?:<loc[0-9]{{4}}>){{4}})(?P<codes>(?:<seg[0-9]{{3}}>){{{CODES_PER_MASK}}})?(?P<label>[^<>]*)"
)
_NUM_LOCATIONS = 1024
_NUM_CODES = 128

# Okabe and Ito's colours, which colour-blind readers can tell apart too, less black and yellow.
_PALETTE = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0))
_MASK_OPACITY = 0.45


@dataclass(frozen=True, eq=False)
class Detection:
    """One object: its label, its box x1, y1, x2, y2 in pixels, and where it was segmented its mask, bool [H, W]."""

    label: str
    box: Box
    mask: np.ndarray | None = None


def parse(
    text: str, size: tuple[int, int], *, scale: float = 1023, mask_decoder: MaskVQVAE | None = None
) -> list[Detection]:
    """Reads the objects of an answer to "detect …" or "segment …".

    Args:
        text: objects joined by " ; ", each four ``<loc>`` (y1, x1, y2, x2), sixteen ``<seg>`` or none, and a label.
        size: width and height of the image in pixels.
        scale: the location that means the far edge: 1023 as in training, 1024 as in the public demo.
        mask_decoder: turns codes into masks; without it masks are None.

    Returns:
        The objects in the order of the text. Malformed ones are left out, and so are boxes without area.

    Raises:
        ValueError: ``size`` or ``scale`` is not positive.
    """
    width, height = size
    if width <= 0 or height <= 0:
        raise ValueError(f"size: {size}; width and height must be positive")
    if scale <= 0:
        raise ValueError(f"scale: {scale}; it must be positive")
    objects = []
    for part in text.split(";"):
        match = _OBJECT.fullmatch(part)
        if match is None:
            continue
        locations = _numbers(match["locations"])
        codes = _numbers(match["codes"] or "")
        y1, x1, y2, x2 = locations
        if max(locations) >= _NUM_LOCATIONS or max(codes, default=0) >= _NUM_CODES or y2 <= y1 or x2 <= x1:
            continue
        box = (x1 / scale * width, y1 / scale * height, x2 / scale * width, y2 / scale * height)
        mask = None
        if codes and mask_decoder is not None:
            mask = paste(mask_decoder.decode(np.array([codes]))[0], box, size)
        objects.append(Detection(match["label"].strip(), box, mask))
    return objects


def format_boxes(
    objects: Sequence[Detection],
    size: tuple[int, int],
    *,
    scale: float = 1023,
    mask_encoder: MaskVQVAE | None = None,
) -> str:
    """Writes the answer that ``parse`` reads, for training data.

    Args:
        objects: boxes in pixels, cut off at the image's edges; labels without "<", ">" or ";".
        size: width and height of the image in pixels.
        scale: as in ``parse``.
        mask_encoder: turns masks into codes; without it masks are not written.

    Raises:
        ValueError: a label would not be read back, or a box has no area at this resolution.
    """
    width, height = size
    parts = []
    for index, detection in enumerate(objects):
        if re.search("[<>;\n]", detection.label):
            raise ValueError(f"objects[{index}]: label {detection.label!r} holds one of < > ; or a line break")
        x1, y1, x2, y2 = detection.box
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
    """Returns an RGB copy of the image with masks, outlines and labels, a colour per label.

    Raises:
        ValueError: a mask is not of the image's size.
    """
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
        # A contour, because a tint does not show on an object of its own colour.
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
    # Tags last, so that no outline crosses a text.
    tags: list[Box] = []
    for detection in detections:
        if detection.label:
            tags.append(_draw_tag(pen, detection, colours[detection.label], image.size, font, line + 1, tags))
    return canvas


def label_font(size: float) -> Font:
    """Returns a font of so many pixels: matplotlib's DejaVu Sans where that is installed, else Pillow's own, which has no "é"."""
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
    # Above the box, or below it, where there is room beside the other tags; else inside its upper edge; never beyond the image.
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
    """A colour per label: the same in every image, unless two labels of this one want the same."""
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
