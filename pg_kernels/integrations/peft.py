"""PEFT's LoRA over int8 layers. Float layers need nothing from this module."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import nn

from pg_kernels.nn import Int8Linear

# Parts of layer names of transformers up to 4.51 or 4.57, plain or in regular expressions, and their names today.
_OLDER_NAMES = (
    (r"language_model\\?\.lm_head", "lm_head"),
    (r"(language_model\\?\.)model\\?\.", r"\1"),
    (r"(?:vision_tower\\?\.)?vision_model", "vision_tower"),
    (r"(?:^|(?<=[(|^:]))(?=(?:language_model|vision_tower|multi_modal_projector)\b)", "model."),
)


def register(config: LoraConfig) -> LoraConfig:
    """Let a LoraConfig adapt `Int8Linear` layers, too, and return it, for `get_peft_model` and `add_adapter`.

    PEFT does not save the registration. Load an adapter with

        PeftModel.from_pretrained(model, folder, config=register(LoraConfig.from_pretrained(folder)))

    int8 layers take plain and rank-stabilised LoRA with an initialisation that does not read the weights; PEFT raises ValueError
    for others when it wraps a layer. Layers may have the names of PaliGemma in transformers up to 4.57.
    """
    for field in ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"):
        setattr(config, field, _with_current_names(getattr(config, field)))
    config._register_custom_module({Int8Linear: LoraInt8Linear})
    return config


def _with_current_names(names: Any) -> Any:
    """Add today's names to layer names: a list of names, a mapping by names, or a regular expression."""
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

    Merging replaces the layer by an nn.Linear with the dequantised weight plus the adapter, in the layer's dtype: most of an
    adapter would be lost in int8 steps. Unmerging puts the int8 layer back.

    Source: Hu et al., https://arxiv.org/abs/2106.09685.
    """

    lora_variants: Any = {(): None}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.int8_layer: nn.Module | None = None
        """The int8 base layer, while a merged float layer takes its place; else None."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the int8 layer by its dequantised one, and add these adapters, or the active ones, to its weight."""
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

    # PEFT reads sizes and dtype from a layer's tensors, and warns of layers that it does not know.

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        return base_layer.weight.device, base_layer.weight.dtype
