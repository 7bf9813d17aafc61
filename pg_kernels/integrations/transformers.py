"""The kernels under transformers: an attention implementation, and faster forwards for models that exist already."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaForCausalLM, GemmaMLP, GemmaRMSNorm
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2Attention,
    Gemma2ForCausalLM,
    Gemma2MLP,
    Gemma2RMSNorm,
    eager_attention_forward,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3ForCausalLM, Gemma3MLP, Gemma3RMSNorm
from transformers.models.paligemma.modeling_paligemma import (
    PaliGemmaCausalLMOutputWithPast,
    PaliGemmaForConditionalGeneration,
)
from transformers.models.siglip.modeling_siglip import SiglipAttention
from transformers.utils.generic import can_return_tuple

from pg_kernels import apply_rotary, linear_cross_entropy, prefix_lm_attention, quantize_, rms_norm
from pg_kernels.backends import requested, select
from pg_kernels.nn import GeGLUMLP, Int8Linear, is_only_a_product, is_only_an_int8_product
from pg_kernels.ops.prefix_lm_attention.reference import visible_keys

NAME = "pg_kernels"
"""What `register` makes transformers know the attention by."""

_HANDS_ON = frozenset(
    (
        *("gemma", "gemma2", "gemma3", "gemma3_text", "gemma4_text", "paligemma", "vaultgemma"),
        *("siglip", "siglip_text_model", "siglip_vision_model"),
        *("cohere2", "exaone4", "gpt2", "gpt_neox", "granite", "llama", "minimax", "mistral", "olmo2", "opt"),
        *("persimmon", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2"),
    )
)
"""Types of models that give a mask to attention as they got it; others add to it, cut it, or look at what it hides."""
_REFUSED = ("s_aux", "sinks", "cache", "indices", "block_indices")
"""What some models give attention that changes what it means: sinks, paged caches, sparse keys."""

Model = TypeVar("Model", bound=nn.Module)


def register() -> None:
    """Make `attn_implementation="pg_kernels"` known to transformers, for every model with attention by name; again does no harm.

    A mask that `prefix_lm_attention` can express (a bidirectional prefix, causal text after it, padding before or after both, a
    sliding window) becomes a few lengths in the models that are known to hand it on: Gemma's, PaliGemma, SigLIP, Llama and their
    like. With any other mask or model, with dropout, and with what else the op does not have, attention is PyTorch's under the
    dense mask, or transformers' eager one where there is a softcap.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


# A device must be waited for, once a forward pass, to know what kind of mask it is: a compiled graph cannot, and breaks here.
@torch.compiler.disable
def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # an int, or of a static cache a tensor
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor:
    """Give lengths for `_attention`, int32 [B, parts, 4 + window, 1], or, if none mean the mask, itself, bool [B, 1, Sq, Skv].

    The lengths are guessed from the dense mask, and taken only if they lead to the very same one: some bytes for each query and
    key, for a moment and once for all layers. Rows of padding, which nobody looks at, may differ. A model that may do more with
    a mask than hand it on gets numbers to add to scores, which all of them understand.
    """
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "allow_is_bidirectional_skip": False,
        "use_vmap": use_vmap,
        "device": device,
    }
    if config is not None and config.model_type not in _HANDS_ON:
        return eager_mask(dtype=dtype, **arguments)
    dense: Any = sdpa_mask(allow_is_causal_skip=False, **arguments)
    if dense.shape[1] != 1 or not dense.numel():
        return dense
    visible = dense[:, 0]
    if q_length == 1:  # when decoding: any run of keys is a prefix of its own
        start, end = _span(visible[:, 0])
        run = torch.stack((end - start, start, end, torch.zeros_like(start)), 1).int()[:, None, :, None]
        return _adjacent(run) if bool((visible.sum(2)[:, 0] == end - start).all()) else dense
    queries = torch.arange(q_length, device=visible.device) + q_offset
    alike = (visible == visible[:, :1]).flatten(1).all(1)[:, None]
    rows = alike.expand(-1, q_length)
    if attention_mask is None:
        rows = torch.ones_like(rows)
    else:  # which may be about other tokens than the queries: an encoder's, whose mask has rows that are all alike
        about_them = queries[-1] + 1 == attention_mask.shape[1]
        rows = rows | ~about_them | attention_mask.bool()[:, queries.clamp(max=attention_mask.shape[1] - 1)]
    lengths = _lengths(visible & rows[..., None], rows, queries[0] - kv_offset, alike[:, 0])
    choices = [lengths[:, None, :, None]]
    if local_size is not None:
        # The kernel's window never hides the prefix, transformers' does from what comes after it: two parts.
        causal = lengths * lengths.new_tensor([0, 1, 1, 1])
        parts = torch.stack((lengths, causal), 1)[..., None]
        choices += [nn.functional.pad(part, (0, 0, 0, local_size)) for part in (parts[:, 1:], parts)]
    same = [(_visible(choice, q_length, kv_length) == dense) | ~rows[:, None, :, None] for choice in choices]
    fits = torch.stack([cells.all() for cells in same]).tolist()
    return _adjacent(choices[fits.index(True)]) if any(fits) else dense


