"""Images of any kind to 8-bit RGB, and to the pixels that a model sees."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .files import read_json_object

ImageInput: TypeAlias = "Image.Image | np.ndarray | torch.Tensor | str | os.PathLike[str]"

MAX_IMAGE_PIXELS = 178_956_970
"""The largest image, in pixels (0.5 GB as RGB). Pillow refuses to open larger files."""


def load_image(image: ImageInput) -> Image.Image:
    """Return any accepted image as 8-bit RGB, with transparency blended onto white.

    Args:
        image: PIL image, array (HWC or HW), tensor (CHW, HWC or HW), or path, whose EXIF orientation is applied. Arrays
            are uint8, or float in [0, 1]; 1, 3 or 4 channels.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file is not an image, or truncated.
        ValueError: more than `MAX_IMAGE_PIXELS` pixels, or an array of another shape, dtype or range.
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
        except Exception as error:  # Pillow reads lazily, and raises anything on damaged files
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
    """Return the width and height of an image file as `load_image` gives it, read from the header if possible.

    Raises:
        As `load_image`.
    """
    with _opened(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        size = image.size
    return load_image(path).size if turned else size


def resized_pixels(
    image: Image.Image, size: int, mode: str, resample: Image.Resampling, normalized: np.ndarray
) -> torch.Tensor:
    """Resize an RGB image to a square of side `size` and normalise it: fp32 [3, size, size].

    `mode` is one of choices.RESIZE_MODES. "hf" uses Pillow's filter `resample` and the table of `normalization_table`.
    """
    if mode == "hf":
        pixels = np.asarray(image.resize((size, size), resample=resample))
        return torch.from_numpy(np.stack([normalized[c][pixels[..., c]] for c in range(3)]))
    # Resize one channel at a time: a large photo in float would take four times its memory.
    channels = [
        torch.nn.functional.interpolate(
            torch.from_numpy(np.asarray(channel, dtype=np.float32))[None, None],
            size=(size, size),
            mode="bilinear",
            align_corners=False,
            antialias=mode == "big_vision",
        )[0, 0]
        for channel in image.split()
    ]
    return torch.stack(channels) / 127.5 - 1.0


def normalization_table(mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return the normalised value of each byte for each channel, fp32 [3, 256]."""
    # The order of operations and roundings is transformers', so that results are equal to the last bit.
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.asarray(mean, np.float32)[:, None]) / np.asarray(std, np.float32)[:, None]


def read_image_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Read the image processor's file and check the fields that change pixels. Return its path and content; ValueError."""
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


def _load_file(path: Path) -> Image.Image:
    with _opened(path) as image:
        return _to_rgb(ImageOps.exif_transpose(image), str(path))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file. Errors inside the block name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image file")
    try:
        with warnings.catch_warnings():
            # Pillow warns above half of MAX_IMAGE_PIXELS and refuses above MAX_IMAGE_PIXELS.
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
    """A readable image that is not accepted."""


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
        # Pillow would clip 16-bit grey to 8 bits, which turns most of it white.
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


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
