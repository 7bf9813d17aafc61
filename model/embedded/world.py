"""A small world to train a small PaliGemma on: pictures of up to seven emoji, with the box and mask of each emoji."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..locations import Detection

FONT_PATH = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # the only bitmap size in Noto Color Emoji

# Everyday things that remain distinguishable at 28 px. All are countable and singular, so "a NAME" is English.
EMOJI = (
    "🐶🐱🦊🐻🐼🐷🐸🐵🐧🦁🐘🐢🐍🐙🦀🐠🦋🐞🐝🐌🦉🦄🦒🦓🐬🦩🐰"  # animals
    "🍎🍌🍉🍓🍍🍋🍆🥕🌽🥑🍄🍔🍕🍩"  # food
    "🚗🚌🚲🚀🚁⛵🚂"  # vehicles
    "☂🎈🎁🔑🎸📷💡📺🔨🎩👑👟💎🧲📕🏠🏰"  # things
    "🎄🌵🌻🍀🌈⭐🔥🌙"  # nature
    "⚽🏀💀👻🤖⚓❤"  # symbols and toys
)

# The names of single-colour backgrounds.
COLOURS = {
    "red": (214, 48, 49),
    "orange": (242, 145, 40),
    "yellow": (247, 230, 90),
    "green": (70, 170, 85),
    "blue": (60, 110, 205),
    "purple": (140, 75, 175),
    "pink": (250, 165, 205),
    "brown": (130, 85, 50),
    "black": (25, 25, 25),
    "gray": (150, 150, 150),
    "white": (248, 248, 248),
}

Box = tuple[int, int, int, int]

_UNIT = 224  # picture width in pixels that the lengths below refer to; they scale with the picture
_SMALLEST_PICTURE = 112
_SIZES = {1: (72.0, 168.0), 2: (68.0, 112.0), 3: (56.0, 84.0)}  # pixels, by number of emoji
_COUNTS = (1, 1, 1, 2, 2, 2, 2, 3, 3, 3)
_CROWD_SIZES = (44.0, 62.0)
_LARGEST_CROWD = 6
UNSEEN_SIZES = (76.0, 82.0)  # pixels; drawn only in held-out pictures
_MAX_ROTATION = 10.0  # degrees
_MIN_GAP = 4  # pixels between boxes; rounding to whole pixels takes less, so boxes never overlap
_MIN_CENTRE_DISTANCE = 20  # pixels, horizontally: which of two emoji is left of the other is unambiguous
_MIN_COLOUR_DISTANCE = 90.0  # RGB distance between the background and an emoji's mean colour
_VISIBLE = 64  # alpha (of 255) below which a pixel is invisible and does not count for the box
_REDUCTIONS = (1, 2, 3, 4, 6)  # emoji are stored divided by these factors


class Random(Protocol):
    """A random source: `random.Random` and `numpy.random.Generator` both satisfy it."""

    def random(self) -> float:
        """Return a number in [0, 1)."""
        ...


@dataclass(frozen=True)
class Picture:
    """A square RGB image and its contents.

    `objects`: name, box in whole pixels and mask of each emoji, from left to right by box centre.
    `background`: a key of `COLOURS` if the background has one colour, else None.
    """

    image: Image.Image
    objects: list[Detection]
    background: str | None = None


@dataclass(frozen=True)
class _Glyph:
    name: str
    levels: dict[int, Image.Image]  # by reduction; premultiplied alpha (RGBa), so that resampling leaves no dark fringe
    outline: np.ndarray  # [2,n] corners of the visible part, in full-size pixels from the centre
    colour: np.ndarray  # [3] mean RGB


@dataclass(frozen=True)
class _Pose:
    """Rotation and scale of an outline, and the size of its rotated bounding box."""

    cos: float
    sin: float
    scale: float  # units per full-size pixel
    corner: tuple[float, float]  # top left of the rotated outline, in units from the centre
    extent: tuple[float, float]  # width and height in units


def names(language: str = "en") -> dict[str, str]:
    """Return the Unicode name of every emoji of the world, such as "dog face", in one language.

    `language`: "en", "es", "fr", "de", "pt", "it" or another that the `emoji` package has (`emoji.LANGUAGES`).
    Raises ModuleNotFoundError without that package, ValueError for a language it does not have.
    """
    try:
        import emoji
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "emoji names need the package `emoji`: pip install emoji, or install this package's `train` extra"
        ) from error
    if language not in emoji.LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(emoji.LANGUAGES)}, got {language!r}")
    return {
        symbol: emoji.demojize(symbol, language=language, delimiters=("", "")).replace("_", " ").strip()
        for symbol in EMOJI
    }


def render_glyphs(font_path: str | Path = FONT_PATH) -> dict[str, Image.Image]:
    """Draw every emoji of the world with a colour font: {English name: RGBA image cropped to its visible part}.

    Raises FileNotFoundError if there is no font at `font_path`, ValueError if the font lacks an emoji.
    """
    if not Path(font_path).is_file():
        raise FileNotFoundError(
            f"no colour emoji font at {font_path}: install Debian's package fonts-noto-color-emoji, "
            "or give font_path the place of NotoColorEmoji.ttf"
        )
    font = ImageFont.truetype(str(font_path), FONT_SIZE)
    glyphs = {}
    for symbol, name in names().items():
        canvas = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE))
        ImageDraw.Draw(canvas).text((10, 10), symbol, font=font, embedded_color=True)
        box = canvas.getchannel("A").getbbox()
        if box is None:
            raise ValueError(f"font_path: {font_path} has no picture of {symbol} ({name})")
        glyphs[name] = canvas.crop(box)
    return glyphs


class World:
    """Makes pictures of emoji on simple backgrounds.

    `font_path`: a colour emoji font, by default where Debian's fonts-noto-color-emoji puts it.
    `glyphs`: {name: RGBA image} to use in place of the font's emoji; at least five.
    The same random source in the same state gives the same bytes. Raises FileNotFoundError without the font,
    ModuleNotFoundError without the package `emoji`; neither is needed when `glyphs` is given.
    """

    def __init__(self, font_path: str | Path = FONT_PATH, glyphs: Mapping[str, Image.Image] | None = None) -> None:
        if glyphs is None:
            glyphs = render_glyphs(font_path)
        if len(glyphs) < 5:  # with fewer emoji, no three could meet
            raise ValueError(f"glyphs must hold at least 5 images, got {len(glyphs)}")
        self._glyphs = [_prepare(name, image) for name, image in glyphs.items()]
        self.names = [glyph.name for glyph in self._glyphs]

    def scene(self, rng: Random, image_size: int, *, count: int | None = None, held_out: bool = False) -> Picture:
        """Draw one to three different emoji, each as likely, of random size, tilt and place.

        Args:
            image_size: side of the picture in pixels, at least 112.
            count: how many; default: mostly two.
            held_out: draw what the other pictures never show: two emoji that never meet there, of sizes within `UNSEEN_SIZES`
                (pixels of 224).

        Raises:
            ValueError: an image_size that is too small, or a count that is none of these.
        """
        if count is None:
            count = 2 if held_out else _COUNTS[int(rng.random() * len(_COUNTS))]
        if count not in ({2} if held_out else _SIZES):
            raise ValueError(f"count: expected 1, 2 or 3, and 2 where held_out, got {count}")
        chosen = self._choose(rng, count, held_out)
        return self._draw(rng, image_size, chosen, _SIZES[count], held_out, ordered=True)

    def scene_with(self, rng: Random, image_size: int, wanted: Sequence[str]) -> Picture:
        """Draw one to three given emoji that meet, as `scene` does; ValueError for names that the world lacks."""
        unknown = set(wanted) - set(self.names)
        if unknown or len(wanted) not in _SIZES:
            raise ValueError(f"wanted: expected one to three names of the world, got {list(wanted)}")
        chosen = [self._glyphs[self.names.index(name)] for name in wanted]
        return self._draw(rng, image_size, chosen, _SIZES[len(wanted)], held_out=False, ordered=True)

    def choose(self, rng: Random, count: int) -> list[str]:
        """Draw the names of different emoji that may appear in one picture."""
        return [glyph.name for glyph in self._choose(rng, count, held_out=False)]

    def crowd(self, rng: Random, image_size: int) -> Picture:
        """Draw one emoji one to six times, and sometimes another one once or twice."""
        several, other = self._choose(rng, 2, held_out=False)
        others = int(rng.random() * 3) if rng.random() < 0.5 else 0
        chosen = [several] * (1 + int(rng.random() * _LARGEST_CROWD)) + [other] * others
        return self._draw(rng, image_size, chosen, _CROWD_SIZES, held_out=False, ordered=False)

    def _draw(
        self, rng: Random, size: int, chosen: list[_Glyph], sizes: tuple[float, float], held_out: bool, ordered: bool
    ) -> Picture:
        _check_size(size)
        while True:
            poses = [
                _pose(glyph, _uniform(rng, -_MAX_ROTATION, _MAX_ROTATION), _size(rng, sizes, held_out))
                for glyph in chosen
            ]
            places = _place(rng, [pose.extent for pose in poses], _MIN_CENTRE_DISTANCE if ordered else 0)
            if places is not None:
                break
        picture, name = background(rng, size, [glyph.colour for glyph in chosen])
        objects = [
            _paste(picture, glyph, pose, place) for glyph, pose, place in zip(chosen, poses, places, strict=True)
        ]
        objects.sort(key=lambda found: found.box[0] + found.box[2])
        return Picture(picture, objects, name)

    def _choose(self, rng: Random, count: int, held_out: bool) -> list[_Glyph]:
        """Draw different emoji. Any two of them meet in training, or, with `held_out`, in held-out pictures only."""
        while True:
            chosen: list[int] = []
            while len(chosen) < count:
                index = int(rng.random() * len(self._glyphs))
                if index not in chosen:
                    chosen.append(index)
            pairs = [(a, b) for position, a in enumerate(chosen) for b in chosen[:position]]
            if all(_never_meet(a, b) == held_out for a, b in pairs):
                return [self._glyphs[index] for index in chosen]


def _never_meet(a: int, b: int) -> bool:
    """Return whether two emoji never share a training picture. Each emoji is kept apart from a tenth of the others."""
    return (a + b) % 10 == 3


def _size(rng: Random, sizes: tuple[float, float], held_out: bool) -> float:
    if held_out:
        return _uniform(rng, *UNSEEN_SIZES)
    while True:
        size = _uniform(rng, *sizes)
        if not UNSEEN_SIZES[0] <= size <= UNSEEN_SIZES[1]:
            return size


def _check_size(image_size: int) -> None:
    if image_size < _SMALLEST_PICTURE:
        raise ValueError(f"image_size must be at least {_SMALLEST_PICTURE} pixels, got {image_size}")


def _uniform(rng: Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _prepare(name: str, image: Image.Image) -> _Glyph:
    rgba = image.convert("RGBA")
    visible = np.asarray(rgba.getchannel("A")) >= _VISIBLE
    rows = np.flatnonzero(visible.any(axis=1))
    if not rows.size:
        raise ValueError(f"glyphs: the image of {name!r} is transparent")
    # A border as wide as the largest reduction keeps the outermost pixels of every level clear.
    multiple, border = math.lcm(*_REDUCTIONS), max(_REDUCTIONS)
    side = math.ceil((max(rgba.size) + 2 * border) / multiple) * multiple
    left, top = (side - rgba.width) // 2, (side - rgba.height) // 2
    canvas = Image.new("RGBa", (side, side))
    canvas.paste(rgba.convert("RGBa"), (left, top))
    starts = visible[rows].argmax(axis=1)
    ends = visible.shape[1] - visible[rows, ::-1].argmax(axis=1)
    x = np.concatenate([starts, starts, ends, ends]) + (left - side / 2)
    y = np.concatenate([rows, rows + 1, rows, rows + 1]) + (top - side / 2)
    pixels = np.asarray(rgba, dtype=np.float64).reshape(-1, 4)
    return _Glyph(
        name=name,
        levels={reduction: canvas.reduce(reduction) for reduction in _REDUCTIONS},
        outline=np.stack([x, y]),
        colour=np.average(pixels[:, :3], axis=0, weights=pixels[:, 3]),
    )


def _pose(glyph: _Glyph, degrees: float, larger_side: float) -> _Pose:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turned = np.array([[cos, -sin], [sin, cos]]) @ glyph.outline
    (left, top), (right, bottom) = turned.min(axis=1).tolist(), turned.max(axis=1).tolist()
    scale = larger_side / max(right - left, bottom - top)
    return _Pose(cos, sin, scale, (left * scale, top * scale), ((right - left) * scale, (bottom - top) * scale))


def _place(rng: Random, extents: list[tuple[float, float]], centre_distance: float) -> list[tuple[float, float]] | None:
    """Place the emoji one by one. Return their top left corners in units, or None if there was no room."""
    places: list[tuple[float, float]] = []
    for index, (width, height) in enumerate(extents):
        for _ in range(40):
            place = (_uniform(rng, 0, _UNIT - width), _uniform(rng, 0, _UNIT - height))
            if all(
                _apart((extents[index], extents[other]), (place, places[other]), centre_distance)
                for other in range(index)
            ):
                places.append(place)
                break
        else:
            return None
    return places


def _apart(
    extents: tuple[tuple[float, float], tuple[float, float]],
    places: tuple[tuple[float, float], tuple[float, float]],
    centre_distance: float,
) -> bool:
    ((w0, h0), (w1, h1)), ((x0, y0), (x1, y1)) = extents, places
    gap = max(x1 - x0 - w0, x0 - x1 - w1, y1 - y0 - h0, y0 - y1 - h1)
    return gap >= _MIN_GAP and abs((x0 + w0 / 2) - (x1 + w1 / 2)) >= centre_distance


def _paste(picture: Image.Image, glyph: _Glyph, pose: _Pose, place: tuple[float, float]) -> Detection:
    """Draw an emoji with its rotated top left corner at `place` (units). Return box and mask of its visible pixels."""
    pixels_per_unit = picture.width / _UNIT
    step = 1 / (pose.scale * pixels_per_unit)  # full-size pixels per pixel of the picture
    reduction = min(_REDUCTIONS, key=lambda reduction: abs(reduction - step))
    level = glyph.levels[reduction]
    # One extra pixel on every side for the antialiased edge.
    left, top = (max(0, math.floor(start * pixels_per_unit) - 1) for start in place)
    right, bottom = (
        min(picture.width, math.ceil((start + length) * pixels_per_unit) + 1)
        for start, length in zip(place, pose.extent, strict=True)
    )
    # Map pixels of the patch to pixels of the level, rotating about the emoji's centre.
    centre_x, centre_y = (
        (start - corner) * pixels_per_unit - offset
        for start, corner, offset in zip(place, pose.corner, (left, top), strict=True)
    )
    cos, sin = pose.cos * step / reduction, pose.sin * step / reduction
    patch = level.transform(
        (right - left, bottom - top),
        Image.Transform.AFFINE,
        (
            *(cos, sin, level.width / 2 - cos * centre_x - sin * centre_y),
            *(-sin, cos, level.height / 2 + sin * centre_x - cos * centre_y),
        ),
        Image.Resampling.BICUBIC,
    ).convert("RGBA")
    alpha = patch.getchannel("A")
    picture.paste(patch, (left, top), alpha)
    visible = np.asarray(alpha) >= _VISIBLE
    box = Image.fromarray(visible).getbbox() or (0, 0, right - left, bottom - top)
    mask = np.zeros((picture.height, picture.width), dtype=bool)
    mask[top:bottom, left:right] = visible
    return Detection(glyph.name, (left + box[0], top + box[1], left + box[2], top + box[3]), mask)


def background(rng: Random, size: int, avoid: list[np.ndarray]) -> tuple[Image.Image, str | None]:
    """Paint a background that contrasts with the mean colours `avoid`. Return its colour's name, too, or None."""
    kind = rng.random()
    if kind < 0.4 and (named := _named_colour(rng, avoid)):
        name, (red, green, blue) = named
        return Image.new("RGB", (size, size), (red, green, blue)), name
    if kind < 0.6:
        pattern, contrast = _gradient(rng, size), 90
    elif kind < 0.8:
        pattern, contrast = _noise(rng, size), 60
    else:
        pattern, contrast = (_stripes if kind < 0.9 else _checker)(rng, size), 30
    start, end = _colours(rng, avoid, contrast)
    ramp = np.linspace(start, end, 256).round().astype(np.uint8)
    return Image.fromarray(ramp.take(pattern, axis=0)), None


