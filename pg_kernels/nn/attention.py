"""Gemma's attention as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pg_kernels.nn.configurations import is_gemma2
from pg_kernels.nn.fusion import project
from pg_kernels.nn.rotary import RotaryEmbedding
from pg_kernels.ops.apply_rotary import apply_rotary_to_cache
from pg_kernels.ops.prefix_lm_attention import prefix_lm_attention


class PrefixLMAttention(nn.Module):
    """Gemma's attention: projections, rotary embedding, `prefix_lm_attention`. Parameters have transformers' names.

    Args:
        hidden_size: last dimension of input and output.
        num_attention_heads, num_key_value_heads, head_dim: H, Hkv and D.
        bias: whether the four projections have a bias.
        scale, softcap, window: as for `prefix_lm_attention`.
        theta: as for `apply_rotary`.

    Raises ValueError when Hkv does not divide H.

    Source: Gemma, https://arxiv.org/abs/2403.08295; Gemma 2, https://arxiv.org/abs/2408.00118.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        bias: bool = False,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
        theta: float = 10_000.0,
    ) -> None:
        super().__init__()
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {num_key_value_heads} does not divide num_attention_heads, {num_attention_heads}"
            )
        self.head_dim, self.scale, self.softcap, self.window = head_dim, scale, softcap, window
        query_dim, kv_dim = num_attention_heads * head_dim, num_key_value_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, query_dim, bias)
        self.k_proj = nn.Linear(hidden_size, kv_dim, bias)
        self.v_proj = nn.Linear(hidden_size, kv_dim, bias)
        self.o_proj = nn.Linear(query_dim, hidden_size, bias)
        self.rotary_emb = RotaryEmbedding(theta)

    @classmethod
    def from_config(cls, config: Any, layer_idx: int) -> PrefixLMAttention:
        """Build it as transformers builds GemmaAttention and Gemma2Attention.

        Raises ValueError for other models, dropout and scaled frequencies.
        """
        gemma2 = is_gemma2(config)
        if config.attention_dropout:
            raise ValueError(f"config: attention_dropout is {config.attention_dropout}, supported is 0")
        sliding = gemma2 and config.layer_types[layer_idx] == "sliding_attention"
        return cls(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.attention_bias,
            scale=config.query_pre_attn_scalar**-0.5 if gemma2 else None,
            softcap=config.attn_logit_softcapping if gemma2 else None,
            window=config.sliding_window if sliding else None,
            theta=RotaryEmbedding.from_config(config).theta,
        )

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        prefix_lens: Tensor | int | None = None,
        kv_starts: Tensor | int | None = None,
        kv_lens: Tensor | int | None = None,
        q_starts: Tensor | int | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        cache_positions: Tensor | None = None,
        query_index: Tensor | None = None,
    ) -> Tensor:
        """Map x [B, S, hidden_size] to the same shape.

        Args:
            positions: [S] or [B, S], int32 or int64, for the rotary embedding.
            prefix_lens, kv_starts, kv_lens, q_starts: as for `prefix_lm_attention`.
            cache: keys and values [B, Hkv, capacity, D]. x's own are written into them, and x attends to them all. Inference
                only. `kv_lens` and `q_starts` are required, because the capacity says nothing about the lengths.
            cache_positions: [S] or [B, S], int32 or int64: where x's keys and values go in the cache.
            query_index: int64 [B], one row of each example's x. The result is then that row's, [B, 1, hidden_size].

        Raises ValueError for a cache without cache_positions or lengths, and for cache_positions without a cache.
        """
        if (cache is None) != (cache_positions is None):
            raise ValueError("cache and cache_positions: one needs the other")
        if cache is not None and (kv_lens is None or q_starts is None):
            raise ValueError("kv_lens and q_starts: needed with a cache")
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for y in project(x, (self.q_proj, self.k_proj, self.v_proj))
        )
        if cache is None or cache_positions is None:
            q, k = self.rotary_emb(q, k, positions)
        else:
            q = apply_rotary_to_cache(q, k, v, positions, *cache, cache_positions, theta=self.rotary_emb.theta)
            k, v = cache
        if query_index is not None:
            q = q.gather(2, query_index[:, None, None, None].expand(-1, q.shape[1], 1, q.shape[3]))
            q_starts = (k.shape[2] - x.shape[1] if q_starts is None else q_starts) + query_index.int()
        out = prefix_lm_attention(
            q,
            k,
            v,
            prefix_lens=prefix_lens,
            kv_starts=kv_starts,
            kv_lens=kv_lens,
            q_starts=q_starts,
            scale=self.scale,
            softcap=self.softcap,
            window=self.window,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, scale={self.scale}, softcap={self.softcap}, window={self.window}"
