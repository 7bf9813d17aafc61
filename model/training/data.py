"""Fine-tuning examples from JSON lines: `{"image": "a.png", "prefix": "answer en …", "suffix": "…"}`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..files import parse_json
from ..processor import Processor
from ..tokenizer import IMAGE_TOKEN
from . import fingerprint


@dataclass(frozen=True)
class Example:
    """A prompt about any number of images, and its accepted answers. Training uses the first answer."""

    images: tuple[Path, ...]
    prefix: str
    suffixes: tuple[str, ...]
    where: str = ""
    """The file and line of the example."""


class UnreadableImage(OSError):
    """An image is missing or cannot be read. The message names the image and the line that refers to it."""


class JsonLines(Dataset[Example]):
    """The examples of a file of JSON lines, all checked when it is opened; blank lines are skipped.

    A line is an object with the keys "prefix", a string; "suffix", a string or a list of strings; and optionally "image", a file
    or a list of files, relative to `images_root` (default: the data file's folder). Other keys are ignored. big_vision and
    Roboflow write this format.

    With `skip_unreadable`, `Collator` leaves out examples whose images are missing or cannot be read.

    Raises OSError or ValueError naming file, line and key, also for a missing image and a file that is not an image.
    """

    def __init__(
        self, path: str | Path, images_root: str | Path | None = None, *, skip_unreadable: bool = False
    ) -> None:
        self.path, self.skip_unreadable = Path(path), skip_unreadable
        root = self.path.parent if images_root is None else Path(images_root)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file")
        content = self.path.read_bytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        """Identifies the lines by their content."""
        self.examples: list[Example] = []
        for number, line in enumerate(content.splitlines(), start=1):
            if line.strip():
                self.examples.append(_example(line, root, f"{self.path}, line {number}"))
        if not self.examples:
            raise ValueError(f"{self.path}: it holds no examples")
        where: dict[Path, str] = {}
        for example in self.examples:
            for image in example.images:
                where.setdefault(image, example.where)
        problems = self._unopened(where)
        if problems and not (skip_unreadable and any(problems.keys().isdisjoint(e.images) for e in self.examples)):
            raise next(iter(problems.values()))
        self.images_fingerprint = fingerprint.of_files(tqdm(where, desc="fingerprints", delay=2, disable=None))
        """Identifies the images by their content."""

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def check_lengths(self, processor: Processor) -> None:
        """Raise ValueError, naming the line, if an example is too long for the model."""
        for example in tqdm(self.examples, desc="lengths", delay=2, disable=None):
            try:
                for suffix in example.suffixes:
                    processor.encode([example.prefix], [len(example.images)], [suffix])
            except ValueError as error:
                raise ValueError(f"{example.where}: {error}") from error

    def _unopened(self, where: Mapping[Path, str]) -> dict[Path, UnreadableImage]:
        """Yield what is wrong with the images, judged by their headers."""
        found = {}
        for path, line in tqdm(where.items(), desc="images", delay=2, disable=None):
            try:
                Image.open(path).close()
            except FileNotFoundError:
                found[path] = UnreadableImage(f"{line}, image: {path} does not exist")
            except Exception:  # of damaged files Pillow's readers raise anything
                found[path] = UnreadableImage(f"{line}, image: {path} is no image that Pillow can read")
        return found


def _example(line: bytes, root: Path, where: str) -> Example:
    try:
        content = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object, got {type(content).__name__}")
    images = () if content.get("image") is None else _texts(content, "image", where)
    suffixes = _texts(content, "suffix", where)
    prefix = content.get("prefix")
    if not isinstance(prefix, str):
        raise ValueError(f"{where}, prefix: expected a string, got {_kind(content, 'prefix')}")
    if prefix.count(IMAGE_TOKEN) not in (0, len(images)):
        raise ValueError(
            f"{where}, prefix: {prefix.count(IMAGE_TOKEN)} {IMAGE_TOKEN} in it, but {len(images)} image(s)"
        )
    for suffix in suffixes:
        if IMAGE_TOKEN in suffix:
            raise ValueError(f"{where}, suffix: {IMAGE_TOKEN} can stand in a prefix only")
    return Example(tuple(root / name for name in images), prefix, suffixes, where)


def _texts(content: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = content.get(key)
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}, {key}: expected a string or a list of strings, got {_kind(content, key)}")
    return tuple(texts)


def _kind(content: dict[str, Any], key: str) -> str:
    return json.dumps(content[key], ensure_ascii=False)[:80] if key in content else "no such key"


class Collator:
    """Make batches of examples, padded on the right: the model's inputs with labels, and `image_index` for `suffix_loss`.

    With `prompts`, a batch also holds the inputs without answers, padded on the left, under names that begin with "prompt_". With
    `skip_unreadable`, an example with an unreadable image gets no labels and a blank image, and the batch holds "skipped", a list
    of the reasons. Otherwise `UnreadableImage` is raised.
    """

    def __init__(self, processor: Processor, *, prompts: bool = False, skip_unreadable: bool = False) -> None:
        self._processor, self._prompts, self._skip = processor, prompts, skip_unreadable

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        prefixes, counts = [example.prefix for example in examples], [len(example.images) for example in examples]
        batch: dict[str, Any] = self._processor.encode(
            prefixes, counts, [example.suffixes[0] for example in examples], padding_side="right"
        )
        pixels, problems = self._read(path for example in examples for path in example.images)
        skipped = []
        for row, example in enumerate(examples):
            for path in problems.keys() & example.images:
                problem = f"{example.where}, image: {problems[path]}"
                if not self._skip:
                    raise UnreadableImage(problem)
                skipped.append(problem)
                batch["labels"][row] = -100
                break
        rows = {path: row for row, path in enumerate(pixels)}
        # A batch without images encodes a blank one, because all processes must run the same layers.
        batch["pixel_values"] = torch.cat(list(pixels.values()) or [self._blank()])
        batch["image_index"] = torch.tensor([rows[path] for e in examples for path in e.images], dtype=torch.int64)
        if self._prompts:
            prompts = self._processor.encode(prefixes, counts)
            batch |= {f"prompt_{name}": tensor for name, tensor in prompts.items()}
        if skipped:
            batch["skipped"] = skipped
        return batch

    def _read(self, images: Iterable[Path]) -> tuple[dict[Path, Tensor], dict[Path, str]]:
        """Read each distinct image once. Return the images, and for each image replaced by a blank one why it cannot be read."""
        pixels, problems = {}, {}
        for path in dict.fromkeys(images):
            try:
                pixels[path] = self._processor.preprocess_images([path])
            except Exception as error:  # of damaged files Pillow's readers raise anything
                pixels[path] = self._blank()
                problems[path] = str(error) if str(path) in str(error) else f"{path}: {type(error).__name__}: {error}"
        return pixels, problems

    def _blank(self) -> Tensor:
        side = self._processor.image_size
        return self._processor.preprocess_images([Image.new("RGB", (side, side))])
