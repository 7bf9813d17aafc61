"""Hugging Face folders: config.json and safetensors, in every layout that transformers has written for PaliGemma."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..adapters import OLDER_NAMES
from ..config import PaliGemmaConfig, end_ids
from ..files import json_bytes, read_json_object, shown, temporary_sibling, unreadable
from .layout import EMBEDDING, HEAD, SCALE, TensorSpec, raw_bytes, widest

_FILE_TO_MODEL = tuple((re.compile(pattern), name) for pattern, name in OLDER_NAMES.items())
# The layout that every version of transformers with PaliGemma reads.
_MODEL_TO_FILE = (
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^model\.vision_tower\."), "vision_tower.vision_model."),
    (re.compile(r"^model\.multi_modal_projector\."), "multi_modal_projector."),
)
# SigLIP's pooling head, which PaliGemma does not use, and buffers that old releases stored.
_IGNORED = re.compile(r"vision_tower\.(?:vision_model\.)?head\.|rotary_emb\.inv_freq$|embeddings\.position_ids$")

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()} | {torch.int8: "I8"}
_QUANTIZER = "pg_kernels"

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_GENERATION = "generation_config.json"
_WEIGHTS = re.compile(r"model(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index\.json)?")

# A tensor that every PaliGemma has once. It tells the prefix of all names.
_LANDMARK = "multi_modal_projector.linear.weight"

# Map the file anew after reading this much: its pages count as resident memory while it stays mapped.
_MAPPED_BYTES = 1 << 26


def _rename(key: str, table: Sequence[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in table:
        renamed, count = pattern.subn(replacement, key)
        if count:
            return renamed
    return key


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{folder} is a PEFT adapter, not a model: merge it into its base model and load the result"
            )
        others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".h5", ".msgpack"})
        found = ""
        if others:
            command = (
                "from transformers import PaliGemmaForConditionalGeneration as P; "
                f"P.from_pretrained({str(folder)!r}).save_pretrained('OUT')"
            )
            found = (
                f"; {', '.join(others[:3])} is not read, because unpickling runs code; if you trust it, convert it to "
                f'safetensors: python -c "{command}"'
            )
        raise FileNotFoundError(f"{folder} has neither {_SINGLE} nor {_INDEX}{found}")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not 0 < len(name) < 256:
            raise ValueError(f"{index} lists {shown(name)}; shards must be files of the same folder")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist, but {index} lists it")
    return [folder / name for name in names]


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            yield handle
    except SafetensorError as error:
        raise unreadable(path, "safetensors", error) from error


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each tensor that a PaliGemma may have."""
    header = {}
    with _open(path) as handle:
        keys: list[str] = list(handle.keys())  # a handle is no dict
        for key in keys:
            if not _IGNORED.search(key):
                tensor = handle.get_slice(key)
                header[key] = (tensor.get_dtype(), tuple(tensor.get_shape()))
    return header


def _prefix(keys: Collection[str]) -> str:
    """Return the prefix of all names of a model that was saved as a part of another module, such as `_orig_mod.`.

    Raises ValueError for a file that holds several models under different prefixes and none without a prefix.
    """
    found = set()
    for key in keys:
        if key.endswith(_LANDMARK):
            prefix = key.removesuffix(_LANDMARK)
            # From transformers 4.52 on the names themselves begin with `model.`, apart from the head's.
            old = any(other.startswith(f"{prefix}language_model.model.") for other in keys)
            found.add(prefix.removesuffix("model.") if prefix.endswith(".model.") and not old else prefix)
    if not found or found & {"", "model."}:
        return ""
    if len(found) > 1:
        raise ValueError(f"its tensors stand under several prefixes: {', '.join(map(repr, sorted(found)))}; keep one")
    return found.pop()


