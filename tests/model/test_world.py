"""The world of emoji pictures, and the tokenizer trained on its names."""

from __future__ import annotations

import random
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pg_kernels.model.embedded.tasks import caption
from pg_kernels.model.embedded.vocabulary import NUM_TEXT_PIECES, train_tokenizer
from pg_kernels.model.embedded.world import COLOURS as COLOUR_NAMES
from pg_kernels.model.embedded.world import EMOJI, FONT_PATH, UNSEEN_SIZES, Picture, World, names, render_glyphs
from pg_kernels.model.tokenizer import IMAGE_TOKEN, LOC_TOKENS, SEG_TOKENS, Tokenizer

needs_emoji = pytest.mark.skipif(find_spec("emoji") is None, reason="needs the package emoji (extra: train)")
needs_font = pytest.mark.skipif(not Path(FONT_PATH).is_file(), reason="needs Debian's fonts-noto-color-emoji")
needs_protobuf = pytest.mark.skipif(
    find_spec("google") is None or find_spec("google.protobuf") is None,
    reason="needs the package protobuf (extra: train)",
)

COLOURS = {
    **{"red box": (255, 0, 0), "orb": (0, 200, 0), "blue cross": (0, 0, 255), "umber slash": (120, 70, 0)},
    **{"pink bar": (255, 0, 255), "teal bar": (0, 255, 255)},
}


def _shape(*rectangles: tuple[int, int, int, int], colour: tuple[int, int, int], round: bool = False) -> Image.Image:
    image = Image.new("RGBA", (128, 128))
    draw = ImageDraw.Draw(image)
    for rectangle in rectangles:
        (draw.ellipse if round else draw.rectangle)(rectangle, fill=(*colour, 255))
    return image


@pytest.fixture(scope="module")
def world() -> World:
    """Return a world of plain shapes. Each is off its image's centre and of one colour, so that pixels tell them apart."""
    slash = Image.new("RGBA", (128, 128))
    ImageDraw.Draw(slash).line((110, 20, 30, 100), fill=(*COLOURS["umber slash"], 255), width=20)
    return World(
        glyphs={
            "red box": _shape((5, 10, 94, 69), colour=COLOURS["red box"]),
            "orb": _shape((20, 0, 109, 119), colour=COLOURS["orb"], round=True),
            "blue cross": _shape((40, 0, 70, 99), (10, 30, 109, 60), colour=COLOURS["blue cross"]),
            "umber slash": slash,
            "pink bar": _shape((10, 50, 118, 79), colour=COLOURS["pink bar"]),
            "teal bar": _shape((50, 3, 89, 118), colour=COLOURS["teal bar"]),
        }
    )


def _scenes(world: World, count: int, image_size: int = 224) -> list[Picture]:
    rng = random.Random(0)
    return [world.scene(rng, image_size) for _ in range(count)]


