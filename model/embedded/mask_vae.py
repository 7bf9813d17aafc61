"""Training of the small model's mask VQ-VAE: silhouettes of the world's emoji, and other shapes, as sixteen codes each."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import trange

from ..files import temporary_sibling
from ..segmentation import CODEBOOK, MASK_SIZE, MaskVQVAE, crop_mask

_CODES = 128  # as many as there are <seg> tokens
_EMBEDDING = 16
_ENCODER_WIDTHS = (16, 32, 48, 64)  # channels at 32, 16, 8 and 4 pixels
_DECODER_WIDTHS = (48, 24, 8, 4)  # channels at 8, 16, 32 and 64 pixels
_HIDDEN = 16  # channels inside the residual blocks

_VISIBLE = 64  # a pixel with less alpha (of 255) does not belong to a mask, as for the world's boxes
_SIZES = (24, 160)  # pixels of the larger side
_MAX_ROTATION = 10.0  # degrees, as in the world
_POSES = 64  # drawn of each silhouette and shape
_SHAPES = 60

_PAIRS = 16  # per step: two poses each
_SHAPE_PAIRS = 3  # of them
_LEARNING_RATE = 3e-3
_WARM_UP = 100  # steps
_UNQUANTISED = 120  # steps before the codebook is made: features are worth clustering, and not yet used to carry more
_DECAY = 0.99  # of the codebook's moving averages
_REVIVING = (50, 0.7)  # every so many steps, up to this share of the steps
_RARE = 0.5  # a code that fewer of a step's features choose on average is set anew
_COMMITMENT = 0.25
_CONSISTENCY = 0.2
_SCALE = 0.01


def pose_masks(alpha: Image.Image, poses: int, rng: random.Random) -> Tensor:
    """Draw a silhouette at random sizes (24 to 160 pixels) and tilts (10 degrees at most), as the encoder sees it.

    `alpha`: its opacity, mode L. Returns fp32 [poses, 64, 64] from 0 to 1. Raises ValueError if no pixel is visible.
    """
    if np.asarray(alpha).max() < _VISIBLE:
        raise ValueError(f"alpha: no pixel is as opaque as {_VISIBLE} of 255")
    masks: list[Tensor] = []
    while len(masks) < poses:
        tilt = rng.uniform(-_MAX_ROTATION, _MAX_ROTATION)
        turned = alpha.rotate(tilt, Image.Resampling.BICUBIC, expand=True)
        scale = rng.uniform(*_SIZES) / max(turned.size)
        size = (math.ceil(turned.width * scale), math.ceil(turned.height * scale))
        mask = np.asarray(turned.resize(size, Image.Resampling.BICUBIC)) >= _VISIBLE
        box = Image.fromarray(mask).getbbox()
        if box is not None:  # a line may vanish when it is drawn small
            masks.append(crop_mask(torch.from_numpy(mask).float(), box))
    return torch.stack(masks)


def random_shape(rng: random.Random) -> Image.Image:
    """Draw an ellipse, a polygon or a blob of several of them: an opacity, mode L, 128×128."""
    image = Image.new("L", (128, 128))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        x, y = rng.uniform(40, 88), rng.uniform(40, 88)
        if rng.random() < 0.5:
            width, height = rng.uniform(8, 38), rng.uniform(8, 38)
            draw.ellipse((x - width, y - height, x + width, y + height), fill=255)
        else:
            corners, start = rng.randint(3, 8), rng.uniform(0, 2 * math.pi)
            angles = [start + 2 * math.pi * corner / corners for corner in range(corners)]
            radii = [rng.uniform(12, 38) for _ in angles]
            draw.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles)], fill=255)
    return image.rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC)


def train_mask_vae(
    path: str | os.PathLike[str], alphas: Sequence[Image.Image], *, steps: int = 4000, seed: int = 0
) -> MaskVQVAE:
    """Train a small mask VQ-VAE and write it in the layout of `vae-oid.npz`, as float16; 6 minutes on one core.

    `path`: the .npz file. `alphas`: opacities (mode L) of the objects whose masks it is for; a share of other shapes is added.
    On one thread the same arguments give the same tensors. Raises ValueError for arguments it has no use for.

    Source: van den Oord et al. 2017 (arXiv:1711.00937), with the codebook learnt by moving averages (its appendix A.1) and
    rare codes set anew. A term of our own draws two poses of an object together, so that more of their codes are the same: a
    language model has to guess them from the picture.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"path: the file's name must end in .npz, got {path}")
    if not alphas:
        raise ValueError("alphas: at least one silhouette is needed")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    with temporary_sibling(path) as temporary:
        temporary.touch()  # a folder that cannot be written to is noticed before the work
        tensors = _train(alphas, steps, seed)
        arrays: dict[str, Any] = {key: value.numpy().astype(np.float16) for key, value in tensors.items()}
        np.savez_compressed(temporary, **arrays)
        os.replace(temporary, path)
    return MaskVQVAE.from_file(path)


