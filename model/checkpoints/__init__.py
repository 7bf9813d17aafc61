"""Checkpoints: Hugging Face folders and big_vision .npz files, read and written one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from pg_kernels import PackedInt8Weight
from pg_kernels.nn import Int8Embedding, Int8Linear
from pg_kernels.quantization import ACTIVATIONS, quantize_

from ..config import PaliGemmaConfig
from ..paligemma import PaliGemma
from .big_vision import BigVisionReader, write_big_vision
from .huggingface import HuggingFaceReader, write_huggingface
from .layout import EMBEDDING, FLOAT_DTYPES, HEAD, SCALE, Reader, TensorSpec

__all__ = ["convert", "load", "save_big_vision", "save_huggingface"]

# What belongs to a checkpoint besides its weights and config.json, and does not depend on their layout.
_COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def load(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    config: PaliGemmaConfig | None = None,
    quantize: str | None = None,
    progress: bool = True,
) -> PaliGemma:
    """Loads a PaliGemma from a Hugging Face folder or a big_vision .npz file, whichever `path` is.

    `dtype` None keeps the checkpoint's own (config.json's, else the widest of its tensors); `device` None is the CPU.
    `config` replaces the folder's config.json, or what is inferred from the .npz file's shapes; the tensors' shapes must
    still agree with it. `quantize` makes the linear layers int8 as `pg_kernels.quantize_` does, "int8" or "int8-dynamic";
    for a checkpoint that is int8 already it only says what becomes of activations. Tensors are read one at a time straight
    to their dtype and device, or into int8, so peak memory is the model and little more; none of them stays tied to the
    file. With `progress`, a bar appears on stderr, if that is a terminal, once loading has taken a second. The model is
    returned in evaluation mode.

    Raises FileNotFoundError for a path, config.json or shard that does not exist; ValueError naming file and tensor for
    unreadable files, other architectures, and missing, unexpected or wrongly shaped tensors, or an unknown `quantize`; TypeError
    for a dtype that is not float32, float16 or bfloat16.
    """
    _check_dtype(dtype)
    if quantize is not None and quantize not in ACTIVATIONS:
        raise ValueError(f"quantize: got {quantize!r}, expected one of {', '.join(map(repr, ACTIVATIONS))} or None")
    reader = _open(path)
    config, names = _resolve(reader, config)
    target_dtype = dtype or reader.dtype
    target_device = torch.device("cpu" if device is None else device)
    model = _meta_model(config).to(target_dtype)
    _make_int8(model, reader, names, quantize)
    waiting: dict[str, Tensor] = {}
    for file_name, tensor in _streamed(reader, names, target_dtype, target_device, progress):
        try:
            _assign(model, names[file_name], tensor, waiting)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{reader.describe(file_name)}: {error}") from error
    if waiting:
        owner, tensor = next(iter(waiting.items()))
        what = "is int8 without a scale" if tensor.dtype == torch.int8 else "has a scale, but is not int8"
        raise ValueError(f"{reader.path}: {owner}.weight {what}")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    return model.eval()


def save_huggingface(model: PaliGemma, folder: str | os.PathLike[str], *, max_shard_bytes: float = 5e9) -> None:
    """Writes a model as a Hugging Face folder: config.json, generation_config.json and safetensors.

    The tensors keep their dtypes and get the names that transformers 4.48 to 5.x read; they are split into shards of
    `max_shard_bytes` at most where one file would be larger. Other files of an existing folder are kept, and no file
    is ever half-written. int8 layers are written as int8 with their scales beside them, for this package alone to read.
    Raises OSError naming `folder` if it cannot be written; ValueError if the model does not hold exactly PaliGemma's
    parameters, in floats or int8 (wrapped layers).
    """
    entries = _entries(model)
    # Wide dtypes first, so that every tensor of a file with several of them starts aligned.
    specs = sorted((spec for spec, _ in entries.values()), key=lambda spec: -spec.dtype.itemsize)
    tensors = ((spec.name, entries[spec.name][1]()) for spec in specs)
    kinds = {module.activations for module in model.modules() if type(module) is Int8Linear}
    if not kinds and any(spec.dtype == torch.int8 for spec in specs):
        kinds = {"keep"}
    if len(kinds) > 1:
        raise ValueError("model cannot be saved: some of its int8 layers quantise activations and some do not")
    write_huggingface(
        model.config,
        specs,
        tensors,
        Path(folder),
        max_shard_bytes=max_shard_bytes,
        activations=kinds.pop() if kinds else None,
    )


def save_big_vision(model: PaliGemma, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Writes a model as a big_vision .npz file.

    `dtype` None keeps the embedding's; bfloat16 is written as two-byte void, as in the released files. Raises OSError
    naming `path` if it cannot be written; ValueError for an untied output head or a model that does not hold exactly
    PaliGemma's floating-point parameters.
    """
    _check_dtype(dtype)
    entries = _entries(model)
    if any(spec.dtype == torch.int8 for spec, _ in entries.values()):
        raise ValueError(f"{path}: .npz files hold no int8 weights; save the model before quantising it")
    write_big_vision(model.config, lambda name: entries[name][1](), Path(path), dtype or entries[EMBEDDING][0].dtype)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> None:
    """Converts a checkpoint: a Hugging Face folder or a big_vision .npz to a Hugging Face folder, or to .npz if `target` ends so.

    `dtype` None keeps the source's. A folder gets the source folder's tokenizer and processor files, and `tokenizer`, a
    SentencePiece model, as tokenizer.model. Memory stays at a few tensors, except from .npz to .npz, which takes the model.
    Raises what `load` raises for the source, OSError naming the target if it cannot be written, FileNotFoundError for a
    tokenizer that does not exist, ValueError for a tokenizer with an .npz target.
    """
    _check_dtype(dtype)
    source, target = Path(source), Path(target)
    if tokenizer is not None:
        if target.suffix == ".npz":
            raise ValueError(f"tokenizer is given, but {target} is an .npz file, which has no place for it")
        if not Path(tokenizer).is_file():
            raise FileNotFoundError(f"tokenizer {tokenizer} does not exist")
    if target.suffix == ".npz" and not source.is_dir():
        save_big_vision(load(source, dtype=dtype, device="cpu", progress=progress), target)
        return

    reader = _open(source)
    if reader.quantization is not None:
        raise ValueError(f"{source} holds int8 weights, which are not converted; convert the original checkpoint")
    config, names = _resolve(reader, None)
    target_dtype, cpu = dtype or reader.dtype, torch.device("cpu")
    if target.suffix == ".npz":
        file_names = {name: file_name for file_name, name in names.items()}
        write_big_vision(
            config, lambda name: next(reader.tensors([file_names[name]], target_dtype, cpu))[1], target, target_dtype
        )
        return
    specs = [TensorSpec(name, reader.shapes[file_name], target_dtype) for file_name, name in names.items()]
    tensors = ((names[name], tensor) for name, tensor in _streamed(reader, names, target_dtype, cpu, progress))
    copied = {name: source / name for name in _COMPANIONS if source.is_dir() and (source / name).is_file()}
    if tokenizer is not None:
        copied["tokenizer.model"] = Path(tokenizer)
    write_huggingface(config, specs, tensors, target, copied_files=copied)


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOAT_DTYPES))} or None, got {dtype!r}")


