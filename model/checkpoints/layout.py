"""What reading and writing share: names, a tensor to be written, the interface of readers, the model's shapes.

Checkpoints do not import the network. Callers pass `build`, which makes the model of a configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..config import PaliGemmaConfig

EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
SCALE = "_scale"
"""Suffix of an int8 weight's name: its fp32 scales."""
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "vae-oid.npz",
)
"""Files of a checkpoint besides its weights and config.json that do not depend on the weights' layout."""


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the widest dtype. float64, which the model does not support, becomes float32."""
    dtype = reduce(torch.promote_types, dtypes)
    return torch.float32 if dtype == torch.float64 else dtype


class TensorSpec(NamedTuple):
    """A tensor to be written, known before its data is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Reader(Protocol):
    """An open checkpoint: its tensors, under the model's parameter names, read one at a time."""

    path: Path
    dtype: torch.dtype
    shapes: dict[str, tuple[int, ...]]
    quantization: dict[str, Any] | None
    """config.json's quantization_config, if some weights are int8 with scales."""
    generation_defaults: dict[str, Any]
    """The content of generation_config.json, empty if there is none."""
    prefix: str
    """The prefix of all the model's tensor names, which `shapes` leaves out."""
    outside: dict[str, str]
    """Tensors without that prefix, by name: their files and keys, for messages."""

    def read_config(self) -> PaliGemmaConfig: ...

    def head_differs(self) -> bool:
        """Return whether the file holds an output head whose values differ from the embedding's."""

    def describe(self, name: str) -> str:
        """Return a parameter's file and key, for messages."""

    def tensors(
        self, names: Iterable[str], dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the named tensors in the order of `shapes`, each in its own memory, never tied to the file.

        int8 weights and their scales keep their dtypes.
        """


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, row-major, without a copy if it is contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise TypeError for a dtype that the model does not support."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOAT_DTYPES))} or None, got {dtype!r}")


Model = TypeVar("Model", bound=nn.Module)


class _WithoutNumbers(TorchFunctionMode):
    """Skip initialisation: drawing numbers on the meta device would import all of torch.compile, a second and 150 MB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def meta_model(build: Callable[[PaliGemmaConfig], Model], config: PaliGemmaConfig) -> Model:
    """Build a model on the meta device: parameters without memory."""
    with torch.device("meta"), _WithoutNumbers():
        return build(config)


def expected_shapes(
    build: Callable[[PaliGemmaConfig], nn.Module], config: PaliGemmaConfig
) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every parameter of the model that `build` makes, without a tied head."""
    parameters = meta_model(build, config).named_parameters(remove_duplicate=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
    if config.tie_word_embeddings:
        shapes.pop(HEAD)
    return shapes
