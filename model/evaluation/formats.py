"""Public data sets' file formats, read as questions with references. Every entry is checked."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from ..added_tokens import lone_surrogate
from ..files import parse_json, read_json_object, unreadable
from ..images import image_size
from ..locations import Box, Detection

Segmentation = list[list[float]] | dict[str, Any]
"""A mask in COCO's format: polygons [x1, y1, x2, y2, …] in pixels, or run lengths with their size."""

_MOST_PERMUTED = 6


@dataclass(frozen=True)
class Options:
    """A multiple choice and its right option."""

    texts: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Objects:
    """The objects to find in an image of `size` (width, height)."""

    size: tuple[int, int]
    objects: tuple[Detection, ...]
    crowds: tuple[bool, ...]


@dataclass(frozen=True)
class Region:
    """The region of an expression or a category in an image of `size` (width, height)."""

    size: tuple[int, int]
    box: Box | None
    masks: tuple[Segmentation, ...]
    """The masks whose union is the region; empty if only its box is known."""
    ignored: tuple[Segmentation, ...] = ()
    """The masks in which predictions count neither as right nor as wrong."""


@dataclass(frozen=True)
class Question:
    """One question for a model, and the reference for its answer."""

    id: str
    images: tuple[Path, ...]
    fields: Mapping[str, str]
    """The fields that prompt templates may use."""
    reference: Any
    kind: str = ""
    """A group that is also scored separately (VQAv2's answer types, a category); "" for none."""
    where: str = ""
    """The file's entry with the image's size, for error messages; "" for none."""


Read = list[tuple[Question, Sequence[Sequence[str]]]]
"""Questions whose images are not looked up yet, and the possible file names of each image."""


def find_images(questions: Read, folder: Path) -> list[Question]:
    """Look up the questions' images: the first of each image's possible names that exists.

    Raises FileNotFoundError naming the first missing image and the number of others; OSError or ValueError for an image whose
    size differs from its entry's or cannot be read.
    """
    found: dict[tuple[str, ...], Path | None] = {}
    missing: list[Path] = []
    complete = []
    for question, images in questions:
        paths = []
        for names in map(tuple, images):
            if names not in found:
                found[names] = next((path for name in names if _is_file(path := folder / name)), None)
                if found[names] is None:
                    missing.append(folder / names[0])
            paths.append(found[names] or folder / names[0])
        complete.append(replace(question, images=tuple(paths)))
    if missing:
        more = f" (and {len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{missing[0]}: no such image file{more}; --images says where they are")
    for question in complete:
        if isinstance(question.reference, (Objects, Region)):
            _check_size(question)
    return complete


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds what no name can
        return False


def _check_size(question: Question) -> None:
    """Raise ValueError if boxes and masks refer to an image of another size than the model's."""
    for path in question.images:
        loaded, declared = image_size(path), question.reference.size
        if loaded != declared:
            turned = "; its EXIF orientation turns it" if loaded == declared[::-1] else ""
            raise ValueError(
                f"{question.where}: width and height are {declared[0]} and {declared[1]}, but {path} is of "
                f"{loaded[0]}×{loaded[1]} pixels{turned}"
            )