def _open(path: str | os.PathLike[str]) -> Reader:
    path = Path(path)
    if path.is_dir():
        return HuggingFaceReader(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; expected a Hugging Face folder or a big_vision .npz on this machine"
        )
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} is a single safetensors file; give the folder that holds it and its config.json")
    return BigVisionReader(path)


class _WithoutNumbers(TorchFunctionMode):
    """Initialises nothing: on the meta device drawing numbers would import all of torch.compile, a second and 150 MB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _meta_model(config: PaliGemmaConfig) -> PaliGemma:
    with torch.device("meta"), _WithoutNumbers():
        return PaliGemma(config)


def _expected_shapes(config: PaliGemmaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, a tied head left out."""
    parameters = _meta_model(config).named_parameters(remove_duplicate=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
    if config.tie_word_embeddings:
        shapes.pop(HEAD)
    return shapes


def _resolve(reader: Reader, config: PaliGemmaConfig | None) -> tuple[PaliGemmaConfig, dict[str, str]]:
    """The model's configuration, and which of the file's tensors (in its order) is which parameter.

    A head equal to the embedding is tied to it, if the configuration says so; one that stands alone serves as both; one
    that differs stays separate whatever the configuration says. Raises ValueError for missing, unexpected or wrongly
    shaped tensors.
    """
    config = reader.read_config() if config is None else config
    names = {name: name for name in reader.shapes}
    both = EMBEDDING in names and HEAD in names
    config = replace(config, tie_word_embeddings=not both or (config.tie_word_embeddings and not reader.head_differs()))
    if HEAD in names and not both:
        names[HEAD] = EMBEDDING
    elif both and config.tie_word_embeddings:
        del names[HEAD]

    expected = _expected_shapes(config)
    for file_name in [name for name in names if name.endswith(SCALE)]:
        weight = file_name.removesuffix(SCALE)
        if weight == HEAD and HEAD not in names:
            del names[file_name]  # the head is the embedding
            continue
        names[file_name] = names.get(weight, weight) + SCALE
        if weight not in names:
            continue
        rows = expected.get(names[weight], (0,))[:1]
        # One scale for each row, or for each group of its columns: how many, packing checks.
        expected[names[file_name]] = rows + reader.shapes[file_name][1:2]
    present = set(names.values())
    _refuse(reader, "tensor(s) missing", [name for name in expected if name not in present])
    _refuse(reader, "unexpected tensor(s)", [file_name for file_name, name in names.items() if name not in expected])
    for file_name, name in names.items():
        shape = reader.shapes[file_name]
        if shape != expected[name]:
            raise ValueError(
                f"{reader.describe(file_name)} has shape {list(shape)} for {name}, expected {list(expected[name])}"
            )
    return config, names


def _refuse(reader: Reader, what: str, names: list[str]) -> None:
    if names:
        shown = "; ".join(reader.describe(name).removeprefix(f"{reader.path}: ") for name in names[:5])
        raise ValueError(f"{reader.path}: {len(names)} {what}: {shown}{'; …' if len(names) > 5 else ''}")


def _streamed(
    reader: Reader, names: dict[str, str], dtype: torch.dtype, device: torch.device, progress: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    int8 = {name.removesuffix(SCALE) for name in names if name.endswith(SCALE)}
    total = sum(TensorSpec(name, reader.shapes[name], torch.int8 if name in int8 else dtype).nbytes for name in names)
    with tqdm(
        total=total,
        desc=reader.path.name,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        delay=1.0,
        disable=None if progress else True,
    ) as bar:
        for name, tensor in reader.tensors(names, dtype, device):
            yield name, tensor
            bar.update(tensor.nbytes)


def _make_int8(model: PaliGemma, reader: Reader, names: dict[str, str], quantize: str | None) -> None:
    """Put int8 layers where the checkpoint has them, or everywhere if it has none and `quantize` says so."""
    layers = {name.removesuffix(f".weight{SCALE}") for name in names.values() if name.endswith(SCALE)}
    if not layers and quantize is None:
        return
    modes = {activations: mode for mode, activations in ACTIVATIONS.items()}
    mode = quantize or modes.get(str((reader.quantization or {}).get("activations", "keep")))
    if mode is None:
        raise ValueError(f"{reader.path}: config.json's quantization_config has unknown activations")
    embedding = EMBEDDING.removesuffix(".weight")
    wanted = layers | ({"lm_head"} if model.config.tie_word_embeddings and embedding in layers else set())
    quantize_(model, mode, skip=lambda name, _: bool(layers) and name not in wanted)
    for name in layers:
        if not isinstance(model.get_submodule(name), (Int8Linear, Int8Embedding)):
            raise ValueError(f"{reader.describe(f'{name}.weight')} is int8, which this layer cannot be")


def _assign(model: nn.Module, name: str, tensor: Tensor, waiting: dict[str, Tensor]) -> None:
    """Hand a tensor to its module; an int8 weight and its scale, one of which is `waiting` for the other, together."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, (Int8Linear, Int8Embedding)) and leaf != "bias":
        if leaf == "weight" and tensor.is_floating_point():
            module.set_weight(tensor)
        elif owner in waiting:
            other = waiting.pop(owner)
            module.set_weight(*((tensor, other) if leaf == "weight" else (other, tensor)))
        else:
            waiting[owner] = tensor
        return
    if not tensor.is_floating_point():
        raise ValueError("it is int8 without a scale")
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=getattr(module, leaf).requires_grad))


def _entries(model: PaliGemma) -> dict[str, tuple[TensorSpec, Callable[[], Tensor]]]:
    """What is to be written of a model, a tied head left out, by name. Raises ValueError if it is not PaliGemma's."""
    expected = _expected_shapes(model.config)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    entries: dict[str, tuple[TensorSpec, Callable[[], Tensor]]] = {}
    for name, shape in expected.items():
        module = modules.get(name.rpartition(".")[0])
        if isinstance(module, (Int8Linear, Int8Embedding)) and name.endswith(".weight"):
            weight = module.weight
            scale = TensorSpec(name + SCALE, weight.scale_shape, torch.float32)
            entries[name] = TensorSpec(name, tuple(weight.shape), torch.int8), partial(_unpacked, weight, 0)
            entries[name + SCALE] = scale, partial(_unpacked, weight, 1)
            continue
        parameter = found.get(name)
        if parameter is None or tuple(parameter.shape) != shape or parameter.dtype not in FLOAT_DTYPES:
            what = "missing" if parameter is None else f"{parameter.dtype} {list(parameter.shape)}"
            raise ValueError(
                f"model cannot be saved: {name} is {what}, expected a floating-point parameter of shape {list(shape)}; "
                "save the model before wrapping its layers"
            )
        entries[name] = TensorSpec(name, shape, parameter.dtype), partial(_given, parameter)
    unexpected = [name for name in found if name not in expected and name != HEAD]
    if unexpected:
        raise ValueError(
            f"model cannot be saved: {len(unexpected)} unexpected parameter(s): {', '.join(unexpected[:5])}"
        )
    return entries


def _unpacked(weight: PackedInt8Weight, index: int) -> Tensor:
    return weight.unpack()[index]


def _given(tensor: Tensor) -> Tensor:
    return tensor
