"""Int8Linear, Int8Embedding, and quantize_, which replaces a model's layers by them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pg_kernels import backend as use_backend
from pg_kernels import int8_linear, pack_int8, quantize_, quantize_int8
from pg_kernels.nn import (
    GeGLUMLP,
    Int8Embedding,
    Int8Linear,
    fuse_qkv_,
    is_plain_int8_linear,
    is_plain_linear,
    project,
)

MODES = {"int8": "keep", "int8-dynamic": "int8"}


def linear(inputs: int = 70, outputs: int = 33, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias, dtype=dtype)


class Tied(nn.Module):
    """Return a model whose embedding is also its head, with a layer under two names and one of a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.other = nn.Embedding(40, 16)
        self.body = nn.Sequential(
            nn.Linear(16, 16), nn.LayerNorm(16), nn.modules.linear.NonDynamicallyQuantizableLinear(16, 16)
        )
        self.again = self.body[0]
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.again(self.body(self.embed(ids) + self.other(ids))))


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied()


# Int8Linear


@pytest.mark.parametrize("activations", MODES.values())
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_its_function(dtype: torch.dtype, group_size: int | None, activations: str) -> None:
    layer, x = linear(dtype=dtype), torch.randn(2, 3, 70, dtype=dtype)
    module = Int8Linear.from_linear(layer, group_size=group_size, activations=activations)
    qweight, scale = quantize_int8(layer.weight, group_size=group_size)
    assert torch.equal(module(x), int8_linear(x, qweight, scale, layer.bias, activations=activations))
    assert module.bias is layer.bias
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(module.weight.unpack(), (qweight, scale), strict=True))


def test_gradients_reach_input_and_bias() -> None:
    layer, x = linear(), torch.randn(3, 70)
    module = Int8Linear.from_linear(copy.deepcopy(layer))
    with torch.no_grad():
        layer.weight.copy_(module.weight.dequantize())
    results = []
    for m in (module, layer):
        inputs = x.clone().requires_grad_()
        m(inputs).square().sum().backward()
        results.append((inputs.grad, m.bias.grad))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)
    assert [name for name, _ in module.named_parameters()] == ["bias"]


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bias", [False, True])
def test_state(bias: bool, group_size: int | None) -> None:
    module = Int8Linear.from_linear(linear(bias=bias), group_size=group_size)
    state = module.state_dict()
    assert list(state) == ["weight", "weight_scale"] + ["bias"] * bias
    assert state["weight"].dtype == torch.int8 and state["weight_scale"].dtype == torch.float32
    other = Int8Linear(70, 33, bias)
    assert not other.weight.dequantize().any()
    other.load_state_dict(state)
    x = torch.randn(2, 70)
    assert torch.equal(other(x), module(x)) and other.group_size == group_size
    sequence = nn.Sequential(nn.Identity(), Int8Linear(70, 33, bias, group_size=group_size))
    sequence.load_state_dict({f"1.{name}": tensor for name, tensor in linear(bias=bias).state_dict().items()})
    assert torch.equal(sequence(x), module(x))  # floats are quantised on assignment


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, 'Missing key(s) in state_dict: "weight"'),
        ({"weight_scale": None}, 'Missing key(s) in state_dict: "weight_scale"'),
        ({"more": torch.ones(1)}, 'Unexpected key(s) in state_dict: "more"'),
        ({"weight": torch.ones(3, 4, dtype=torch.int8)}, "weight: expected shape [33, 70], got [3, 4]"),
        ({"weight_scale": torch.full((33,), torch.nan)}, "scale: holds NaN or infinity"),
        ({"weight": torch.ones(33, 70).int()}, "expected torch.int8, got torch.int32"),
    ],
)
def test_states_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    module = Int8Linear.from_linear(linear())
    before = module(torch.ones(1, 70))
    state = {name: tensor for name, tensor in {**module.state_dict(), **change}.items() if tensor is not None}
    with pytest.raises(RuntimeError) as raised:
        module.load_state_dict(state)
    assert message in str(raised.value)
    assert torch.equal(module(torch.ones(1, 70)), before)


