"""The shipped mask VQ-VAE and its training."""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pg_kernels.model import EMBEDDED_CHECKPOINT, Processor
from pg_kernels.model.embedded import mask_vae
from pg_kernels.model.embedded.mask_vae import pose_masks, random_shape, score_mask_vae, train_mask_vae
from pg_kernels.model.embedded.world import FONT_PATH, render_glyphs
from pg_kernels.model.segmentation import MaskVQVAE

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHIPPED = Path(EMBEDDED_CHECKPOINT) / "vae-oid.npz"

needs_emoji = pytest.mark.skipif(find_spec("emoji") is None, reason="needs the package emoji (extra: train)")
needs_font = pytest.mark.skipif(not Path(FONT_PATH).is_file(), reason="needs Debian's fonts-noto-color-emoji")


def silhouettes() -> list[Image.Image]:
    """Return a ring and a bar."""
    ring, bar = Image.new("L", (100, 80)), Image.new("L", (90, 90))
    ImageDraw.Draw(ring).ellipse((10, 5, 89, 74), outline=255, width=12)
    ImageDraw.Draw(bar).line((15, 80, 75, 10), fill=255, width=20)
    return [ring, bar]


@needs_emoji
@needs_font
def test_shipped_codec_restores_the_masks_of_emoji() -> None:
    alphas = [glyph.getchannel("A") for glyph in render_glyphs().values()]
    scores = score_mask_vae(MaskVQVAE.from_file(SHIPPED), alphas, poses=4, seed=123)
    assert scores.iou > 0.94 and scores.iou_of_pose > 0.84 and scores.shared > 0.4


def test_shipped_codec_restores_other_shapes() -> None:
    rng = random.Random(123)  # differs from the training's seed
    scores = score_mask_vae(MaskVQVAE.from_file(SHIPPED), [random_shape(rng) for _ in range(40)], poses=2, seed=123)
    assert scores.iou > 0.94


def test_shipped_file_has_the_layout_of_vae_oid() -> None:
    with np.load(SHIPPED) as file:
        shapes = {key: file[key].shape for key in file.files}
        assert all(file[key].dtype == np.float16 for key in file.files)
    with np.load(FIXTURES / "seg_vae.params.npz") as file:
        decoder = {key: file[key].shape for key in file.files}
    layers = ["encoder.0", "encoder.2", "encoder.4", "encoder.6", "encoder.10"]
    layers += [f"encoder.{block}.net.{layer}" for block in (8, 9) for layer in (0, 2, 4)]
    assert set(shapes) == {*decoder, *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))}
    assert all(shapes[key][2:] == shape[2:] and len(shapes[key]) == len(shape) for key, shape in decoder.items())
    assert shapes["_vq_vae._embedding"][0] == 128
    assert SHIPPED.stat().st_size < 500_000


def test_the_shipped_checkpoint_decodes_masks() -> None:
    answer = "<loc0256><loc0128><loc0767><loc0895>" + "".join(f"<seg{code:03d}>" for code in range(16)) + " cat"
    (found,) = Processor.from_pretrained(EMBEDDED_CHECKPOINT).parse(answer, (112, 112))
    assert found.mask is not None and found.mask.shape == (112, 112)


def test_training_again_gives_the_same_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("_POSES", "_SHAPES", "_PAIRS"):
        monkeypatch.setattr(mask_vae, size, 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # longer sums add up in another order
    try:
        runs = [
            train_mask_vae(tmp_path / f"{name}.npz", silhouettes(), steps=20, seed=seed)
            for name, seed in (("first", 0), ("again", 0), ("other", 1))
        ]
    finally:
        torch.set_num_threads(threads)
    first, again, other = (run.state_dict() for run in runs)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["codebook"], other["codebook"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.npz", "first.npz", "other.npz"]


def test_masks_fill_their_boxes_and_differ() -> None:
    masks = pose_masks(silhouettes()[0], 6, random.Random(0))
    assert masks.shape == (6, 64, 64) and masks.dtype == torch.float32
    assert masks.min() >= 0 and masks.max() <= 1 + 1e-6
    edges = torch.stack([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]])
    assert (edges.amax(-1) > 0).all()
    assert (masks[:, 32, 32] == 0).all()  # the ring's hole
    assert all((a - b).abs().max() > 0.2 for a, b in zip(masks, masks[1:]))


def test_codebook_finds_clusters_and_revives_the_rare() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 16, generator=generator) * 10
    features = centres.repeat(100, 1) + torch.randn(300, 16, generator=generator) * 0.01
    codebook = mask_vae._Codebook(features, generator)
    assert torch.cdist(features, codebook.codes).amin(1).max() < 0.2
    for _ in range(500):  # the features move, and the chosen codes follow
        features = features + 0.02
        nearest = codebook.update(features)
    assert (nearest - features).norm(dim=1).max() < 8
    lost = torch.cdist(codebook.codes, features).amin(1) > 10
    assert lost.any()
    codebook.revive(features, generator)
    assert (torch.cdist(codebook.codes, features).amin(1) < 10).all()


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must end in .npz"):
        train_mask_vae(tmp_path / "codec.safetensors", silhouettes())
    with pytest.raises(ValueError, match="alphas: at least one"):
        train_mask_vae(tmp_path / "codec.npz", [])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        train_mask_vae(tmp_path / "codec.npz", silhouettes(), steps=0)
    with pytest.raises(ValueError, match="no pixel is as opaque as 64 of 255"):
        train_mask_vae(tmp_path / "codec.npz", [Image.new("L", (20, 20), 63)])
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write .*codec.npz"):
        train_mask_vae(tmp_path / "file" / "codec.npz", silhouettes(), steps=10**9)