def _adjacent(mask: Tensor) -> Tensor:
    """The same with a length's numbers for all examples side by side in memory, where a kernel needs no copy of them."""
    return mask.movedim(0, -1).contiguous().movedim(-1, 0)


def _lengths(visible: Tensor, rows: Tensor, q_start: Tensor, alike: Tensor) -> Tensor:
    """The four of _LENGTHS, int32 [B, 4], that bool [B, Sq, Skv] would have; `rows` [B, Sq] count, and may be `alike` [B]."""
    start, end = _span(visible.any(1))
    first = rows.int().argmax(1)  # the first query that is no padding: what it sees of the future is the prefix
    _, horizon = _span(visible[torch.arange(len(first), device=first.device), first])
    prefix = (horizon - start).where((horizon > q_start + first + 1) | alike, 0)
    return torch.stack((prefix, start, end, q_start.expand_as(start)), 1).int()


def _span(seen: Tensor) -> tuple[Tensor, Tensor]:
    """The first true key of bool [B, Skv], and the one after the last; 0 and 0 where there is none."""
    return seen.int().argmax(1), (seen * torch.arange(1, seen.shape[1] + 1, device=seen.device)).amax(1)


def _visible(mask: Tensor, q_len: int, kv_len: int) -> Tensor:
    """The dense mask, bool [B, 1, Sq, Skv], that lengths of `_mask` mean."""
    return _by_parts(mask, q_len, lambda **part: visible_keys(q_len, kv_len, causal=True, **part)[:, None])


def _by_parts(mask: Tensor, q_len: int, result: Callable[..., Tensor]) -> Tensor:
    """What `result` [B, H, Sq, N] is for lengths of `_mask`; of two parts, the first is for the queries in the prefix.

    The window is the tensor's size, for a kernel needs an int, and no device should be waited for in every layer.
    """
    parts = [dict(zip(_LENGTHS, part[:, :4, 0].unbind(1), strict=True)) for part in mask.unbind(1)]
    results = [result(**part, window=mask.shape[2] - 4 or None) for part in parts]
    if len(parts) == 1:
        return results[0]
    positions = parts[0]["q_starts"][:, None] + torch.arange(q_len, device=mask.device)
    inside = positions < (parts[0]["kv_starts"] + parts[0]["prefix_lens"])[:, None]
    return torch.where(inside[:, None, :, None], results[0], results[1])