class HuggingFaceReader:
    """An open Hugging Face folder.

    Raises FileNotFoundError for a folder without config.json or a listed shard, ValueError for anything else that is not
    a PaliGemma in safetensors, in floats or in this package's int8.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._config = self._read_config_json()
        self.quantization: dict[str, Any] | None = self._config.get("quantization_config") or None
        generation = folder / _GENERATION
        self.generation_defaults = read_json_object(generation) if generation.is_file() else {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._keys: dict[str, tuple[Path, str]] = {}
        self._file_dtypes: dict[str, torch.dtype] = {}
        headers = {file: _read_header(file) for file in _weight_files(folder)}
        try:
            self.prefix = _prefix([key for header in headers.values() for key in header])
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        self.outside: dict[str, str] = {}
        for file, header in headers.items():
            for key, (code, shape) in header.items():
                self._add(file, key, code, shape)
        self.dtype = self._own_dtype()

    def _read_config_json(self) -> dict[str, Any]:
        path = self.path / "config.json"
        if not path.is_file():
            if (self.path / "adapter_config.json").is_file():
                raise ValueError(
                    f"{self.path} is a PEFT adapter, not a model: merge it into its base model and load the result"
                )
            raise FileNotFoundError(f"{path} does not exist")
        config = read_json_object(path)
        if config.get("model_type") != "paligemma":
            raise ValueError(f"{path}: model_type is {shown(config.get('model_type'))}, expected 'paligemma'")
        quantization = config.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict):
            raise ValueError(f"{path}: quantization_config is {shown(quantization)}, expected an object")
        method = (quantization or {}).get("quant_method", "unknown")
        if quantization and method != _QUANTIZER:
            method = method if isinstance(method, str) else shown(method)
            raise ValueError(f"{path}: the weights are quantised ({method}); load the unquantised checkpoint instead")
        return config

    def _add(self, file: Path, key: str, code: str, shape: tuple[int, ...]) -> None:
        if not key.startswith(self.prefix):
            self.outside[_rename(key, _FILE_TO_MODEL)] = f"{file}: {key}"
            return
        name = _rename(key.removeprefix(self.prefix), _FILE_TO_MODEL)
        if name in self._keys:
            raise ValueError(f"{file}: {key} holds the same parameter as {self.describe(name)}")
        known = _DTYPES if self.quantization is None else _DTYPES | {"I8": torch.int8}
        if code not in known:
            raise ValueError(f"{file}: {key} has dtype {code}, expected one of {', '.join(known)}")
        self.shapes[name] = shape
        self._file_dtypes[name] = known[code]
        self._keys[name] = (file, key)

    def _own_dtype(self) -> torch.dtype:
        field = "dtype" if self._config.get("dtype") is not None else "torch_dtype"
        declared = self._config.get(field)
        if declared is None:
            return _common_dtype(self._file_dtypes)
        for dtype in _DTYPES.values():
            if isinstance(declared, str) and declared.removeprefix("torch.") == str(dtype).removeprefix("torch."):
                return widest([dtype])
        raise ValueError(
            f"{self.path / 'config.json'}: {field} is {shown(declared)}, expected 'float32', 'float16' or 'bfloat16'"
        )

    def read_config(self) -> PaliGemmaConfig:
        try:
            config = PaliGemmaConfig.from_dict(self._config)
        except ValueError as error:
            raise ValueError(f"{self.path / 'config.json'}: {error}") from error
        ends = self.generation_defaults.get("eos_token_id")
        if ends is None:
            return config
        return replace(config, eos_token_id=end_ids(ends, f"{self.path / _GENERATION}: eos_token_id"))

    def head_differs(self) -> bool:
        # int8 weights can be equal although their scales differ.
        return any(self._differ(EMBEDDING + suffix, HEAD + suffix) for suffix in ("", SCALE))

    def _differ(self, first: str, second: str) -> bool:
        """Return whether two tensors have different values; False if the head is missing."""
        if HEAD not in self._keys or EMBEDDING not in self._keys or not self._keys.keys() & {first, second}:
            return False
        if first not in self._keys or second not in self._keys or self.shapes[first] != self.shapes[second]:
            return True
        dtype = torch.promote_types(self._file_dtypes[first], self._file_dtypes[second])
        (file, key), (other_file, other_key) = self._keys[first], self._keys[second]
        with _open(file) as handle, _open(other_file) as other_handle:
            ours, theirs = handle.get_slice(key), other_handle.get_slice(other_key)
            rows, step = (self.shapes[first] or (0,))[0], 4096
            return any(
                not torch.equal(ours[i : i + step].to(dtype), theirs[i : i + step].to(dtype))
                for i in range(0, rows, step)
            )

    def describe(self, name: str) -> str:
        if name not in self._keys:
            return f"{self.path}: {self.prefix}{_rename(name, _MODEL_TO_FILE)}"
        file, key = self._keys[name]
        return f"{file}: {key}"

    def tensors(
        self, names: Iterable[str], dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[str, torch.Tensor]]:
        wanted = set(names)
        for group in self._groups([name for name in self.shapes if name in wanted]):
            with _open(self._keys[group[0]][0]) as handle:
                for name in group:
                    # copy=True: the handle's tensors are the mapped file, which the user may replace.
                    own = self._file_dtypes[name] == torch.int8 or name.endswith(SCALE)
                    wanted_dtype = self._file_dtypes[name] if own else dtype
                    yield name, handle.get_tensor(self._keys[name][1]).to(device, wanted_dtype, copy=True)

    def _groups(self, names: list[str]) -> Iterator[list[str]]:
        """Group neighbouring tensors of one file, up to _MAPPED_BYTES unless a single tensor is larger."""
        group: list[str] = []
        size = 0
        for name in names:
            nbytes = TensorSpec(name, self.shapes[name], self._file_dtypes[name]).nbytes
            if group and (self._keys[name][0] != self._keys[group[0]][0] or size + nbytes > _MAPPED_BYTES):
                yield group
                group, size = [], 0
            group.append(name)
            size += nbytes
        if group:
            yield group


def _shards(specs: Sequence[TensorSpec], max_shard_bytes: float) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _write_safetensors(path: Path, specs: Sequence[TensorSpec], tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Write one safetensors file from a stream.

    safetensors' own writer needs all of a shard in memory at once, beside the model. The format is an 8-byte length, a
    JSON header and the data, in the order of the offsets.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[_rename(spec.name, _MODEL_TO_FILE)] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for spec in specs:
            name, tensor = next(tensors)
            if TensorSpec(name, tuple(tensor.shape), tensor.dtype) != spec:
                raise RuntimeError(f"{name} {tuple(tensor.shape)} {tensor.dtype} came where {spec} was announced")
            file.write(raw_bytes(tensor))


def write_huggingface(
    config: PaliGemmaConfig,
    specs: Sequence[TensorSpec],
    tensors: Iterator[tuple[str, torch.Tensor]],
    folder: Path,
    *,
    max_shard_bytes: float = 5e9,
    copied_files: Mapping[str, Path] | None = None,
    activations: str | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a Hugging Face folder from a stream of tensors that come in the order of `specs`.

    Everything is first written beside `folder` and then moved. A new folder appears as a whole. In an existing folder each file
    is replaced by a complete one, weight files of another sharding are removed, and all other files are kept. `copied_files`
    maps names in the folder to files to copy. `activations` is the mode of int8 layers, if there are any. `generation` is the
    content of generation_config.json; by default it holds the ids that generation needs, unless the file exists. Raises OSError
    naming `folder` if it cannot be written, ValueError for a shard limit that is not positive.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    with temporary_sibling(folder) as temporary:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder")
        temporary.mkdir()
        shards = _shards(specs, max_shard_bytes)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_safetensors(temporary / name, shard, tensors)
            weight_map.update({_rename(spec.name, _MODEL_TO_FILE): name for spec in shard})
        if len(shards) > 1:
            total = sum(spec.nbytes for spec in specs)
            (temporary / _INDEX).write_bytes(json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map}))
        dtype = _common_dtype({spec.name: spec.dtype for spec in specs})
        # "torch_dtype" is the name that old and new transformers read.
        content = config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
        if activations is not None:
            content["quantization_config"] = {"quant_method": _QUANTIZER, "bits": 8, "activations": activations}
        (temporary / "config.json").write_bytes(json_bytes(content))
        if generation or not (folder / _GENERATION).exists():
            ids = {f"{kind}_token_id": getattr(config, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
            kept = {name: value for name, value in (generation or {}).items() if value is not None}
            # The model's end tokens come from this file, or were changed since.
            ends = {"eos_token_id": config.eos_token_id}
            (temporary / _GENERATION).write_bytes(json_bytes({**ids, **kept, **ends}))
        for name, file in (copied_files or {}).items():
            shutil.copyfile(file, temporary / name)
        _move_into(temporary, folder)


def _common_dtype(dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """Return the widest dtype of a checkpoint's tensors, without int8 weights and their scales."""
    floats = [dtype for name, dtype in dtypes.items() if dtype != torch.int8 and not name.endswith(SCALE)]
    return widest(floats or [torch.bfloat16])


def _move_into(source: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(source, folder)
        return
    written = {path.name for path in source.iterdir()}
    for name in sorted(written):
        os.replace(source / name, folder / name)
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in written:
            path.unlink()