def _named_colour(rng: Random, avoid: list[np.ndarray]) -> tuple[str, tuple[int, int, int]] | None:
    """Return a slightly varied named colour, or None if every candidate would hide an emoji."""
    for _ in range(8):
        name = list(COLOURS)[int(rng.random() * len(COLOURS))]
        red, green, blue = (round(min(max(part + _uniform(rng, -10, 10), 0), 255)) for part in COLOURS[name])
        if all(np.linalg.norm(np.array([red, green, blue]) - colour) >= _MIN_COLOUR_DISTANCE for colour in avoid):
            return name, (red, green, blue)
    return None


def _colours(rng: Random, avoid: list[np.ndarray], contrast: float) -> tuple[np.ndarray, np.ndarray]:
    """Return two RGB colours, at most `contrast` apart per channel, that contrast with the colours `avoid`."""
    while True:
        whiteness = rng.random()
        start = np.array([255 - (255 * rng.random()) * whiteness for _ in range(3)])
        end = np.clip(start + [_uniform(rng, -contrast, contrast) for _ in range(3)], 0, 255)
        blend = np.stack([start, (start + end) / 2, end])
        if all(np.linalg.norm(blend - colour, axis=1).min() >= _MIN_COLOUR_DISTANCE for colour in avoid):
            return start, end


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the x [1,size] and y [size,1] of pixel centres, from 0 to 1."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    return centres[None, :], centres[:, None]


def _gradient(rng: Random, size: int) -> np.ndarray:
    x, y = _grid(size)
    angle = _uniform(rng, 0, 2 * math.pi)
    along = (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle)  # in ±sqrt(1/2)
    return (127.5 + 127.5 * math.sqrt(2) * along).astype(np.uint8)


def _noise(rng: Random, size: int) -> np.ndarray:
    cells = 3 + int(rng.random() * 6)
    values = np.array([255 * rng.random() for _ in range(cells * cells)]).reshape(cells, cells).astype(np.uint8)
    return np.asarray(Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC))


def _stripes(rng: Random, size: int) -> np.ndarray:
    x, y = _grid(size)
    angle, count = _uniform(rng, 0, math.pi), _uniform(rng, 4, 20)
    along = x * math.cos(angle) + y * math.sin(angle)
    return (np.floor(along * count).astype(np.int64) % 2 * 255).astype(np.uint8)


def _checker(rng: Random, size: int) -> np.ndarray:
    x, y = _grid(size)
    count = _uniform(rng, 4, 16)
    return ((np.floor(x * count) + np.floor(y * count)).astype(np.int64) % 2 * 255).astype(np.uint8)
