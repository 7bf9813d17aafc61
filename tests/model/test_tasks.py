"""Questions about pictures of a world of plain shapes: their wording and their answers."""

from __future__ import annotations

import random
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pg_kernels.model import EMBEDDED_CHECKPOINT
from pg_kernels.model.embedded.charts import LABELS, Charts
from pg_kernels.model.embedded.tasks import LANGUAGES, TASKS, Exercise, Questions, caption, plural, unique_images
from pg_kernels.model.embedded.world import Picture, World, names
from pg_kernels.model.embedded.writing import WORDS, written
from pg_kernels.model.locations import parse
from pg_kernels.model.segmentation import MaskVQVAE

NAMES = ("fox", "owl", "key", "bus", "star", "house")


@pytest.fixture(scope="module")
def questions() -> Questions:
    glyphs = {}
    for number, name in enumerate(NAMES):
        glyph = Image.new("RGBA", (96, 96))
        box = (4, 4, 60 + 5 * number, 90 - 8 * number)
        (ImageDraw.Draw(glyph).ellipse if number % 2 else ImageDraw.Draw(glyph).rectangle)(
            box, fill=((67 * number) % 256, (151 * number + 80) % 256, (211 * number) % 256, 255)
        )
        glyphs[name] = glyph
    translations = {language: {name: f"{name} {language}" for name in NAMES} for language in LANGUAGES}
    codec = MaskVQVAE.from_file(EMBEDDED_CHECKPOINT / "vae-oid.npz")
    return Questions(World(glyphs=glyphs), codec, translations)


@pytest.fixture(scope="module")
def scenes(questions: Questions) -> list[Picture]:
    rng = random.Random(0)
    return [questions.world.scene(rng, 224) for _ in range(150)]


@pytest.mark.parametrize(
    ("things", "language", "text"),
    [
        (["fox"], "en", "a fox"),
        (["dog face", "umbrella"], "en", "a dog face and an umbrella"),
        (["unicorn", "owl", "key"], "en", "a unicorn, an owl and a key"),
        (["Christmas tree", "ear of corn"], "en", "a Christmas tree and an ear of corn"),
        (["zorro", "llave"], "es", "zorro y llave"),
        (["fuchs", "eule", "haus"], "de", "fuchs, eule und haus"),
    ],
)
def test_caption(things: list[str], language: str, text: str) -> None:
    assert caption(things, language) == text


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("fox", "foxes"),
        ("bus", "buses"),
        ("key", "keys"),
        ("strawberry", "strawberries"),
        ("ear of corn", "ears of corn"),
    ],
)
def test_plural(one: str, many: str) -> None:
    assert plural(one) == many


def test_captions_name_what_is_there_in_every_language(questions: Questions, scenes: list[Picture]) -> None:
    for language in LANGUAGES:
        example = questions.caption(scenes[0], language)
        assert example.prefix == f"caption {language}" and example.language == language
        assert example.suffix == caption([f"{found.label} {language}" for found in scenes[0].objects], language)


def test_vqa_answers_are_true(questions: Questions, scenes: list[Picture]) -> None:
    """Each kind of question is answered a second time, from the boxes."""
    kinds: Counter[str] = Counter()
    for number, picture in enumerate(scenes * 3):
        example = questions.vqa(random.Random(number), picture)
        question = example.prefix.removeprefix("answer en ").removesuffix("?")
        boxes = {found.label: found.box for found in picture.objects}
        named = [name for name in NAMES if name in question.split()]
        middle = {name: ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for name, box in boxes.items()}
        answer = example.suffix
        kind = " ".join(word for word in question.split() if word not in (*NAMES, "a", "an"))
        kinds[kind] += 1
        if kind.startswith("is there"):
            assert answer == ("yes" if named[0] in boxes else "no")
        elif kind == "what is this":
            assert [answer] == list(boxes)
        elif kind == "what color is the background":
            assert answer == picture.background
        elif kind.startswith("what color is the"):
            assert (named[0], answer) in {("fox", "orange"), ("star", "yellow")}
        elif kind.startswith("where is the"):
            x, y = middle[named[0]]
            assert answer == f"{'top' if y < 112 else 'bottom'} {'left' if x < 112 else 'right'}"
        elif kind.startswith("which is larger"):
            extent = {name: max(box[2] - box[0], box[3] - box[1]) for name, box in boxes.items()}
            assert answer == max(named, key=extent.__getitem__)
        elif kind.endswith("to the left of the") and kind.startswith("is the"):
            first, second = sorted(named, key=question.split().index)
            assert answer == ("yes" if middle[first][0] < middle[second][0] else "no")
        else:
            axis = 0 if "left" in kind or "right" in kind else 1
            order = sorted(boxes, key=lambda name: middle[name][axis])
            if "left" not in kind and "top" not in kind and "above" not in kind:
                order.reverse()
            if named:  # nothing else lies further out
                assert order.index(named[0]) == 1
            assert answer == order[0]
    assert len(kinds) >= 14 and min(kinds.values()) >= 2, kinds


def test_counting(questions: Questions) -> None:
    rng = random.Random(0)
    answers: Counter[str] = Counter()
    for _ in range(150):
        picture = questions.world.crowd(rng, 224)
        example = questions.count(rng, picture)
        asked = next(name for name in NAMES if plural(name) in example.prefix.split())
        assert example.prefix == f"answer en how many {plural(asked)} are there?"
        assert example.suffix == str([found.label for found in picture.objects].count(asked))
        answers[example.suffix] += 1
    assert set(answers) == set("0123456")


