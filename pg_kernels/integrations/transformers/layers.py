"""The forwards with which `patch` replaces those of transformers' classes, and the subclasses that have them.

`versions.RELIES_ON` lists the code of transformers that each forward depends on.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from pg_kernels import apply_rotary, linear_cross_entropy, rms_norm
from pg_kernels.backends import requested, select
from pg_kernels.integrations.transformers.versions import RELIES_ON, class_path, find, unknown_reason
from pg_kernels.nn import GeGLUMLP, Int8Linear, is_plain_int8_linear, is_plain_linear

Forward = Callable[..., Any]


def option_of(cls: type) -> str:
    """Return the option of `patch` that replaces the forward of `cls`, or "" if there is none."""
    path = class_path(cls)
    return next((option for option in FORWARDS if (option, path) in RELIES_ON), "")


def computes_the_same(module: Any) -> bool:
    """Return whether the replacement supports the module's configuration: its activation, its rotary embedding."""
    option = option_of(type(module))
    return (option != "mlp" or _is_tanh_gelu(module.act_fn)) and (option != "rotary" or _theta(module) is not None)


@functools.cache
def patched(cls: Any) -> Any:
    """Return a subclass of `cls` with the replaced forward. It keeps the class's name, which checkpoints and PEFT look at."""
    body = {name: getattr(cls, name) for name in ("__module__", "__doc__")}
    body |= {"forward": FORWARDS[option_of(cls)](cls), "_pg_kernels_original": cls, "__reduce_ex__": _reduced}
    return type(cls.__name__, (cls,), body)


def original(module: nn.Module) -> Any:
    """Return the class of transformers that a patched module's class was made from, or None for a module that is not patched."""
    return getattr(type(module), "_pg_kernels_original", None)


def _reduced(module: Any, protocol: Any) -> tuple[Any, ...]:
    """Make copy and pickle restore the patched class. By its name, pickle would find the original class."""
    return _bare, (type(module)._pg_kernels_original,), vars(module)


def _bare(cls: Any) -> Any:
    """Return a patched module without attributes; an unpatched one if transformers has changed since it was pickled."""
    if reason := unknown_reason(option_of(cls), cls):
        warnings.warn(f"{cls.__name__} is loaded unpatched: {reason}", stacklevel=2)
    else:
        cls = patched(cls)
    return cls.__new__(cls)


def _norm_forward(cls: Any) -> Forward:
    return lambda self, x: rms_norm(x, self.weight, self.eps)


def _attention_forward(cls: Any) -> Forward:
    original = cls.forward
    names = list(inspect.signature(original).parameters)[1:]
    # Older versions call the cache `past_key_values`. Newer ones call it `cache`, accept both, and pass more to its update.
    renamed = "cache" in names
    cache_name = "cache" if renamed else "past_key_values"
    attributes = _ATTENTION_OPTIONS[cls.__name__]
    namespace = inspect.unwrap(original).__globals__

    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        inputs |= zip(names, args, strict=False)
        positions = inputs.get("position_ids")
        # On the reference backend, cos and sin computed once for all layers beat recomputing them in each.
        fused = requested() != "auto" or select("apply_rotary", inputs["hidden_states"].device.type) != "reference"
        if positions is None or not fused or (renamed and "past_key_values" in inputs):
            return original(self, **inputs)
        hidden_states = inputs.pop("hidden_states")
        attention_mask, cache = inputs.pop("attention_mask", None), inputs.pop(cache_name, None)
        inputs.pop("position_embeddings", None)
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, k, positions.expand(len(q), -1), theta=_theta(self))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, **({"kwargs": inputs} if renamed else {}))
        functions, eager = namespace["ALL_ATTENTION_FUNCTIONS"], namespace["eager_attention_forward"]
        attend = functions.get_interface(self.config._attn_implementation, eager)
        inputs |= {option: getattr(self, attribute) for option, attribute in attributes.items()}
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **inputs)
        return self.o_proj(out.flatten(2)), weights

    return forward


