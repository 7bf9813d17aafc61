"""A robot policy in the shape of pi0, in plain PyTorch and on pg_kernels: time per chunk of actions, and how far they differ.

python examples/robot_policy.py [--size tiny|base] [--dtype float32|bfloat16] [--rounds N] [--seed N]

PaliGemma reads camera images and a prompt; a smaller Gemma, the action expert, has as many layers and attends in each of them to
PaliGemma's keys and values and its own. It predicts the velocity that turns noise into actions, which ten steps follow (flow
matching). Weights are random, which changes no time.

Source: Black et al., https://arxiv.org/abs/2410.24164.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pg_kernels as pg
from pg_kernels import nn as pg_nn

STEPS = 10


@dataclass(frozen=True)
class Size:
    """The same heads in PaliGemma and expert, as they share keys and values."""

    cameras: int
    image_size: int
    vision_width: int
    vision_mlp: int
    vision_heads: int
    vision_layers: int
    width: int
    mlp: int
    expert_width: int
    expert_mlp: int
    layers: int
    heads: int
    head_dim: int
    kv_heads: int = 1
    prompt: int = 16
    actions: int = 50
    action_dim: int = 32
    patch: int = 14
    vocabulary: int = 1024


SIZES = {
    "tiny": Size(2, 56, 144, 288, 2, 4, 256, 1024, 128, 512, layers=4, heads=4, head_dim=64),
    "base": Size(2, 224, 384, 1536, 6, 6, 768, 4096, 384, 1536, layers=8, heads=8, head_dim=128),
}


# --- the layers, as transformers writes them


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        total = x if residual is None else x + residual
        wide = total.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight.float())
        return normed.to(x.dtype) if residual is None else (normed.to(x.dtype), total)


class GeGLUMLP(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Attention(nn.Module):
    """Over a static cache, all of which up to the last token is seen."""

    def __init__(self, hidden_size: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, *, cache: tuple[Tensor, Tensor], q_starts: int, kv_lens: int, **_: Any
    ) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        frequencies = 10_000.0 ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = (positions[:, None] * frequencies).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        q, k = (
            y * cos + torch.cat((-y[..., y.shape[-1] // 2 :], y[..., : y.shape[-1] // 2]), -1) * sin for y in (q, k)
        )
        for kept, new in zip(cache, (k, v), strict=True):
            kept[:, :, q_starts:kv_lens] = new
        k, v = (kept[:, :, :kv_lens] for kept in cache)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class Layers:
    """What a policy is built from: classes that are made and called alike, and whose parameters have the same names."""

    rms_norm: Callable[..., nn.Module]
    layer_norm: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]
    attention: Callable[..., nn.Module]
    image_attention: Callable[..., Tensor]


PLAIN = Layers(RMSNorm, nn.LayerNorm, GeGLUMLP, Attention, F.scaled_dot_product_attention)
KERNELS = Layers(
    pg_nn.RMSNorm,
    pg_nn.LayerNorm,
    pg_nn.GeGLUMLP,
    pg_nn.PrefixLMAttention,
    partial(pg.prefix_lm_attention, causal=False),
)


# --- the policy


class ImageBlock(nn.Module):
    def __init__(self, size: Size, layers: Layers) -> None:
        super().__init__()
        width = size.vision_width
        self.heads, self.attention = size.vision_heads, layers.image_attention
        self.layer_norm1, self.layer_norm2 = layers.layer_norm(width, 1e-6), layers.layer_norm(width, 1e-6)
        self.qkv_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, size.vision_mlp), nn.Linear(size.vision_mlp, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(self.layer_norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out_proj(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x)), approximate="tanh"))


class ImageEncoder(nn.Module):
    """Images [n, 3, H, W] to tokens [n, N, vision_width]."""

    def __init__(self, size: Size, layers: Layers) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, size.vision_width, size.patch, size.patch)
        self.position_embedding = nn.Embedding((size.image_size // size.patch) ** 2, size.vision_width)
        self.layers = nn.Sequential(*(ImageBlock(size, layers) for _ in range(size.vision_layers)))
        self.post_layernorm = layers.layer_norm(size.vision_width, 1e-6)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        return self.post_layernorm(self.layers(patches + self.position_embedding.weight))


class Block(nn.Module):
    """Gemma's, over a cache into which it writes its keys and values from `start` on."""

    def __init__(self, width: int, mlp: int, size: Size, layers: Layers) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = layers.rms_norm(width), layers.rms_norm(width)
        self.self_attn = layers.attention(width, size.heads, size.kv_heads, size.head_dim)
        self.mlp = layers.mlp(width, mlp)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor], start: int) -> Tensor:
        end = start + x.shape[1]
        positions = torch.arange(start, end)
        attended = self.self_attn(
            self.input_layernorm(x),
            positions,
            prefix_lens=end,  # all see all: pi0's blocks are bidirectional, and later ones are not there yet
            kv_lens=end,
            q_starts=start,
            cache=cache,
            slots=positions,
        )
        normed, x = self.post_attention_layernorm(attended, residual=x)
        return x + self.mlp(normed)


