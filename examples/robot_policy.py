"""A robot policy in the shape of pi0, in plain transformers and patched: time per chunk of actions, and their difference.

python examples/robot_policy.py [--size tiny|base] [--dtype float32|bfloat16] [--rounds N] [--seed N]

PaliGemma reads camera images and a prompt. A smaller Gemma, the action expert, has as many layers. Each of its layers attends
to PaliGemma's keys and values and to its own. The expert predicts the velocity that turns noise into actions, and ten steps
follow it (flow matching). Weights are random, which does not change the time.

Source: Black et al., https://arxiv.org/abs/2410.24164.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import time
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import Cache, GemmaConfig, GemmaModel, PaliGemmaConfig, PaliGemmaForConditionalGeneration

from pg_kernels.integrations.transformers import patch

STEPS = 10
PLAIN = "transformers"
# transformers 5.24 renamed the argument and the output's field.
CACHE = "cache" if "cache" in inspect.signature(GemmaModel.forward).parameters else "past_key_values"


@dataclass(frozen=True)
class Size:
    """Sizes of the policy. PaliGemma and expert have the same heads because they share keys and values."""

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
    prompt: int = 16
    actions: int = 50
    action_dim: int = 32
    patch: int = 14
    vocabulary: int = 1024

    @property
    def image_tokens(self) -> int:
        return self.cameras * (self.image_size // self.patch) ** 2

    def gemma(self, width: int, mlp: int) -> dict[str, Any]:
        return {
            "model_type": "gemma",
            "vocab_size": self.vocabulary,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": 1,
            "head_dim": self.head_dim,
        }

    def paligemma(self) -> PaliGemmaConfig:
        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": self.vision_width,
            "intermediate_size": self.vision_mlp,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.vision_heads,
            "image_size": self.image_size,
            "patch_size": self.patch,
            "vision_use_head": False,
        }
        return PaliGemmaConfig(
            vision_config=vision,
            text_config=self.gemma(self.width, self.mlp),
            projection_dim=self.width,
            image_token_index=self.vocabulary - 1,
        )


SIZES = {
    "tiny": Size(2, 56, 144, 288, 2, 4, 256, 1024, 128, 512, layers=4, heads=4, head_dim=64),
    "base": Size(2, 224, 384, 1536, 6, 6, 768, 4096, 384, 1536, layers=8, heads=8, head_dim=128),
}


class Policy(nn.Module):
    """Map images, a prompt and the robot's state to a chunk of actions [B, actions, action_dim]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        width = size.expert_width
        self.paligemma = PaliGemmaForConditionalGeneration(size.paligemma())
        self.expert = GemmaModel(GemmaConfig(**size.gemma(width, size.expert_mlp)))
        self.state_proj, self.action_in_proj = nn.Linear(size.action_dim, width), nn.Linear(size.action_dim, width)
        self.time_mlp_in, self.time_mlp_out = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.action_out_proj = nn.Linear(width, size.action_dim)

    def prefill(self, images: Tensor, prompt: Tensor, state: Tensor) -> Cache:
        """Return the KV cache of everything that denoising does not change.

        It includes the state's keys and values. The state attends to images and prompt, but not to actions.
        """
        placeholder = self.paligemma.config.image_token_id
        ids = torch.cat((torch.full((len(prompt), self.size.image_tokens), placeholder), prompt), 1)
        seen = self.paligemma.model(
            input_ids=ids,
            pixel_values=images.flatten(0, 1),
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.zeros_like(ids),
            use_cache=True,
        )
        self.expert(inputs_embeds=self.state_proj(state)[:, None], **{CACHE: seen[CACHE]})
        return seen[CACHE]

    def velocity(self, actions: Tensor, moment: float, cache: Cache) -> Tensor:
        """Return the velocity of actions [B, actions, action_dim] at a moment in [0, 1]."""
        periods = 4e-3 * 1e3 ** torch.linspace(0, 1, self.size.expert_width // 2)
        angles = 2 * torch.pi * moment / periods
        wave = torch.cat((angles.sin(), angles.cos())).to(actions.dtype).expand(*actions.shape[:2], -1)
        x = self.time_mlp_in(torch.cat((self.action_in_proj(actions), wave), -1))
        count, length = actions.shape[1], cache.get_seq_length()
        out = self.expert(
            inputs_embeds=self.time_mlp_out(F.silu(x)),
            # Actions attend to each other: pi0's blocks are bidirectional.
            attention_mask=torch.ones(len(actions), 1, count, length + count, dtype=torch.bool),
            **{CACHE: cache},
        )
        cache.crop(-count)
        return self.action_out_proj(out.last_hidden_state)

    def denoise(self, noise: Tensor, cache: Cache) -> Tensor:
        """Follow the velocity from noise at time 0 to actions at time 1."""
        actions = noise
        for step in range(STEPS):
            actions = actions + self.velocity(actions, step / STEPS, cache) / STEPS
        return actions


@torch.no_grad()
def initialize(policy: nn.Module) -> None:
    for module in policy.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)


