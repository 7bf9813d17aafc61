"""big_vision's arrays: their keys, the parameters that each holds, and the conversions in both directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

IMAGE_BLOCK = "img/Transformer/encoderblock"
TEXT_BLOCK = "llm/layers"

Split = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
Join = Callable[[tuple[torch.Tensor, ...], int], torch.Tensor]


@dataclass(frozen=True)
class Array:
    """One array of one layer (or of no layer): its key, its parameters and the conversions in both directions.

    `split` makes the torch parameters of an array with `ndim` dimensions; `join(parameters, head_dim)` is its inverse.
    """

    key: str
    names: tuple[str, ...]
    ndim: int
    split: Split
    join: Join


def _as_is(key: str, name: str, ndim: int = 1) -> Array:
    return Array(key, (name,), ndim, lambda a: (a,), lambda t, _: t[0])


def _transposed(key: str, name: str) -> Array:
    return Array(key, (name,), 2, lambda a: (a.T,), lambda t, _: t[0].T)


def _projection(weight: torch.Tensor) -> torch.Tensor:
    """Reshape [heads, D, hd] to [heads * hd, D]."""
    return weight.transpose(-1, -2).flatten(0, 1)


def _per_head(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reshape [heads * hd, D] to [heads, D, hd]."""
    return weight.unflatten(0, (-1, head_dim)).transpose(-1, -2)


def _fused(key: str, names: tuple[str, ...]) -> Array:
    return Array(
        key,
        names,
        4,
        lambda a: tuple(_projection(part) for part in a.unbind()),
        lambda t, head_dim: torch.stack([_per_head(weight, head_dim) for weight in t]),
    )


def image_block() -> list[Array]:
    arrays = []
    for i in (0, 1):
        arrays += [
            _as_is(f"LayerNorm_{i}/scale", f"layer_norm{i + 1}.weight"),
            _as_is(f"LayerNorm_{i}/bias", f"layer_norm{i + 1}.bias"),
            _transposed(f"MlpBlock_0/Dense_{i}/kernel", f"mlp.fc{i + 1}.weight"),
            _as_is(f"MlpBlock_0/Dense_{i}/bias", f"mlp.fc{i + 1}.bias"),
        ]
    for long, short in (("query", "q"), ("key", "k"), ("value", "v")):
        key, name = f"MultiHeadDotProductAttention_0/{long}", f"self_attn.{short}_proj"
        arrays += [
            Array(
                f"{key}/kernel",
                (f"{name}.weight",),
                3,
                lambda a: (a.flatten(1).T,),
                lambda t, head_dim: t[0].T.unflatten(1, (-1, head_dim)),
            ),
            Array(
                f"{key}/bias",
                (f"{name}.bias",),
                2,
                lambda a: (a.flatten(),),
                lambda t, head_dim: t[0].unflatten(0, (-1, head_dim)),
            ),
        ]
    key, name = "MultiHeadDotProductAttention_0/out", "self_attn.out_proj"
    arrays += [
        Array(
            f"{key}/kernel",
            (f"{name}.weight",),
            3,
            lambda a: (a.flatten(0, 1).T,),
            lambda t, head_dim: t[0].T.unflatten(0, (-1, head_dim)),
        ),
        _as_is(f"{key}/bias", f"{name}.bias"),
    ]
    return arrays


def text_block(*, gemma2: bool, fused_qkv: bool) -> list[Array]:
    q, k, v = (f"self_attn.{name}_proj.weight" for name in "qkv")
    if fused_qkv:
        arrays = [_fused("attn/qkv_einsum/w", (q, k, v))]
    else:
        arrays = [
            Array(
                "attn/q_einsum/w",
                (q,),
                3,
                lambda a: (_projection(a),),
                lambda t, head_dim: _per_head(t[0], head_dim),
            ),
            _fused("attn/kv_einsum/w", (k, v)),
        ]
    arrays += [
        Array(
            "attn/attn_vec_einsum/w",
            ("self_attn.o_proj.weight",),
            3,
            lambda a: (a.flatten(0, 1).T,),
            lambda t, head_dim: t[0].T.unflatten(0, (-1, head_dim)),
        ),
        Array(
            "mlp/gating_einsum",
            ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            3,
            lambda a: tuple(part.T for part in a.unbind()),
            lambda t, _: torch.stack([weight.T for weight in t]),
        ),
        _transposed("mlp/linear", "mlp.down_proj.weight"),
        _as_is("pre_attention_norm/scale", "input_layernorm.weight"),
    ]
    if gemma2:
        arrays += [
            _as_is("post_attention_norm/scale", "post_attention_layernorm.weight"),
            _as_is("pre_ffw_norm/scale", "pre_feedforward_layernorm.weight"),
            _as_is("post_ffw_norm/scale", "post_feedforward_layernorm.weight"),
        ]
    else:
        # Hugging Face's name in Gemma 1 for the norm before the MLP.
        arrays += [_as_is("pre_ffw_norm/scale", "post_attention_layernorm.weight")]
    return arrays


SINGLE_ARRAYS = [
    Array(
        "img/embedding/kernel",
        ("model.vision_tower.embeddings.patch_embedding.weight",),
        4,
        lambda a: (a.permute(3, 2, 0, 1),),
        lambda t, _: t[0].permute(2, 3, 1, 0),
    ),
    _as_is("img/embedding/bias", "model.vision_tower.embeddings.patch_embedding.bias"),
    Array(
        "img/pos_embedding",
        ("model.vision_tower.embeddings.position_embedding.weight",),
        3,
        lambda a: (a.flatten(0, 1),),
        lambda t, _: t[0][None],
    ),
    _as_is("img/Transformer/encoder_norm/scale", "model.vision_tower.post_layernorm.weight"),
    _as_is("img/Transformer/encoder_norm/bias", "model.vision_tower.post_layernorm.bias"),
    _transposed("img/head/kernel", "model.multi_modal_projector.linear.weight"),
    _as_is("img/head/bias", "model.multi_modal_projector.linear.bias"),
    _as_is("llm/embedder/input_embedding", "model.language_model.embed_tokens.weight", ndim=2),
    _as_is("llm/final_norm/scale", "model.language_model.norm.weight"),
]
LAYER_PREFIXES = {IMAGE_BLOCK: "model.vision_tower.encoder.layers", TEXT_BLOCK: "model.language_model.layers"}
