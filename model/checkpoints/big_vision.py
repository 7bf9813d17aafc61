"""big_vision's .npz checkpoints: the original JAX naming, read and written one layer at a time."""

from __future__ import annotations

import lzma
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..config import PaliGemmaConfig, TextConfig, VisionConfig
from ..files import temporary_sibling, unreadable
from .big_vision_arrays import (
    IMAGE_BLOCK,
    LAYER_PREFIXES,
    SINGLE_ARRAYS,
    TEXT_BLOCK,
    Array,
    image_block,
    text_block,
)
from .layout import TensorSpec, raw_bytes, widest

# numpy has no bfloat16: JAX arrays of it are stored as two-byte voids.
_DTYPES = {
    np.dtype("<f4"): torch.float32,
    np.dtype("<f2"): torch.float16,
    np.dtype("V2"): torch.bfloat16,
    np.dtype("<f8"): torch.float64,
}
_DESCRIPTORS = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "|V2"}

_VOCABULARY = 257_152  # 256,000 pieces, 1,024 <loc>, 128 <seg>
_HF_PADDED_VOCABULARY = 257_216  # Hugging Face's files: <image> and random rows after it

_BLOCK = re.compile(rf"({IMAGE_BLOCK}|{TEXT_BLOCK})(?:[_/](\d{{1,6}}))?/(.+)")
# Optimiser and clock of a training checkpoint, and SigLIP's pooling head, which PaliGemma does not use.
_IGNORED = re.compile(r"(?:opt|chrono)(?:/|$)|img/MAPHead_0/")
_CHUNK_BYTES = 1 << 20
_MAX_LAYERS = 10_000  # a damaged header may say any number
# The exceptions of reading a damaged zip file or array; the last two are for encryption and unknown compression.
_DAMAGE = (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, RuntimeError)


@dataclass(frozen=True)
class _Member:
    """An array in the zip file. `array` is None if the model has no such parameter.

    `data_bytes` is the size of the data after the header. `layers` is the range of layers that the array holds, None outside the
    stacks; `stacked` tells whether its first axis runs over them.
    """

    member: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    data_bytes: int
    array: Array | None
    block: str | None
    layers: range | None
    stacked: bool

    def names(self, layer: int | None) -> tuple[str, ...]:
        if self.array is None:
            return (self.member.removesuffix(".npy"),)
        if self.block is None or layer is None:
            return self.array.names
        return tuple(f"{LAYER_PREFIXES[self.block]}.{layer}.{name}" for name in self.array.names)


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether column-major, and dtype. The file is then at the data."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        length = int.from_bytes(file.peek(4)[:4], "little")
        if length > 1 << 16:  # numpy would read it all before it refuses
            raise ValueError(f"its header has {length} bytes")
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {version} of the .npy format is not supported")


def _fill(file: IO[bytes], tensor: torch.Tensor) -> None:
    view = raw_bytes(tensor)
    position = 0
    while position < len(view):
        chunk = file.read(min(_CHUNK_BYTES, len(view) - position))
        if not chunk:
            raise EOFError(f"the data end after {position} of {len(view)} bytes")
        view[position : position + len(chunk)] = chunk
        position += len(chunk)


