"""The Gemma and Gemma 2 decoders, attending through a prefix-LM mask and an optional static key-value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pg_kernels.nn import GeGLUMLP, PrefixLMAttention, RMSNorm, add_and_norm

from .adapters import AdapterParent
from .cache import AttentionLengths, KVCache
from .config import TextConfig


def attention(config: TextConfig, layer: int) -> PrefixLMAttention:
    """Return the attention of a layer. Gemma 2's even layers may have a sliding window."""
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
    """One block of Gemma: a norm before attention and a norm before the MLP, which Hugging Face calls post_attention.

    A block leaves its last residual addition to the next block's norm, which reads the sum anyway. It takes x and `residual`
    [B, S, D] (None before the first block), whose sum is its input, and returns such a pair. `attention` goes to
    `PrefixLMAttention`.
    """

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GeGLUMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, residual: Tensor | None, positions: Tensor, query_index: Tensor | None, **attention: Any
    ) -> tuple[Tensor, Tensor]:
        normed, x = add_and_norm(self.input_layernorm, x, residual)
        attended = self.self_attn(normed, positions, query_index=query_index, **attention)
        normed, x = self.post_attention_layernorm(attended, residual=_select_query(x, query_index))
        return x, self.mlp(normed)


class Gemma2DecoderLayer(nn.Module):
    """One block of Gemma 2: norms before and after both attention and MLP. It is called like Gemma's block."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GeGLUMLP(config.hidden_size, config.intermediate_size)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, residual: Tensor | None, positions: Tensor, query_index: Tensor | None, **attention: Any
    ) -> tuple[Tensor, Tensor]:
        normed, x = add_and_norm(self.input_layernorm, x, residual)
        attended = self.post_attention_layernorm(
            self.self_attn(normed, positions, query_index=query_index, **attention)
        )
        normed, x = self.pre_feedforward_layernorm(attended, residual=_select_query(x, query_index))
        return x, self.post_feedforward_layernorm(self.mlp(normed))


def _select_query(x: Tensor, query_index: Tensor | None) -> Tensor:
    """Return x [B, S, D], or with `query_index` [B] each example's row there, [B, 1, D]."""
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
        lengths: AttentionLengths,
        cache: KVCache | None = None,
        cache_positions: Tensor | None = None,
        query_index: Tensor | None = None,
    ) -> Tensor:
        """Run all layers; positions [B, S] turn the rotary embedding, cache_positions [B, S] say where the cache takes the keys.

        With `query_index`, int64 [B], return only the state of each example's token at that index, [B, 1, D]. The last layer then
        computes nothing but keys and values of the other tokens.
        """
        x, residual = embeddings, None
        for index, layer in enumerate(self.layers):
            x, residual = layer(
                x,
                residual,
                positions,
                query_index if index == len(self.layers) - 1 else None,
                prefix_lens=lengths.prefix_lens,
                kv_starts=lengths.kv_starts,
                kv_lens=lengths.kv_lens,
                q_starts=lengths.q_starts,
                cache=None if cache is None else (cache.keys[index], cache.values[index]),
                cache_positions=cache_positions,
            )
        return add_and_norm(self.norm, x, residual)[0]
