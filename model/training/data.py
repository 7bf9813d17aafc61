"""Examples to fine-tune on, from JSON lines: `{"image": "a.png", "prefix": "answer en …", "suffix": "…"}`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..processor import Processor
from ..tokenizer import IMAGE_TOKEN


@dataclass(frozen=True)
class Example:
    """A prompt about images, none or several, and the answers that are right; the first one is learnt."""

    images: tuple[Path, ...]
    prefix: str
    suffixes: tuple[str, ...]


class JsonLines(Dataset[Example]):
    """The examples of a file of JSON lines, checked from end to end; blank lines are skipped.

    A line is an object with the keys "prefix", a string; "suffix", a string or a list of strings; and "image", a file or a list
    of files, relative to `images_root` (default: the lines' folder), or nothing for an example without. Other keys may be there.
    As big_vision and Roboflow write them.

    Raises OSError or ValueError naming the file, the line and the key, also for an image that is missing or none.
    """

    def __init__(self, path: str | Path, images_root: str | Path | None = None) -> None:
        self.path = Path(path)
        root = self.path.parent if images_root is None else Path(images_root)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file")
        content = self.path.read_bytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        """Tells these lines from others."""
        self.examples: list[Example] = []
        self._lines: list[int] = []
        for number, line in enumerate(content.splitlines(), start=1):
            if line.strip():
                self.examples.append(_example(line, root, f"{self.path}, line {number}"))
                self._lines.append(number)
        if not self.examples:
            raise ValueError(f"{self.path}: it holds no examples")
        self._check_images()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def check_lengths(self, processor: Processor) -> None:
        """Raise ValueError, naming the line, if an example is too long for the model."""
        for example, line in zip(tqdm(self.examples, desc="lengths", delay=2, disable=None), self._lines, strict=True):
            try:
                for suffix in example.suffixes:
                    processor.encode([example.prefix], [len(example.images)], [suffix])
            except ValueError as error:
                raise ValueError(f"{self.path}, line {line}: {error}") from error

    def _check_images(self) -> None:
        seen: set[Path] = set()
        for example, line in zip(tqdm(self.examples, desc="images", delay=2, disable=None), self._lines, strict=True):
            for path in example.images:
                if path in seen:
                    continue
                seen.add(path)
                where = f"{self.path}, line {line}, image: {path}"
                if not path.is_file():
                    raise FileNotFoundError(f"{where} does not exist")
                try:
                    Image.open(path).close()  # reads no more than the header
                except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
                    raise OSError(f"{where} is no image that Pillow can read") from error


def _example(line: bytes, root: Path, where: str) -> Example:
    try:
        content = json.loads(line)
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
    return Example(tuple(root / name for name in images), prefix, suffixes)


def _texts(content: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = content.get(key)
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}, {key}: expected a string or a list of strings, got {_kind(content, key)}")
    return tuple(texts)


def _kind(content: dict[str, Any], key: str) -> str:
    return json.dumps(content[key], ensure_ascii=False)[:80] if key in content else "no such key"


class Collator:
    """Makes a batch of examples, padded on the right: what the model's loss takes, with `image_index` as `suffix_loss` has it.

    With `prompts`, also the same without the answers, padded on the left, under names that begin with "prompt_".
    """

    def __init__(self, processor: Processor, *, prompts: bool = False) -> None:
        self._processor, self._prompts = processor, prompts

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        prefixes, counts = [example.prefix for example in examples], [len(example.images) for example in examples]
        batch = self._processor.encode(
            prefixes, counts, [example.suffixes[0] for example in examples], padding_side="right"
        )
        images = [path for example in examples for path in example.images]
        rows = {path: row for row, path in enumerate(dict.fromkeys(images))}
        # A batch without an image encodes a blank one: several processes must all run the same layers.
        side = self._processor.image_size
        batch["pixel_values"] = self._processor.preprocess_images(rows or [Image.new("RGB", (side, side))])
        batch["image_index"] = torch.tensor([rows[path] for path in images], dtype=torch.int64)
        if self._prompts:
            prompts = self._processor.encode(prefixes, counts)
            batch |= {f"prompt_{name}": tensor for name, tensor in prompts.items()}
        return batch
