"""The mask VQ-VAE, compared with the original code's outputs and with an independent computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import save_file

from pg_kernels.model.segmentation import MaskVQVAE, paste

FIXTURES = Path(__file__).parents[1] / "fixtures"


def decoder_tensors() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "seg_vae.params.npz") as file:
        return {key: file[key] for key in file.files}


def encoder_tensors(embedding: int = 24, hidden: int = 12, channels: int = 20) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"_vq_vae._embedding": (128, embedding)}
    widths = [1, 6, 10, 14, channels]
    for i in range(4):
        shapes[f"encoder.{2 * i}"] = (widths[i + 1], widths[i], 4, 4)
    for i in (8, 9):
        shapes[f"encoder.{i}.net.0"] = (hidden, channels, 3, 3)
        shapes[f"encoder.{i}.net.2"] = (hidden, hidden, 3, 3)
        shapes[f"encoder.{i}.net.4"] = (channels, hidden, 1, 1)
    shapes["encoder.10"] = (embedding, channels, 1, 1)
    shapes["decoder.0"] = (channels, embedding, 1, 1)
    for i in (2, 3):
        shapes[f"decoder.{i}.net.0"] = (hidden, channels, 3, 3)
        shapes[f"decoder.{i}.net.2"] = (hidden, hidden, 3, 3)
        shapes[f"decoder.{i}.net.4"] = (channels, hidden, 1, 1)
    for i, width in enumerate((12, 8, 6, 4)):
        shapes[f"decoder.{4 + 2 * i}"] = ((channels, 12, 8, 6)[i], width, 4, 4)
    shapes["decoder.12"] = (1, 4, 1, 1)
    tensors = {}
    for key, shape in shapes.items():
        fan_in = np.prod(shape[1:]) if len(shape) > 1 else 1
        values = (rng.standard_normal(shape) * (2 / fan_in) ** 0.5).astype(np.float32)
        if key.startswith("_"):
            tensors[key] = values
            continue
        out = shape[1] if key in ("decoder.4", "decoder.6", "decoder.8", "decoder.10") else shape[0]
        tensors[f"{key}.weight"] = values
        tensors[f"{key}.bias"] = rng.standard_normal(out).astype(np.float32) * 0.1
    return tensors


def build(tensors: dict[str, np.ndarray]) -> MaskVQVAE:
    return MaskVQVAE({key: torch.from_numpy(value) for key, value in tensors.items()}, name="weights")


def correlate(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """Compute a convolution as a sum over the kernel's taps, in fp64."""
    kernel = weight.shape[2]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    size = (x.shape[1] - kernel) // stride + 1
    out = np.broadcast_to(bias[:, None, None].astype(np.float64), (len(bias), size, size)).copy()
    for dy in range(kernel):
        for dx in range(kernel):
            window = x[:, dy : dy + stride * size : stride, dx : dx + stride * size : stride]
            out += np.einsum("oi,iyx->oyx", weight[:, :, dy, dx], window)
    return out


def reference_features(tensors: dict[str, np.ndarray], mask64: np.ndarray) -> np.ndarray:
    """Compute the encoder's features before the codebook, [16, E], from the published layer list."""

    def conv(x: np.ndarray, key: str, stride: int, padding: int) -> np.ndarray:
        return correlate(x, tensors[f"{key}.weight"], tensors[f"{key}.bias"], stride, padding)

    x = 2.0 * mask64[None].astype(np.float64) - 1.0
    for i in (0, 2, 4, 6):
        x = np.maximum(conv(x, f"encoder.{i}", 2, 1), 0)
    for i in (8, 9):
        y = np.maximum(conv(x, f"encoder.{i}.net.0", 1, 1), 0)
        y = np.maximum(conv(y, f"encoder.{i}.net.2", 1, 1), 0)
        x = x + conv(y, f"encoder.{i}.net.4", 1, 0)
    return conv(x, "encoder.10", 1, 0).reshape(-1, 16).T


