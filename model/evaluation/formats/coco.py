"""COCO's instances and refer's expressions, whose answers are boxes and masks."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from ...locations import Detection
from .entries import Entry, coco_image_names, known_id, read_object, require_questions
from .questions import Objects, Question, Read, Region, Segmentation


def read_detection(path: Path) -> Read:
    """Read COCO's instances JSON: one question for each image, about the categories of all its objects."""
    images, names, annotations = _read_instances(path)
    questions: Read = []
    for number, entries in annotations.items():
        labels = [names[known_id(entry, "category_id", names)] for entry in entries]
        size = images[number].size()
        objects = tuple(Detection(label, entry.box(size)) for label, entry in zip(labels, entries))
        crowds = tuple(bool(entry.content.get("iscrowd", 0)) for entry in entries)
        asked = [label for label in names.values() if label in labels]
        fields = {"categories": " ; ".join(asked)}
        question = Question(str(number), (), fields, Objects(size, objects, crowds), where=images[number].where)
        questions.append((question, [coco_image_names(images[number], number)]))
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
            chosen[known_id(entry, "category_id", names)].append(entry.segmentation(size))
        for category, parts in masks.items():
            region = Region(size, None, tuple(parts), tuple(ignored[category]))
            fields = {"category": names[category]}
            label = names[category]
            question = Question(f"{number}/{label}", (), fields, region, label, images[number].where)
            questions.append((question, [coco_image_names(images[number], number)]))
    return require_questions(questions, path)


def read_referring(path: Path) -> Read:
    """Read referring expressions in MDETR's variant of COCO's format: each image entry has a `caption` and one annotation.

    Either all annotations have masks (`segmentation`), or none has.
    """
    top = read_object(path)
    images = {entry.number("id"): entry for entry in top.entries("images")}
    questions: Read = []
    asked: set[int] = set()
    entries = top.entries("annotations")
    masks = any("segmentation" in entry.content for entry in entries)
    for entry in entries:
        number = known_id(entry, "image_id", images)
        if number in asked:
            raise ValueError(f"{entry.where}: expected one annotation for each image entry, got another of {number}")
        asked.add(number)
        image = images[number]
        size = image.size()
        region = Region(size, entry.box(size), (entry.segmentation(size),) if masks else ())
        fields = {"verb": "segment" if masks else "detect", "expression": image.text("caption")}
        question = Question(str(number), (), fields, region, where=image.where)
        questions.append((question, [coco_image_names(image, number)]))
    return questions


def _read_instances(path: Path) -> tuple[dict[int, Entry], dict[int, str], dict[int, list[Entry]]]:
    """Return images and category names by id, and the annotations of each image that has any."""
    top = read_object(path)
    images = {entry.number("id"): entry for entry in top.entries("images")}
    names = {entry.number("id"): entry.text("name").lower() for entry in top.entries("categories")}
    annotations: dict[int, list[Entry]] = defaultdict(list)
    for entry in top.entries("annotations"):
        annotations[known_id(entry, "image_id", images)].append(entry)
    return images, names, {number: annotations[number] for number in images if number in annotations}
