"""What reading and writing have in common, whatever the layout: what a tensor to be written is, and a reader's interface."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ..config import PaliGemmaConfig

EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
SCALE = "_scale"
"""Behind the name of an int8 weight: its fp32 scales."""
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TensorSpec(NamedTuple):
    """A tensor that is going to be written, known before its data is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Reader(Protocol):
    """A checkpoint that is open: what it holds, under the model's parameter names, and its tensors one at a time."""

    path: Path
    dtype: torch.dtype
    shapes: dict[str, tuple[int, ...]]
    quantization: dict[str, Any] | None
    """config.json's, where some weights are int8 and have scales beside them."""

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