_ATTENTION_OPTIONS = {
    "GemmaAttention": {},
    "Gemma2Attention": {"sliding_window": "sliding_window", "softcap": "attn_logit_softcapping"},
    "Gemma3Attention": {"sliding_window": "sliding_window"},
}
"""The options that each class passes to attention besides dropout and scaling, and the attributes that hold them."""


def _theta(attention: Any) -> Any:
    """Return the base of the rotary embedding's frequencies, or None if they are scaled."""
    parameters = attention.config.rope_parameters
    parameters = parameters.get(
        getattr(attention, "layer_type", None), parameters
    )  # Gemma 3 has parameters for each kind of layer
    return parameters["rope_theta"] if parameters["rope_type"] == "default" else None


def _is_tanh_gelu(activation: Any) -> bool:
    x = torch.linspace(-4, 4, 65, dtype=torch.float32, device="cpu")  # models are also built on the meta device
    return torch.allclose(activation(x), nn.functional.gelu(x, approximate="tanh"), rtol=0, atol=1e-6)


ForCausalLMLoss: Any = find("loss.loss_utils.ForCausalLMLoss")


def _computes_loss(model: Any, logits_to_keep: int | Tensor) -> bool:
    """Return whether `linear_cross_entropy` computes the model's loss."""
    if original(model) is None:  # unpatched; accelerate still calls the forward that it has kept
        return False
    head = model.lm_head
    whole = not isinstance(logits_to_keep, Tensor) and logits_to_keep == 0
    return whole and model.loss_function is ForCausalLMLoss and (is_plain_linear(head) or is_plain_int8_linear(head))


def _loss_forward(cls: Any) -> Forward:
    original = cls.forward
    signature = inspect.signature(original)
    names = list(signature.parameters)[1:]
    function = inspect.unwrap(original)
    # Some versions of PaliGemma's forward leave the softcap out.
    caps = "final_logit_softcapping" in (*function.__code__.co_consts, *function.__code__.co_names)
    pali = "PaliGemma" if cls.__name__.startswith("PaliGemma") else ""

    @function.__globals__["can_return_tuple"]
    def without_logits(self: Any, labels: Tensor, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        hidden = outputs.last_hidden_state
        head = self.lm_head
        targets = inputs.get("shift_labels")
        if targets is None:
            hidden, targets = hidden[:, :-1], labels[:, 1:]
        items = inputs.get("num_items_in_batch")
        text = self.config.get_text_config()
        loss = linear_cross_entropy(
            hidden,
            head.weight.dequantize(hidden.dtype) if type(head) is Int8Linear else head.weight,
            targets.to(hidden.device),
            ignore_index=inputs.get("ignore_index", -100),
            softcap=getattr(text, "final_logit_softcapping", None) if caps else None,
            reduction="mean" if items is None else "sum",
        )
        if items is not None:
            loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
        Output = function.__globals__[f"{pali}CausalLMOutputWithPast"]
        shared = outputs.keys() & {field.name for field in fields(Output)}
        return Output(loss=loss, **{name: outputs[name] for name in shared})

    def forward(self: Any, *args: Any, skip_logits: bool | None = None, **inputs: Any) -> Any:
        inputs |= zip(names, args, strict=False)
        skip = self.training if skip_logits is None else skip_logits
        if not skip or inputs.get("labels") is None or not _computes_loss(self, inputs.get("logits_to_keep", 0)):
            return original(self, **inputs)
        inputs.pop("logits_to_keep", None)
        return without_logits(self, **inputs)

    # Trainer and generate read the signature. functools.wraps would make accelerate unwrap this function.
    skip = inspect.Parameter("skip_logits", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    forward.__signature__ = signature.replace(parameters=[*parameters[:-1], skip, parameters[-1]])  # type: ignore[attr-defined]
    forward.__doc__ = original.__doc__
    return forward


FORWARDS: dict[str, Callable[[Any], Forward]] = {
    "rms_norm": _norm_forward,
    "rotary": _attention_forward,
    "mlp": lambda cls: GeGLUMLP.forward,
    "loss": _loss_forward,
}
"""The functions that make the replaced forward of a class, by option of `patch`."""
