"""What PEFT needs of a model beyond its layers: accessors, older parameter names, weights that adapters may change."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from pg_kernels.nn import Int8Embedding, Int8Linear

# Name in a file -> parameter name, first match wins. The layouts: `language_model.model.` and `vision_tower.vision_model.`
# (transformers up to 4.51), everything under `model.` (4.52), no `vision_model.` (5.x in memory), and the mixture of
# old prefix and new tower that 5.x writes.
OLDER_NAMES = {
    r"^(?:model\.)?(?:language_model\.)?lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.language_model.",
    r"^(?:model\.)?vision_tower\.(?:vision_model\.)?": "model.vision_tower.",
    r"^(?:model\.)?multi_modal_projector\.": "model.multi_modal_projector.",
}


class AdapterParent(nn.Module):
    """A module whose child layers can share a weight with another layer, or be int8, and still take PEFT's adapters.

    PEFT merges an adapter into its base layer's weight in place. Output head and embedding may share a weight, and merging an
    adapter over one would change both. An adapted layer therefore gets its own copy of the weight. PEFT's `modules_to_save`
    trains a copy of a layer; an int8 layer cannot be trained and raises ValueError.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        adapter = getattr(value, "token_adapter", value)  # PEFT's wrapper for single trained tokens holds the adapter
        base, copied = getattr(adapter, "base_layer", None), getattr(value, "modules_to_save", None)
        weight = getattr(base, "weight", None)
        if isinstance(base, nn.Module) and isinstance(weight, nn.Parameter):
            base.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        if isinstance(copied, nn.Module) and any(isinstance(m, Int8Linear | Int8Embedding) for m in copied.modules()):
            raise ValueError(f"modules_to_save: {name} is int8, which cannot be trained; load the model in floats")
        super().__setattr__(name, value)


class Adaptable(AdapterParent):
    """The interface that PEFT, accelerate and transformers' utilities expect of a PaliGemma, with transformers' names."""

    config: Any
    model: Any
    lm_head: Any
    generation_defaults: dict[str, Any]

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _checkpoint_conversion_mapping: ClassVar = OLDER_NAMES
    # Checkpointed layers are recomputed without reentering autograd, so PEFT need not make their inputs require gradients.
    is_gradient_checkpointing = is_activation_checkpointing = False
    generation_config: Any = None

    @property
    def device(self) -> torch.device:
        """The device of the embedding."""
        return self._table.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states, which is the embedding's. Norms may be kept in fp32."""
        return self._table.dtype

    @property
    def _table(self) -> Any:
        embedding = self.get_input_embeddings()
        return getattr(embedding, "original_module", embedding).weight  # PEFT's wrapper would compute a new table

    def get_input_embeddings(self) -> Any:
        return self.model.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.language_model.embed_tokens = value

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Exists because PEFT's `task_type="CAUSAL_LM"` requires it. It is never called: `generate` is not transformers'."""
        raise NotImplementedError("PaliGemma.generate prepares its inputs itself")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Report an adapter's tensors that fit no adapted layer, which PEFT would ignore silently."""
        super()._load_from_state_dict(state_dict, prefix, *rest)
        names = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
        unknown = [name for name in names if not self._has(name)]
        if unknown and hasattr(self, "peft_config"):
            *_, errors = rest
            errors.append(
                f"{len(unknown)} tensor(s) fit no layer that is adapted here: {', '.join(unknown[:3])}"
                f"{', …' if len(unknown) > 3 else ''}. target_modules must match this model's names, such as "
                "model.language_model.layers.0.self_attn.q_proj; for tensors with the names of an older transformers, give "
                "PEFT key_mapping=pg_kernels.model.adapters.OLDER_NAMES"
            )

    def _has(self, name: str) -> bool:
        owner, _, leaf = name.rpartition(".")
        try:
            module = self.get_submodule(owner)
        except AttributeError:
            return False
        return leaf in {**module._parameters, **module._buffers} or isinstance(module, Int8Linear | Int8Embedding)
