"""Damaged weights and unusual names are either read correctly or refused in one line that names file and tensor."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pg_kernels import quantize_
from pg_kernels.model import PaliGemma, PaliGemmaConfig, TextConfig, VisionConfig
from pg_kernels.model.checkpoints.conversion import convert
from pg_kernels.model.files import temporary_sibling

TEXT = TextConfig("gemma", 64, 32, 48, 2, 2, 1, 16)
CONFIG = PaliGemmaConfig(VisionConfig(32, 48, 1, 2, image_size=28), TEXT, image_token_id=63)


@pytest.fixture(scope="module")
def model() -> PaliGemma:
    torch.manual_seed(0)
    return PaliGemma(CONFIG)


@pytest.fixture
def folder(model: PaliGemma, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def assert_equal(found: PaliGemma, expected: PaliGemma) -> None:
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())


# Prefixes

PREFIXES = (
    "_orig_mod.",
    "module.",
    "model.paligemma_with_expert.paligemma.",
    "base_model.model.",
    "module._orig_mod.base_model.model.",
)
LAYOUTS = ("files", "memory")  # `language_model.model.…`, and `model.language_model.…` since transformers 4.52


def prefixed(folder: Path, model: PaliGemma, prefix: str, layout: str, **others: Tensor) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    if layout == "memory":
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    tensors = {prefix + name: tensor.clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file({**tensors, **others}, folder / "model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_prefix_of_all_tensors(folder: Path, model: PaliGemma, prefix: str, layout: str) -> None:
    prefixed(folder, model, prefix, layout)
    with pytest.warns(
        UserWarning, match=rf"{re.escape(str(folder))}: read without the prefix '{re.escape(prefix)}'"
    ) as told:
        found = PaliGemma.from_pretrained(folder)
    assert len(told) == 1
    assert_equal(found, model)
    with pytest.warns(UserWarning, match="read without the prefix"):
        convert(folder, folder.parent / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(PaliGemma.from_pretrained(folder.parent / "plain"), model)


def test_an_untied_head_and_int8_under_a_prefix(folder: Path, model: PaliGemma) -> None:
    head = torch.randn(64, 32)
    prefixed(folder, model, "module.", "memory", **{"module.lm_head.weight": head})
    with pytest.warns(UserWarning, match="'module.'"):
        assert torch.equal(PaliGemma.from_pretrained(folder).lm_head.weight, head)
    quantised = quantize_(load_copy(model))
    quantised.save_pretrained(folder)
    prefixed(folder, model, "_orig_mod.", "files")
    with pytest.warns(UserWarning, match="'_orig_mod.'"):
        assert_equal(PaliGemma.from_pretrained(folder), quantised)


def load_copy(model: PaliGemma) -> PaliGemma:
    copied = PaliGemma(CONFIG)
    copied.load_state_dict(model.state_dict())
    return copied


def test_tensors_beside_the_prefixed_ones_are_another_models(folder: Path, model: PaliGemma) -> None:
    """Write a robot policy's file: PaliGemma and an action expert."""
    prefix = "model.paligemma_with_expert.paligemma."
    expert = {
        "model.paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3),
        "model.paligemma_with_expert.gemma_expert.lm_head.weight": torch.zeros(3, 3),
        "model.action_in_proj.bias": torch.zeros(3, dtype=torch.int32),
    }
    prefixed(folder, model, prefix, "memory", **expert)
    with pytest.warns(UserWarning, match=r"3 tensor\(s\) without it are ignored: .*model\.action_in_proj\.bias"):
        assert_equal(PaliGemma.from_pretrained(folder), model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # A copy of another model's tensors, or one tensor that could belong to the model.
        ({"ema.": None}, r"under several prefixes: 'ema\.', 'module\.'"),
        ({"lm_head.weight": torch.zeros(64, 32)}, r"1 unexpected tensor\(s\): model\.safetensors: lm_head\.weight"),
        ({"module.lora_A": torch.zeros(1)}, r"1 unexpected tensor\(s\): .*module\.lora_A"),
    ],
)
def test_prefixes_that_do_not_tell(
    folder: Path, model: PaliGemma, changes: dict[str, Tensor | None], message: str
) -> None:
    others = {
        prefix + name: tensor.clone()
        for prefix, value in changes.items()
        if value is None
        for name, tensor in model.state_dict().items()
    }
    others |= {name: value for name, value in changes.items() if value is not None}
    prefixed(folder, model, "module.", "memory", **others)
    with pytest.raises(ValueError, match=message.replace("model\\.safetensors", ".*model\\.safetensors")):
        PaliGemma.from_pretrained(folder)