class Policy(nn.Module):
    """Images, a prompt and the robot's state to a chunk of actions [B, actions, action_dim]."""

    def __init__(self, size: Size, layers: Layers) -> None:
        super().__init__()
        self.size = size
        width, expert = size.width, size.expert_width
        self.vision_tower = ImageEncoder(size, layers)
        self.projector = nn.Linear(size.vision_width, width)
        self.embed_tokens = nn.Embedding(size.vocabulary, width)
        self.language_model = nn.ModuleList(Block(width, size.mlp, size, layers) for _ in range(size.layers))
        self.expert = nn.ModuleList(Block(expert, size.expert_mlp, size, layers) for _ in range(size.layers))
        self.norm = layers.rms_norm(expert)
        self.state_proj = nn.Linear(size.action_dim, expert)
        self.action_in_proj = nn.Linear(size.action_dim, expert)
        self.time_mlp_in, self.time_mlp_out = nn.Linear(2 * expert, expert), nn.Linear(expert, expert)
        self.action_out_proj = nn.Linear(expert, size.action_dim)

    def prefill(self, images: Tensor, prompt: Tensor, state: Tensor) -> tuple[Tensor, int]:
        """Write keys and values of all that denoising does not change: the cache [layers, 2, B, Hkv, capacity, D], its length.

        The state's are among them: it sees images and prompt, but no action.
        """
        batch = len(prompt)
        features = self.projector(self.vision_tower(images.flatten(0, 1))).unflatten(0, (batch, -1)).flatten(1, 2)
        x = torch.cat((features, self.embed_tokens(prompt)), 1)
        shape = (self.size.layers, 2, batch, self.size.kv_heads, x.shape[1] + 1 + self.size.actions, self.size.head_dim)
        cache, length = x.new_zeros(shape), x.shape[1]
        run(self.language_model, x, cache, 0)
        run(self.expert, self.state_proj(state)[:, None], cache, length)
        return cache, length + 1

    def velocity(self, actions: Tensor, moment: float, cache: Tensor, length: int) -> Tensor:
        """Where actions [B, actions, action_dim] should move at a moment in [0, 1]."""
        half = self.size.expert_width // 2
        periods = 4e-3 * 1e3 ** torch.linspace(0, 1, half)
        angles = 2 * torch.pi * moment / periods
        wave = torch.cat((angles.sin(), angles.cos())).to(actions.dtype).expand(*actions.shape[:2], -1)
        x = self.time_mlp_in(torch.cat((self.action_in_proj(actions), wave), -1))
        x = run(self.expert, self.time_mlp_out(F.silu(x)), cache, length)
        return self.action_out_proj(self.norm(x))

    def denoise(self, noise: Tensor, cache: Tensor, length: int) -> Tensor:
        """Follow the velocity from noise, at 0, to actions, at 1."""
        actions = noise
        for step in range(STEPS):
            actions = actions + self.velocity(actions, step / STEPS, cache, length) / STEPS
        return actions