class _Entry:
    """A JSON object and its place in the file, which errors name."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            raise ValueError(f"{where}: expected an object, got {_shown(content)}")
        self.content, self.where = content, where

    def error(self, key: str, expected: str) -> ValueError:
        if key not in self.content:
            return ValueError(f"{self.where}: {key!r} is missing; expected {expected}")
        return ValueError(f"{self.where}: {key!r}: expected {expected}, got {_shown(self.content[key])}")

    def text(self, *keys: str) -> str:
        """Return the string under the first key that exists. A number is converted."""
        key = next((key for key in keys if key in self.content), keys[0])
        value = self.content.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value.strip() or lone_surrogate(value):
            raise self.error(key, "a text")
        return value.strip()

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.content.get(key)
        value = [value] if isinstance(value, (str, int, float)) else value
        if not isinstance(value, list) or not value or not all(isinstance(text, (str, int, float)) for text in value):
            raise self.error(key, "a text or a list of texts")
        texts = tuple(str(text) for text in value)
        if any(lone_surrogate(text) for text in texts):
            raise self.error(key, "a text or a list of texts")
        return texts

    def number(self, key: str) -> int:
        value = self.content.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, "a whole number")
        return value

    def entries(self, key: str) -> list[_Entry]:
        value = self.content.get(key)
        if not isinstance(value, list) or not value:
            raise self.error(key, "a list of objects that is not empty")
        return [_Entry(content, f"{self.where}: {key}[{i}]") for i, content in enumerate(value)]

    def box(self, size: tuple[int, int]) -> Box:
        """Return COCO's `bbox`, [x, y, width, height] in pixels, as corners. It must lie in an image of `size`."""
        value = self.content.get("bbox")
        if isinstance(value, list) and len(value) == 4 and all(map(_is_number, value)):
            x, y, width, height = value
            if width >= 0 and height >= 0 and _are_inside([x, y, x + width, y + height], size):
                return x, y, x + width, y + height
        raise self.error("bbox", f"[x, y, width, height] within {size[0]}×{size[1]} pixels")

    def size(self) -> tuple[int, int]:
        width, height = self.number("width"), self.number("height")
        if not (1 <= width < 2**31 and 1 <= height < 2**31):
            sides = f"{_shown(width)} and {_shown(height)}"
            raise ValueError(f"{self.where}: width and height: expected at least 1 and below 2³¹, got {sides}")
        return width, height

    def segmentation(self, size: tuple[int, int]) -> Segmentation:
        value = self.content.get("segmentation")
        if isinstance(value, dict):
            self._check_run_lengths(value, size)
            return value
        # Far beyond the image pycocotools would crash; so it would on what is not a number.
        if not isinstance(value, list) or not value or not all(_is_polygon(polygon, size) for polygon in value):
            expected = f"polygons [x1, y1, x2, y2, x3, y3, …] within {size[0]}×{size[1]} pixels"
            raise self.error("segmentation", f"{expected}, or run lengths with their size")
        return value

    def _check_run_lengths(self, value: dict[str, Any], size: tuple[int, int]) -> None:
        width, height = size
        counts = value.get("counts")
        counts = _run_lengths(counts) if isinstance(counts, str) else counts
        numbers = counts if isinstance(counts, list) and all(isinstance(n, int) and n >= 0 for n in counts) else []
        # Of fewer pixels than the image has, pycocotools would leave the rest to chance.
        if sum(numbers) != width * height or value.get("size") != [height, width]:
            raise self.error("segmentation", f"run lengths of size [{height}, {width}], as its image is")


def _run_lengths(text: str) -> list[int] | None:
    """Decode COCO's compressed run lengths: differences to the last but one, in 5-bit digits, lowest first. None if damaged."""
    lengths: list[int] = []
    value = shift = 0
    for letter in text:
        digit = ord(letter) - 48
        if not 0 <= digit < 64 or shift > 60:
            return None
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return None if shift else lengths


def _is_polygon(value: Any, size: tuple[int, int]) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= 6
        and len(value) % 2 == 0
        and all(map(_is_number, value))
        and _are_inside(value, size)
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_inside(coordinates: Sequence[float], size: tuple[int, int]) -> bool:
    """Return whether x, y, x, y, … lie in an image. COCO's own polygons exceed the edges by rounding errors."""
    slack = [1 + side / 100 for side in size]
    return all(-slack[i % 2] <= n <= size[i % 2] + slack[i % 2] for i, n in enumerate(coordinates))


def decode_masks(parts: Sequence[Segmentation], size: tuple[int, int]) -> np.ndarray:
    """Return the union of the parts, bool [height, width]; `size` is (width, height)."""
    from pycocotools import mask as coco

    width, height = size
    mask = np.zeros((height, width), dtype=bool)
    for part in parts:
        uncompressed = isinstance(part, list) or isinstance(part["counts"], list)
        runs = coco.frPyObjects(part, height, width) if uncompressed else part
        mask |= coco.decode(coco.merge(runs) if isinstance(runs, list) else runs).astype(bool)
    return mask


