"""Writing a model that is in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pg_kernels import PackedInt8Weight
from pg_kernels.nn import Int8Embedding, Int8Linear

from ..adapters import Adaptable
from ..config import PaliGemmaConfig
from .big_vision import write_big_vision
from .huggingface import write_huggingface
from .layout import EMBEDDING, FLOAT_DTYPES, HEAD, SCALE, TensorSpec, check_dtype, expected_shapes

Build = Callable[[PaliGemmaConfig], nn.Module]
Entries = dict[str, tuple[TensorSpec, Callable[[], Tensor]]]


def save_huggingface(model: Adaptable, folder: str | os.PathLike[str], build: Build, *, max_shard_bytes: float) -> None:
    """Write a model as a Hugging Face folder: see `PaliGemma.save_pretrained`. `build` makes the model of a configuration."""
    config = replace(model.config, tie_word_embeddings=head_is_embedding(model))
    entries = _entries(model, build, config)
    # Write wide dtypes first, so that every tensor of a file with several dtypes is aligned.
    specs = sorted((spec for spec, _ in entries.values()), key=lambda spec: -spec.dtype.itemsize)
    tensors = ((spec.name, entries[spec.name][1]()) for spec in specs)
    kinds = {module.activations for module in model.modules() if type(module) is Int8Linear}
    if not kinds and any(spec.dtype == torch.int8 for spec in specs):
        kinds = {"keep"}
    if len(kinds) > 1:
        raise ValueError("model cannot be saved: some of its int8 layers quantise activations and some do not")
    write_huggingface(
        config,
        specs,
        tensors,
        Path(folder),
        max_shard_bytes=max_shard_bytes,
        activations=kinds.pop() if kinds else None,
        generation=model.generation_defaults,
    )


def save_big_vision(
    model: Adaptable, path: str | os.PathLike[str], build: Build, *, dtype: torch.dtype | None = None
) -> None:
    """Write a model as a big_vision .npz file: see `PaliGemma.save_big_vision`."""
    check_dtype(dtype)
    config = replace(model.config, tie_word_embeddings=head_is_embedding(model, by_value=True))
    entries = _entries(model, build, config)
    if any(spec.dtype == torch.int8 for spec, _ in entries.values()):
        raise ValueError(f"{path}: .npz files hold no int8 weights; save the model before quantising it")
    write_big_vision(config, lambda name: entries[name][1](), Path(path), dtype or entries[EMBEDDING][0].dtype)


def head_is_embedding(model: Adaptable, *, by_value: bool = False) -> bool:
    """Return whether head and embedding are the same memory, or equal values if the configuration ties them or `by_value`."""
    head: Any = getattr(model.lm_head, "weight", None)
    embedding: Any = getattr(model.model.language_model.embed_tokens, "weight", None)
    if head is embedding:
        return True
    if head is None or embedding is None or type(head) is not type(embedding):
        return False
    pair = [w.unpack() if isinstance(w, PackedInt8Weight) else (w.detach(),) for w in (head, embedding)]
    if any(a.shape != b.shape or a.dtype != b.dtype or a.device != b.device for a, b in zip(*pair, strict=True)):
        return False
    same_memory = all(a.data_ptr() == b.data_ptr() and a.stride() == b.stride() for a, b in zip(*pair, strict=True))
    compared = by_value or model.config.tie_word_embeddings
    return same_memory or (compared and all(torch.equal(a, b) for a, b in zip(*pair, strict=True)))


def _entries(model: Adaptable, build: Build, config: PaliGemmaConfig) -> Entries:
    """Return the tensors to write by name, without a tied head. Raises ValueError if they are not exactly PaliGemma's."""
    expected = expected_shapes(build, config)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    entries: Entries = {}
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