_LENGTHS = ("prefix_lens", "kv_starts", "kv_lens", "q_starts")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend with query [B, H, Sq, D] and key and value [B, Hkv, Skv, D], as transformers asks for it; [B, Sq, H, D]."""
    for unknown in _REFUSED if softcap is None else (*_REFUSED, "position_bias"):
        if options.get(unknown) is not None:
            raise ValueError(f"{unknown}: not supported by attn_implementation={NAME!r}")
    compact = attention_mask if attention_mask is not None and attention_mask.dtype == torch.int32 else None
    if compact is not None and not _is_whole(compact):
        raise ValueError(f"{type(module).__name__} has changed the mask; use another attn_implementation for it")
    # As for transformers' SDPA: without a mask one query sees everything, and several begin at the first key.
    causal = query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    others = key.shape != value.shape or len(query) != len(key) or options.get("position_bias") is not None
    if dropout or others:
        if compact is not None:
            attention_mask = _visible(compact, query.shape[2], key.shape[2])
    elif compact is not None or attention_mask is None:
        attend = functools.partial(prefix_lm_attention, query, key, value, scale=scaling, softcap=softcap)
        out = attend(q_starts=0, causal=causal) if compact is None else _by_parts(compact, query.shape[2], attend)
        return out.transpose(1, 2).contiguous(), None
    if softcap is None:
        arguments = (module, query, key, value, attention_mask)
        return sdpa_attention_forward(*arguments, dropout=dropout, scaling=scaling, is_causal=is_causal, **options)
    bias: Any = _bias(attention_mask, query, key, causal)
    return eager_attention_forward(module, query, key, value, bias, dropout=dropout, scaling=scaling, softcap=softcap)


def _is_whole(mask: Tensor) -> bool:
    """Whether int32 is what `_mask` gave: some models work on a mask as if it were dense, or slice it along the keys."""
    return mask.dim() == 4 and mask.shape[1] <= 2 and mask.shape[2] >= 4 and mask.shape[3] == 1


def _bias(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """A dense mask as transformers' eager attention wants it: added to the scores."""
    if mask is None and causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros((), dtype=query.dtype, device=query.device).where(mask, torch.finfo(query.dtype).min)