def blob(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 1, 5, 5)))
    return (F.interpolate(coarse, size=(height, width), mode="bicubic")[0, 0] > 0.5).numpy()


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return encoder_tensors()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_decoder_equals_the_original_code(suffix: str, tmp_path: Path) -> None:
    path = FIXTURES / "seg_vae.params.npz"
    if suffix == ".safetensors":
        path = tmp_path / "vae-oid.safetensors"
        save_file(decoder_tensors(), path)
    codec = MaskVQVAE.from_file(path)
    with np.load(FIXTURES / "seg_vae.io.npz") as io:
        for codes in (io["codebook_indices"], torch.from_numpy(io["codebook_indices"])):
            masks = codec.decode(codes)
            assert masks.dtype == torch.float32
            np.testing.assert_allclose(masks.numpy(), io["mask"][..., 0], atol=1e-4)
    assert codec.decode(np.zeros((0, 16), np.int64)).shape == (0, 64, 64)


def test_encoder_equals_the_layer_list(tensors: dict[str, np.ndarray]) -> None:
    codec = build(tensors)
    codes = set()
    for seed, (height, width) in enumerate([(64, 64), (64, 64), (200, 90), (31, 64)]):
        mask = blob(height, width, seed)
        box = (0, 0, 64, 64) if height == 64 else (5.4, 2.6, width - 3, height - 4)
        x1, y1, x2, y2 = (round(edge) for edge in box)
        # Pillow's float bilinear is the antialiased triangle filter of the original pipeline.
        crop = Image.fromarray(mask[y1:y2, x1:x2].astype(np.float32)).resize((64, 64), Image.Resampling.BILINEAR)
        features = reference_features(tensors, np.asarray(crop))
        distances = ((features[:, None] - tensors["_vq_vae._embedding"][None]) ** 2).sum(-1)
        result = codec.encode(mask, box)
        assert result.dtype == torch.int64 and result.tolist() == distances.argmin(1).tolist()
        assert torch.equal(codec.encode(torch.from_numpy(mask).float(), box), result)
        codes.update(result.tolist())
    assert len(codes) > 8


def test_features_on_the_codebook_give_their_codes(tensors: dict[str, np.ndarray]) -> None:
    mask = blob(64, 64, seed=3)
    features = reference_features(tensors, mask.astype(np.float64))
    expected = np.random.default_rng(1).permutation(128)[:16]
    codebook = np.random.default_rng(2).standard_normal((128, features.shape[1])) * 10
    codebook[expected] = features
    codec = build({**tensors, "_vq_vae._embedding": codebook.astype(np.float32)})
    assert codec.encode(mask, (0, 0, 64, 64)).tolist() == expected.tolist()


