"""Reading, writing and drawing objects in text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
from PIL import Image, ImageChops

from pg_kernels.model.locations import Detection, draw, format_boxes, parse, run_lengths
from pg_kernels.model.segmentation import MaskVQVAE, paste

FIXTURES = Path(__file__).parents[1] / "fixtures"
SEG = "".join(f"<seg{n:03d}>" for n in range(0, 128, 8))


def test_parse_boxes() -> None:
    text = "<loc0000><loc0341><loc1023><loc0682> cat ; <loc0100><loc0000><loc0200><loc1023> brown dog"
    cat, dog = parse(text, (300, 1023))
    assert (cat.label, dog.label) == ("cat", "brown dog")
    np.testing.assert_allclose(cat.box, (100, 0, 200, 1023))
    np.testing.assert_allclose(dog.box, (0, 100, 300, 200))
    assert cat.mask is None and dog.mask is None


def test_parse_with_the_demos_scale() -> None:
    (detection,) = parse("<loc0256><loc0512><loc0512><loc0768> x", (1024, 512), scale=1024)
    assert detection.box == (512, 128, 768, 256)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no objects",
        "<loc0001><loc0002><loc0003> cat",
        "<loc0001><loc0002><loc0003><loc0004><loc0005> cat",
        "<loc0005><loc0002><loc0005><loc0004> flat",
        "<loc0001><loc0004><loc0005><loc0002> mirrored",
        "<loc1024><loc0000><loc1500><loc0010> beyond",
        "<loc0001><loc0002><loc0003><loc0004>" + "<seg000>" * 15 + " short",
        "<loc0001><loc0002><loc0003><loc0004>" + "<seg000>" * 17 + " long",
        "<loc0001><loc0002><loc0003><loc0004>" + "<seg128>" * 16 + " beyond",
        "<seg000><loc0001><loc0002><loc0003><loc0004> order",
    ],
)
def test_malformed_objects_are_left_out(text: str) -> None:
    assert parse(text, (10, 10)) == []
    good = "<loc0000><loc0000><loc1023><loc1023> good"
    for joined in (f"{text} ; {good}", f"{good} ; {text}", f"{text};{good}\n"):
        assert [detection.label for detection in parse(joined, (10, 10))] == ["good"]


CAT, DOG, OWL = ("".join(f"<loc{n:04d}>" for n in box) for box in ((0, 0, 9, 9), (1, 2, 30, 40), (5, 6, 7, 1023)))


@pytest.mark.parametrize(
    "before", ["", "detect cat ; dog\n", "segment cat\n", "Here, the cat: ", "<loc0001> is no box "]
)
@pytest.mark.parametrize("separator", [" ; ", ";", "\n", ", ", ",", "", " ", " ,\n", ";\n\n"])
@pytest.mark.parametrize("codes", ["", SEG, f" {SEG}"])
def test_every_object_is_found(before: str, separator: str, codes: str) -> None:
    """Objects are found wherever big_vision's demo or the supervision package finds them."""
    text = before + separator.join((f"{CAT}{codes} cat", f"{DOG} brown dog", f"{OWL}{codes} t-shirt"))
    found = [(thing.label, thing.box) for thing in parse(text, (1023, 1023))]
    assert found == [("cat", (0, 0, 9, 9)), ("brown dog", (2, 1, 40, 30)), ("t-shirt", (6, 5, 1023, 7))]


def test_objects_without_labels_in_a_row() -> None:
    found = parse(f"{CAT}{DOG}{SEG}{OWL} t-shirt, black, ", (1023, 1023))
    assert [(thing.label, thing.box[0]) for thing in found] == [("", 0), ("", 2), ("t-shirt, black", 6)]


def test_labels_may_be_absent_or_repeated() -> None:
    box = "<loc0000><loc0000><loc1023><loc1023>"
    assert [d.label for d in parse(f"{box} ; {box} a ; {box} a", (4, 4))] == ["", "a", "a"]