@dataclass
class _Patch:
    """What `unpatch` must know besides what it sees: the attention that each configuration had, and whether floats are gone."""

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
    """Let a live model of transformers run on the kernels: PaliGemma 1 and 2, Gemma 1, 2 and 3 (text), SigLIP.

    Modules, parameters and their names stay; only the classes of some modules become subclasses with another forward. Works
    before and after PEFT wraps the model. Anything that has become more than the kernel computes (LoRA, hooks, offloaded weights,
    an own loss function) is left to transformers, call by call.

    Args:
        model: the model, or a module that holds some, such as a PEFT model or a robot policy.
        rms_norm: Gemma's norms.
        rotary: rotary embeddings, in fp32 instead of the model's dtype, unless they are scaled or no fused kernel runs there.
        mlp: Gemma's MLPs with tanh-approximated GELU.
        attention: `register`, and switch to it.
        loss: with labels, in training, compute the loss without logits: `output.logits` is None. An argument `skip_logits` of
            the model's forward overrules this, either way.
        int8: "int8" or "int8-dynamic" also replaces nn.Linear layers as `quantize_` does, for good, but for adapters;
            `save_pretrained` then raises ValueError, except for adapters.

    Returns:
        The model.

    Raises:
        ValueError: nothing in the model can be patched, it is patched already, somebody else has, or an unknown `int8`; nothing
            is changed then.
    """
    if _holders(model):
        raise ValueError("model: already patched; call unpatch first")
    wanted = {"rms_norm": rms_norm, "rotary": rotary, "mlp": mlp, "loss": loss}
    modules: list[Any] = [module for module in model.modules() if wanted.get(_kind(module), False)]
    attends = any(type(module) in (*_ATTENTIONS, SiglipAttention) for module in model.modules())
    outermost = _outermost(model) if attention and attends else []
    if not modules and not outermost:
        known = "PaliGemma, Gemma, Gemma 2, Gemma 3 (text) and SigLIP"
        raise ValueError(f"model: {type(model).__name__} holds nothing to patch; expected one of transformers' {known}")
    if covered := [module for module in modules if "forward" in vars(module) and "_old_forward" not in vars(module)]:
        name = type(covered[0]).__name__
        raise ValueError(
            f"model: a {name} has a forward of its own, as accelerate gives for autocast; patch before that"
        )
    if int8 is not None:
        quantize_(model, int8, skip=_is_adapter(model))
        for top in _outermost(model):
            vars(top).update(_IN_INT8)
    configs = {id(m.config): m.config for top in outermost for m in top.modules() if isinstance(m, PreTrainedModel)}
    # One that is ours already is another patched model's, too, which knows what it was.
    before = [(c, c._attn_implementation) for c in configs.values() if c._attn_implementation != NAME]
    vars(model)["_pg_kernels_patch"] = _Patch(before, int8 is not None)
    if outermost:
        register()
    for top in outermost:
        top.set_attn_implementation(NAME)
    for module in modules:
        _set_class(module, _patched(module.__class__))
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`, to the bit; give the model.

    Raises ValueError for a model that is not patched; one whose classes have changed since, as by FSDP; one in int8, whose floats
    are gone: load it again.
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
            config._attn_implementation_internal = name
        del holder._pg_kernels_patch
    for module in ours:
        _set_class(module, type(module)._pg_kernels_original)  # type: ignore[attr-defined]
    return model


def apply_to_paligemma(**options: Any) -> Callable[[], None]:
    """Patch every PaliGemma that transformers builds or loads from now on; calling the result ends that.

    Args:
        options: `patch`'s but `int8`, which needs the weights.

    Raises:
        ValueError: applied already. TypeError: an unknown option.
    """
    cls: Any = PaliGemmaForConditionalGeneration
    original = cls.__init__
    if hasattr(original, "_pg_kernels_original"):
        raise ValueError("apply_to_paligemma: applied already")
    allowed = inspect.signature(patch).parameters.keys() - {"model", "int8"}
    if unknown := options.keys() - allowed:
        raise TypeError(f"apply_to_paligemma: got {', '.join(sorted(unknown))}, expected {', '.join(sorted(allowed))}")

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        patch(self, **options)

    def undo() -> None:
        if cls.__init__ is init:
            cls.__init__ = original

    init._pg_kernels_original = original  # type: ignore[attr-defined]
    cls.__init__ = init
    return undo


def _holders(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "_pg_kernels_patch" in vars(module)]


def _outermost(model: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers in a module that are part of no other one."""
    if isinstance(model, PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in _outermost(child)]


def _is_adapter(model: nn.Module) -> Callable[[str, Any], bool]:
    """Tell PEFT's own layers, which are trained, from those that they adapt."""
    if not any(hasattr(module, "peft_config") for module in model.modules()):
        return lambda name, layer: False
    from peft.tuners.tuners_utils import BaseTunerLayer

    own = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            own |= set(module.modules()) - set(module.get_base_layer().modules())
    return lambda name, layer: layer in own or bool(layer.weight.requires_grad)


def _refuse_to_save(*args: Any, **options: Any) -> None:
    """transformers would read levels as if they were weights, and only warn of scales that it does not know."""
    raise ValueError("save_pretrained: transformers cannot load int8 weights; save the model before, or its adapters")


def _refuse_to_resize(*args: Any, **options: Any) -> None:
    raise ValueError("resize_token_embeddings: the embedding is int8; resize before patching")


def _are_tied(*args: Any, **options: Any) -> None:
    """Weights that were one are one int8 weight, which nothing has to tie."""


_IN_INT8 = {
    "save_pretrained": _refuse_to_save,
    "resize_token_embeddings": _refuse_to_resize,
    "tie_weights": _are_tied,
}
"""What a model in int8 does instead."""


def _kind(module: nn.Module) -> str:
    """Which forward of ours fits a module, as `patch` calls it; "" for none."""
    kind = next((kind for kind, (classes, _) in _FORWARDS.items() if type(module) in classes), "")
    if kind == "mlp" and type(module.act_fn) is not type(ACT2FN["gelu_pytorch_tanh"]):
        return ""
    return "" if kind == "rotary" and _theta(module) is None else kind


@functools.cache
def _patched(cls: Any) -> Any:
    """A subclass with our forward that looks like the class itself, for checkpoints and PEFT know classes by their names."""
    forward = next(forward for classes, forward in _FORWARDS.values() if cls in classes)
    body = {name: getattr(cls, name) for name in ("__module__", "__doc__")}
    body |= {"forward": forward(cls.forward), "_pg_kernels_original": cls, "__reduce_ex__": _reduced}
    return type(cls.__name__, (cls,), body)


def _reduced(module: Any, protocol: Any) -> tuple[Any, ...]:
    """How it is copied and pickled: by its name pickle would find the original class."""
    return _bare, (type(module)._pg_kernels_original,), vars(module)


def _bare(original: Any) -> Any:
    cls = _patched(original)
    return cls.__new__(cls)


def _set_class(module: Any, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    if "_old_forward" in vars(module):  # what accelerate calls between its hooks
        module._old_forward = cls.forward.__get__(module)


def _norm_forward(self: Any, x: Tensor) -> Any:
    return rms_norm(x, self.weight, self.eps)


def _attention_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Any:
        positions = options.get("position_ids")
        # Without a kernel, cosines computed once for all layers are faster than ours for each.
        fused = requested() != "auto" or select("apply_rotary", hidden_states.device.type) != "reference"
        if positions is None or not fused:
            return original(self, hidden_states, position_embeddings, attention_mask, past_key_values, **options)
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if isinstance(self, Gemma3Attention):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, k, positions.expand(len(q), -1), theta=_theta(self))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if not isinstance(self, GemmaAttention):
            options["sliding_window"] = self.sliding_window
        if isinstance(self, Gemma2Attention):
            options["softcap"] = self.attn_logit_softcapping
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **options)
        return self.o_proj(out.flatten(2)), weights

    return forward


def _theta(attention: Any) -> Any:
    """The base of the angles' series, or None where they are scaled."""
    parameters = attention.config.rope_parameters
    parameters = parameters.get(getattr(attention, "layer_type", None), parameters)  # Gemma 3's differ by kind of layer
    return parameters["rope_theta"] if parameters["rope_type"] == "default" else None


def _computes_loss(model: Any, logits_to_keep: int | Tensor) -> bool:
    """Whether `linear_cross_entropy` gives the loss that the model would."""
    if type(model) in _HEADS:  # unpatched, and called by what accelerate has kept
        return False
    head = model.lm_head
    whole = not isinstance(logits_to_keep, Tensor) and logits_to_keep == 0
    return (
        whole and model.loss_function is ForCausalLMLoss and (is_only_a_product(head) or is_only_an_int8_product(head))
    )


def _loss_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    names = list(signature.parameters)[1:]
    code = inspect.unwrap(original).__code__
    # PaliGemma's forward has left it out in some versions.
    caps = "final_logit_softcapping" in (*code.co_consts, *code.co_names)

    @can_return_tuple
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
        pali = isinstance(self, PaliGemmaForConditionalGeneration)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return (PaliGemmaCausalLMOutputWithPast if pali else CausalLMOutputWithPast)(loss=loss, **others)

    def forward(self: Any, *args: Any, skip_logits: bool | None = None, **inputs: Any) -> Any:
        inputs |= zip(names, args, strict=False)
        skip = self.training if skip_logits is None else skip_logits
        if not skip or inputs.get("labels") is None or not _computes_loss(self, inputs.get("logits_to_keep", 0)):
            return original(self, **inputs)
        inputs.pop("logits_to_keep", None)
        return without_logits(self, **inputs)

    # Trainer and generate look at it; functools.wraps would lead accelerate past this function.
    skip = inspect.Parameter("skip_logits", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    forward.__signature__ = signature.replace(parameters=[*parameters[:-1], skip, parameters[-1]])  # type: ignore[attr-defined]
    forward.__doc__ = original.__doc__
    return forward


_ATTENTIONS = (GemmaAttention, Gemma2Attention, Gemma3Attention)
_HEADS = (PaliGemmaForConditionalGeneration, GemmaForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM)
_FORWARDS: dict[str, tuple[tuple[type[nn.Module], ...], Callable[[Callable[..., Any]], Callable[..., Any]]]] = {
    "rms_norm": ((GemmaRMSNorm, Gemma2RMSNorm, Gemma3RMSNorm), lambda original: _norm_forward),
    "rotary": (_ATTENTIONS, _attention_forward),
    "mlp": ((GemmaMLP, Gemma2MLP, Gemma3MLP), lambda original: GeGLUMLP.forward),
    "loss": (_HEADS, _loss_forward),
}
"""For each of `patch`'s options: the classes whose forwards it replaces, and what makes the new one of the old."""