def test_decoding_only(tensors: dict[str, np.ndarray]) -> None:
    codec = MaskVQVAE.from_file(FIXTURES / "seg_vae.params.npz")
    with pytest.raises(ValueError, match=r"seg_vae.params.npz: has no encoder"):
        codec.encode(np.ones((4, 4), bool), (0, 0, 4, 4))
    assert not any(parameter.requires_grad for parameter in codec.parameters())


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("_vq_vae._embedding", None, "_vq_vae._embedding is missing"),
        ("decoder.3.net.4.bias", None, "decoder.3.net.4.bias is missing"),
        ("encoder.9.net.2.weight", None, "encoder.9.net.2.weight is missing"),
        ("decoder.12.weight", (2, 4, 1, 1), r"decoder.12.weight has shape \[2, 4, 1, 1\], expected \[1, 4, 1, 1\]"),
        ("decoder.4.weight", (20, 12, 3, 3), r"decoder.4.weight has shape .* expected \[20, any, 4, 4\]"),
        ("encoder.10.weight", (23, 20, 1, 1), r"encoder.10.weight .* expected \[24, 20, 1, 1\]"),
        ("encoder.0.bias", (7,), r"encoder.0.bias .* expected \[6\]"),
        ("_vq_vae._embedding", (128,), r"_vq_vae._embedding .* expected \[any, any\]"),
    ],
)
def test_bad_weights_are_named(
    key: str, shape: tuple[int, ...] | None, message: str, tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    broken = {name: value for name, value in tensors.items() if name != key}
    if shape is not None:
        broken[key] = np.zeros(shape, np.float32)
    np.savez(tmp_path / "broken.npz", **broken)
    with pytest.raises(ValueError, match=f"broken.npz: {message}"):
        MaskVQVAE.from_file(tmp_path / "broken.npz")


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone.npz"):
        MaskVQVAE.from_file(tmp_path / "gone.npz")
    for name in ("text.npz", "text.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1")
        with pytest.raises(ValueError, match=f"{name}: not a"):
            MaskVQVAE.from_file(tmp_path / name)
    np.savez(tmp_path / "pickled.npz", a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="pickled.npz: not an .npz file of arrays"):
        MaskVQVAE.from_file(tmp_path / "pickled.npz")
    content = (FIXTURES / "seg_vae.params.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="half.npz: not an .npz"):
        MaskVQVAE.from_file(tmp_path / "half.npz")
    np.savez_compressed(tmp_path / "deflated.npz", a=np.arange(1000.0))
    content = bytearray((tmp_path / "deflated.npz").read_bytes())
    content[60:90] = bytes(30)
    (tmp_path / "deflated.npz").write_bytes(content)
    with pytest.raises(ValueError, match="deflated.npz: not an .npz"):
        MaskVQVAE.from_file(tmp_path / "deflated.npz")


def test_bad_arguments(tensors: dict[str, np.ndarray]) -> None:
    codec = build(tensors)
    with pytest.raises(ValueError, match=r"codes: \[n, 16\]"):
        codec.decode(torch.zeros(16, dtype=torch.int64))
    for code in (-1, 128):
        with pytest.raises(ValueError, match="codes: 0 to 127"):
            codec.decode(torch.full((1, 16), code))
    with pytest.raises(TypeError, match="codes: integers"):
        codec.decode(np.zeros((1, 16)))
    for box in ((0, 0, float("inf"), 4), (0, float("nan"), 4, 4), (0, 0, 4)):
        with pytest.raises(ValueError, match="box: four finite numbers"):
            paste(np.zeros((64, 64)), box, (4, 4))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="box: four finite numbers"):
            codec.encode(np.zeros((4, 4), bool), box)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask: \[H, W\]"):
        codec.encode(np.zeros((1, 4, 4), bool), (0, 0, 4, 4))
    with pytest.raises(ValueError, match="no pixel of a mask of 4×3"):
        codec.encode(np.zeros((3, 4), bool), (4, 0, 9, 3))
    with pytest.raises(ValueError, match="mask"):
        paste(np.zeros((1, 64, 64)), (0, 0, 4, 4), (4, 4))


@pytest.mark.parametrize("box", [(3.9, 2.2, 20.7, 30.1), (0, 0, 150, 100), (10, 20, 140, 30)])
def test_paste_is_pillows_bilinear_in_the_box(box: tuple[float, float, float, float]) -> None:
    mask = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    x1, y1, x2, y2 = map(int, box)
    resized = Image.fromarray(mask).resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)
    expected = np.zeros((100, 150), bool)
    expected[y1:y2, x1:x2] = np.asarray(resized) > 0
    result = paste(torch.from_numpy(mask), box, (150, 100))
    assert result.dtype == bool
    assert np.array_equal(result, expected)


def test_paste_at_the_edges() -> None:
    halves = np.concatenate([-np.ones((64, 32)), np.ones((64, 32))], 1)
    assert np.array_equal(paste(halves, (-2, -5, 2, 3), (4, 4))[:, :3].any(0), [True, True, False])
    assert not paste(halves, (8, 8, 12, 12), (4, 4)).any()
    assert not paste(halves, (1.2, 0, 1.9, 4), (4, 4)).any()