def _train(alphas: Sequence[Image.Image], steps: int, seed: int) -> dict[str, Tensor]:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    objects = [*alphas, *(random_shape(rng) for _ in range(_SHAPES))]
    masks = torch.stack([pose_masks(alpha, _POSES, rng).half() for alpha in objects])
    codec = MaskVQVAE(_initial_tensors(generator))
    codec.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on CPU
    assert codec.encoder is not None
    weights = [*codec.encoder.parameters(), *codec.decoder.parameters()]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.Adam(weights, lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    codebook: _Codebook | None = None
    progress = trange(steps, desc="mask-vae", unit="step")
    for step in progress:
        chosen = torch.cat(
            (
                torch.randint(len(alphas), (_PAIRS - _SHAPE_PAIRS,), generator=generator),
                torch.randint(len(alphas), len(objects), (_SHAPE_PAIRS,), generator=generator),
            )
        )
        poses = torch.randint(_POSES, (2, _PAIRS), generator=generator)
        pixels = masks[chosen, poses].reshape(-1, 1, MASK_SIZE, MASK_SIZE).float() * 2 - 1
        grid = codec.encoder(pixels.contiguous(memory_format=torch.channels_last))
        features = grid.permute(0, 2, 3, 1).reshape(-1, _EMBEDDING)
        # Distances are in units of the spread: the encoder cannot lessen them by making all features small. Nothing else then
        # sets the scale, so that it drifts beyond float16 if it is not held.
        spread = features.var(0).sum()
        scale = (spread / _EMBEDDING).log().square()
        first, second = features.chunk(2)
        apart = (first - second).square().sum(1).mean() / (2 * spread)
        if step < min(_UNQUANTISED, steps // 10):
            quantised, off = features, features.new_zeros(())
        else:
            if codebook is None:
                codebook = _Codebook(features.detach(), generator)
            nearest = codebook.update(features.detach())
            every, share = _REVIVING
            if step % every == 0 and step < share * steps:
                codebook.revive(features.detach(), generator)
            off = (features - nearest).square().sum(1).mean() / spread
            quantised = features + (nearest - features).detach()
        output = codec.decoder(quantised.reshape(len(pixels), 4, 4, _EMBEDDING).permute(0, 3, 1, 2))
        error = (output - pixels).square().mean()
        optimizer.zero_grad()
        (error + _COMMITMENT * off + _CONSISTENCY * apart + _SCALE * scale).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(error=f"{error.item():.3f}", off=f"{off.item():.3f}", apart=f"{apart.item():.3f}")
    assert codebook is not None
    state = {key: value for key, value in codec.state_dict().items() if key != "codebook"}
    return {CODEBOOK: codebook.codes, **state}


@dataclass(frozen=True)
class MaskScores:
    """The quality of a mask VQ-VAE: numbers from 0 to 1, and the number of codes in use."""

    iou: float  # of masks with what their own codes give
    iou_of_pose: float  # of masks with what the codes of the same object in another pose give
    shared: float  # codes that two poses of an object have in common
    codes: int  # different ones in use

    def __str__(self) -> str:
        return (
            f"IoU {self.iou:.3f}, from another pose's codes {self.iou_of_pose:.3f}, "
            f"codes shared by two poses {self.shared:.1%}, codes in use {self.codes}"
        )


def score_mask_vae(codec: MaskVQVAE, alphas: Sequence[Image.Image], *, poses: int = 8, seed: int = 1) -> MaskScores:
    """Encode and decode every silhouette in random poses. Training with another seed does not draw these poses."""
    rng = random.Random(seed)
    masks = torch.stack([pose_masks(alpha, poses, rng) for alpha in alphas])
    codes = torch.stack([codec.encode(mask, (0, 0, MASK_SIZE, MASK_SIZE)) for mask in masks.flatten(0, 1)])
    restored = (codec.decode(codes) > 0).view_as(masks)
    by_pose = codes.view(len(alphas), poses, -1)
    return MaskScores(
        iou=_iou(restored, masks > 0.5),
        iou_of_pose=_iou(restored, masks.roll(1, 1) > 0.5),
        shared=(by_pose == by_pose.roll(1, 1)).float().mean().item(),
        codes=len(codes.unique()),
    )


def _iou(a: Tensor, b: Tensor) -> float:
    """Mean intersection over union of masks, bool [..., h, w]."""
    return ((a & b).sum((-1, -2)) / (a | b).sum((-1, -2))).mean().item()


class _Codebook:
    """A codebook whose codes are moving averages of the features nearest to them."""

    def __init__(self, features: Tensor, generator: torch.Generator) -> None:
        self._sums = self._pick(features, generator)
        self._counts = torch.ones(_CODES)
        for _ in range(10):  # k-means
            self.update(features, decay=0.1)

    @property
    def codes(self) -> Tensor:
        return self._sums / self._counts[:, None].clamp(min=1e-30)

    def update(self, features: Tensor, decay: float = _DECAY) -> Tensor:
        """Find the nearest codes of features [n, E], update the codes, and return the updated codes, [n, E]."""
        chosen = torch.cdist(features, self.codes).argmin(1)
        votes = nn.functional.one_hot(chosen, _CODES).float()
        self._sums = decay * self._sums + (1 - decay) * (votes.T @ features)
        self._counts = decay * self._counts + (1 - decay) * votes.sum(0)
        return self.codes[chosen]

    def revive(self, features: Tensor, generator: torch.Generator) -> None:
        """Replace rarely chosen codes by randomly chosen features."""
        rare = self._counts < _RARE
        self._sums = torch.where(rare[:, None], self._pick(features, generator), self._sums)
        self._counts = self._counts.masked_fill(rare, 1.0)

    @staticmethod
    def _pick(features: Tensor, generator: torch.Generator) -> Tensor:
        return features[torch.randint(len(features), (_CODES,), generator=generator)]


def _initial_tensors(generator: torch.Generator) -> dict[str, Tensor]:
    """Make tensors of vae-oid's layout: He initialisation, and a codebook that training replaces."""
    top = _ENCODER_WIDTHS[-1]
    layers = {"encoder.10": (_EMBEDDING, top, 1), "decoder.0": (top, _EMBEDDING, 1)}  # out, in, kernel
    for i, (before, after) in enumerate(zip((1, *_ENCODER_WIDTHS), _ENCODER_WIDTHS)):
        layers[f"encoder.{2 * i}"] = (after, before, 4)
    for block in ("encoder.8", "encoder.9", "decoder.2", "decoder.3"):
        layers[f"{block}.net.0"] = (_HIDDEN, top, 3)
        layers[f"{block}.net.2"] = (_HIDDEN, _HIDDEN, 3)
        layers[f"{block}.net.4"] = (top, _HIDDEN, 1)
    layers["decoder.12"] = (1, _DECODER_WIDTHS[-1], 1)
    tensors = {CODEBOOK: torch.zeros(_CODES, _EMBEDDING)}
    for name, (after, before, kernel) in layers.items():
        scale = math.sqrt(2 / (before * kernel**2))
        tensors[f"{name}.weight"] = torch.randn(after, before, kernel, kernel, generator=generator) * scale
        tensors[f"{name}.bias"] = torch.zeros(after)
    for i, (before, after) in enumerate(zip((top, *_DECODER_WIDTHS), _DECODER_WIDTHS)):
        name = f"decoder.{4 + 2 * i}"  # transposed, of stride 2: four of the sixteen taps meet in a pixel
        tensors[f"{name}.weight"] = torch.randn(before, after, 4, 4, generator=generator) * math.sqrt(2 / (before * 4))
        tensors[f"{name}.bias"] = torch.zeros(after)
    return tensors