def read_captions(path: Path, language: str) -> Read:
    """Read COCO's captions JSON, or the captions in `language` from JSON lines of XM3600 or COCO-35L."""
    if path.suffix == ".jsonl":
        return _read_caption_lines(path, language)
    top = _read_object(path)
    images = {entry.number("id"): entry for entry in top.entries("images")}
    captions: dict[int, list[str]] = defaultdict(list)
    for entry in top.entries("annotations"):
        captions[_known(entry, "image_id", images)].append(entry.texts("caption")[0])
    return [
        (Question(str(number), (), {}, tuple(captions[number])), [_coco_names(images[number], number)])
        for number in images
        if number in captions
    ]


def _read_caption_lines(path: Path, language: str) -> Read:
    captions: dict[str, list[str]] = defaultdict(list)
    names: dict[str, list[str]] = {}
    for entry in _read_lines(path):
        if "image/key" in entry.content:  # XM3600: every language in one line
            image = entry.text("image/key")
            names[image] = [f"{image}.jpg"]
            if language in entry.content:
                captions[image] += _Entry(entry.content[language], f"{entry.where}: {language}").texts("caption")
            continue
        # COCO-35L: a line for each caption and language into which it was translated from English.
        image = entry.text("image_id").partition("_")[0]
        if not image.isdecimal():
            raise entry.error("image_id", "COCO's number of an image")
        names[image] = [f"COCO_val2014_{int(image):012d}.jpg", f"COCO_train2014_{int(image):012d}.jpg"]
        names[image] += [f"{int(image):012d}.jpg"]
        target = entry.text("trg_lang")
        if target == language:
            captions[image].append(entry.texts("translation_tokenized")[0])
        elif language == "en" and target == "de":  # each English caption once
            captions[image].append(entry.texts("caption_tokenized")[0])
    if not captions:
        raise ValueError(f"{path}: it holds no captions in the language {language!r}")
    return [(Question(image, (), {}, tuple(texts)), [names[image]]) for image, texts in captions.items()]


def read_vqa(path: Path, annotations: Path | None) -> Read:
    """Read the questions of VQAv2 or OK-VQA with the answers of the annotations file, or TextVQA's JSON, which has both."""
    top = _read_object(path)
    if "questions" not in top.content:
        if annotations is not None:
            raise ValueError(f"--annotations: {path} has no 'questions', so that none are needed beside it")
        return [
            (
                Question(entry.text("question_id"), (), {"question": entry.text("question")}, entry.texts("answers")),
                [[f"{entry.text('image_id')}.jpg"]],
            )
            for entry in top.entries("data")
        ]
    if annotations is None:
        raise ValueError(f"{path} holds questions without answers: give VQAv2's file of them with --annotations")
    answers = {}
    for entry in _read_object(annotations).entries("annotations"):
        people = tuple(answer.texts("answer")[0] for answer in entry.entries("answers"))
        kind = entry.text("answer_type") if "answer_type" in entry.content else ""
        answers[entry.number("question_id")] = people, kind
    subset = top.content.get("data_subtype")
    questions: Read = []
    for entry in top.entries("questions"):
        number = entry.number("question_id")
        if number not in answers:
            raise ValueError(f"{entry.where}: {annotations} holds no answers to question {number}")
        people, kind = answers[number]
        question = Question(str(number), (), {"question": entry.text("question")}, people, kind)
        questions.append((question, [_coco_names(entry, entry.number("image_id"), subset)]))
    return questions


def read_gqa(path: Path) -> Read:
    """Read GQA's questions JSON: an object for each question, by its id."""
    questions: Read = []
    for number, content in read_json_object(path).items():
        entry = _Entry(content, f"{path}: {number}")
        if lone_surrogate(number):
            raise ValueError(f"{path}: {number!r}: expected a question's number")
        question = Question(number, (), {"question": entry.text("question")}, (entry.text("answer"),))
        questions.append((question, [[f"{entry.text('imageId')}.jpg"]]))
    return _not_empty(questions, path)