class BigVisionReader:
    """An open big_vision checkpoint.

    Keys with or without `params/`, stacked layers or `encoderblock_{i}` and `layers_{i}`, `q_einsum` and `kv_einsum` or
    `qkv_einsum`; float32, float16, bfloat16 stored as two-byte void, or float64. Raises ValueError, naming file and array,
    for anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.quantization: dict[str, Any] | None = None
        self.generation_defaults: dict[str, Any] = {}
        self.prefix = ""
        self.outside: dict[str, str] = {}
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, ValueError, RuntimeError, struct.error) as error:
            raise unreadable(path, ".npz", error) from error
        members = self._key_members()
        self._gemma2 = any(re.search(r"(?:^|/)post_(?:attention|ffw)_norm/", key) for key in members)
        # The attention weights may have either form. A file that mixes both has duplicates or gaps, which raise.
        self._arrays = {
            IMAGE_BLOCK: {array.key: array for array in image_block()},
            TEXT_BLOCK: {
                array.key: array
                for fused in (True, False)
                for array in text_block(gemma2=self._gemma2, fused_qkv=fused)
            },
        }
        self._members: list[_Member] = []
        self._by_key: dict[str, _Member] = {}
        self._sources: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for key, member in members.items():
            self._add(key, member)
        if not self._members:
            raise ValueError(f"{path} holds no arrays")
        self.dtype = widest(member.dtype for member in self._members)

    def _key_members(self) -> dict[str, str]:
        """Return the names in the zip file by key, without `params/` and `.npy`."""
        keys: dict[str, str] = {}
        for member in self._zip.namelist():
            key = member.removesuffix(".npy").removeprefix("params/")
            if not _IGNORED.match(key) and not member.endswith("/"):
                if key in keys:
                    raise self._error(member, f"holds the same array as {keys[key].removesuffix('.npy')}")
                keys[key] = member
        return keys

    def _error(self, member: str, reason: object) -> ValueError:
        return ValueError(f"{self.path}: {member.removesuffix('.npy')}: {reason}")

    def _add(self, key: str, member: str) -> None:
        try:
            with self._zip.open(member) as file:
                shape, _, dtype = _read_header(file)
                data_bytes = self._zip.getinfo(member).file_size - file.tell()
        except Exception as error:  # numpy parses a header as Python source, which can raise nearly anything
            raise self._error(member, f"cannot be read as an array: {error}") from error
        if dtype.hasobject:
            raise self._error(member, "is an array of Python objects, which are never unpickled")
        if dtype not in _DTYPES:
            raise self._error(member, f"has dtype {dtype}, expected float32, float16, bfloat16 (|V2) or float64")
        if any(type(size) is not int or size < 1 for size in shape) or math.prod(shape) >= 2**60:
            raise self._error(member, f"has shape {list(shape)}, which no array of a model has")
        entry = self._match(key, _Member(member, shape, _DTYPES[dtype], data_bytes, None, None, None, stacked=False))
        self._members.append(entry)
        self._by_key[key] = entry
        for layer in [None] if entry.layers is None else entry.layers:
            for name, part in zip(entry.names(layer), self._part_shapes(entry), strict=True):
                if name in self.shapes:
                    raise self._error(member, f"holds the same parameter ({name}) as {self._sources[name]}")
                self.shapes[name] = part
                self._sources[name] = member.removesuffix(".npy")

    def _match(self, key: str, entry: _Member) -> _Member:
        """Return the model's array of this key, or None."""
        for array in SINGLE_ARRAYS:
            if array.key == key:
                return replace(entry, array=array)
        match = _BLOCK.fullmatch(key)
        if match:
            block, layer, rest = match.groups()
            arrays = self._arrays[block]
            found = arrays.get(rest) or arrays.get(f"{rest}/w")
            if found is not None:
                if layer is not None:
                    return replace(entry, array=found, block=block, layers=range(int(layer), int(layer) + 1))
                if not entry.shape:
                    raise self._error(entry.member, "has no layer axis")
                if entry.shape[0] > _MAX_LAYERS:
                    raise self._error(entry.member, f"has shape {list(entry.shape)}, more layers than {_MAX_LAYERS}")
                return replace(entry, array=found, block=block, layers=range(entry.shape[0]), stacked=True)
        return entry

    def _part_shapes(self, entry: _Member) -> list[tuple[int, ...]]:
        """Return the shapes of one layer's parameters."""
        shape = entry.shape[1:] if entry.stacked else entry.shape
        if entry.array is None:
            return [shape]
        parts: tuple[torch.Tensor, ...] = ()
        if len(shape) == entry.array.ndim and len(entry.array.names) in (1, shape[0]):
            parts = entry.array.split(torch.empty(shape, device="meta"))
        if len(parts) != len(entry.array.names):
            layers = "layers, then " if entry.stacked else ""
            fused = f", the first of them {len(entry.array.names)}" if len(entry.array.names) > 1 else ""
            raise self._error(
                entry.member, f"has shape {list(entry.shape)}, expected {layers}{entry.array.ndim} dimensions{fused}"
            )
        return [tuple(part.shape) for part in parts]

    def _shape(self, *keys: str) -> tuple[int, ...]:
        """Return one layer's shape of the first existing array."""
        for key in keys:
            block = next((block for block in LAYER_PREFIXES if key.startswith(block)), None)
            unstacked = [key] if block is None else [key.replace(block, f"{block}{mark}0") for mark in "_/"]
            for candidate in (key, *unstacked):
                for spelling in (candidate, candidate.removesuffix("/w")):
                    if spelling in self._by_key:
                        entry = self._by_key[spelling]
                        return entry.shape[1:] if entry.stacked else entry.shape
        raise ValueError(f"{' or '.join(keys)} is missing")

    def _depth(self, block: str) -> int:
        return 1 + max(
            (entry.layers[-1] for entry in self._members if entry.block == block and entry.layers), default=-1
        )

    def read_config(self) -> PaliGemmaConfig:
        """Infer the configuration from the shapes.

        Values that no shape tells are the released ones: softcaps 50 and 30 with Gemma 2, the query scale head_dim^-1/2 (27B:
        144^-1/2), no sliding window.
        """
        try:
            return self._infer_config()
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def _infer_config(self) -> PaliGemmaConfig:
        patch_size, _, _, width = self._shape("img/embedding/kernel")
        tokens = self._shape("img/pos_embedding")[1]
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"img/pos_embedding has {tokens} positions, expected a square number")
        vision = VisionConfig(
            hidden_size=width,
            intermediate_size=self._shape(f"{IMAGE_BLOCK}/MlpBlock_0/Dense_0/kernel")[1],
            num_hidden_layers=self._depth(IMAGE_BLOCK),
            num_attention_heads=self._shape(f"{IMAGE_BLOCK}/MultiHeadDotProductAttention_0/query/kernel")[1],
            image_size=side * patch_size,
            patch_size=patch_size,
        )
        heads, hidden, head_dim = self._shape(f"{TEXT_BLOCK}/attn/q_einsum/w", f"{TEXT_BLOCK}/attn/qkv_einsum/w")[-3:]
        vocabulary = self._shape("llm/embedder/input_embedding")[0]
        is_27b = (hidden, heads) == (4608, 32)
        text = TextConfig(
            model_type="gemma2" if self._gemma2 else "gemma",
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=self._shape(f"{TEXT_BLOCK}/mlp/linear")[0],
            num_hidden_layers=self._depth(TEXT_BLOCK),
            num_attention_heads=heads,
            num_key_value_heads=self._shape(f"{TEXT_BLOCK}/attn/kv_einsum/w", f"{TEXT_BLOCK}/attn/qkv_einsum/w")[-3],
            head_dim=head_dim,
            query_pre_attn_scalar=hidden / heads if is_27b else None,
            attn_logit_softcapping=50.0 if self._gemma2 else None,
            final_logit_softcapping=30.0 if self._gemma2 else None,
        )
        return PaliGemmaConfig(vision_config=vision, text_config=text, image_token_id=min(vocabulary, _VOCABULARY))

    def head_differs(self) -> bool:
        return False

    def describe(self, name: str) -> str:
        if name in self._sources:
            return f"{self.path}: {self._sources[name]}"
        for array in SINGLE_ARRAYS:
            if name in array.names:
                return f"{self.path}: {array.key}"
        for block, prefix in LAYER_PREFIXES.items():
            layer, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            for array in self._arrays[block].values():
                if name.startswith(prefix) and rest in array.names and "qkv" not in array.key:
                    return f"{self.path}: {block}/{array.key} (layer {layer})"
        return f"{self.path}: {name}"

    def tensors(
        self, names: Iterable[str], dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[str, torch.Tensor]]:
        wanted = set(names)
        members = [(entry, entry.array) for entry in self._members if entry.array is not None]
        for entry, _ in members:  # before any memory is taken
            self._check_size(entry)
        for entry, array in members:
            layers: Iterable[int | None] = [None] if entry.layers is None else entry.layers
            for layer, source in zip(layers, self._layers(entry), strict=True):
                parts = array.split(source)
                for name, part in zip(entry.names(layer), parts, strict=True):
                    if name in wanted:
                        # copy=True: the memory of `source` is reused for the next layer.
                        yield name, part.to(device, dtype, copy=True, memory_format=torch.contiguous_format)

    def _check_size(self, entry: _Member) -> None:
        """Raise ValueError if an array's shape does not match its data, or its data cannot be in the file."""
        expected = TensorSpec(entry.member, entry.shape, entry.dtype).nbytes
        info = self._zip.getinfo(entry.member)
        # Deflate expands one byte to at most 1032.
        held = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else 1032)
        if entry.data_bytes != expected or expected > held:
            found = min(entry.data_bytes, held)
            raise self._error(
                entry.member, f"has {found} bytes of data, expected {expected} for shape {list(entry.shape)}"
            )

    def _layers(self, entry: _Member) -> Iterator[torch.Tensor]:
        """Yield the array's layers in order, each valid until the next one is requested.

        The 28B model's MLP is a single array of 31 GB, so it must not be read as one.
        """
        try:
            with self._zip.open(entry.member) as file:
                shape, column_major, _ = _read_header(file)
                if column_major:
                    whole = torch.empty(shape[::-1], dtype=entry.dtype, device="cpu")
                    _fill(file, whole)
                    whole = whole.permute(*reversed(range(len(shape))))
                    yield from whole if entry.stacked else [whole]
                else:
                    layer = torch.empty(shape[1:] if entry.stacked else shape, dtype=entry.dtype, device="cpu")
                    for _ in range(shape[0] if entry.stacked else 1):
                        _fill(file, layer)
                        yield layer
                # Reading to the end makes zipfile compare the checksum.
                if file.read(1):
                    raise ValueError("has more data than its shape says")
        except _DAMAGE as error:
            raise self._error(entry.member, f"cannot be read: {error}") from error


