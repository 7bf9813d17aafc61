"""Questions about the world's pictures, with their answers, for every kind of task that PaliGemma is known for."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..locations import Detection, format_boxes
from ..segmentation import MaskVQVAE
from .charts import Chart, Charts
from .world import Picture, Random, World, names
from .writing import written

LANGUAGES = ("en", "es", "fr", "de", "pt", "it")
_AND = {"en": "and", "es": "y", "fr": "et", "de": "und", "pt": "e", "it": "e"}

TASKS = ("caption", "vqa", "count", "detect", "segment", "ocr", "chart", "compare")

# The main colours of emoji that have one, for questions about colours.
_COLOURED = {
    "red": ("red apple", "strawberry", "lady beetle", "crab", "red heart", "automobile", "balloon", "magnet"),
    "orange": ("fox", "carrot", "basketball"),
    "yellow": ("banana", "lemon", "star", "crescent moon", "crown", "cat face"),
    "green": ("frog", "turtle", "avocado", "cactus", "four leaf clover", "snake"),
    "purple": ("eggplant", "octopus"),
    "pink": ("pig face", "flamingo"),
}
_COLOUR_OF = {name: colour for colour, things in _COLOURED.items() for name in things}

WRITING = 0.3
"""The share of images with writing in training. There is one question about each of them."""
CHARACTERS = 0.3
"""The share of images with writing that show a few random letters or digits. Scoring uses none of them."""

_MOST_BOXES = 4  # boxes per answer; six boxes would be 60 tokens
_MARGIN = 24 / 224  # share of the picture's side; "above" and "at the top" need at least this distance
_RATIO = 1.3  # ratio of two sizes from which the larger one is visibly larger


@dataclass(frozen=True)
class Exercise:
    """A question with its answer.

    `images`: one, or two to compare. `prefix`, `suffix`: in the released models' wording. `task`: one of `TASKS`. `objects`: what
    "detect" and "segment" ask for.
    """

    images: tuple[Image.Image, ...]
    prefix: str
    suffix: str
    task: str
    objects: tuple[Detection, ...] = ()

    @property
    def language(self) -> str | None:
        """The answer's language: the prompt's second word if it is one of `LANGUAGES`, else ""."""
        words = self.prefix.split()
        return words[1] if len(words) > 1 and words[1] in LANGUAGES else None


def caption(things: Sequence[str], language: str = "en") -> str:
    """Return "a dog face, a key and an umbrella" for ["dog face", "key", "umbrella"]. Other languages have no articles."""
    words = [_with_article(thing) for thing in things] if language == "en" else list(things)
    return f" {_AND[language]} ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def plural(noun: str) -> str:
    """Return "running shoes" for "running shoe", "boxes" for "box", "strawberries" for "strawberry"."""
    if noun == "ear of corn":
        return "ears of corn"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def _with_article(noun: str) -> str:
    # "a unicorn": the only name of the world that begins with a vowel but is spoken with a consonant.
    an = noun[0].lower() in "aeiou" and not noun.startswith("uni")
    return f"{'an' if an else 'a'} {noun}"


_Kinds = list[tuple[float, Callable[[Random, Picture], Exercise]]]


class Questions:
    """Draw images of a world and ask questions about them.

    `codec` encodes the masks of "segment"; without it that task is left out. `translations`: {language: {English name: name}}, by
    default from `names`. The same random source in the same state gives the same questions.
    """

    def __init__(
        self, world: World, codec: MaskVQVAE | None = None, translations: dict[str, dict[str, str]] | None = None
    ) -> None:
        self.world, self.codec = world, codec
        if translations is None:
            english = names("en")
            translations = {
                language: {english[symbol]: name for symbol, name in names(language).items()} for language in LANGUAGES
            }
        self.translations = translations
        self._charts = Charts()
        self._about_scene: _Kinds = [
            (4.0, lambda rng, picture: self.caption(picture, LANGUAGES[int(rng.random() * len(LANGUAGES))])),
            (1.2, lambda rng, picture: self.caption(picture, "en")),
            (3.6, self.vqa),
            (0.6, self.count),
            (1.4, self.detect),
            (1.8, lambda rng, picture: self.detect(rng, picture, everything=True)),
        ]
        if codec is not None:
            self._about_scene.append((2.2, self.segment))
        self._about_crowd: _Kinds = [
            (4.0, self.count),
            (1.2, self.detect),
        ]

    def about_one(
        self, rng: Random, image_size: int, writing: float = WRITING, characters: float = CHARACTERS
    ) -> list[Exercise]:
        """Draw a picture and ask different questions about it, at most six.

        `writing` is the share of pictures of writing, `characters` of these the share that show a few at random.
        """
        if rng.random() < writing:
            return [self.ocr(rng, image_size, characters)]
        kind = rng.random()
        if kind < 0.55:
            picture = self.world.scene(rng, image_size)
            return self._several(rng, picture, self._about_scene, 4)
        if kind < 0.88:
            picture = self.world.crowd(rng, image_size)
            few = len(picture.objects) <= _MOST_BOXES
            return self._several(rng, picture, self._about_crowd[: 1 + few], 3)
        return self.charts(rng, image_size, 6)

    def caption(self, picture: Picture, language: str) -> Exercise:
        """Ask for the names, from left to right."""
        translation = self.translations[language]
        answer = caption([translation[found.label] for found in picture.objects], language)
        return Exercise((picture.image,), f"caption {language}", answer, "caption")

    def count(self, rng: Random, picture: Picture) -> Exercise:
        """Ask how many objects of one kind there are, sometimes of a kind that is absent."""
        labels = [found.label for found in picture.objects]
        name = labels[int(rng.random() * len(labels))]
        if rng.random() < 0.1:
            name = self._absent(rng, labels)
        question = f"answer en how many {plural(name)} are there?"
        return Exercise((picture.image,), question, str(labels.count(name)), "count")

    def detect(self, rng: Random, picture: Picture, everything: bool = False) -> Exercise:
        """Ask for the boxes of one kind, or of all kinds (always for `everything`): from left to right, kind after kind."""
        kinds = list(dict.fromkeys(found.label for found in picture.objects))
        if not everything and (rng.random() < 0.6 or len(kinds) == 1):
            kinds = [kinds[int(rng.random() * len(kinds))]]
        found = [thing for kind in kinds for thing in picture.objects if thing.label == kind]
        answer = format_boxes(found, picture.image.size)
        return Exercise((picture.image,), f"detect {' ; '.join(kinds)}", answer, "detect", tuple(found))

    def segment(self, rng: Random, picture: Picture) -> Exercise:
        """Ask for the mask of one thing."""
        found = picture.objects[int(rng.random() * len(picture.objects))]
        answer = format_boxes([found], picture.image.size, mask_encoder=self.codec)
        return Exercise((picture.image,), f"segment {found.label}", answer, "segment", (found,))

    def ocr(self, rng: Random, image_size: int, characters: float = 0.0) -> Exercise:
        """Ask for the writing, line after line; `characters` is the share of pictures with a few at random."""
        image, text = written(rng, image_size, characters)
        return Exercise((image,), "ocr", text, "ocr")

    def charts(self, rng: Random, image_size: int, most: int = 1) -> list[Exercise]:
        """Draw a chart and ask for up to `most` different values and facts that can be read from it."""
        chart = self._charts.draw(rng, image_size)
        asked = list(_about_chart(chart))
        chosen = [asked.pop(int(rng.random() * len(asked))) for _ in range(min(most, len(asked)))]
        return [Exercise((chart.image,), f"answer en {question}", answer, "chart") for question, answer in chosen]

    def compare(self, rng: Random, image_size: int, most: int = 1) -> list[Exercise]:
        """Draw two pictures that share an emoji, each with one that the other lacks, and ask for the difference."""
        shared, first, second = self.world.choose(rng, 3)
        pictures = [self.world.scene_with(rng, image_size, [shared, own]) for own in (first, second)]
        images = tuple(picture.image for picture in pictures)
        asked = [
            ("what is only in the first picture?", first),
            ("what is only in the second picture?", second),
            ("what is in both pictures?", shared),
            (f"which picture shows {_with_article(first)}?", "first"),
            (f"which picture shows {_with_article(second)}?", "second"),
        ]
        chosen = [asked.pop(int(rng.random() * len(asked))) for _ in range(most)]
        return [Exercise(images, f"answer en {question}", answer, "compare") for question, answer in chosen]

    def vqa(self, rng: Random, picture: Picture) -> Exercise:
        """Ask about places, sizes, colours and what is there."""
        kinds = list(self._about_places(rng, picture))
        question, answer = kinds[int(rng.random() * len(kinds))]
        return Exercise((picture.image,), f"answer en {question}", answer, "vqa")

    def _about_places(self, rng: Random, picture: Picture) -> Iterator[tuple[str, str]]:
        things = picture.objects
        labels = [found.label for found in things]
        some = things[int(rng.random() * len(things))]
        there = rng.random() < 0.5
        yield (
            f"is there {_with_article(some.label if there else self._absent(rng, labels))} in the picture?",
            "yes" if there else "no",
        )
        if picture.background is not None:
            yield "what color is the background?", picture.background
        coloured = [found for found in things if found.label in _COLOUR_OF]
        if coloured:
            yield f"what color is the {coloured[0].label}?", _COLOUR_OF[coloured[0].label]
        if len(things) == 1:
            yield "what is this?", some.label
            if place := _quarter(some, picture.image.size):
                yield f"where is the {some.label}?", place
            return
        yield "what is on the left?", labels[0]
        yield "what is on the right?", labels[-1]
        yield f"what is to the left of the {labels[1]}?", labels[0]
        yield f"what is to the right of the {labels[-2]}?", labels[-1]
        a, b = int(rng.random() * len(things)), 1 + int(rng.random() * (len(things) - 1))
        b = (a + b) % len(things)
        yield f"is the {labels[a]} to the left of the {labels[b]}?", "yes" if a < b else "no"
        large, small = sorted((things[a], things[b]), key=_extent, reverse=True)
        if _extent(large) >= _RATIO * _extent(small):
            yield f"which is larger, the {labels[a]} or the {labels[b]}?", large.label
        by_height = sorted(things, key=lambda found: found.box[1] + found.box[3])
        margin = 2 * _MARGIN * picture.image.height
        middles = [found.box[1] + found.box[3] for found in by_height]
        if middles[1] - middles[0] >= margin:
            yield "what is at the top?", by_height[0].label
            yield f"what is above the {by_height[1].label}?", by_height[0].label
        if middles[-1] - middles[-2] >= margin:
            yield "what is at the bottom?", by_height[-1].label
            yield f"what is below the {by_height[-2].label}?", by_height[-1].label

    def _absent(self, rng: Random, labels: Sequence[str]) -> str:
        while True:
            name = self.world.names[int(rng.random() * len(self.world.names))]
            if name not in labels:
                return name

    def _several(self, rng: Random, picture: Picture, kinds: _Kinds, most: int) -> list[Exercise]:
        """Ask questions of random kinds, by the kinds' weights. A repeated question counts once."""
        until = list(itertools.accumulate(weight for weight, _ in kinds))
        chosen = (kinds[bisect.bisect(until, rng.random() * until[-1])][1] for _ in range(most))
        examples = (kind(rng, picture) for kind in chosen)
        return list({example.prefix: example for example in examples}.values())


