"""SigLIP's image encoder: a pre-LayerNorm vision transformer without class token and pooling head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pg_kernels import prefix_lm_attention
from pg_kernels.nn import LayerNorm, add_and_norm, project

from .config import VisionConfig


class SiglipEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.num_image_tokens, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        return patches + self.position_embedding.weight.to(patches.dtype)


class SiglipAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for y in project(x, (self.q_proj, self.k_proj, self.v_proj))
        )
        return self.out_proj(prefix_lm_attention(q, k, v, causal=False).transpose(1, 2).flatten(2))


class SiglipMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipEncoderLayer(nn.Module):
    """One block, called like `GemmaDecoderLayer`: it leaves its last residual addition to the next norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        normed, x = add_and_norm(self.layer_norm1, x, added)
        normed, x = self.layer_norm2(self.self_attn(normed), residual=x)
        return x, self.mlp(normed)


class SiglipEncoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        added = None
        for layer in self.layers:
            x, added = layer(x, added)
        return x, added


class SiglipVisionTower(nn.Module):
    """Map pixel_values [n, 3, image_size, image_size] in [−1, 1] to patch features [n, N, hidden_size].

    Source: Zhai et al., https://arxiv.org/abs/2303.15343; big_vision's `vit.py`.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return add_and_norm(self.post_layernorm, *self.encoder(self.embeddings(pixel_values)))[0]


def resample_position_embedding(weight: Tensor, num_image_tokens: int) -> Tensor:
    """Resample a learned square grid of position embeddings [N, D] to another grid [num_image_tokens, D].

    Bilinear in fp32 with the corners kept in place, as big_vision's `resample_posemb` does. Raises ValueError when either grid
    is not square.
    """
    sides = [round(n**0.5) for n in (weight.shape[0], num_image_tokens)]
    for side, n in zip(sides, (weight.shape[0], num_image_tokens), strict=True):
        if side * side != n:
            raise ValueError(f"position embedding: {n} tokens do not form a square grid")
    grid = weight.detach().float().T.reshape(1, -1, sides[0], sides[0])
    resampled = F.interpolate(grid, (sides[1], sides[1]), mode="bilinear", align_corners=True)
    return resampled.flatten(2)[0].T.contiguous().to(weight.dtype)