def read_docvqa(path: Path) -> Read:
    """Read the JSON of DocVQA, InfographicVQA or ST-VQA: `data` with question, answers and the name of a page or image.

    Lists in InfographicVQA's answers may come in any order: each of up to 720 orders is accepted.
    """
    questions: Read = []
    for entry in _read_object(path).entries("data"):
        if "answers" not in entry.content:
            raise ValueError(
                f"{entry.where}: 'answers' is missing; test sets without answers are scored by their server"
            )
        answers = entry.texts("answers")
        if "image_local_name" in entry.content:
            answers = tuple(order for answer in answers for order in _orders(answer))
        image = entry.text("image", "image_local_name", "file_path")
        question = Question(entry.text("questionId", "question_id"), (), {"question": entry.text("question")}, answers)
        questions.append((question, [[image, Path(image).name]]))
    return questions


def _orders(answer: str) -> list[str]:
    parts = answer.split(", ")
    return [", ".join(order) for order in permutations(parts)] if len(parts) <= _MOST_PERMUTED else [answer]


def read_chartqa(path: Path) -> Read:
    """Read ChartQA's JSON, human or augmented: a list of imgname, query and label."""
    return [
        (Question(str(i), (), {"question": entry.text("query")}, entry.texts("label")), [[entry.text("imgname")]])
        for i, entry in enumerate(_read_list(path))
    ]


def read_lines(path: Path, prefix: str | None = None) -> Read:
    """Read JSON lines of image (or a list of images), prefix and suffix (or a list of accepted answers), as for fine-tuning.

    `prefix` is the default for lines without one; None makes it required.
    """
    questions: Read = []
    for i, entry in enumerate(_read_lines(path), 1):
        asked = prefix if prefix is not None and "prefix" not in entry.content else entry.text("prefix")
        images = [[name] for name in entry.texts("image")]
        questions.append((Question(str(i), (), {"prefix": asked}, entry.texts("suffix")), images))
    return questions


def read_pope(path: Path) -> Read:
    """Read POPE's JSON lines: image, text (the question) and label (yes or no)."""
    questions: Read = []
    for i, entry in enumerate(_read_lines(path), 1):
        label = entry.text("label").lower()
        if label not in ("yes", "no"):
            raise entry.error("label", "yes or no")
        number = entry.text("question_id") if "question_id" in entry.content else str(i)
        questions.append((Question(number, (), {"question": entry.text("text")}, label), [[entry.text("image")]]))
    return questions


def read_mmvp(path: Path) -> Read:
    """Read MMVP's Questions.csv, two rows for each pair. Images are named by the row's index."""
    columns = ("Index", "Question", "Options", "Correct Answer")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise unreadable(path, "CSV", error) from error
    questions: Read = []
    for line, row in enumerate(rows, 2):
        where = f"{path}, row {line}"
        if not all(row.get(column) for column in columns):
            raise ValueError(f"{where}: expected {', '.join(columns)}, got {_shown(row)}")
        options = re.findall(r"\(([a-z])\)\s*([^()]+)", row["Options"])
        letters = [f"({letter})" for letter, _ in options]
        right = row["Correct Answer"].strip().lower()
        if right not in letters or letters != [f"({chr(ord('a') + i)})" for i in range(len(letters))]:
            raise ValueError(
                f"{where}: expected options '(a) … (b) …' with one of them right, got {row['Options']!r} and {right!r}"
            )
        texts = tuple(text.strip() for _, text in options)
        fields = {"question": row["Question"].strip(), "options": row["Options"].strip()}
        question = Question(row["Index"], (), fields, Options(texts, letters.index(right)))
        questions.append((question, [[f"{row['Index']}.jpg", f"MMVP Images/{row['Index']}.jpg"]]))
    if len(questions) % 2:
        raise ValueError(f"{path}: expected an even number of rows, two for each pair, got {len(questions)}")
    return _not_empty(questions, path)


def read_detection(path: Path) -> Read:
    """Read COCO's instances JSON: one question for each image, about the categories of all its objects."""
    images, names, annotations = _read_instances(path)
    questions: Read = []
    for number, entries in annotations.items():
        labels = [names[_known(entry, "category_id", names)] for entry in entries]
        size = images[number].size()
        objects = tuple(Detection(label, entry.box(size)) for label, entry in zip(labels, entries))
        crowds = tuple(bool(entry.content.get("iscrowd", 0)) for entry in entries)
        asked = [label for label in names.values() if label in labels]
        fields = {"categories": " ; ".join(asked)}
        question = Question(str(number), (), fields, Objects(size, objects, crowds), where=images[number].where)
        questions.append((question, [_coco_names(images[number], number)]))
    return questions


