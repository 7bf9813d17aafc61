"""Questions with references, and their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...images import image_size
from ...locations import Box, Detection

Segmentation = list[list[float]] | dict[str, Any]
"""A mask in COCO's format: polygons [x1, y1, x2, y2, …] in pixels, or run lengths with their size."""


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