def test_states_come_through_hooks_that_rename_them() -> None:
    module = Int8Linear.from_linear(linear())
    other = Int8Linear(70, 33)

    def rename(module: nn.Module, state: Any, *rest: Any) -> None:
        state["weight"] = state.pop("w")

    other.register_load_state_dict_pre_hook(rename)
    state = module.state_dict()
    state["w"] = state.pop("weight")
    other.load_state_dict(state)
    assert torch.equal(other.weight.dequantize(), module.weight.dequantize())


def test_groups_wider_than_a_row() -> None:
    module = Int8Linear.from_linear(linear(), group_size=128)
    module.load_state_dict(linear().state_dict())
    other = Int8Linear(70, 33)
    other.load_state_dict(module.state_dict())
    other.load_state_dict(linear().state_dict())
    assert torch.equal(other.weight.dequantize(), module.weight.dequantize())


def test_the_default_dtype_is_not_the_scales() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert Int8Linear.from_linear(nn.Linear(4, 4)).weight.unpack()[1].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_only_a_move_changes_the_weight() -> None:
    module = Int8Linear.from_linear(linear())
    levels, scale = module.weight.unpack()
    module.to(torch.bfloat16)
    assert module.bias.dtype == module.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(module.weight.unpack(), (levels, scale), strict=True))
    meta = copy.deepcopy(module).to("meta")
    assert meta.weight.device.type == "meta" and meta.weight.unpack()[1].dtype == torch.float32
    back = meta.to_empty(device="cpu")
    assert back.weight.device.type == "cpu" and not back.weight.dequantize().any()


def test_a_weight_has_the_dtype_of_its_layer() -> None:
    """Models cast a layer's input to the dtype of its weight."""
    module = Int8Linear.from_linear(linear(dtype=torch.bfloat16))
    x = torch.randn(3, 70, dtype=torch.float64)
    assert module(x.to(module.weight.dtype)).dtype == torch.bfloat16
    copied = copy.deepcopy(module).half()
    copied.set_weight(torch.ones(33, 70))
    copied.load_state_dict(module.state_dict())
    assert (copied.weight.dtype, module.weight.dtype) == (torch.float16, torch.bfloat16)
    assert copied(x.to(copied.weight.dtype)).dtype == torch.float16
    assert module.to("meta").to_empty(device="cpu").weight.dtype == torch.bfloat16


def test_copies_are_independent() -> None:
    module = Int8Linear.from_linear(linear())
    other = copy.deepcopy(module)
    other.set_weight(torch.ones(33, 70))
    assert not torch.equal(module.weight.dequantize(), other.weight.dequantize())


@pytest.mark.parametrize("mode", MODES)
def test_from_torchao(mode: str) -> None:
    from torchao import quantization as torchao

    config = torchao.Int8WeightOnlyConfig() if mode == "int8" else torchao.Int8DynamicActivationInt8WeightConfig()
    theirs = nn.Sequential(linear(64, 32, dtype=torch.bfloat16))
    torchao.quantize_(theirs, config)
    ours, x = Int8Linear.from_torchao(theirs[0]), torch.randn(5, 64, dtype=torch.bfloat16)
    assert ours.activations == MODES[mode] and ours.bias is theirs[0].bias
    # torchao and our layer each round to bf16.
    torch.testing.assert_close(ours(x), theirs(x), rtol=2**-6, atol=2**-6)
    with pytest.raises(TypeError, match="^linear: expected a weight of torchao's Int8Tensor, got Tensor"):
        Int8Linear.from_torchao(linear())


# Int8Embedding, and layers together


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_embedding_gives_rows(dtype: torch.dtype) -> None:
    table = Int8Embedding(40, 16, dtype=dtype)
    assert not table(torch.tensor([1])).any()
    table.set_weight(torch.randn(40, 16))
    ids = torch.randint(0, 40, (2, 3))
    assert torch.equal(table(ids), table.weight.dequantize()[ids].to(dtype))
    assert table.to(torch.float16)(ids).dtype == torch.float16
    other = Int8Embedding(40, 16)
    other.load_state_dict(table.state_dict())
    assert torch.equal(other(ids), table.weight.dequantize()[ids])