def _bounds_of_colour(image: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    distance = np.linalg.norm(np.asarray(image, dtype=float) - colour, axis=-1)
    box = Image.fromarray(distance < 45).getbbox()
    assert box is not None
    return box


@pytest.mark.parametrize("image_size, tolerance", [(112, 2), (448, 3)])
def test_boxes_are_tight(world: World, image_size: int, tolerance: int) -> None:
    for picture in _scenes(world, 100, image_size):
        for found in picture.objects:
            drawn = _bounds_of_colour(picture.image, COLOURS[found.label])
            assert np.abs(np.subtract(drawn, found.box)).max() <= tolerance
            x1, y1, x2, y2 = found.box
            assert x1 <= drawn[0] and y1 <= drawn[1] and x2 >= drawn[2] and y2 >= drawn[3]


def test_masks_are_what_is_drawn(world: World) -> None:
    for picture in _scenes(world, 60):
        for found in picture.objects:
            assert found.mask is not None and found.mask.shape == (224, 224)
            assert Image.fromarray(found.mask).getbbox() == found.box
            distance = np.linalg.norm(np.asarray(picture.image, dtype=float) - COLOURS[found.label], axis=-1)
            drawn = distance < 90
            assert (drawn & found.mask).sum() / (drawn | found.mask).sum() > 0.9


def test_turned_shapes_are_whole(world: World) -> None:
    def area_in_square_diagonals(image: Image.Image) -> float:
        distance = np.linalg.norm(np.asarray(image, dtype=float) - COLOURS["umber slash"], axis=-1)
        x1, y1, x2, y2 = _bounds_of_colour(image, COLOURS["umber slash"])
        return int((distance < 45).sum()) / ((x2 - x1) ** 2 + (y2 - y1) ** 2)

    upright = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(upright).line((110, 20, 30, 100), fill=COLOURS["umber slash"], width=20)
    expected = area_in_square_diagonals(upright)
    pictures = [world.scene_with(random.Random(seed), 448, ["umber slash", "orb"]) for seed in range(20)]
    for picture in pictures:
        assert area_in_square_diagonals(picture.image) == pytest.approx(expected, rel=0.1)


def test_geometry(world: World) -> None:
    counts = {1: 0, 2: 0, 3: 0}
    for picture in _scenes(world, 200):
        counts[len(picture.objects)] += 1
        assert picture.image.mode == "RGB" and picture.image.size == (224, 224)
        smallest, largest = {1: (72, 168), 2: (68, 112), 3: (56, 84)}[len(picture.objects)]
        for found in picture.objects:
            x1, y1, x2, y2 = found.box
            assert 0 <= x1 < x2 <= 224 and 0 <= y1 < y2 <= 224
            assert smallest - 2 <= max(x2 - x1, y2 - y1) <= largest + 2
        for first, second in pairwise(picture.objects):
            a, b = first.box, second.box
            assert first.label != second.label
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert (b[0] + b[2]) / 2 - (a[0] + a[2]) / 2 >= 18
    assert min(counts.values()) >= 40


def test_held_out_pictures_are_never_drawn_otherwise(world: World) -> None:
    rng = random.Random(1)
    pictures = [*(world.scene(rng, 224) for _ in range(300)), *(world.crowd(rng, 224) for _ in range(100))]
    seen = {frozenset(found.label for found in picture.objects) for picture in pictures}
    sizes = [
        max(found.box[2] - found.box[0], found.box[3] - found.box[1])
        for picture in pictures
        for found in picture.objects
    ]
    low, high = UNSEEN_SIZES
    assert not [size for size in sizes if low + 2.5 < size < high - 2.5]  # rounding to whole pixels moves edges
    for _ in range(50):
        picture = world.scene(rng, 224, held_out=True)
        names = frozenset(found.label for found in picture.objects)
        assert len(names) == 2 and not any(names <= other for other in seen)
        for found in picture.objects:
            assert low - 2 <= max(found.box[2] - found.box[0], found.box[3] - found.box[1]) <= high + 2


def test_crowds(world: World) -> None:
    rng = random.Random(0)
    numbers = set()
    for _ in range(150):
        labels = [found.label for found in world.crowd(rng, 224).objects]
        assert 1 <= len(set(labels)) <= 2 and len(labels) <= 8
        numbers.add(max(map(labels.count, labels)))
    assert numbers == {1, 2, 3, 4, 5, 6}


def test_named_backgrounds_are_of_their_colour(world: World) -> None:
    named = [picture for picture in _scenes(world, 200) if picture.background is not None]
    assert 40 <= len(named) <= 100
    for picture in named:
        x, y = next((x, y) for x in range(224) for y in range(224) if not any(o.mask[y, x] for o in picture.objects))
        assert np.abs(np.subtract(picture.image.getpixel((x, y)), COLOUR_NAMES[picture.background])).max() <= 11


def test_larger_pictures_show_the_same_scene(world: World) -> None:
    for small, large in zip(_scenes(world, 40, 112), _scenes(world, 40, 448), strict=True):
        assert large.image.size == (448, 448)
        for one, other in zip(small.objects, large.objects, strict=True):
            assert one.label == other.label
            assert np.abs(np.subtract(other.box, np.multiply(one.box, 4))).max() <= 6
        difference = np.asarray(large.image.resize((112, 112), Image.Resampling.BOX), dtype=float) - small.image
        assert np.abs(difference).mean() < 6


@pytest.mark.parametrize("source", [random.Random, np.random.default_rng])
def test_same_seed_same_bytes(world: World, source: type) -> None:
    def draw(seed: int) -> list[bytes]:
        rng = source(seed)
        return [draw(rng, 112).image.tobytes() for draw in (world.scene, world.crowd) for _ in range(10)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    box = _shape((5, 10, 94, 69), colour=(255, 0, 0))
    world = World(glyphs={name: box for name in "abcde"})
    with pytest.raises(ValueError, match="image_size must be at least 112 pixels, got 64"):
        world.scene(random.Random(0), 64)
    with pytest.raises(ValueError, match="count: expected 1, 2 or 3"):
        world.scene(random.Random(0), 224, count=4)
    with pytest.raises(ValueError, match="names of the world, got .'f'."):
        world.scene_with(random.Random(0), 224, ["f"])
    with pytest.raises(ValueError, match="glyphs must hold at least 5 images, got 1"):
        World(glyphs={"a": box})
    with pytest.raises(ValueError, match="'b' is transparent"):
        World(glyphs={**{name: box for name in "acde"}, "b": Image.new("RGBA", (9, 9))})
    with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
        World(font_path=tmp_path / "missing.ttf")


@needs_emoji
def test_names_are_plain_and_unique() -> None:
    english = names()
    assert list(english) == list(EMOJI) and len(english) == 80
    assert len(set(english.values())) == 80
    assert english["🐶"] == "dog face" and english["🍎"] == "red apple"
    assert all(name and not set(name) & set(":_<>;\n") for name in english.values())
    assert names("es")["🐶"] == "cara de perro"
    with pytest.raises(ValueError, match="language must be one of .*en.*, got 'xx'"):
        names("xx")


@needs_emoji
@needs_font
def test_every_emoji_has_its_own_picture() -> None:
    glyphs = render_glyphs()
    assert list(glyphs) == list(names().values())
    small = [np.asarray(glyph.resize((28, 28)), dtype=float) / 255 for glyph in glyphs.values()]
    premultiplied = np.stack([image[..., :3] * image[..., 3:] + 1 - image[..., 3:] for image in small]).reshape(80, -1)
    distances = np.sqrt(((premultiplied[:, None] - premultiplied[None]) ** 2).mean(axis=-1))
    assert distances[~np.eye(80, dtype=bool)].min() > 0.15
    picture = World().scene(random.Random(0), 224)
    assert all(found.label in glyphs for found in picture.objects)


@needs_emoji
@needs_protobuf
def test_tokenizer(tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "first.model")
    train_tokenizer(tmp_path / "second.model")
    data = (tmp_path / "first.model").read_bytes()
    assert data == (tmp_path / "second.model").read_bytes() and len(data) < 60_000
    assert len(list(tmp_path.iterdir())) == 2

    tokenizer = Tokenizer.from_file(tmp_path / "first.model")
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "\n"]
    added = [*LOC_TOKENS, *SEG_TOKENS, IMAGE_TOKEN]
    assert len(tokenizer) == NUM_TEXT_PIECES + len(added)
    assert [tokenizer.piece(index) for index in range(5)] == [None, None, None, None, "\n"]
    assert [tokenizer.encode(piece) for piece in pieces] == [[0], [1], [2], [3], [4]]
    assert [tokenizer.encode(piece) for piece in added] == [[NUM_TEXT_PIECES + index] for index in range(len(added))]

    # English names are whole words wherever a task writes them. Everything else still round-trips.
    for name in names().values():
        words = 1 + name.count(" ")
        assert len(tokenizer.encode(f"detect {name}\n")) == words + 2
        assert len(tokenizer.encode(f"<loc0001><loc0002><loc0003><loc1023> {name}")) == words + 4
        assert len(tokenizer.encode(caption([name, name]))) == 2 * words + 3
    for text in ("answer en how many 12 objects?\n", "yes", "left", "  Ünïcode 😀\n", "a ; b", "<loc1023><seg127> x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("2024")) == 4