def write_big_vision(
    config: PaliGemmaConfig, parameter: Callable[[str], torch.Tensor], path: Path, dtype: torch.dtype
) -> None:
    """Write an .npz in big_vision's naming, keys under `params/`, layers stacked, uncompressed, one layer at a time.

    `parameter` returns the tensor of a parameter name. Hugging Face's 64 rows after the vocabulary are left out. The format
    cannot hold the query scale, softcaps and an untied output head, which raises ValueError. Raises OSError naming `path` if it
    cannot be written.
    """
    if not config.tie_word_embeddings:
        raise ValueError(f"{path}: big_vision's format has no place for an output head that is not the embedding")
    text, vision = config.text_config, config.vision_config
    fused = text.num_attention_heads == text.num_key_value_heads
    text_arrays = text_block(gemma2=text.model_type == "gemma2", fused_qkv=fused)
    vision_head_dim = vision.hidden_size // vision.num_attention_heads

    with temporary_sibling(path) as temporary:
        with zipfile.ZipFile(temporary, "w") as archive:
            for array in SINGLE_ARRAYS:
                tensor = array.join(tuple(parameter(name) for name in array.names), 0)
                if array.key == "llm/embedder/input_embedding" and len(tensor) == _HF_PADDED_VOCABULARY:
                    tensor = tensor[:_VOCABULARY]
                _write_array(archive, array.key, iter([tensor]), None, dtype)
            for block, arrays, layers, head_dim in (
                (IMAGE_BLOCK, image_block(), vision.num_hidden_layers, vision_head_dim),
                (TEXT_BLOCK, text_arrays, text.num_hidden_layers, text.head_dim),
            ):
                for array in arrays:
                    stream = (
                        array.join(
                            tuple(parameter(f"{LAYER_PREFIXES[block]}.{i}.{name}") for name in array.names), head_dim
                        )
                        for i in range(layers)
                    )
                    _write_array(archive, f"{block}/{array.key}", stream, layers, dtype)
        os.replace(temporary, path)


def _write_array(
    archive: zipfile.ZipFile, key: str, parts: Iterator[torch.Tensor], layers: int | None, dtype: torch.dtype
) -> None:
    first = next(parts)
    shape = tuple(first.shape) if layers is None else (layers, *first.shape)
    large = TensorSpec(key, shape, dtype).nbytes > 1 << 31
    with archive.open(f"params/{key}.npy", "w", force_zip64=large) as file:
        header = {"descr": _DESCRIPTORS[dtype], "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(raw_bytes(first.to(dtype)))
        for part in parts:
            file.write(raw_bytes(part.to(dtype)))
