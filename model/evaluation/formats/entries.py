"""JSON objects whose fields are checked. Errors name the file and the entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...added_tokens import lone_surrogate
from ...files import parse_json, read_json_object, unreadable
from ...locations import Box
from .questions import Read, Segmentation


class Entry:
    """A JSON object and its place in the file, which errors name."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            raise ValueError(f"{where}: expected an object, got {shown(content)}")
        self.content, self.where = content, where

    def error(self, key: str, expected: str) -> ValueError:
        if key not in self.content:
            return ValueError(f"{self.where}: {key!r} is missing; expected {expected}")
        return ValueError(f"{self.where}: {key!r}: expected {expected}, got {shown(self.content[key])}")

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

    def entries(self, key: str) -> list[Entry]:
        value = self.content.get(key)
        if not isinstance(value, list) or not value:
            raise self.error(key, "a list of objects that is not empty")
        return [Entry(content, f"{self.where}: {key}[{i}]") for i, content in enumerate(value)]

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
            sides = f"{shown(width)} and {shown(height)}"
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
        counts = run_lengths(counts) if isinstance(counts, str) else counts
        numbers = counts if isinstance(counts, list) and all(isinstance(n, int) and n >= 0 for n in counts) else []
        # Of fewer pixels than the image has, pycocotools would leave the rest to chance.
        if sum(numbers) != width * height or value.get("size") != [height, width]:
            raise self.error("segmentation", f"run lengths of size [{height}, {width}], as its image is")


def run_lengths(text: str) -> list[int] | None:
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


def known_id(entry: Entry, key: str, known: Mapping[int, object]) -> int:
    number = entry.number(key)
    if number not in known:
        raise ValueError(f"{entry.where}: {key!r}: the file has none with the id {number}")
    return number


def coco_image_names(entry: Entry, number: int, subset: object = None) -> list[str]:
    """Return the possible names of an image: as written, with and without its folder, or COCO's names of 2014 and 2017."""
    if "file_name" in entry.content:
        name = entry.text("file_name")
        return list(dict.fromkeys([name, Path(name).name]))
    subsets = [subset] if isinstance(subset, str) else ["val2014", "train2014"]
    return [*(f"COCO_{name}_{number:012d}.jpg" for name in subsets), f"{number:012d}.jpg"]


def read_object(path: Path) -> Entry:
    return Entry(read_json_object(path), str(path))


def read_list(path: Path) -> list[Entry]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise unreadable(path, "a JSON list", error) from error
    return Entry({"entries": content}, str(path)).entries("entries")


def read_json_lines(path: Path) -> list[Entry]:
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                content = parse_json(line)
            except ValueError as error:
                raise unreadable(path, "JSON lines", f"line {number}: {error}") from error
            entries.append(Entry(content, f"{path}, line {number}"))
    if not entries:
        raise ValueError(f"{path}: it is empty")
    return entries


def require_questions(questions: Read, path: Path) -> Read:
    if not questions:
        raise ValueError(f"{path}: it holds no question")
    return questions


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
