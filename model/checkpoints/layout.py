"""What reading and writing have in common: a tensor to be written, a reader's interface, the model's shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.overrides import TorchFunctionMode

from ..config import PaliGemmaConfig
from ..paligemma import PaliGemma

EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
SCALE = "_scale"
"""Behind the name of an int8 weight: its fp32 scales."""
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype of a model with tensors of these ones; float64, which the model has no weights in, becomes float32."""
    dtype = reduce(torch.promote_types, dtypes)
    return torch.float32 if dtype == torch.float64 else dtype


class TensorSpec(NamedTuple):
    """A tensor that is going to be written, known before its data is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Reader(Protocol):
    """A checkpoint that is open: what it holds, under the model's parameter names, and its tensors one at a time."""

    path: Path
    dtype: torch.dtype
    shapes: dict[str, tuple[int, ...]]
    quantization: dict[str, Any] | None
    """config.json's, where some weights are int8 and have scales beside them."""
    generation_defaults: dict[str, Any]
    """The content of generation_config.json, empty if there is none."""
    prefix: str
    """What all of the model's tensors have before their names; left out of `shapes`."""
    outside: dict[str, str]
    """Tensors without that prefix, if there is one: their files and keys, for messages, by name."""

    def read_config(self) -> PaliGemmaConfig: ...

    def head_differs(self) -> bool:
        """Whether the file holds an output head whose values are not the embedding's."""

    def describe(self, name: str) -> str:
        """The file and the key in it of a parameter, for messages."""

    def tensors(
        self, names: Iterable[str], dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the named tensors in the order of `shapes`, each in memory of its own, never tied to the file.

        int8 weights and their scales keep their dtypes.
        """


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, row-major, without a copy if it is contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise TypeError for a dtype that the model has no weights in."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOAT_DTYPES))} or None, got {dtype!r}")


class _WithoutNumbers(TorchFunctionMode):
    """Initialises nothing: on the meta device drawing numbers would import all of torch.compile, a second and 150 MB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def meta_model(config: PaliGemmaConfig) -> PaliGemma:
    with torch.device("meta"), _WithoutNumbers():
        return PaliGemma(config)


def expected_shapes(config: PaliGemmaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, a tied head left out."""
    parameters = meta_model(config).named_parameters(remove_duplicate=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
    if config.tie_word_embeddings:
        shapes.pop(HEAD)
    return shapes
