"""The mask VQ-VAE: sixteen `<seg>` codes to a mask, and a mask to its codes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .files import temporary_sibling

CODES_PER_MASK = 16
MASK_SIZE = 64
_GRID = 4

CODEBOOK = "_vq_vae._embedding"


class _Residual(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net(x)


class MaskVQVAE(nn.Module):
    """PaliGemma's mask codec; parameter names are those of `vae-oid.npz`.

    Channel counts are read from the tensors. Without `encoder.*` tensors it only decodes.

    Args:
        tensors: name to fp32 tensor.
        name: the source's name in errors (its path).

    Raises:
        ValueError: a tensor is missing or has a wrong shape.

    Source: big_vision's `evaluators/proj/paligemma/transfers/segmentation.py` (decoder) and
    `pp/proj/paligemma/segmentation.py` (encoder).
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, name: str = "mask VQ-VAE") -> None:
        super().__init__()
        shapes = _Shapes(tensors, name)
        self.codebook = nn.Parameter(shapes.get(CODEBOOK, (None, None)).clone(), requires_grad=False)
        self.decoder = _build_decoder(shapes, self.codebook.shape[1])
        has_encoder = any(key.startswith("encoder.") for key in tensors)
        self.encoder = _build_encoder(shapes, self.codebook.shape[1]) if has_encoder else None
        self._name = name
        state = {key: value for key, value in tensors.items() if key.startswith(("decoder.", "encoder."))}
        self.load_state_dict({"codebook": tensors[CODEBOOK], **state})
        self.requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> MaskVQVAE:
        """Read `vae-oid.npz` or its conversion to safetensors.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is neither kind of file, or a tensor is missing or has a wrong shape.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; the mask decoder's weights (vae-oid.npz) are needed")
        if path.suffix == ".safetensors":
            try:
                tensors = {key: value.float() for key, value in load_file(path).items()}
            except (SafetensorError, RuntimeError) as error:
                raise ValueError(f"{path}: not a safetensors file ({error})") from error
        else:
            try:
                with np.load(path, allow_pickle=False) as file:
                    tensors = {key: torch.from_numpy(file[key].astype(np.float32)) for key in file.files}
            except Exception as error:  # numpy, zipfile and zlib raise anything on damaged files
                raise ValueError(f"{path}: not an .npz file of arrays ({error})") from error
        return cls(tensors, name=str(path))

    def save(self, path: Path) -> None:
        """Write `vae-oid.npz`; OSError naming `path` if it cannot be written."""
        state = {CODEBOOK if name == "codebook" else name: tensor for name, tensor in self.state_dict().items()}
        arrays: dict[str, Any] = {name: tensor.float().cpu().numpy() for name, tensor in state.items()}
        with temporary_sibling(path) as temporary:
            np.savez_compressed(temporary, **arrays)
            os.replace(temporary, path)

    @torch.inference_mode()
    def decode(self, codes: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Turn codes into masks.

        Args:
            codes: integers [n, 16], row by row of the 4×4 grid.

        Returns:
            fp32 [n, 64, 64], about -1 outside and 1 inside.

        Raises:
            TypeError: codes that are not integers.
            ValueError: another shape, or a code outside the codebook.
        """
        codes = torch.as_tensor(codes, device=self.codebook.device)
        if codes.is_floating_point() or codes.is_complex():
            raise TypeError(f"codes: integers are expected, got {codes.dtype}")
        codes = codes.long()
        if codes.ndim != 2 or codes.shape[1] != CODES_PER_MASK:
            raise ValueError(f"codes: [n, {CODES_PER_MASK}] is expected, got {list(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < len(self.codebook):
            raise ValueError(f"codes: 0 to {len(self.codebook) - 1} are allowed, got {codes.min()} to {codes.max()}")
        grid = self.codebook[codes].reshape(len(codes), _GRID, _GRID, self.codebook.shape[1]).permute(0, 3, 1, 2)
        return self.decoder(grid)[:, 0]

    @torch.inference_mode()
    def encode(self, mask: np.ndarray | torch.Tensor, box: tuple[float, float, float, float]) -> torch.Tensor:
        """Find the codes of the part of a mask that lies in a box, for training data.

        Args:
            mask: [H, W], bool or numbers from 0 to 1.
            box: x1, y1, x2, y2 in pixels, rounded to whole ones.

        Returns:
            int64 [16].

        Raises:
            ValueError: the weights have no encoder, the mask has another shape, or the box contains no pixel.
        """
        if self.encoder is None:
            raise ValueError(f"{self._name}: has no encoder.* tensors, so masks can be decoded only")
        values = torch.as_tensor(mask).to(self.codebook.device, torch.float32)
        if values.ndim != 2:
            raise ValueError(f"mask: [H, W] is expected, got {list(values.shape)}")
        height, width = values.shape
        x1, y1, x2, y2 = (round(edge) for edge in _finite(box))
        x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
        if x1 >= x2 or y1 >= y2:
            raise ValueError(f"box: {box} holds no pixel of a mask of {width}×{height}")
        crop = crop_mask(values, (x1, y1, x2, y2))[None, None]
        features = self.encoder(crop * 2 - 1).permute(0, 2, 3, 1).reshape(CODES_PER_MASK, -1)
        # Use the exact form of the distance: the expanded form loses small differences between close codes.
        distances = torch.cdist(features, self.codebook, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.argmin(dim=1)


def crop_mask(mask: torch.Tensor, box: tuple[int, int, int, int]) -> torch.Tensor:
    """Resize the part of a mask [H, W] inside a box to the encoder's input, fp32 [64, 64]."""
    x1, y1, x2, y2 = box
    return nn.functional.interpolate(
        mask[None, None, y1:y2, x1:x2],
        size=(MASK_SIZE, MASK_SIZE),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )[0, 0]


def paste(mask: torch.Tensor | np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """Paste a decoded mask into its box in an image.

    Args:
        mask: [64, 64], positive inside.
        box: x1, y1, x2, y2 in pixels, truncated to integers; parts outside the image are left out.
        size: width and height of the image.

    Returns:
        bool [height, width].

    Raises:
        ValueError: the mask is not two-dimensional, or the box is not four finite numbers.
    """
    values = torch.as_tensor(mask, dtype=torch.float32)
    if values.ndim != 2:
        raise ValueError(f"mask: [h, w] is expected, got {list(values.shape)}")
    width, height = size
    # Truncate towards zero, as big_vision's evaluator does. Its training targets are rounded instead.
    x1, y1, x2, y2 = (int(edge) for edge in _finite(box))
    canvas = np.zeros((height, width), dtype=bool)
    if x1 >= x2 or y1 >= y2:
        return canvas
    resized = nn.functional.interpolate(
        values[None, None], size=(y2 - y1, x2 - x1), mode="bilinear", align_corners=False, antialias=True
    )[0, 0]
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if left < right and top < bottom:
        visible = resized[top - y1 : bottom - y1, left - x1 : right - x1]
        canvas[top:bottom, left:right] = (visible > 0).cpu().numpy()
    return canvas


def _finite(box: Sequence[float]) -> Sequence[float]:
    if len(box) != 4 or not all(-math.inf < edge < math.inf for edge in box):
        raise ValueError(f"box: four finite numbers are expected, got {box!r:.80}")
    return box


class _Shapes:
    """Tensors by name, with errors that name the tensor and its file."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], source: str) -> None:
        self._tensors = tensors
        self._source = source

    def get(self, key: str, shape: tuple[int | None, ...]) -> torch.Tensor:
        if key not in self._tensors:
            raise ValueError(f"{self._source}: {key} is missing")
        tensor = self._tensors[key]
        if tensor.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, tensor.shape)):
            expected = ", ".join("any" if want is None else str(want) for want in shape)
            raise ValueError(f"{self._source}: {key} has shape {list(tensor.shape)}, expected [{expected}]")
        return tensor

    def conv(self, prefix: str, in_channels: int, kernel: int, out_channels: int | None = None) -> nn.Conv2d:
        out = self.get(f"{prefix}.weight", (out_channels, in_channels, kernel, kernel)).shape[0]
        self.get(f"{prefix}.bias", (out,))
        stride, padding = (2, 1) if kernel == 4 else (1, kernel // 2)
        return nn.Conv2d(in_channels, out, kernel, stride=stride, padding=padding)

    def transposed(self, prefix: str, in_channels: int) -> nn.ConvTranspose2d:
        out = self.get(f"{prefix}.weight", (in_channels, None, 4, 4)).shape[1]
        self.get(f"{prefix}.bias", (out,))
        return nn.ConvTranspose2d(in_channels, out, 4, stride=2, padding=1)

    def residual(self, prefix: str, channels: int) -> _Residual:
        hidden = self.conv(f"{prefix}.net.0", channels, 3).out_channels
        self.conv(f"{prefix}.net.2", hidden, 3, out_channels=hidden)
        self.conv(f"{prefix}.net.4", hidden, 1, out_channels=channels)
        return _Residual(channels, hidden)


def _build_decoder(shapes: _Shapes, embedding: int) -> nn.Sequential:
    first = shapes.conv("decoder.0", embedding, 1)
    channels = first.out_channels
    layers: list[nn.Module] = [first, nn.ReLU(), *(shapes.residual(f"decoder.{i}", channels) for i in (2, 3))]
    for i in (4, 6, 8, 10):
        layers += [shapes.transposed(f"decoder.{i}", channels), nn.ReLU()]
        channels = shapes.get(f"decoder.{i}.bias", (None,)).shape[0]
    return nn.Sequential(*layers, shapes.conv("decoder.12", channels, 1, out_channels=1))


def _build_encoder(shapes: _Shapes, embedding: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 1
    for i in (0, 2, 4, 6):
        conv = shapes.conv(f"encoder.{i}", channels, 4)
        layers += [conv, nn.ReLU()]
        channels = conv.out_channels
    layers += [shapes.residual(f"encoder.{i}", channels) for i in (8, 9)]
    return nn.Sequential(*layers, shapes.conv("encoder.10", channels, 1, out_channels=embedding))