def test_missing_and_unexpected_names_stand_in_one_error(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for prefix in ("", "module."):
        changed = {prefix + name.replace("up_proj", "up"): tensor.clone() for name, tensor in tensors.items()}
        if prefix:
            changed["up"] = changed.pop(f"{prefix}language_model.model.layers.0.mlp.up.weight")
        safetensors.torch.save_file(changed, folder / "model.safetensors")
        with pytest.raises(ValueError) as caught:
            PaliGemma.from_pretrained(folder)
        missing, unexpected = str(caught.value).split("; 2 unexpected tensor(s): ")
        assert missing.startswith(
            f"{folder}: 2 tensor(s) missing: {prefix}language_model.model.layers.0.mlp.up_proj.weight"
        )
        assert "layers.1.mlp.up.weight" in unexpected


# Damaged files


def with_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = change(json.loads(content[8 : 8 + size]))
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + size :])


NORM = "language_model.model.norm.weight"
HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nested": lambda header: b"[" * 100_000,
    "list": lambda header: [],
    "empty": lambda header: {},
    "no offsets": lambda header: header | {NORM: {"dtype": "F32", "shape": [32]}},
    "negative": lambda header: header | {NORM: header[NORM] | {"shape": [-32]}},
    "huge": lambda header: header | {NORM: header[NORM] | {"shape": [2**62, 2**62]}},
    "scalar": lambda header: header | {NORM: header[NORM] | {"shape": []}},
    "other dtype": lambda header: header | {NORM: header[NORM] | {"dtype": "F99"}},
    "integers": lambda header: header | {NORM: header[NORM] | {"dtype": "I32"}},
    "half": lambda header: header | {NORM: header[NORM] | {"dtype": "F16"}},
    "beyond the end": lambda header: header | {NORM: header[NORM] | {"data_offsets": [0, 2**50]}},
    "layer": lambda header: {name.replace("layers.1.", f"layers.{10**30}."): value for name, value in header.items()},
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_damaged_headers(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with_header(folder / "model.safetensors", change)
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        PaliGemma.from_pretrained(folder)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "weight_map",
    [None, [], {}, "model.safetensors", {"a": 3}, {"a": None}, {"a": "../hf/model.safetensors"}, {"a": "/etc/passwd"}]
    + [{"a": name} for name in ("", ".", "..", "sub/model.safetensors", "\0", "a" * 10_000)],
)
def test_an_index_of_other_types_or_places(folder: Path, weight_map: object) -> None:
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(index))):
        PaliGemma.from_pretrained(folder)


