"""Images and text in, text, boxes and masks out."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .added_tokens import lone_surrogate
from .arguments import integer
from .config import PaliGemmaConfig
from .files import json_bytes, read_json_object, write_atomically
from .inputs import Inputs
from .locations import Detection, draw, parse
from .segmentation import MaskVQVAE
from .tokenizer import IMAGE_TOKEN, StreamDecoder, Tokenizer

ImageInput: TypeAlias = "Image.Image | np.ndarray | torch.Tensor | str | os.PathLike[str]"

MAX_IMAGE_PIXELS = 178_956_970
"""Largest image taken, in pixels (0.5 GB as RGB): the size from which Pillow refuses to open a file."""

MASK_DECODER = "vae-oid.npz"
"""A checkpoint folder's mask decoder."""

RESIZE_MODES = ("hf", "big_vision", "big_vision_no_antialias")
IGNORE_INDEX = -100


class Processor:
    """Turns images and prompts into a model's inputs, and a model's tokens into text and objects.

    Args:
        tokenizer: the text side.
        image_size: side of the square that images are resized to, in pixels.
        num_image_tokens: placeholders per image.
        image_token_id: id of the placeholder; the tokenizer's unless given.
        max_position_embeddings: longest sequence the model takes, image tokens included.
        resize: how images become squares. "hf" resamples 8-bit images with Pillow (bicubic, antialias), as
            transformers; "big_vision" is bilinear with antialias in float, as the original code's inference and its
            VQA and OCR training; "big_vision_no_antialias" is what COCO captions, TextCaps, SciCap, RefCOCO and GQA
            were trained with.
        resample: Pillow's filter for "hf".
        image_mean, image_std: one number per channel for "hf", applied after scaling to [0, 1].
        mask_decoder: turns segmentation codes into masks; without it, parsed objects have none.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        num_image_tokens: int,
        image_token_id: int | None = None,
        max_position_embeddings: int = 8192,
        resize: str = "hf",
        resample: int = Image.Resampling.BICUBIC,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        mask_decoder: MaskVQVAE | None = None,
    ) -> None:
        if resize not in RESIZE_MODES:
            raise ValueError(f"resize: {resize!r}; allowed are {', '.join(map(repr, RESIZE_MODES))}")
        for argument, value in (("image_size", image_size), ("num_image_tokens", num_image_tokens)):
            if integer(argument, value) < 1:
                raise ValueError(f"{argument}: {value}; it must be at least 1")
        if len(image_mean) != 3 or len(image_std) != 3:
            raise ValueError(f"image_mean and image_std: 3 numbers each, got {image_mean} and {image_std}")
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.num_image_tokens = num_image_tokens
        self.image_token_id = tokenizer.image_token_id if image_token_id is None else image_token_id
        self.max_position_embeddings = max_position_embeddings
        self.resize = resize
        self.resample = Image.Resampling(resample)
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.mask_decoder = mask_decoder
        self._normalized = _normalization_table(self.image_mean, self.image_std)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        resize: str = "hf",
        mask_decoder: MaskVQVAE | str | os.PathLike[str] | None = None,
    ) -> Processor:
        """Builds the processor of a checkpoint folder.

        Reads ``tokenizer.model``, ``config.json``, and where they are there ``tokenizer_config.json``,
        ``added_tokens.json``, ``preprocessor_config.json`` or ``processor_config.json``, and ``vae-oid.npz``, the mask
        decoder (``mask_decoder``: another one, or its path).

        Raises:
            FileNotFoundError: a file that is needed is not there.
            ValueError: a file cannot be understood, or two of them disagree.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        config_path = folder / "config.json"
        if not config_path.is_file():
            raise FileNotFoundError(f"{config_path}: missing; it says the image size and the image token")
        config = PaliGemmaConfig.from_file(config_path)
        tokenizer = Tokenizer.from_pretrained(folder, image_token_id=config.image_token_id)
        vocabulary = config.text_config.vocab_size
        if tokenizer.largest_text_id >= vocabulary:
            raise ValueError(
                f"{folder}: its tokenizer has ids up to {tokenizer.largest_text_id}, but {config_path} has vocab_size "
                f"{vocabulary}; a model with added tokens needs a larger embedding"
            )
        image_path, image_config = _read_image_config(folder)
        size = config.vision_config.image_size
        declared = image_config.get("size", size)
        if declared not in (size, {"height": size, "width": size}):
            raise ValueError(f"{image_path}: size {declared}, but {config_path} has image_size {size}")
        if mask_decoder is None and (folder / MASK_DECODER).is_file():
            mask_decoder = folder / MASK_DECODER
        if mask_decoder is not None and not isinstance(mask_decoder, MaskVQVAE):
            mask_decoder = MaskVQVAE.from_file(mask_decoder)
        return cls(
            tokenizer,
            image_size=size,
            num_image_tokens=config.vision_config.num_image_tokens,
            image_token_id=config.image_token_id,
            max_position_embeddings=config.text_config.max_position_embeddings,
            resize=resize,
            resample=image_config.get("resample", Image.Resampling.BICUBIC),
            image_mean=image_config.get("image_mean", (0.5, 0.5, 0.5)),
            image_std=image_config.get("image_std", (0.5, 0.5, 0.5)),
            mask_decoder=mask_decoder,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``tokenizer.model``, ``tokenizer_config.json`` and ``preprocessor_config.json``.

        Beside the model's ``config.json``, both this class and transformers' ``AutoProcessor`` read them. The mask decoder,
        if there is one, goes into ``vae-oid.npz``.
        """
        self.tokenizer.save_pretrained(folder)
        content = {
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "PaliGemmaProcessor",
            "image_seq_length": self.num_image_tokens,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.image_size, "width": self.image_size},
            "resample": int(self.resample),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }
        write_atomically(Path(folder) / "preprocessor_config.json", json_bytes(content))
        if self.mask_decoder is not None:
            self.mask_decoder.save(Path(folder) / MASK_DECODER)

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput] | Sequence[Sequence[ImageInput]],
        prompts: str | Sequence[str],
        suffixes: str | Sequence[str] | None = None,
        *,
        padding_side: str = "left",
    ) -> Inputs:
        """Makes the inputs of a model: ``<image>`` placeholders, BOS, prompt, newline, and for training suffix, EOS.

        Args:
            images: one image, one for each prompt, or a list of images for each prompt. An image is a PIL image, an
                array or tensor (HWC, HW, or CHW for tensors; uint8, or float in [0, 1]), or a path (whose EXIF
                orientation is applied). Transparency is blended onto white.
            prompts: one prompt or a batch. One that has ``<image>`` in it says itself where its images go.
            suffixes: the answers to learn, one for each prompt.
            padding_side: "left" (to generate) or "right".

        Returns:
            ``input_ids``, ``attention_mask``, ``token_type_ids`` (1 on the suffix), each int64 [B, S];
            ``pixel_values`` fp32 [images, 3, H, W]; with suffixes ``labels`` int64 [B, S], -100 off the suffix. They are a
            dict, whose ``to`` moves them to a device.

        Raises:
            ValueError: counts of images, prompts or suffixes differ, a sequence is too long, or an image is too large.
            TypeError: an image or a text is of no type named above.
            FileNotFoundError, OSError: an image file is missing, no image, or truncated.
        """
        prompts = _as_texts("prompts", prompts)
        if not prompts:
            raise ValueError("prompts: none given; at least one is needed")
        flat_images, counts = _images_per_prompt(images, prompts)
        inputs = self.encode(prompts, counts, suffixes, padding_side=padding_side)
        inputs["pixel_values"] = self.preprocess_images(flat_images)
        return inputs

    def encode(
        self,
        prompts: Sequence[str],
        num_images: Sequence[int],
        suffixes: str | Sequence[str] | None = None,
        *,
        padding_side: str = "left",
    ) -> Inputs:
        """Makes a model's inputs without ``pixel_values``: those of ``__call__`` for so many images of each prompt.

        Raises:
            ValueError, TypeError: as ``__call__``.
        """
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side: {padding_side!r}; allowed are 'left' and 'right'")
        prefixes = [self._prefix(prompt, count) for prompt, count in zip(prompts, num_images)]
        answers: list[list[int]] = [[] for _ in prompts]
        if suffixes is not None:
            suffixes = _as_texts("suffixes", suffixes)
            if len(suffixes) != len(prompts):
                raise ValueError(f"suffixes: {len(suffixes)} for {len(prompts)} prompts; each prompt needs one")
            answers = [self._suffix(suffix) for suffix in suffixes]
        for index, (prefix, answer) in enumerate(zip(prefixes, answers)):
            self._check_length(index, prefix, answer)
        inputs = self._pad(prefixes, answers, padding_side)
        if suffixes is not None:
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 0, IGNORE_INDEX)
        return inputs

    def preprocess_images(self, images: Iterable[ImageInput]) -> torch.Tensor:
        """Resizes and normalizes images.

        Returns:
            fp32 [n, 3, H, W], in [-1, 1] for the released models.

        Raises:
            As ``__call__``.
        """
        pixels = [self._preprocess(load_image(image)) for image in images]
        return torch.stack(pixels) if pixels else torch.empty(0, 3, self.image_size, self.image_size)

    def decode(self, ids: torch.Tensor | np.ndarray | Sequence[int] | Sequence[Sequence[int]]) -> list[str]:
        """Returns the text of each row of ids [B, T] (or of the one row [T]), up to its first EOS.

        Special tokens are left out, ``<loc>`` and ``<seg>`` are kept, and so is white space, as in transformers'
        ``batch_decode(skip_special_tokens=True)``. Other tokens that end an answer (``generate``'s ``eos_token_id``) are text
        unless they are special, as there.

        Raises:
            TypeError: ids that are no integers, or no rows of them.
        """
        if not isinstance(ids, (torch.Tensor, np.ndarray, Sequence)):
            raise TypeError(f"ids: rows of token ids are expected, got {type(ids).__name__}")
        rows: list = ids.tolist() if isinstance(ids, (torch.Tensor, np.ndarray)) else list(ids)
        if not rows or not isinstance(rows[0], (list, tuple, torch.Tensor, np.ndarray)):
            rows = [rows]
        return [self.tokenizer.decode(row) for row in rows]

    def stream_decoder(self) -> StreamDecoder:
        """Returns a decoder for one sequence: ``push(id)`` gives the text an id completes, ``finish()`` the rest."""
        return self.tokenizer.stream_decoder()

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the text of one sequence piece by piece, never half of a character."""
        decoder = self.stream_decoder()
        for token_id in ids:
            if text := decoder.push(token_id):
                yield text
        if text := decoder.finish():
            yield text

    def parse(self, text: str, size: tuple[int, int]) -> list[Detection]:
        """Returns the objects that an answer names, in pixels of an image of ``size`` (width, height)."""
        return parse(text, size, mask_decoder=self.mask_decoder)

    def draw(self, image: ImageInput, objects: Sequence[Detection]) -> Image.Image:
        """Returns a copy of the image with the objects' outlines, labels and masks."""
        return draw(load_image(image), objects)

    def _prefix(self, prompt: str, num_images: int) -> list[int]:
        split = prompt.rfind(IMAGE_TOKEN) + len(IMAGE_TOKEN) if IMAGE_TOKEN in prompt else 0
        head = self.tokenizer.encode(prompt[:split]) if split else [self.tokenizer.image_token_id] * num_images
        ids: list[int] = []
        for token_id in head:
            is_image = token_id == self.tokenizer.image_token_id
            ids += [self.image_token_id] * self.num_image_tokens if is_image else [token_id]
        return [*ids, self.tokenizer.bos_id, *self.tokenizer.encode(prompt[split:] + "\n")]

    def _suffix(self, suffix: str) -> list[int]:
        if IMAGE_TOKEN in suffix:
            raise ValueError(f"suffixes: {IMAGE_TOKEN} can stand in a prompt only, got {suffix!r}")
        return [*self.tokenizer.encode(suffix), self.tokenizer.eos_id]

    def _check_length(self, index: int, prefix: list[int], answer: list[int]) -> None:
        length = len(prefix) + len(answer)
        if length > self.max_position_embeddings:
            image_tokens = prefix.count(self.image_token_id)
            raise ValueError(
                f"prompts[{index}]: {image_tokens} image tokens and {length - image_tokens} text tokens make {length}; "
                f"the model takes at most {self.max_position_embeddings}"
            )

    def _pad(self, prefixes: list[list[int]], answers: list[list[int]], side: str) -> Inputs:
        lengths = [len(prefix) + len(answer) for prefix, answer in zip(prefixes, answers)]
        shape = (len(prefixes), max(lengths))
        input_ids = torch.full(shape, self.tokenizer.pad_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        token_type_ids = torch.zeros(shape, dtype=torch.int64)
        for row, (prefix, answer) in enumerate(zip(prefixes, answers)):
            start = shape[1] - lengths[row] if side == "left" else 0
            end = start + lengths[row]
            input_ids[row, start:end] = torch.tensor(prefix + answer)
            attention_mask[row, start:end] = 1
            token_type_ids[row, start + len(prefix) : end] = 1
        return Inputs(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)

    def _preprocess(self, image: Image.Image) -> torch.Tensor:
        size = (self.image_size, self.image_size)
        if self.resize == "hf":
            pixels = np.asarray(image.resize(size, resample=self.resample))
            return torch.from_numpy(np.stack([self._normalized[c][pixels[..., c]] for c in range(3)]))
        # One channel at a time: a large photo in float, all at once, would take four times its channel's memory.
        channels = [
            torch.nn.functional.interpolate(
                torch.from_numpy(np.asarray(channel, dtype=np.float32))[None, None],
                size=size,
                mode="bilinear",
                align_corners=False,
                antialias=self.resize == "big_vision",
            )[0, 0]
            for channel in image.split()
        ]
        return torch.stack(channels) / 127.5 - 1.0


def load_image(image: ImageInput) -> Image.Image:
    """Returns any accepted image as 8-bit RGB, with transparency blended onto white.

    Args:
        image: PIL image, array (HWC or HW), tensor (CHW, HWC or HW), or path, whose EXIF orientation is applied. Arrays
            are uint8, or float in [0, 1]; 1, 3 or 4 channels.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file is no image, or truncated.
        ValueError: more than ``MAX_IMAGE_PIXELS`` pixels, or an array of another shape, dtype or range.
        TypeError: anything else.
    """
    if isinstance(image, (str, os.PathLike)):
        return _load_file(Path(image))
    if isinstance(image, Image.Image):
        name = str(getattr(image, "filename", "") or "image")
        _check_pixels(name, image.size)
        try:
            return _to_rgb(image, name)
        except _UnfitImage:
            raise
        except Exception as error:  # Pillow's readers raise anything on damaged files, which they may read only now
            raise _unreadable(name, error) from error
    if isinstance(image, torch.Tensor):
        if image.layout != torch.strided or image.is_meta or image.is_quantized:
            raise TypeError(
                f"images: a dense tensor is expected, got {image.layout} of {image.dtype} on {image.device}"
            )
        array = image.detach().cpu()
        return _array_to_rgb((array.float() if array.is_floating_point() else array).numpy(), channels_first=True)
    if isinstance(image, np.ndarray):
        return _array_to_rgb(image, channels_first=False)
    raise TypeError(f"images: a PIL image, array, tensor or path is expected, got {type(image).__name__}")


def image_size(path: Path) -> tuple[int, int]:
    """Returns width and height of an image file as ``load_image`` gives it, from its header alone where that can be.

    Raises:
        As ``load_image``.
    """
    with _opened(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        size = image.size
    return load_image(path).size if turned else size


def _load_file(path: Path) -> Image.Image:
    with _opened(path) as image:
        return _to_rgb(ImageOps.exif_transpose(image), str(path))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file; whatever goes wrong in the block comes out naming it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image file")
    try:
        with warnings.catch_warnings():
            # Pillow warns from half of the size that it refuses; MAX_IMAGE_PIXELS is that second bound.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _check_pixels(str(path), image.size)
                yield image
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: too large ({error}); at most {MAX_IMAGE_PIXELS} pixels are taken") from error
    except UnidentifiedImageError as error:
        raise OSError(f"{path}: not an image, or of a format Pillow cannot read") from error
    except _UnfitImage:
        raise
    except Exception as error:  # Pillow's readers raise anything on damaged files
        raise _unreadable(str(path), error) from error


class _UnfitImage(ValueError):
    """An image that could be read, and is not taken."""


def _unreadable(name: str, error: Exception) -> OSError:
    reason = error if isinstance(error, (OSError, SyntaxError)) else f"{type(error).__name__}: {error}"
    return OSError(f"{name}: cannot read the image, it may be truncated ({reason})")


def _check_pixels(name: str, size: tuple[int, int]) -> None:
    width, height = size
    if width * height == 0:
        raise _UnfitImage(f"{name}: the image is empty ({width}×{height})")
    if width * height > MAX_IMAGE_PIXELS:
        pixels = width * height
        raise _UnfitImage(
            f"{name}: {width}×{height} is {pixels} pixels; at most {MAX_IMAGE_PIXELS} are taken, reduce it"
        )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey to 8 bits, which turns most of it white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise _UnfitImage(f"{name}: Pillow mode {image.mode!r} has no fixed range; convert it to 'L' or 'RGB' first")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _array_to_rgb(array: np.ndarray, *, channels_first: bool) -> Image.Image:
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and channels_first and shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        layout = "[H, W], [C, H, W] or [H, W, C]" if channels_first else "[H, W] or [H, W, C]"
        raise ValueError(f"images: {layout} with 1, 3 or 4 channels is expected, got {list(shape)}")
    _check_pixels("images", (array.shape[1], array.shape[0]))
    if np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(f"images: float arrays must lie in [0, 1], got [{low}, {high}]")
        array = np.rint(array * 255.0).astype(np.uint8)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ValueError(f"images: dtype uint8 or float is expected, got {array.dtype}")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)), "images")


def _normalization_table(mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    # In transformers' order of operations and roundings, so that the result is equal to the last bit.
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.asarray(mean, np.float32)[:, None]) / np.asarray(std, np.float32)[:, None]


def _as_texts(argument: str, texts: str | Sequence[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{argument}: a string or a list of strings is expected, got {type(texts).__name__}")
    for index, text in enumerate(texts):
        if surrogate := lone_surrogate(text):
            raise ValueError(
                f"{argument}[{index}]: it holds {surrogate}, half of a surrogate pair, which is no character"
            )
    return list(texts)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _images_per_prompt(
    images: ImageInput | Sequence[ImageInput] | Sequence[Sequence[ImageInput]], prompts: list[str]
) -> tuple[list[ImageInput], list[int]]:
    """Flattens the images and counts those of each prompt."""
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        images = list(images)
    groups: list = list(images) if isinstance(images, (list, tuple)) else [images]
    nested = any(_is_list(group) for group in groups)
    if nested and not all(_is_list(group) for group in groups):
        raise TypeError("images: a list holds either images or lists of images, not both")
    flat = [image for group in groups for image in group] if nested else groups
    if not flat:
        raise ValueError("images: none given; a prompt needs at least one")
    placeholders = [prompt.count(IMAGE_TOKEN) for prompt in prompts]
    if any(placeholders) and not nested:
        if sum(placeholders) != len(flat):
            raise ValueError(f"prompts: {sum(placeholders)} {IMAGE_TOKEN} in them, but {len(flat)} images are given")
        return flat, placeholders
    if len(groups) != len(prompts):
        hint = "; several images of one prompt go into a list of their own: [[a, b]]" * (len(prompts) == 1)
        raise ValueError(f"images: {len(groups)} for {len(prompts)} prompts{hint}")
    counts = [len(group) for group in groups] if nested else [1] * len(groups)
    if any(placeholders):
        for index, (written, given) in enumerate(zip(placeholders, counts)):
            if written != given:
                raise ValueError(f"prompts[{index}]: {written} {IMAGE_TOKEN} in it, but {given} images are given")
    return flat, counts


def _read_image_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Read the image processor's file and check the fields that decide what a model sees."""
    path = folder / "preprocessor_config.json"
    config = {}
    if path.is_file():
        config = read_json_object(path)
    elif (path := folder / "processor_config.json").is_file():
        config = read_json_object(path).get("image_processor", {})
        if not isinstance(config, dict):
            raise ValueError(f"{path}: image_processor: expected an object, got {config!r:.80}")
    config = {name: value for name, value in config.items() if value is not None}
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(step, True) is not True:
            raise ValueError(f"{path}: {step} is {config[step]!r:.80}; images are always resized and normalized here")
    factor = config.get("rescale_factor", 1 / 255)
    if not _is_finite(factor) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"{path}: rescale_factor: expected 1/255, got {factor!r:.80}")
    resample = config.get("resample", Image.Resampling.BICUBIC)
    if (
        type(resample) is not int
        and not isinstance(resample, Image.Resampling)
        or resample not in list(Image.Resampling)
    ):
        raise ValueError(f"{path}: resample: expected one of Pillow's numbers, 0 to 5, got {resample!r:.80}")
    for name in ("image_mean", "image_std"):
        values = config.get(name, 0.5)
        config[name] = values = values if isinstance(values, list) else [values] * 3
        if len(values) != 3 or not all(map(_is_finite, values)) or (name == "image_std" and min(values) <= 0):
            raise ValueError(f"{path}: {name}: expected a number or three of them, got {config[name]!r:.80}")
    return path, config


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
