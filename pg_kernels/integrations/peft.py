"""PEFT's LoRA over int8 layers; over float layers PEFT needs nothing from here."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import nn

from pg_kernels.nn import Int8Linear

# Parts of names, plain or in regular expressions, as transformers up to 4.51 or 4.57 had them, and what stands there today.
_OLDER_NAMES = (
    (r"language_model\\?\.lm_head", "lm_head"),
    (r"(language_model\\?\.)model\\?\.", r"\1"),
    (r"(?:vision_tower\\?\.)?vision_model", "vision_tower"),
    (r"(?:^|(?<=[(|^:]))(?=(?:language_model|vision_tower|multi_modal_projector)\b)", "model."),
)


def register(config: LoraConfig) -> LoraConfig:
    """Let a LoraConfig adapt `Int8Linear` layers, too, and give it back: for `get_peft_model`, `add_adapter` and the like.

    PEFT does not save this, so an adapter is loaded with

        PeftModel.from_pretrained(model, folder, config=register(LoraConfig.from_pretrained(folder)))

    Plain and rank-stabilised LoRA, initialised without a look at the weights; PEFT raises ValueError for others when it wraps a
    layer. Layers may have the names that transformers up to 4.57 gave them in PaliGemma.
    """
    for field in ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"):
        setattr(config, field, _with_current_names(getattr(config, field)))
    config._register_custom_module({Int8Linear: LoraInt8Linear})
    return config


def _with_current_names(names: Any) -> Any:
    """Names of layers, a mapping of them or a regular expression for them; older ones also as they are today."""
    if isinstance(names, str):
        both = re.fullmatch(r"\(\?:(.*)\)\|\(\?:(.*)\)", names)
        known = _current(names) == names or (both is not None and _current(both[1]) == both[2])
        return names if known else f"(?:{names})|(?:{_current(names)})"
    if isinstance(names, dict):
        return {_current(name): value for name, value in names.items()} | names
    return names and type(names)(dict.fromkeys([*names, *map(_current, names)]))


def _current(name: str) -> str:
    for older, current in _OLDER_NAMES:
        name = re.sub(older, current, name)
    return name


class LoraInt8Linear(lora.Linear):
    """LoRA over an `Int8Linear`: the int8 weight is frozen, gradients flow to the adapter and to the input.

    Merging replaces the layer by an nn.Linear, the dequantised weight plus the adapter's in the layer's dtype, as most of an
    adapter would be lost in int8 steps; unmerging puts back the very int8 layer.

    Source: Hu et al., https://arxiv.org/abs/2106.09685.
    """

    lora_variants: Any = {(): None}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.int8_layer: nn.Module | None = None
        """The base layer while a float one that adapters are merged into stands in its place."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the dequantised layer in the int8 one's place, and add these adapters, or the active ones, to its weight."""
        if isinstance(self.base_layer, Int8Linear):
            self.int8_layer, self.base_layer = self.base_layer, self.base_layer.dequantize()
        try:
            super().merge(safe_merge, adapter_names)
        finally:
            if not self.merged:
                self._put_back()

    def unmerge(self) -> None:
        """Put the int8 layer back."""
        super().unmerge()
        self._put_back()

    def _put_back(self) -> None:
        if self.int8_layer is not None:
            self.base_layer, self.int8_layer = self.int8_layer, None

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> None:
        start = config.init_lora_weights
        if start not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights: {start!r} looks at the base weight, which is int8; True, False and 'gaussian' do not"
            )
        try:
            super().resolve_lora_variant(config=config, **kwargs)
        except ValueError as error:
            raise ValueError(f"an int8 layer takes plain or rank-stabilised LoRA: {error}") from error

    # PEFT asks tensors for what it wants to know of a layer, and warns of layers that it has not heard of.

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        return base_layer.weight.device, base_layer.weight.dtype