def run(blocks: nn.ModuleList, x: Tensor, cache: Tensor, start: int) -> Tensor:
    for block, (keys, values) in zip(blocks, cache, strict=True):
        x = block(x, (keys, values), start)
    return x


@torch.no_grad()
def initialize(policy: nn.Module) -> None:
    for module in policy.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)


# --- the comparison


def quantized(policy: Policy) -> Policy:
    """A copy with int8 layers; what reads and writes actions stays as it is."""
    policy = copy.deepcopy(policy)
    for part in (policy.vision_tower, policy.language_model, policy.expert):
        pg.quantize_(part)
    return policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=9, help="each policy acts once a round, one after the other")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: expected at least 2")
    size, dtype = SIZES[arguments.size], getattr(torch, arguments.dtype)

    torch.manual_seed(arguments.seed)
    exact = Policy(size, PLAIN).eval()
    initialize(exact)
    plain = copy.deepcopy(exact).to(dtype)
    kernels = Policy(size, KERNELS).eval().to(dtype)
    kernels.load_state_dict(plain.state_dict())
    policies = {"plain PyTorch": plain, "pg_kernels": kernels, "pg_kernels, int8": quantized(kernels)}

    images = torch.rand(1, size.cameras, 3, size.image_size, size.image_size) * 2 - 1
    prompt = torch.randint(size.vocabulary, (1, size.prompt))
    state, noise = torch.randn(1, size.action_dim), torch.randn(1, size.actions, size.action_dim)
    floats = [tensor.to(dtype) for tensor in (images, state, noise)]

    with torch.inference_mode():
        expected = exact.denoise(noise, *exact.prefill(images, prompt, state))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in policies}
        actions = {}
        order = list(policies.items())
        for _ in range(arguments.rounds + 1):
            order.append(order.pop(0))  # whoever comes first may find other caches and clocks
            for name, policy in order:
                begin = time.perf_counter()
                prefix = policy.prefill(floats[0], prompt, floats[1])
                middle = time.perf_counter()
                actions[name] = policy.denoise(floats[2], *prefix)
                times[name].append((middle - begin, time.perf_counter() - middle))

    parameters = sum(parameter.numel() for parameter in plain.parameters()) / 1e6
    print(
        f"{arguments.size}: {parameters:.0f} M parameters, {arguments.dtype}, {torch.get_num_threads()} thread(s);",
        end=" ",
    )
    print(f"{prefix[1]} tokens of images, prompt and state, {size.actions} actions in {STEPS} steps")
    print(f"{'':18}{'prefix':>10}{f'{STEPS} steps':>12}{'chunk':>12}{'plain ÷ it':>12}{'in rounds':>14}", end="")
    print(f"{'largest difference':>20}")
    chunks = {name: [sum(parts) for parts in taken[1:]] for name, taken in times.items()}  # the first round warms up
    theirs = chunks["plain PyTorch"]
    for name, chunk in chunks.items():
        before, steps = (median(part) * 1e3 for part in zip(*times[name][1:], strict=True))
        low, _, high = quantiles([their / our for their, our in zip(theirs, chunk, strict=True)], n=4)
        difference = (actions[name].float() - expected).abs().max().item()
        print(f"{name:18}{before:>7.1f} ms{steps:>9.1f} ms{median(chunk) * 1e3:>9.1f} ms", end="")
        print(f"{median(theirs) / median(chunk):>12.2f}{f'{low:.2f} to {high:.2f}':>14}{difference:>20.1e}")
    print(
        f"Times: medians of {arguments.rounds} rounds; plain ÷ it: their ratio; in rounds: the middle half of each round's."
    )
    print(
        f"Differences are from plain PyTorch in float32, of actions whose standard deviation is {expected.std():.2f}."
    )


if __name__ == "__main__":
    main()
