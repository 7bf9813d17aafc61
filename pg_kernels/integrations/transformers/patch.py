"""Replace the forwards of live transformers models by the kernels', and undo it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import transformers
from torch import nn

from pg_kernels import quantize_
from pg_kernels.integrations.transformers.attention import NAME, missing_reason, register
from pg_kernels.integrations.transformers.layers import computes_the_same, option_of, original, patched
from pg_kernels.integrations.transformers.versions import RELIES_ON, class_path, find, unknown_reason

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class _Patch:
    """What `unpatch` restores: each configuration's attention. `int8` says that the float weights are gone."""

    attention: list[tuple[Any, str]]
    int8: bool


def patch(
    model: Model,
    *,
    rms_norm: bool = True,
    rotary: bool = True,
    mlp: bool = True,
    attention: bool = True,
    loss: bool = True,
    int8: str | None = None,
) -> Model:
    """Run a live transformers model on the kernels: PaliGemma 1 and 2, Gemma 1, 2 and 3 (text), SigLIP.

    Modules, parameters and their names stay. Some modules get a subclass of their class with another forward. This works before
    and after PEFT wraps the model. A call that needs more than the kernel computes (LoRA, hooks, offloaded weights, a custom loss
    function) runs transformers' code. Layers whose code in the installed transformers is unknown stay unpatched, and one
    UserWarning names them.

    Args:
        model: the model, or a module that contains models, such as a PEFT model or a robot policy.
        rms_norm: Gemma's norms.
        rotary: rotary embeddings, in fp32 instead of the model's dtype; not if they are scaled or no fused kernel is available.
        mlp: Gemma's MLPs with tanh-approximated GELU.
        attention: call `register`, and switch the model to that attention.
        loss: in training with labels, compute the loss without logits: `output.logits` is None. The argument `skip_logits` of the
            model's forward overrides this.
        int8: "int8" or "int8-dynamic" also replaces nn.Linear layers, except adapters, as `quantize_` does. This cannot be
            undone, and `save_pretrained` then raises ValueError, except for adapters.

    Returns:
        The model.

    Raises:
        ValueError: nothing in the model can be patched, it is patched already, another package has replaced a forward, or an
            unknown `int8`. The model is then unchanged.
    """
    if _holders(model):
        raise ValueError("model: already patched; call unpatch first")
    wanted = {"rms_norm": rms_norm, "rotary": rotary, "mlp": mlp, "loss": loss, "attention": attention}
    options = [option for option, on in wanted.items() if on]
    unknown = _unknown(model, options)
    modules = [module for module in model.modules() if _is_replaceable(module, options, unknown)]
    outermost = [top for top in _outermost(model) if attention and _is_switchable(top, unknown)]
    if not modules and not outermost and not unknown:
        known = "PaliGemma, Gemma, Gemma 2, Gemma 3 (text) and SigLIP"
        raise ValueError(f"model: {type(model).__name__} holds nothing to patch; expected one of transformers' {known}")
    if covered := [module for module in modules if "forward" in vars(module) and "_old_forward" not in vars(module)]:
        name = type(covered[0]).__name__
        raise ValueError(
            f"model: a {name} has a forward of its own, as accelerate gives for autocast; patch before that"
        )
    replacements = [(module, patched(module.__class__)) for module in modules]  # type: ignore[arg-type]
    if int8 is not None:
        quantize_(model, int8, skip=_is_adapter(model))
        for top in _outermost(model):
            vars(top).update(_IN_INT8)
    configs = {
        id(m.config): m.config
        for top in outermost
        for m in top.modules()
        if isinstance(m, transformers.PreTrainedModel)
    }
    # A configuration that is switched already belongs to another patched model, too, which keeps the original setting.
    before = [(c, c._attn_implementation) for c in configs.values() if c._attn_implementation != NAME]
    vars(model)["_pg_kernels_patch"] = _Patch(before, int8 is not None)
    if outermost:
        register()
    for top in outermost:
        top.set_attn_implementation(NAME)
    for module, cls in replacements:
        _set_class(module, cls)
    if unknown:
        reasons = "; ".join(f"{name} ({option}): {reason}" for (option, name), reason in unknown.items())
        version = transformers.__version__
        warnings.warn(f"patch: not known of transformers {version}, and left as it is: {reasons}", stacklevel=2)
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch` completely, and return the model.

    Raises ValueError for a model that is not patched, whose classes have changed since (as FSDP does), or that is int8: its float
    weights are gone.
    """
    holders = _holders(model)
    if not holders:
        raise ValueError("model: not patched")
    if any(holder._pg_kernels_patch.int8 for holder in holders):
        raise ValueError("model: int8 has replaced the float weights for good; load the checkpoint again")
    ours = [module for module in model.modules() if hasattr(type(module), "_pg_kernels_original")]
    for module in ours:
        if "_pg_kernels_original" not in vars(type(module)):
            name = type(module).__name__
            raise ValueError(
                f"model: {name} was made from a patched class, as FSDP and parametrize do; undo that first"
            )
    for holder in holders:
        for config, name in holder._pg_kernels_patch.attention:
            config._attn_implementation = (
                name  # also sets the attention of its parts, which the next iterations restore
            )
        del holder._pg_kernels_patch
    for module in ours:
        _set_class(module, type(module)._pg_kernels_original)  # type: ignore[attr-defined]
    return model


def apply_to_paligemma(**options: Any) -> Callable[[], None]:
    """Patch every PaliGemma that transformers builds or loads from now on. Return a function that ends this.

    Args:
        options: `patch`'s options, except `int8`, which needs the weights.

    Raises:
        ValueError: applied already. TypeError: an unknown option.
    """
    cls: Any = transformers.PaliGemmaForConditionalGeneration
    before = cls.__init__
    if hasattr(before, "_pg_kernels_original"):
        raise ValueError("apply_to_paligemma: applied already")
    allowed = inspect.signature(patch).parameters.keys() - {"model", "int8"}
    if unknown := options.keys() - allowed:
        raise TypeError(f"apply_to_paligemma: got {', '.join(sorted(unknown))}, expected {', '.join(sorted(allowed))}")

    @functools.wraps(before)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        patch(self, **options)

    def undo() -> None:
        if cls.__init__ is init:
            cls.__init__ = before

    init._pg_kernels_original = before  # type: ignore[attr-defined]
    cls.__init__ = init
    return undo


Unknown = dict[tuple[str, str], str]
"""Why an option's replacement does not fit, by option and class name."""


def _unknown(model: nn.Module, options: list[str]) -> Unknown:
    """Return the classes of a model that `options` would replace, but whose code is unknown, with the reasons."""
    classes = {original(module) or type(module) for module in model.modules()}
    homes = {cls.__module__.removeprefix("transformers.") for cls in classes}
    unknown = {}
    for option, path in sorted(RELIES_ON):
        home, _, name = path.rpartition(".")
        if option in options and home in homes and find(path) is None:
            unknown[option, name] = "transformers has it no longer"
    for cls in sorted(classes, key=lambda cls: cls.__name__):
        for option in options:
            if (option, class_path(cls)) in RELIES_ON and (reason := _reason(option, cls)):
                unknown[option, cls.__name__] = reason
    return unknown


def _reason(option: str, cls: type) -> str | None:
    """Return why the replacement of `option` does not fit `cls`, or None if it does."""
    return (missing_reason() if option == "attention" else None) or unknown_reason(option, cls)


def _is_replaceable(module: nn.Module, options: list[str], unknown: Unknown) -> bool:
    """Return whether a module gets another forward."""
    option, name = option_of(type(module)), type(module).__name__
    return (
        original(module) is None and option in options and (option, name) not in unknown and computes_the_same(module)
    )


def _is_switchable(top: nn.Module, unknown: Unknown) -> bool:
    """Return whether all attention layers of a model that have a replacement are of classes whose code is known."""
    layers = {type(module) for module in top.modules() if ("attention", class_path(type(module))) in RELIES_ON}
    return bool(layers) and not any(("attention", cls.__name__) in unknown for cls in layers)


def _holders(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "_pg_kernels_patch" in vars(module)]


def _outermost(model: nn.Module) -> list[Any]:
    """Return the transformers models in a module that are not part of another model."""
    if isinstance(model, transformers.PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in _outermost(child)]


def _is_adapter(model: nn.Module) -> Callable[[str, Any], bool]:
    """Return a function that tells PEFT's own layers, which are trained, from the layers that they adapt."""
    if not any(hasattr(module, "peft_config") for module in model.modules()):
        return lambda name, layer: False
    from peft.tuners.tuners_utils import BaseTunerLayer

    own = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            own |= set(module.modules()) - set(module.get_base_layer().modules())
    return lambda name, layer: layer in own or bool(layer.weight.requires_grad)


def _refuse_to_save(*args: Any, **options: Any) -> None:
    """Raise: transformers would read int8 values as weights, and only warn of the unknown scales."""
    raise ValueError("save_pretrained: transformers cannot load int8 weights; save the model before, or its adapters")


def _refuse_to_resize(*args: Any, **options: Any) -> None:
    raise ValueError("resize_token_embeddings: the embedding is int8; resize before patching")


def _are_tied(*args: Any, **options: Any) -> None:
    """Do nothing: tied weights are one int8 weight already."""


_IN_INT8 = {
    "save_pretrained": _refuse_to_save,
    "resize_token_embeddings": _refuse_to_resize,
    "tie_weights": _are_tied,
}
"""Methods that an int8 model replaces."""


def _set_class(module: Any, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    if "_old_forward" in vars(module):  # accelerate calls it between its hooks
        module._old_forward = cls.forward.__get__(module)
