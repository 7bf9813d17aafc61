"""The example policy acts the same with and without the kernels; an expert of our modules uses our model's cache."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pg_kernels.model import EMBEDDED_CHECKPOINT, PaliGemma
from pg_kernels.nn import PrefixLMAttention

EXAMPLE = Path(__file__).parents[2] / "examples" / "robot_policy.py"


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


def test_actions_are_those_of_transformers(example: SimpleNamespace) -> None:
    torch.manual_seed(0)
    size = example.SIZES["tiny"]
    plain = example.Policy(size).eval()
    example.initialize(plain)
    images = torch.rand(2, size.cameras, 3, size.image_size, size.image_size) * 2 - 1
    prompt, state = torch.randint(size.vocabulary - 1, (2, size.prompt)), torch.randn(2, size.action_dim)
    noise = torch.randn(2, size.actions, size.action_dim)

    @torch.inference_mode()
    def act(policy: torch.nn.Module) -> Tensor:
        cache = policy.prefill(images, prompt, state)
        kept = [layer.keys.clone() for layer in cache.layers]
        actions = policy.denoise(noise, cache)
        assert len(kept) == size.layers and kept[0].shape[2] == size.image_tokens + size.prompt + 1
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, kept, strict=True))
        return actions

    expected = act(plain)
    assert expected.shape == noise.shape and not torch.allclose(expected[0], expected[1], atol=0.1)
    assert plain.expert.config._attn_implementation == "sdpa"
    patched = example.patched(plain)
    assert patched.expert.config._attn_implementation == "pg_kernels"
    torch.testing.assert_close(act(patched), expected, rtol=1e-4, atol=1e-4)
    for mode, most in (("int8", 0.05), ("int8-dynamic", 0.1)):
        error = (act(example.patched(plain, mode)) - expected).norm() / expected.norm()
        assert 0 < error < most


def test_an_expert_over_the_models_cache() -> None:
    """The expert's tokens do not depend on the padding of the prompts before them."""
    torch.manual_seed(0)
    model = PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32)
    text = model.config.text_config
    expert = PrefixLMAttention(48, text.num_attention_heads, text.num_key_value_heads, text.head_dim)
    size = model.config.vision_config.image_size
    x, pixels = torch.randn(2, 3, 48), torch.rand(2, 3, size, size)
    image = [model.config.image_token_id] * model.config.vision_config.num_image_tokens
    rows = [[*image, 2, 40, 41, 42], [*image, 2, 50]]

    @torch.no_grad()
    def attended(input_ids: Tensor, mask: Tensor, x: Tensor, pixels: Tensor) -> Tensor:
        seen, positions = model.attention_lengths(input_ids, mask, None)
        cache = model.new_cache(len(x), input_ids.shape[1] + 3)
        cache_positions = torch.arange(input_ids.shape[1]).expand(len(x), -1)
        model.model.language_model(model.embed(input_ids, pixels, None), positions, seen, cache, cache_positions)
        cache_positions = seen.kv_lens[:, None] + torch.arange(3)
        return expert(
            x,
            cache_positions - seen.kv_starts[:, None],
            prefix_lens=seen.prefix_lens + 3,
            kv_starts=seen.kv_starts,
            kv_lens=seen.kv_lens + 3,
            q_starts=seen.kv_lens,
            cache=(cache.keys[-1], cache.values[-1]),
            cache_positions=cache_positions,
        )

    alone = [
        attended(torch.tensor([row]), torch.ones(1, len(row)), x[i : i + 1], pixels[i : i + 1])
        for i, row in enumerate(rows)
    ]
    for left in (0, 2):
        padded = torch.tensor([rows[0], [0] * left + rows[1] + [0] * (2 - left)])
        together = attended(padded, (padded != 0).int(), x, pixels)
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
