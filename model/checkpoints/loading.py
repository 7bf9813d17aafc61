"""Opening a checkpoint, comparing it with its configuration, and reading it into a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pg_kernels.modes import ACTIVATIONS
from pg_kernels.nn import Int8Embedding, Int8Linear
from pg_kernels.quantization import quantize_

from ..adapters import Adaptable
from ..config import PaliGemmaConfig
from .big_vision import BigVisionReader
from .huggingface import HuggingFaceReader
from .layout import EMBEDDING, HEAD, SCALE, Reader, TensorSpec, check_dtype, expected_shapes, meta_model

Model = TypeVar("Model", bound=Adaptable)


def load(
    build: Callable[[PaliGemmaConfig], Model],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    config: PaliGemmaConfig | None = None,
    quantize: str | None = None,
    progress: bool = True,
) -> Model:
    """Build a model and read a checkpoint into it: see `PaliGemma.from_pretrained`."""
    check_dtype(dtype)
    if quantize is not None and quantize not in ACTIVATIONS:
        raise ValueError(f"quantize: got {quantize!r}, expected one of {', '.join(map(repr, ACTIVATIONS))} or None")
    reader = open_checkpoint(path)
    config, names = resolve(build, reader, config)
    target_dtype = dtype or reader.dtype
    target_device = torch.device("cpu" if device is None else device)
    model = meta_model(build, config).to(target_dtype)
    _make_int8(model, reader, names, quantize)
    waiting: dict[str, Tensor] = {}
    for file_name, tensor in streamed(reader, names, target_dtype, target_device, progress):
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
    model.generation_defaults = reader.generation_defaults
    return model.eval()


def open_checkpoint(path: str | os.PathLike[str]) -> Reader:
    """Open a Hugging Face folder or a big_vision .npz file. Raises FileNotFoundError, ValueError for other files."""
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


def resolve(
    build: Callable[[PaliGemmaConfig], nn.Module], reader: Reader, config: PaliGemmaConfig | None
) -> tuple[PaliGemmaConfig, dict[str, str]]:
    """Return the model's configuration, and the parameter name of each tensor of the file, in its order.

    An output head equal to the embedding is tied to it if the configuration says so. A head without an embedding serves as both.
    A head that differs stays separate, whatever the configuration says. Warns of a prefix of all names. Raises ValueError for
    missing, unexpected or wrongly shaped tensors.
    """
    config = reader.read_config() if config is None else config
    _check_depths(reader, config)
    names = {name: name for name in reader.shapes}
    both = EMBEDDING in names and HEAD in names
    config = replace(config, tie_word_embeddings=not both or (config.tie_word_embeddings and not reader.head_differs()))
    if HEAD in names and not both:
        names[HEAD] = EMBEDDING
    elif both and config.tie_word_embeddings:
        del names[HEAD]

    try:
        expected = expected_shapes(build, config)
    except (RuntimeError, OverflowError, TypeError) as error:  # torch's, for sizes beyond 64 bits
        sizes = {
            f"{section}.{name}": size
            for section, sizes in asdict(config).items()
            if isinstance(sizes, dict)
            for name, size in sizes.items()
            if isinstance(size, int)
        }
        largest = max(sizes, key=sizes.__getitem__)
        raise ValueError(f"{reader.path}: {largest} is {sizes[largest]}, too large for a tensor: {error}") from error
    for file_name in [name for name in names if name.endswith(SCALE)]:
        weight = file_name.removesuffix(SCALE)
        if weight == HEAD and HEAD not in names:
            del names[file_name]  # the head is the embedding
            continue
        names[file_name] = names.get(weight, weight) + SCALE
        if weight not in names:
            continue
        rows = expected.get(names[weight], (0,))[:1]
        # One scale for each row, or for each group of its columns. Packing checks the number of groups.
        expected[names[file_name]] = rows + reader.shapes[file_name][1:2]
    present = set(names.values())
    missing = [name for name in expected if name not in present]
    unexpected = [reader.describe(file_name) for file_name, name in names.items() if name not in expected]
    # Tensors without the prefix belong to another model, unless this model lacks tensors or they have its parameters' names.
    unexpected += [
        described for name, described in reader.outside.items() if missing or name in expected or name == HEAD
    ]
    _refuse(reader, missing=[reader.describe(name) for name in missing], unexpected=unexpected)
    for file_name, name in names.items():
        shape = reader.shapes[file_name]
        if shape != expected[name]:
            raise ValueError(
                f"{reader.describe(file_name)} has shape {list(shape)} for {name}, expected {list(expected[name])}"
            )
    if reader.prefix:
        others = list(reader.outside.values())
        ignored = f"; {len(others)} tensor(s) without it are ignored: {_listed(reader, others)}" if others else ""
        warnings.warn(f"{reader.path}: read without the prefix {reader.prefix!r} of its tensors{ignored}", stacklevel=3)
    return config, names


def _check_depths(reader: Reader, config: PaliGemmaConfig) -> None:
    """Raise ValueError for more layers than the weights can hold, before building them."""
    for section, layers in (
        ("text_config", "model.language_model.layers."),
        ("vision_config", "model.vision_tower.encoder.layers."),
    ):
        depth = getattr(config, section).num_hidden_layers
        if depth > len(reader.shapes):
            found = {name.removeprefix(layers).partition(".")[0] for name in reader.shapes if name.startswith(layers)}
            raise ValueError(
                f"{reader.path}: {section}.num_hidden_layers is {depth}, but the weights hold {len(found)} layer(s)"
            )


def _refuse(reader: Reader, *, missing: list[str], unexpected: list[str]) -> None:
    """Raise ValueError that lists missing and unexpected tensors, if there are any."""
    found = [
        f"{len(names)} {what}: {_listed(reader, names)}"
        for names, what in ((missing, "tensor(s) missing"), (unexpected, "unexpected tensor(s)"))
        if names
    ]
    if found:
        raise ValueError(f"{reader.path}: {'; '.join(found)}")


def _listed(reader: Reader, names: list[str]) -> str:
    return "; ".join(name.removeprefix(f"{reader.path}: ") for name in names[:5]) + "; …" * (len(names) > 5)


def streamed(
    reader: Reader, names: dict[str, str], dtype: torch.dtype, device: torch.device, progress: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the named tensors with a progress bar over their bytes."""
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


def _make_int8(model: Adaptable, reader: Reader, names: dict[str, str], quantize: str | None) -> None:
    """Make the layers int8 that are int8 in the checkpoint, or all layers if it has none and `quantize` is given."""
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
    table = model.get_submodule(embedding)
    if embedding in layers and isinstance(table, nn.Embedding):  # an int8 embedding that is not the head
        rows, columns = table.weight.shape
        model.set_submodule(embedding, Int8Embedding(rows, columns, "meta", table.weight.dtype))
    for name in layers:
        if not isinstance(model.get_submodule(name), (Int8Linear, Int8Embedding)):
            raise ValueError(f"{reader.describe(f'{name}.weight')} is int8, which this layer cannot be")


def _assign(model: nn.Module, name: str, tensor: Tensor, waiting: dict[str, Tensor]) -> None:
    """Assign a tensor to its module. An int8 weight waits in `waiting` for its scale, or the scale for its weight."""
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