def _about_chart(chart: Chart) -> Iterator[tuple[str, str]]:
    thing = {"bar": "bar", "line": "point"}[chart.kind]
    for label, value in chart.values.items():
        yield f"what is the value of {label}?", str(value)
    yield f"how many {thing}s are there?", str(len(chart.values))
    in_order = sorted(chart.values, key=chart.values.__getitem__)
    if chart.values[in_order[-1]] > chart.values[in_order[-2]]:
        yield f"which {thing} is the highest?", in_order[-1]
    if chart.values[in_order[0]] < chart.values[in_order[1]]:
        yield f"which {thing} is the lowest?", in_order[0]


def _quarter(found: Detection, size: tuple[int, int]) -> str | None:
    """Return "top left" and so on, or None near a middle line."""
    x1, y1, x2, y2 = found.box
    across, down = (x1 + x2) / 2 / size[0] - 0.5, (y1 + y2) / 2 / size[1] - 0.5
    if min(abs(across), abs(down)) < _MARGIN / 2:
        return None
    return f"{'top' if down < 0 else 'bottom'} {'left' if across < 0 else 'right'}"


def _extent(found: Detection) -> float:
    x1, y1, x2, y2 = found.box
    return max(x2 - x1, y2 - y1)


def unique_images(examples: Sequence[Exercise]) -> tuple[list[Image.Image], np.ndarray]:
    """Return the distinct images of the examples, and for each image its index among them (int64)."""
    places: dict[int, int] = {}
    images: list[Image.Image] = []
    index = []
    for example in examples:
        for image in example.images:
            if id(image) not in places:
                places[id(image)] = len(images)
                images.append(image)
            index.append(places[id(image)])
    return images, np.array(index, dtype=np.int64)
