"""The Gemma and Gemma 2 decoders, attending through a prefix-LM mask and an optional static key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pg_kernels.nn import GeGLUMLP, PrefixLMAttention, RMSNorm, add_and_norm

from .adapters import AdapterParent
from .config import TextConfig


@dataclass(frozen=True)
class AttentionLengths:
    """What `prefix_lm_attention` needs to know of each example, int32 [B] each: see its mask contract."""

    prefix_lens: Tensor
    kv_starts: Tensor
    kv_lens: Tensor
    q_starts: Tensor


class KVCache:
    """Keys and values of every layer in buffers of a fixed capacity: [layers, B, Hkv, capacity, D] each."""

    def __init__(
        self, config: TextConfig, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def select_rows(self, rows: Tensor) -> None:
        """Replace the batch by these rows (int64 [B']) of it, some perhaps repeated."""
        self.keys = self.keys.index_select(1, rows)
        self.values = self.values.index_select(1, rows)


def attention(config: TextConfig, layer: int) -> PrefixLMAttention:
    """The attention of a layer; on the even ones Gemma 2 may have a window."""
    return PrefixLMAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        scale=config.attention_scale,
        softcap=config.attn_logit_softcapping,
        window=config.sliding_window if layer % 2 == 0 else None,
        theta=config.rope_theta,
    )


class GemmaDecoderLayer(nn.Module):
    """One block of Gemma: a norm before attention and one, which Hugging Face calls post_attention, before the MLP.

    What a block adds last it leaves to the next norm, which reads it anyway: x and `added` (None before the first block) are
    [B, S, D], and their sum is the block's input; the two results likewise. The rest is for `PrefixLMAttention`.
    """

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GeGLUMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, added: Tensor | None, positions: Tensor, query_index: Tensor | None, **attention: Any
    ) -> tuple[Tensor, Tensor]:
        normed, x = add_and_norm(self.input_layernorm, x, added)
        attended = self.self_attn(normed, positions, query_index=query_index, **attention)
        normed, x = self.post_attention_layernorm(attended, residual=_picked(x, query_index))
        return x, self.mlp(normed)


class Gemma2DecoderLayer(nn.Module):
    """One block of Gemma 2: norms before and after both attention and MLP; called as Gemma's is."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GeGLUMLP(config.hidden_size, config.intermediate_size)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, added: Tensor | None, positions: Tensor, query_index: Tensor | None, **attention: Any
    ) -> tuple[Tensor, Tensor]:
        normed, x = add_and_norm(self.input_layernorm, x, added)
        attended = self.post_attention_layernorm(
            self.self_attn(normed, positions, query_index=query_index, **attention)
        )
        normed, x = self.pre_feedforward_layernorm(attended, residual=_picked(x, query_index))
        return x, self.post_feedforward_layernorm(self.mlp(normed))


def _picked(x: Tensor, query_index: Tensor | None) -> Tensor:
    """x [B, S, D], or [B, 1, D] of it at `query_index` [B]."""
    return (
        x if query_index is None else x[torch.arange(len(query_index), device=query_index.device), query_index][:, None]
    )


class GemmaModel(AdapterParent):
    """Map embeddings [B, S, D] to the last layer's normalised states [B, S, D].

    Source: big_vision's `gemma.py`; Gemma, https://arxiv.org/abs/2403.08295; Gemma 2, https://arxiv.org/abs/2408.00118.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        layer = Gemma2DecoderLayer if config.model_type == "gemma2" else GemmaDecoderLayer
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up text tokens [B, S] and scale them by sqrt(D), rounded to the embedding's dtype as in training."""
        embeddings = self.embed_tokens(input_ids)
        return embeddings * torch.tensor(embeddings.shape[-1] ** 0.5, dtype=embeddings.dtype)

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        visibility: AttentionLengths,
        cache: KVCache | None = None,
        cache_positions: Tensor | None = None,
        query_index: Tensor | None = None,
    ) -> Tensor:
        """Run all layers; positions [B, S] turn the rotary embedding, cache_positions [B, S] say where the cache takes the keys.

        With `query_index`, int64 [B], return only the state of each example's token at that index, [B, 1, D]. The last layer then
        computes nothing but keys and values of the other tokens.
        """
        x, added = embeddings, None
        for index, layer in enumerate(self.layers):
            x, added = layer(
                x,
                added,
                positions,
                query_index if index == len(self.layers) - 1 else None,
                prefix_lens=visibility.prefix_lens,
                kv_starts=visibility.kv_starts,
                kv_lens=visibility.kv_lens,
                q_starts=visibility.q_starts,
                cache=None if cache is None else (cache.keys[index], cache.values[index]),
                cache_positions=cache_positions,
            )
        return add_and_norm(self.norm, x, added)[0]