def read_segmentation(path: Path) -> Read:
    """Read COCO's instances JSON: one question for each category in each image, without crowds."""
    images, names, annotations = _read_instances(path)
    questions: Read = []
    for number, entries in annotations.items():
        size = images[number].size()
        masks: dict[int, list[Segmentation]] = defaultdict(list)
        ignored: dict[int, list[Segmentation]] = defaultdict(list)
        for entry in entries:
            chosen = ignored if entry.content.get("iscrowd", 0) else masks
            chosen[_known(entry, "category_id", names)].append(entry.segmentation(size))
        for category, parts in masks.items():
            region = Region(size, None, tuple(parts), tuple(ignored[category]))
            fields = {"category": names[category]}
            label = names[category]
            question = Question(f"{number}/{label}", (), fields, region, label, images[number].where)
            questions.append((question, [_coco_names(images[number], number)]))
    return _not_empty(questions, path)


def read_referring(path: Path) -> Read:
    """Read referring expressions in MDETR's variant of COCO's format: each image entry has a `caption` and one annotation.

    Either all annotations have masks (`segmentation`), or none has.
    """
    top = _read_object(path)
    images = {entry.number("id"): entry for entry in top.entries("images")}
    questions: Read = []
    asked: set[int] = set()
    entries = top.entries("annotations")
    masks = any("segmentation" in entry.content for entry in entries)
    for entry in entries:
        number = _known(entry, "image_id", images)
        if number in asked:
            raise ValueError(f"{entry.where}: expected one annotation for each image entry, got another of {number}")
        asked.add(number)
        image = images[number]
        size = image.size()
        region = Region(size, entry.box(size), (entry.segmentation(size),) if masks else ())
        fields = {"verb": "segment" if masks else "detect", "expression": image.text("caption")}
        question = Question(str(number), (), fields, region, where=image.where)
        questions.append((question, [_coco_names(image, number)]))
    return questions


def _read_instances(path: Path) -> tuple[dict[int, _Entry], dict[int, str], dict[int, list[_Entry]]]:
    """Return images and category names by id, and the annotations of each image that has any."""
    top = _read_object(path)
    images = {entry.number("id"): entry for entry in top.entries("images")}
    names = {entry.number("id"): entry.text("name").lower() for entry in top.entries("categories")}
    annotations: dict[int, list[_Entry]] = defaultdict(list)
    for entry in top.entries("annotations"):
        annotations[_known(entry, "image_id", images)].append(entry)
    return images, names, {number: annotations[number] for number in images if number in annotations}


def _known(entry: _Entry, key: str, known: Mapping[int, object]) -> int:
    number = entry.number(key)
    if number not in known:
        raise ValueError(f"{entry.where}: {key!r}: the file has none with the id {number}")
    return number


def _coco_names(entry: _Entry, number: int, subset: object = None) -> list[str]:
    """Return the possible names of an image: as written, with and without its folder, or COCO's names of 2014 and 2017."""
    if "file_name" in entry.content:
        name = entry.text("file_name")
        return list(dict.fromkeys([name, Path(name).name]))
    subsets = [subset] if isinstance(subset, str) else ["val2014", "train2014"]
    return [*(f"COCO_{name}_{number:012d}.jpg" for name in subsets), f"{number:012d}.jpg"]


def _read_object(path: Path) -> _Entry:
    return _Entry(read_json_object(path), str(path))


def _read_list(path: Path) -> list[_Entry]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise unreadable(path, "a JSON list", error) from error
    return _Entry({"entries": content}, str(path)).entries("entries")


def _read_lines(path: Path) -> list[_Entry]:
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                content = parse_json(line)
            except ValueError as error:
                raise unreadable(path, "JSON lines", f"line {number}: {error}") from error
            entries.append(_Entry(content, f"{path}, line {number}"))
    if not entries:
        raise ValueError(f"{path}: it is empty")
    return entries


def _not_empty(questions: Read, path: Path) -> Read:
    if not questions:
        raise ValueError(f"{path}: it holds no question")
    return questions


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