def test_boxes_and_masks_come_back(questions: Questions, scenes: list[Picture]) -> None:
    rng = random.Random(0)
    several = 0
    for picture in scenes[:40]:
        boxes = questions.detect(rng, picture)
        found = parse(boxes.suffix, (224, 224))
        assert [thing.label for thing in found] == [thing.label for thing in boxes.objects]
        assert boxes.prefix == "detect " + " ; ".join(dict.fromkeys(thing.label for thing in found))
        for thing, wanted in zip(found, boxes.objects, strict=True):
            assert np.abs(np.subtract(thing.box, wanted.box)).max() < 0.12
        several += len(found) > 1
        mask = questions.segment(rng, picture)
        (thing,) = parse(mask.suffix, (224, 224), mask_decoder=questions.codec)
        wanted_mask = mask.objects[0].mask
        assert thing.mask is not None and wanted_mask is not None
        assert (thing.mask & wanted_mask).sum() / (thing.mask | wanted_mask).sum() > 0.8
    assert several >= 5


def test_comparisons_are_true(questions: Questions) -> None:
    rng = random.Random(0)
    kinds = set()
    for _ in range(40):
        for example in questions.compare(rng, 112, 5):
            first, second = example.images
            assert first.size == second.size == (112, 112) and first.tobytes() != second.tobytes()
            kinds.add(" ".join(word for word in example.prefix.split() if word.strip("?") not in (*NAMES, "a", "an")))
            assert example.suffix in (*NAMES, "first", "second")
    assert len(kinds) == 4


def test_charts_show_their_values() -> None:
    charts, rng = Charts(), random.Random(0)
    plain = {"bar": 0, "line": 0}
    for _ in range(8):
        chart = charts.draw(rng, 224)
        plain[chart.kind] += 1
        assert chart.image.size == (224, 224)
        assert 3 <= len(chart.values) <= 5 and tuple(chart.values) in {labels[: len(chart.values)] for labels in LABELS}
    assert min(plain.values()) > 0
    again = charts.draw(random.Random(5), 224), charts.draw(random.Random(5), 224)
    assert again[0].image.tobytes() == again[1].image.tobytes() and again[0].values == again[1].values


def test_a_bar_is_as_high_as_its_value() -> None:
    charts = Charts()
    for seed in range(30):
        chart = charts.draw(random.Random(seed), 448)
        if chart.kind == "bar":
            break
    pixels = np.asarray(chart.image.convert("HSV")).astype(int)
    coloured = (pixels[..., 1] > 100) & (pixels[..., 2] > 60)
    inside = coloured[: int(448 * 0.9), int(448 * 0.16) :]
    heights = inside.sum(0).astype(float)
    scale = 1 if max(chart.values.values()) <= 10 else 10
    expected = max(chart.values.values()) / scale / 10.5 * 0.86 * 448
    assert heights.max() == pytest.approx(expected, abs=6)


def test_questions_about_charts_are_true(questions: Questions) -> None:
    rng = random.Random(0)
    for _ in range(6):
        state = rng.getstate()
        chart = Charts().draw(rng, 112)
        rng.setstate(state)
        asked = questions.charts(rng, 112, 99)
        assert len({example.prefix for example in asked}) == len(asked) >= len(chart.values) + 1
        for example in asked:
            question = example.prefix.removeprefix("answer en ").removesuffix("?")
            last = question.split()[-1]
            if "value of" in question:
                assert example.suffix == str(chart.values[last])
            elif last == "there":
                assert example.suffix == str(len(chart.values))
            else:
                extreme = max if last == "highest" else min
                assert chart.values[example.suffix] == extreme(chart.values.values())
                assert list(chart.values.values()).count(chart.values[example.suffix]) == 1


def test_writing_is_inside_the_picture_and_to_be_seen() -> None:
    rng = random.Random(0)
    lines = Counter[int]()
    for _ in range(60):
        image, text = written(rng, 112)
        lines[text.count("\n") + 1] += 1
        assert all(line.isdigit() or line.lower() in WORDS for line in text.split("\n"))
        pixels = np.asarray(image.convert("L")).astype(int)
        assert np.abs(pixels - np.median(pixels)).max() > 50
    assert set(lines) == {1, 2}


def test_batches_are_of_every_kind(questions: Questions) -> None:
    rng = random.Random(0)
    groups = [questions.about_one(rng, 112) for _ in range(150)]
    tasks = Counter(example.task for group in groups for example in group)
    assert set(tasks) == set(TASKS) - {"compare"} and min(tasks.values()) >= 10
    for group in groups:
        assert len({id(example.images[0]) for example in group}) == 1
        assert len({example.prefix for example in group}) == len(group)
    examples: list[Exercise] = [example for group in groups for example in group]
    images, index = unique_images(examples)
    assert len(images) == len(groups) and len(index) == len(examples)
    assert all(images[place] is example.images[0] for place, example in zip(index, examples, strict=True))


@pytest.mark.skipif(find_spec("emoji") is None, reason="needs the package emoji (extra: train)")
def test_the_emoji_have_names_in_every_language() -> None:
    assert all(len(set(names(language).values())) == 80 for language in LANGUAGES)
