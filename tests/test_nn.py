"""The modules, compared with the modules of transformers and PyTorch that they replace, on the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig, LlamaConfig
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma2 import modeling_gemma2

from pg_kernels import quantize_
from pg_kernels.nn import GeGLUMLP, LayerNorm, PrefixLMAttention, RMSNorm, RotaryEmbedding

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "vocab_size": 32,
    "attn_implementation": "eager",
}
MODELING = {"gemma": modeling_gemma, "gemma2": modeling_gemma2}
CLASSES = {"gemma": "Gemma", "gemma2": "Gemma2"}
FAMILIES = list(MODELING)


def config(family: str, **changes: Any) -> Any:
    if family == "gemma2":
        changes = {"query_pre_attn_scalar": 24, "sliding_window": 5, "attn_logit_softcapping": 3.0, **changes}
    return (Gemma2Config if family == "gemma2" else GemmaConfig)(**{**SIZES, **changes})


def theirs(family: str, name: str, *arguments: Any) -> nn.Module:
    """Return a transformers module in eval mode, with weights as large as trained ones."""
    torch.manual_seed(0)
    module = getattr(MODELING[family], CLASSES[family] + name)(*arguments).eval()
    return randomized(module)


@torch.no_grad()
def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else parameter.shape[1] ** -0.5))
    return module


def assert_same(
    ours: nn.Module, other: nn.Module, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__
) -> None:
    """Require equal results and gradients after loading the other module's parameters."""
    ours.load_state_dict(other.state_dict(), strict=True)
    results: list[Mapping[str, Tensor]] = []
    for module in (ours, other):
        inputs = x.clone().requires_grad_()
        out = call(module, inputs)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        results.append({"out": out.detach(), "x": inputs.grad, **gradients})
    assert results[0].keys() == results[1].keys()
    for name, actual in results[0].items():
        torch.testing.assert_close(actual, results[1][name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# Norms and MLP


@pytest.mark.parametrize("family", FAMILIES)
def test_rms_norm(family: str) -> None:
    other = theirs(family, "RMSNorm", 48, 1e-5)
    assert_same(RMSNorm(48, eps=1e-5), other, torch.randn(2, 3, 48))
    assert torch.equal(RMSNorm(48).weight, getattr(MODELING[family], CLASSES[family] + "RMSNorm")(48).weight)


@pytest.mark.parametrize("shape", [48, [48], torch.Size([48])], ids=str)
def test_layer_norm(shape: Any) -> None:
    torch.manual_seed(0)
    other = randomized(nn.LayerNorm(normalized_shape=shape))
    ours = LayerNorm(normalized_shape=shape)
    assert (ours.eps, ours.normalized_shape) == (other.eps, other.normalized_shape)
    assert_same(ours, other, torch.randn(2, 3, 48))


@pytest.mark.parametrize("family", FAMILIES)
def test_mlp(family: str) -> None:
    assert_same(
        GeGLUMLP.from_config(config(family)),
        theirs(family, "MLP", config(family)),
        torch.randn(2, 3, SIZES["hidden_size"]),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_layer_of_our_modules(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assigned to transformers' class names, our modules are constructed and called like the originals."""
    other = theirs(family, "DecoderLayer", config(family), 0)
    monkeypatch.setattr(MODELING[family], f"{CLASSES[family]}RMSNorm", RMSNorm)
    monkeypatch.setattr(MODELING[family], f"{CLASSES[family]}MLP", GeGLUMLP.from_config)
    ours = getattr(MODELING[family], f"{CLASSES[family]}DecoderLayer")(config(family), 0)
    assert type(ours.mlp) is GeGLUMLP and type(ours.input_layernorm) is RMSNorm
    x = torch.randn(2, 7, SIZES["hidden_size"])
    rotary = theirs(family, "RotaryEmbedding", config(family))
    angles = rotary(x, torch.arange(7)[None])
    assert_same(ours, other, x, lambda module, inputs: module(inputs, position_embeddings=angles))


# Attention


def visible(family: str, length: int, prefix_lens: Tensor, kv_starts: Tensor, window: int | None) -> Tensor:
    """Return the mask [B, 1, S, S] that transformers adds: 0 where a key is visible."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    seen = key <= query
    if window is not None:
        seen = seen & (query - key < window)
    prefix = key - kv_starts[:, None, None] < prefix_lens[:, None, None]
    seen = (seen | prefix) & (key >= kv_starts[:, None, None])
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention(family: str, layer: int, bias: bool) -> None:
    made = config(family, attention_bias=bias, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    other, ours = theirs(family, "Attention", made, layer), PrefixLMAttention.from_config(made, layer)
    assert (ours.window is not None) == (family == "gemma2" and layer == 0)
    x, length = torch.randn(2, 9, SIZES["hidden_size"]), 9
    prefix_lens, kv_starts = torch.tensor([4, 0], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    positions = (torch.arange(length) - kv_starts[:, None]).clamp(min=0)
    angles = theirs(family, "RotaryEmbedding", made)(x, positions)
    mask = visible(family, length, prefix_lens, kv_starts, ours.window)

    def call(module: nn.Module, inputs: Tensor) -> Tensor:
        if module is ours:
            out = ours(inputs, positions, prefix_lens=prefix_lens, kv_starts=kv_starts)
        else:
            out = other(inputs, position_embeddings=angles, attention_mask=mask)[0]
        # The output of padding queries is unspecified.
        return torch.where(torch.arange(length)[:, None] < kv_starts[:, None, None], 0.0, out)

    assert_same(ours, other, x, call)


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "int8"])
def test_attention_with_a_cache(quantised: bool) -> None:
    """Decoding step by step, or only the last query, gives the result of one call."""
    torch.manual_seed(0)
    module = PrefixLMAttention(48, 4, 2, 16, softcap=5.0)
    if quantised:
        quantize_(module)
    x = torch.randn(2, 6, 48)
    with torch.no_grad():
        expected = module(x, torch.arange(6), prefix_lens=3)
        last = module(x, torch.arange(6), prefix_lens=3, query_index=torch.tensor([5, 4]))
        torch.testing.assert_close(last, torch.stack((expected[0, 5:], expected[1, 4:5])))
        cache = (torch.zeros(2, 2, 8, 16), torch.zeros(2, 2, 8, 16))
        parts = [range(0, 3), *([i] for i in range(3, 6))]
        outs = []
        for part in parts:
            cache_positions = torch.tensor(list(part))
            outs.append(
                module(
                    x[:, cache_positions],
                    cache_positions,
                    prefix_lens=3,
                    kv_lens=part[-1] + 1,
                    q_starts=part[0],
                    cache=cache,
                    cache_positions=cache_positions,
                )
            )
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-4, atol=1e-5)


def test_rotary_embedding() -> None:
    made = config("gemma", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    q, k, positions = (
        torch.randn(2, 4, 5, 16),
        torch.randn(2, 2, 5, 16),
        torch.tensor([[0, 1, 2, 3, 4], [7, 0, 0, 1, 9]]),
    )
    expected = modeling_gemma.apply_rotary_pos_emb(q, k, *modeling_gemma.GemmaRotaryEmbedding(made)(q, positions))
    ours = RotaryEmbedding.from_config(made)
    assert not ours.state_dict() and "theta=500.0" in repr(ours)
    for actual, wanted in zip(ours(q, k, positions), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_attention_compiles() -> None:
    torch.manual_seed(0)
    module, x, positions = PrefixLMAttention(48, 4, 2, 16), torch.randn(1, 5, 48), torch.arange(5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, positions, prefix_lens=2), module(x, positions, prefix_lens=2))


# What is refused

SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
ONE = torch.zeros(1, dtype=torch.int64)
CACHE = (torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerNorm((3, 4)), r"^normalized_shape: expected one size, the last dimension's, got \[3, 4\]"),
        (lambda: PrefixLMAttention(48, 4, 3, 16), "^num_key_value_heads: 3 does not divide num_attention_heads, 4"),
        (
            lambda: PrefixLMAttention.from_config(config("gemma", attention_dropout=0.1), 0),
            "^config: attention_dropout is 0.1, supported is 0",
        ),
        (
            lambda: PrefixLMAttention.from_config(config("gemma", rope_parameters=SCALED), 0),
            "^config: rope_type is 'linear', supported is 'default'",
        ),
        (
            lambda: GeGLUMLP.from_config(config("gemma2", hidden_activation="silu")),
            "^config: the activation is 'silu', supported is 'gelu_pytorch_tanh'",
        ),
        (
            lambda: PrefixLMAttention(48, 4, 2, 16)(torch.ones(1, 1, 48), ONE, cache=CACHE),
            "^cache and cache_positions: one needs the other",
        ),
        (
            lambda: PrefixLMAttention(48, 4, 2, 16)(torch.ones(1, 1, 48), ONE, cache_positions=ONE),
            "^cache and cache_positions: one needs the other",
        ),
        (
            lambda: PrefixLMAttention(48, 4, 2, 16)(
                torch.ones(1, 1, 48), ONE, cache=CACHE, cache_positions=ONE, kv_lens=1
            ),
            "^kv_lens and q_starts: needed with a cache",
        ),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("other", [Gemma3TextConfig, LlamaConfig])
@pytest.mark.parametrize(
    "make",
    [RotaryEmbedding.from_config, lambda made: PrefixLMAttention.from_config(made, 0), GeGLUMLP.from_config],
    ids=["rotary", "attention", "mlp"],
)
def test_other_models_are_refused(make: Callable[[Any], object], other: Any) -> None:
    made = other(**SIZES, attention_dropout=0.1)
    with pytest.raises(ValueError, match=f"^config: model_type is '{made.model_type}', supported are 'gemma' and"):
        make(made)