def test_parse_masks() -> None:
    decoder = MaskVQVAE.from_file(FIXTURES / "seg_vae.params.npz")
    text = f"<loc0100><loc0200><loc0900><loc0800>{SEG} cat ; <loc0000><loc0000><loc0500><loc0500> dog"
    cat, dog = parse(text, (120, 80), mask_decoder=decoder)
    codes = np.arange(0, 128, 8)[None]
    assert cat.mask is not None and cat.mask.shape == (80, 120) and cat.mask.dtype == bool
    assert np.array_equal(cat.mask, paste(decoder.decode(codes)[0], cat.box, (120, 80)))
    assert dog.mask is None
    assert parse(text, (120, 80))[0].mask is None


def test_format_is_the_inverse_of_parse() -> None:
    text = "<loc0012><loc0345><loc0678><loc0901> cat ; <loc0000><loc0000><loc1023><loc1023> a brown dog"
    for size in ((640, 480), (7, 1000), (1023, 1023)):
        assert format_boxes(parse(text, size), size) == text
    assert format_boxes(parse(text, (640, 480), scale=1024), (640, 480), scale=1024) == text
    assert format_boxes([], (5, 5)) == ""


def test_format_cuts_boxes_at_the_image() -> None:
    outside = Detection("x", (-10.0, -10.0, 200.0, 60.0))
    assert format_boxes([outside], (100, 100)) == "<loc0000><loc0000><loc0614><loc1023> x"


class FakeEncoder:
    def encode(self, mask: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
        assert mask.shape == (8, 8) and box == (0.0, 0.0, 8.0, 8.0)
        return np.arange(0, 128, 8)


def test_format_writes_masks_only_with_an_encoder() -> None:
    detection = Detection("cat", (0.0, 0.0, 8.0, 8.0), np.ones((8, 8), bool))
    box = "<loc0000><loc0000><loc1023><loc1023>"
    assert format_boxes([detection], (8, 8)) == f"{box} cat"
    assert format_boxes([detection], (8, 8), mask_encoder=FakeEncoder()) == f"{box}{SEG} cat"  # type: ignore[arg-type]


def test_what_would_not_be_read_back_is_refused() -> None:
    for label in ("a ; b", "a<b", "a\nb", "a,", ", a"):
        with pytest.raises(ValueError, match=r"objects\[0\]: label"):
            format_boxes([Detection(label, (0, 0, 1, 1))], (4, 4))
    for box in ((2, 0, 2, 4), (0, 3, 4, 1), (5, 0, 9, 4)):
        with pytest.raises(ValueError, match="no area"):
            format_boxes([Detection("a", box)], (4, 4))
    for size, scale in (((0, 5), 1023), ((5, 5), 0), ((5, 5), float("nan")), ((5, 10**400), 1023)):
        with pytest.raises(ValueError, match="positive"):
            parse("", size, scale=scale)
        with pytest.raises(ValueError, match="positive"):
            format_boxes([], size, scale=scale)
    for size in ((5.5, 5), (5,), 5, ("5", 5)):
        with pytest.raises(TypeError, match="size: width and height"):
            parse("", size)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="text: a string"):
        parse(None, (5, 5))  # type: ignore[arg-type]
    for edge in (float("nan"), float("inf"), -float("inf")):
        detection = Detection("a", (0, 0, edge, 4))
        with pytest.raises(ValueError, match=r"objects\[0\]: box .* is not four finite numbers"):
            format_boxes([detection], (5, 5))
        with pytest.raises(ValueError, match=r"detections\[0\]: box .* is not four finite numbers"):
            draw(Image.new("RGB", (5, 5)), [detection])