@pytest.mark.parametrize("activations", MODES.values())
def test_projections_are_those_of_each_layer(activations: str) -> None:
    layers = [
        Int8Linear.from_linear(linear(70, n, bias), activations=activations) for n, bias in ((33, True), (5, False))
    ]
    mixed, x = [*layers, linear(), Int8Linear.from_linear(linear())], torch.randn(2, 70)
    for chosen in (layers, mixed):
        for y, layer in zip(project(x, chosen), chosen, strict=True):
            assert torch.equal(y, layer(x))


@pytest.mark.parametrize("mode", MODES)
def test_an_mlp(mode: str) -> None:
    torch.manual_seed(0)
    mlp, x = GeGLUMLP(64, 96), torch.randn(3, 64)
    quantised = quantize_(copy.deepcopy(mlp), mode)
    exact = copy.deepcopy(mlp)
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(exact, name).weight.copy_(getattr(quantised, name).weight.dequantize())
        expected, actual = exact(x), quantised(x)
    assert (actual - expected).norm() / expected.norm() < {"int8": 5e-4, "int8-dynamic": 0.03}[mode]
    with use_backend("reference"):
        torch.testing.assert_close(quantised(x), actual, rtol=1e-3, atol=1e-3)


def test_hooks_and_biases_of_gate_and_up_count() -> None:
    mlp, x, seen = quantize_(GeGLUMLP(64, 96)), torch.randn(3, 64), []
    expected = mlp(x)
    mlp.up_proj.register_forward_hook(lambda *_: seen.append("up"))
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-4)
    assert seen == ["up"]
    other = quantize_(GeGLUMLP(64, 96))
    other.load_state_dict(mlp.state_dict())
    other.gate_proj.bias = nn.Parameter(torch.ones(96))
    assert not torch.allclose(other(x), expected)


WATCHED: dict[str, Callable[[nn.Module], object]] = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    "own forward": lambda layer: setattr(layer, "forward", layer.forward),
}