def patched(policy: Policy, int8: str | None = None) -> Policy:
    """Return a patched copy. The layers that read and write actions are unchanged."""
    policy = copy.deepcopy(policy)
    for model in (policy.paligemma, policy.expert):
        patch(model, int8=int8)
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
    exact = Policy(size).eval()
    initialize(exact)
    plain = copy.deepcopy(exact).to(dtype)
    policies = {
        PLAIN: plain,
        "patched": patched(plain),
        "patched, int8": patched(plain, "int8"),
        "patched, int8-dynamic": patched(plain, "int8-dynamic"),
    }

    images = torch.rand(1, size.cameras, 3, size.image_size, size.image_size) * 2 - 1
    prompt = torch.randint(size.vocabulary - 1, (1, size.prompt))
    state, noise = torch.randn(1, size.action_dim), torch.randn(1, size.actions, size.action_dim)
    floats = [tensor.to(dtype) for tensor in (images, state, noise)]

    with torch.inference_mode():
        expected = exact.denoise(noise, exact.prefill(images, prompt, state))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in policies}
        actions = {}
        order = list(policies.items())
        for _ in range(arguments.rounds + 1):
            order.append(order.pop(0))  # rotate the order: the first policy may find other caches and clocks
            for name, policy in order:
                begin = time.perf_counter()
                cache = policy.prefill(floats[0], prompt, floats[1])
                middle = time.perf_counter()
                actions[name] = policy.denoise(floats[2], cache)
                times[name].append((middle - begin, time.perf_counter() - middle))

    parameters = sum(parameter.numel() for parameter in plain.parameters()) / 1e6
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} thread(s)")
    print(f"{arguments.size}: {parameters:.0f} M parameters, {arguments.dtype};", end=" ")
    print(f"{cache.get_seq_length()} tokens of images, prompt and state, {size.actions} actions in {STEPS} steps")
    print(f"{'':22}{'prefix':>10}{f'{STEPS} steps':>12}{'chunk':>12}{'plain ÷ it':>12}{'in rounds':>14}", end="")
    print(f"{'largest difference':>20}")
    chunks = {name: [sum(parts) for parts in taken[1:]] for name, taken in times.items()}  # skip the warm-up round
    theirs = chunks[PLAIN]
    for name, chunk in chunks.items():
        before, steps = (median(part) * 1e3 for part in zip(*times[name][1:], strict=True))
        low, _, high = quantiles([their / our for their, our in zip(theirs, chunk, strict=True)], n=4)
        difference = (actions[name].float() - expected).abs().max().item()
        print(f"{name:22}{before:>7.1f} ms{steps:>9.1f} ms{median(chunk) * 1e3:>9.1f} ms", end="")
        print(f"{median(theirs) / median(chunk):>12.2f}{f'{low:.2f} to {high:.2f}':>14}{difference:>20.1e}")
    print(
        f"Times: medians of {arguments.rounds} rounds; plain ÷ it: their ratio; in rounds: the middle half of each round's."
    )
    print(f"Differences are from transformers in float32, of actions whose standard deviation is {expected.std():.2f}.")


if __name__ == "__main__":
    main()
