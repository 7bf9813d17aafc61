"""Pictures with writing on them: words and numbers in matplotlib's fonts, dark on light."""

from __future__ import annotations

import string
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .world import Random

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
)

_WORDS = (
    "air art bag bar bed big box boy bus buy cab cafe cake call car city clean close cold cool cup day deal door "
    "down dry east eat end exit fast film fire fish floor food free fresh game gate go gold good green help here "
    "high home hot hotel ice info jazz key lake left light live long low lunch mail man map market menu milk moon "
    "music near new news next night north now off oil old on one open out park part pay pizza play post pull push "
    "quick quiet radio rain red rice right river road room run sale sea shop show sky slow snow soft sold south spa "
    "star start stay stop sun taxi tea team ticket time today top town train tree up van view visa wait walk warm "
    "water way west wet wind wine wood work yes you zone zoo"
)
WORDS = tuple(_WORDS.split())
_ALPHABETS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)

_UNIT = 224  # picture width in pixels that the lengths below refer to
_HEIGHTS = (44, 112)  # font sizes, if there is room. From 1.5 patches on; below, letters share patches
_MARGIN = 8
_PAPER, _INK = (200, 256), (0, 120)  # ranges of red, green and blue levels


def written(rng: Random, image_size: int, characters: float = 0.0) -> tuple[Image.Image, str]:
    """Draw one or two lines of writing. Return the picture and its text, lines joined by a line break.

    A line is a word in lower case, capitals or both, or a number of one to four digits. A share `characters` of the pictures
    shows one to four random letters or digits instead.
    Raises ModuleNotFoundError without matplotlib (this package's `train` extra).
    """
    if characters and rng.random() < characters:
        alphabet = _ALPHABETS[int(3 * rng.random())]
        lines = ["".join(alphabet[int(len(alphabet) * rng.random())] for _ in range(1 + int(4 * rng.random())))]
    else:
        lines = [_line(rng) for _ in range(1 + int(rng.random() < 0.35))]
    paper, ink = (tuple(low + int((high - low) * rng.random()) for _ in range(3)) for low, high in (_PAPER, _INK))
    picture = Image.new("RGB", (image_size, image_size), paper)
    name = FONTS[int(rng.random() * len(FONTS))]
    scale = image_size / _UNIT
    height = _HEIGHTS[0] + (_HEIGHTS[1] - _HEIGHTS[0]) * rng.random()
    room = (_UNIT - 2 * _MARGIN) * scale
    while True:  # long words get smaller letters
        font = _font(name, round(height * scale))
        boxes = [font.getbbox(line) for line in lines]
        tall = sum(bottom - top for _, top, _, bottom in boxes) + _MARGIN * scale * (len(lines) - 1)
        if max(tall, *(right - left for left, _, right, _ in boxes)) <= room:
            break
        height -= 2
    pen = ImageDraw.Draw(picture)
    y = _MARGIN * scale + rng.random() * (image_size - 2 * _MARGIN * scale - tall)
    for line, (left, top, right, bottom) in zip(lines, boxes, strict=True):
        x = _MARGIN * scale + rng.random() * (room - (right - left))
        pen.text((x - left, y - top), line, font=font, fill=ink)
        y += bottom - top + _MARGIN * scale
    return picture, "\n".join(lines)


def _line(rng: Random) -> str:
    if rng.random() < 0.4:
        digits = 1 + int(4 * rng.random())
        return str(int(10 ** (digits - 1) * (1 + 9 * rng.random())))
    word = WORDS[int(rng.random() * len(WORDS))]
    kind = int(3 * rng.random())
    return (word, word.upper(), word.capitalize())[kind]


@lru_cache(maxsize=512)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_fonts() / f"{name}.ttf"), size)


@lru_cache(maxsize=1)
def _fonts() -> Path:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "writing needs the fonts of the package `matplotlib`: pip install matplotlib, "
            "or install this package's `train` extra"
        ) from error
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"