@pytest.mark.parametrize("watch", WATCHED.values(), ids=WATCHED)
@pytest.mark.parametrize("quantised", [False, True], ids=["float", "int8"])
def test_watched_layers_are_called(
    quantised: bool, watch: Callable[[nn.Module], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers with hooks are called, although one product of several layers would read their weights."""
    layers = nn.ModuleDict({name: nn.Linear(64, 64, bias=False) for name in ("q_proj", "k_proj", "v_proj")})
    fuse_qkv_(layers)
    if quantised:
        quantize_(layers)
    is_product, kind = (is_plain_int8_linear, Int8Linear) if quantised else (is_plain_linear, nn.Linear)
    forward, calls = kind.forward, []
    monkeypatch.setattr(kind, "forward", lambda self, x: calls.append(self) or forward(self, x))
    with torch.no_grad():
        project(torch.randn(3, 64), list(layers.values()))
        assert not calls and all(map(is_product, layers.values()))
        watch(layers["k_proj"])
        project(torch.randn(3, 64), list(layers.values()))
    assert calls == list(layers.values()) and not is_product(layers["k_proj"])


def test_a_bias_is_more_than_a_product() -> None:
    assert not is_plain_linear(nn.Linear(64, 8)) and not is_plain_int8_linear(Int8Linear(64, 8))


def test_int8_of_torchao_is_not_only_a_product() -> None:
    from torchao import quantization as torchao

    mlp, x = GeGLUMLP(64, 96).bfloat16(), torch.randn(3, 64, dtype=torch.bfloat16)
    torchao.quantize_(mlp, torchao.Int8DynamicActivationInt8WeightConfig())
    assert not is_plain_linear(mlp.gate_proj)
    expected = mlp.down_proj(F.gelu(mlp.gate_proj(x), approximate="tanh") * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), expected, rtol=0.05, atol=1e-2)


def test_layers_compile() -> None:
    model, x = quantize_(nn.Sequential(GeGLUMLP(64, 96), nn.Linear(64, 8))), torch.randn(3, 64)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


# quantize_


@pytest.mark.parametrize("mode", MODES)
def test_linear_layers_are_replaced_and_ties_kept(mode: str) -> None:
    model, ids = tied(), torch.arange(40)[None]
    expected = model(ids)
    assert quantize_(model, mode) is model
    assert type(model.head) is type(model.again) is Int8Linear and model.again is model.body[0]
    assert model.head.activations == MODES[mode] and model.body[0].bias is not None
    assert type(model.embed) is Int8Embedding and model.embed.weight is model.head.weight
    assert type(model.other) is nn.Embedding and type(model.body[2]) is not Int8Linear
    assert (model(ids) - expected).norm() / expected.norm() < 0.03
    assert model.bfloat16()(ids).dtype == torch.bfloat16
    moved = copy.deepcopy(model).to("meta")
    assert moved.embed.weight is moved.head.weight
    state = model.state_dict()
    fresh = quantize_(tied(), mode).bfloat16()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(ids), model(ids)) and fresh.embed.weight is fresh.head.weight


def test_what_is_skipped_stays() -> None:
    model = tied()
    seen = []
    quantize_(model, skip=lambda name, module: seen.append(name) or name == "head")
    assert seen == ["body.0", "again", "head"]
    assert type(model.head) is nn.Linear and type(model.embed) is nn.Embedding and type(model.again) is Int8Linear


def test_an_embedding_under_two_names() -> None:
    model = tied()
    model.alias = model.embed
    quantize_(model)
    assert model.alias is model.embed and type(model.alias) is Int8Embedding


def test_what_int8_cannot_replace_stays() -> None:
    model = tied()
    model.embed.max_norm = 0.1
    assert type(quantize_(model).embed) is nn.Embedding
    layer = quantize_(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval())
    with torch.no_grad():
        assert layer(torch.ones(1, 3, 8)).shape == (1, 3, 8)


def test_groups() -> None:
    model = quantize_(nn.Sequential(linear()), group_size=32)
    assert model[0].group_size == model[0].weight.group_size == 32
    assert model.state_dict()["0.weight_scale"].shape == (33, 3)


def test_float_weights_are_released() -> None:
    import weakref

    model = tied()
    gone = [weakref.ref(model.head.weight), weakref.ref(model.body[0].weight)]
    quantize_(model)
    assert all(reference() is None for reference in gone)


def nan_at_the_end() -> nn.Sequential:
    model = nn.Sequential(linear(), linear())
    model[1].weight.data[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (linear(), {}, "^model: a linear layer cannot replace itself"),
        (nan_at_the_end(), {}, r"^1\.weight: holds NaN or infinity"),
        (nn.Sequential(linear()), {"mode": "int4"}, "^mode: got 'int4', expected one of 'int8', 'int8-dynamic'"),
        (nn.Sequential(linear()), {"group_size": 48}, "^group_size: expected a power of two, got 48"),
        (nn.Sequential(linear()), {"group_size": 64.0}, "^group_size: expected an int, got float"),
        (nn.Sequential(linear()), {"group_size": 0}, "^group_size: expected a power of two, got 0"),
    ],
)
def test_errors_come_before_anything_is_replaced(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        quantize_(model, **options)
    assert not any(isinstance(module, Int8Linear) for module in model.modules())


def test_layer_errors() -> None:
    with pytest.raises(ValueError, match="^activations: got 'int4', expected 'keep' or 'int8'"):
        Int8Linear(4, 4, activations="int4")
    with pytest.raises(TypeError, match="^weight: expected float32, float16 or bfloat16, got torch.int32"):
        Int8Linear(4, 4).set_weight(torch.ones(4, 4).int())
    layer = linear()
    layer.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match="^weight: holds NaN or infinity"):
        Int8Linear.from_linear(layer)


def test_a_weight_moves_in_place() -> None:
    weight = pack_int8(*quantize_int8(torch.randn(5, 7)))
    levels, scale = weight.unpack()
    holder = [weight]
    weight.move_("meta")
    assert holder[0].device.type == "meta" and holder[0].shape == (5, 7)
    weight.replace_(levels, scale)
    assert torch.equal(holder[0].unpack()[0], levels) and holder[0].device.type == "cpu"
