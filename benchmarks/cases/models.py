"""PaliGemma with random weights, in floats and in int8, for the cases of whole models."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pg_kernels.benchmarks.cases.catalogue import Case
from pg_kernels.model import PaliGemma
from pg_kernels.model.config import PaliGemmaConfig
from pg_kernels.nn import Int8Embedding, Int8Linear
from pg_kernels.quantization import ACTIVATIONS, quantize_


def model_config(sizes: Mapping[str, Any]) -> PaliGemmaConfig:
    return PaliGemmaConfig.named(f"{sizes['model']}-{sizes['resolution']}")


def num_text_ids(config: PaliGemmaConfig) -> int:
    """Return the number of text ids. Ids after them are locations, segmentation codes and the image's."""
    return min(256_000, config.text_config.vocab_size)


_held: dict[tuple[Any, ...], PaliGemma] = {}
"""The last model, which several cases share: it takes gigabytes."""
_quantised: dict[str, PaliGemma] = {}
"""The last model in int8, by mode."""


def release() -> None:
    """Free the memory of the last model."""
    _held.clear()
    _quantised.clear()


def _key(case: Case, device: torch.device) -> tuple[Any, ...]:
    return case.sizes["model"], case.dtype, device


def holds(case: Case, device: torch.device) -> bool:
    return _key(case, device) in _held


def random_model(case: Case, device: torch.device) -> PaliGemma:
    key = _key(case, device)
    if key not in _held:
        release()
        _held[key] = filled(model_config(case.sizes), getattr(torch, case.dtype), device)
    return _held[key]


@torch.no_grad()
def filled(config: PaliGemmaConfig, dtype: torch.dtype, device: torch.device) -> PaliGemma:
    """Return a model with random Gaussian weights that preserve variance, in evaluation mode.

    The weights repeat one block: drawing billions of numbers takes minutes on a CPU.
    """
    with torch.device("meta"):
        model = PaliGemma(config).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn((1 << 24) + 1, generator=generator).to(next(model.parameters()))
    for name, parameter in model.named_parameters():
        std = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.05
        flat = parameter.view(-1)
        for start in range(0, flat.numel(), len(block)):
            part = flat[start : start + len(block)]
            torch.mul(block[: len(part)], std, out=part)
        if name.endswith("layernorm.weight") or "layer_norm" in name and name.endswith("weight"):
            parameter.add_(
                1.0 if "vision_tower" in name else 0.0
            )  # SigLIP's norm weights are stored without the offset of 1
    return model.eval()


def in_int8(model: PaliGemma, mode: str) -> PaliGemma:
    """Return the model in int8. It shares all other tensors with the model, and both modes share the int8 weights."""
    if not _quantised:
        _quantised["int8"] = quantize_(_twin(model, model.parameters()), "int8")
    if mode not in _quantised:
        original = _quantised["int8"]
        shared = [m.weight for m in original.modules() if isinstance(m, (Int8Linear, Int8Embedding))]
        _quantised[mode] = _twin(original, [*original.parameters(), *shared])
        for module in _quantised[mode].modules():
            if isinstance(module, Int8Linear):
                module.activations = ACTIVATIONS[mode]
    return _quantised[mode]


def _twin(model: PaliGemma, shared: Iterable[Any]) -> PaliGemma:
    return copy.deepcopy(model, {id(thing): thing for thing in shared})


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
