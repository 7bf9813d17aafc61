"""The example policy: on the kernels, with the parameters of its plain PyTorch layers, it acts as they do."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

EXAMPLE = Path(__file__).parents[2] / "examples" / "robot_policy.py"


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


def test_actions_are_those_of_plain_pytorch(example: SimpleNamespace) -> None:
    torch.manual_seed(0)
    size = example.SIZES["tiny"]
    plain, kernels = example.Policy(size, example.PLAIN).eval(), example.Policy(size, example.KERNELS).eval()
    example.initialize(plain)
    kernels.load_state_dict(plain.state_dict(), strict=True)
    images = torch.rand(2, size.cameras, 3, size.image_size, size.image_size) * 2 - 1
    prompt, state = torch.randint(size.vocabulary, (2, size.prompt)), torch.randn(2, size.action_dim)
    noise = torch.randn(2, size.actions, size.action_dim)

    @torch.inference_mode()
    def act(policy: torch.nn.Module) -> Tensor:
        prefix = policy.prefill(images, prompt, state)
        kept = prefix[0].clone()
        actions = policy.denoise(noise, *prefix)
        assert torch.equal(prefix[0][..., : prefix[1], :], kept[..., : prefix[1], :])  # computed once
        return actions

    expected = act(plain)
    assert expected.shape == noise.shape and not torch.allclose(expected[0], expected[1], atol=0.1)
    torch.testing.assert_close(act(kernels), expected, rtol=1e-4, atol=1e-4)
    error = (act(example.quantized(kernels)) - expected).norm() / expected.norm()
    assert 0 < error < 0.03