def rewritten(path: Path, **changes: bytes | None) -> Path:
    """Replace or add members of an .npz, or remove them (None). Dots stand for slashes in names."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members |= {f"params/{name.replace('.', '/')}.npy": content or b"" for name, content in changes.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def array(
    shape: object, descr: object = "<f4", data: bytes = b"", version: int = 1, length: int | None = None
) -> bytes:
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    size = (len(header) if length is None else length).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + data


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(value, dtype=object), allow_pickle=True)
    return buffer.getvalue()


FINAL_NORM, LINEAR = "llm.final_norm.scale", "llm.layers.mlp.linear"
ARRAYS: list[tuple[str, bytes]] = [
    (FINAL_NORM, b""),
    (FINAL_NORM, b"no array"),
    (FINAL_NORM, array((32,))),  # without data
    (FINAL_NORM, array((32,), data=b"\0" * 127)),
    (FINAL_NORM, array((32,), data=b"\0" * 129)),
    (FINAL_NORM, array((2**40,), data=b"\0" * 128)),
    (FINAL_NORM, array((2**63, 2**63))),
    (FINAL_NORM, array((10**30,))),
    (FINAL_NORM, array((-32,), data=b"\0" * 128)),
    (FINAL_NORM, array((0,))),
    (FINAL_NORM, array(("a",))),
    (FINAL_NORM, array("shape")),
    (FINAL_NORM, array((32,), "|O")),
    (FINAL_NORM, array((32,), ">f4", b"\0" * 128)),
    (FINAL_NORM, array((32,), [("a", "<f4")], b"\0" * 128)),
    (FINAL_NORM, array((32,), "nothing")),
    (FINAL_NORM, array((32,), version=2, length=2**32 - 1)),
    (FINAL_NORM, array((32,), version=9)),
    (FINAL_NORM, array((32,), length=20)),  # cut inside the header's Python literal
    (FINAL_NORM, pickled([{}])),
    (LINEAR, array((10**9, 48, 32), data=b"\0" * 64)),
    (LINEAR, array((10**12, 0))),
    ("llm.layers_999999.mlp.linear", array((48, 32), data=b"\0" * 4 * 48 * 32)),
    (f"llm.layers_{'9' * 5000}.mlp.linear", array((48, 32), data=b"\0" * 4 * 48 * 32)),
]


@pytest.mark.parametrize(("name", "content"), ARRAYS)
def test_damaged_arrays(model: PaliGemma, tmp_path: Path, name: str, content: bytes) -> None:
    model.save_big_vision(tmp_path / "p.npz")
    rewritten(tmp_path / "p.npz", **{name: content})
    named = name.replace(".", "/")[:40]
    with pytest.raises(ValueError, match=rf"p\.npz: .*({re.escape(named)}|num_hidden_layers)"):
        PaliGemma.from_pretrained(tmp_path / "p.npz")


def test_an_array_stored_twice(model: PaliGemma, tmp_path: Path) -> None:
    model.save_big_vision(tmp_path / "p.npz")
    with zipfile.ZipFile(tmp_path / "p.npz", "a") as archive:
        archive.writestr("llm/final_norm/scale.npy", archive.read("params/llm/final_norm/scale.npy"))
    with pytest.raises(ValueError, match=r"llm/final_norm/scale: holds the same array as params/llm/final_norm/scale"):
        PaliGemma.from_pretrained(tmp_path / "p.npz")


@pytest.mark.parametrize("offset", [4, 6, 8, 10, 20, 24, 28, 42])  # version, flags, compression, sizes, lengths, offset
def test_damaged_directory_of_a_zip(model: PaliGemma, tmp_path: Path, offset: int) -> None:
    path = tmp_path / "p.npz"
    model.save_big_vision(path)
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\1\2")
    content[start + offset : start + offset + 2] = b"\xff\x7f"
    path.write_bytes(content)
    try:
        PaliGemma.from_pretrained(path)
    except ValueError as error:
        assert str(path) in str(error)


def test_an_array_that_claims_more_than_the_file_holds(model: PaliGemma, tmp_path: Path) -> None:
    """Sizes in the zip directory, the array header and the configuration must agree before memory is allocated for them."""
    path = tmp_path / "p.npz"
    model.save_big_vision(path)
    table = array((2**38, 32))
    rewritten(path, **{"llm.embedder.input_embedding": table})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("params/llm/embedder/input_embedding.npy")
    claimed = len(table) + 2**38 * 32 * 4
    for start in (m.start() for m in re.finditer(b"PK\1\2", content)):
        if content[start + 46 :].startswith(info.filename.encode()):
            content[start + 24 : start + 28] = min(claimed, 2**32 - 2).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"input_embedding: has \d+ bytes of data, expected 35184372088832"):
        PaliGemma.from_pretrained(path)


def test_float64_becomes_float32(model: PaliGemma, folder: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({name: t.double() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"dtype": "float64"})
    )
    convert(folder, tmp_path / "p.npz")
    for path in (folder, tmp_path / "p.npz"):
        found = PaliGemma.from_pretrained(path)
        assert found.lm_head.weight.dtype == torch.float32
        assert_equal(found, model)


# A full disk


@pytest.fixture
def small_files() -> Iterator[None]:
    """Limit files to 20 kB, like a full disk."""
    resource = pytest.importorskip("resource", reason="file sizes are limited by POSIX")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_os_error(model: PaliGemma, folder: Path, small_files: None) -> None:
    target = folder.parent / "out"

    def by_safetensors() -> None:
        with temporary_sibling(target) as temporary:
            safetensors.torch.save_file({"a": torch.zeros(10_000)}, temporary)

    for save in (
        lambda: model.save_pretrained(target),
        lambda: model.save_big_vision(target),
        lambda: convert(folder, target),
        by_safetensors,
    ):
        with pytest.raises(OSError, match=re.escape(f"cannot write {target}: {os.strerror(errno.EFBIG)}")) as caught:
            save()
        assert caught.value.errno == errno.EFBIG
        assert {path.name for path in folder.parent.iterdir()} == {"hf"}


def test_safetensors_errors_of_writing_are_os_errors(tmp_path: Path) -> None:
    for text, number in (("I/O error: No space left on device (os error 28)", 28), ("other", errno.EIO)):
        match = re.escape(f"cannot write {tmp_path / 'a'}: ")
        with pytest.raises(OSError, match=match) as caught, temporary_sibling(tmp_path / "a"):
            raise SafetensorError(text)
        assert caught.value.errno == number