def test_draw_box_mask_and_label() -> None:
    image = Image.new("RGB", (300, 200), (128, 128, 128))
    before = image.copy()
    mask = np.zeros((200, 300), bool)
    mask[120:140, 120:160] = True
    detection = Detection("cat", (100.0, 90.0, 200.0, 160.0), mask)
    result = draw(image, [detection])
    assert result.mode == "RGB" and result.size == image.size
    assert ImageChops.difference(image, before).getbbox() is None
    pixels = np.asarray(result)
    colour = pixels[160, 150]
    assert (pixels[90:161, 100] == colour).all() and (pixels[160, 100:201] == colour).all()
    expected = np.round(0.55 * 128 + 0.45 * colour.astype(float))
    assert (pixels[121:139, 121:159] == expected).all()
    contour = np.concatenate([pixels[[120, 139], 120:160].reshape(-1, 3), pixels[120:140, [120, 159]].reshape(-1, 3)])
    assert (contour == colour).all()
    assert (pixels[110, 110] == 128).all() and (pixels[170, 150] == 128).all()
    tag = pixels[60:90, 100:130].reshape(-1, 3)
    assert (tag == colour).all(1).any() and ((tag < 60).all(1) | (tag > 240).all(1)).any()


def test_a_tag_goes_below_a_box_at_the_upper_edge() -> None:
    box = (20, 2, 120, 90)
    labelled, bare = (np.asarray(draw(Image.new("RGB", (200, 200)), [Detection(label, box)])) for label in ("cat", ""))
    drawn = (labelled != 0).any(-1)
    assert np.array_equal(drawn[:91], (bare != 0).any(-1)[:91])
    assert drawn[91:].any()


def test_tags_do_not_cover_each_other() -> None:
    upper, lower = Detection("cat", (20, 0, 120, 60)), Detection("dog", (20, 76, 120, 140))
    both = np.asarray(draw(Image.new("RGB", (200, 200)), [lower, upper]))
    alone = np.asarray(draw(Image.new("RGB", (200, 200)), [lower]))
    assert np.array_equal(both[62:], alone[62:])  # neither above nor below its box is room for the upper one's tag


def test_draw_tells_labels_apart() -> None:
    labels = ["cat", "dog", "person", "car", "tree", "house"]
    detections = [Detection(label, (4, 50 * i + 20, 60, 50 * i + 50)) for i, label in enumerate([*labels, *labels])]
    image = draw(Image.new("RGB", (64, 640)), detections)
    colours = [image.getpixel((30, 50 * i + 50)) for i in range(12)]
    assert len(set(colours[:6])) == 6 and colours[:6] == colours[6:]
    alone = draw(Image.new("RGB", (64, 64)), [Detection("cat", (4, 20, 60, 50))])
    assert alone.getpixel((30, 50)) == colours[0]
    many = [Detection(str(i), (4, 20, 60, 50)) for i in range(40)]
    assert draw(Image.new("RGB", (64, 64)), many).size == (64, 64)


@pytest.mark.parametrize("size", [(1, 1), (5, 400), (400, 5), (2000, 1500)])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_draw_any_size_mode_and_label(size: tuple[int, int], mode: str) -> None:
    width, height = size
    boxes = [(0, 0, width, height), (-5, -5, width * 2, height * 2), (width * 0.9, height * 0.9, width, height)]
    detections = [Detection(label, box) for box in boxes for label in ("", "日本語 naïve", "a very long label " * 8)]
    result = draw(Image.new(mode, size), detections)
    assert result.mode == "RGB" and result.size == size


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"detections\[0\]: mask \(4, 5\), expected \(5, 4\)"):
        draw(Image.new("RGB", (4, 5)), [Detection("a", (0, 0, 1, 1), np.zeros((4, 5), bool))])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_run_lengths_are_those_of_coco(share: float) -> None:
    for seed in range(8):
        mask = np.random.default_rng(seed).random((5, 7)) < share
        lengths = run_lengths(mask)
        assert sum(lengths["counts"]) == 35 and min(lengths["counts"][1:], default=1) > 0
        assert np.array_equal(pycocotools.mask.decode(pycocotools.mask.frPyObjects(lengths, 5, 7)), mask)
