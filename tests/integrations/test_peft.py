"""PEFT's LoRA on the model, float and int8: gradients, merging, and adapters exchanged with transformers' PaliGemma."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PaliGemmaForConditionalGeneration

from pg_kernels import quantize_
from pg_kernels.integrations.peft import LoraInt8Linear, register
from pg_kernels.model import EMBEDDED_CHECKPOINT, PaliGemma, Processor, graphs
from pg_kernels.nn import Int8Embedding, Int8Linear

TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "fc1"]
PICTURE = EMBEDDED_CHECKPOINT / "samples" / "banana_and_owl.png"
PROCESSOR = Processor.from_pretrained(EMBEDDED_CHECKPOINT)
PROMPT = PROCESSOR([PICTURE], ["caption en"])


@pytest.fixture(scope="module")
def pretrained() -> PaliGemma:
    return PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32, quantize="int8")


@pytest.fixture
def model(pretrained: PaliGemma) -> PaliGemma:
    return copy.deepcopy(pretrained)


@pytest.fixture(scope="module")
def numbers(pretrained: PaliGemma) -> dict[str, Tensor]:
    """Return the model's parameters, int8 ones dequantised."""
    state = {name: tensor for name, tensor in pretrained.state_dict().items() if not name.endswith("_scale")}
    for name, module in pretrained.named_modules():
        if isinstance(module, Int8Linear | Int8Embedding):
            state[f"{name}.weight"] = module.weight.dequantize()
    return state


@pytest.fixture
def twin(numbers: dict[str, Tensor]) -> PaliGemma:
    """Return the model with the same numbers in float layers."""
    model = PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32)
    model.load_state_dict(numbers)
    return model


@pytest.fixture
def theirs(numbers: dict[str, Tensor]) -> PaliGemmaForConditionalGeneration:
    """Return transformers' model with the same numbers."""
    model = PaliGemmaForConditionalGeneration.from_pretrained(
        EMBEDDED_CHECKPOINT, dtype=torch.float32, attn_implementation="eager"
    )
    model.load_state_dict(numbers)
    return model.eval()


def adapted(model: nn.Module, seed: int = 0, **options: Any) -> PeftModel:
    """Add an adapter with random values, which depend only on the seed, also between float and int8 layers."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"target_modules": TARGETS, "r": 4, "init_lora_weights": False, **options})
    return get_peft_model(model, register(config)).eval()


def examples() -> dict[str, Tensor]:
    return PROCESSOR([PICTURE, PICTURE], ["caption en", "detect owl"], suffixes=["a banana and an owl", "no"])


def logits(model: nn.Module) -> Tensor:
    given = examples()
    with torch.no_grad():
        out = model(**{name: tensor for name, tensor in given.items() if name != "labels"}).logits
    return out[given["attention_mask"].bool()]


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def gradients(model: nn.Module, **changes: Any) -> dict[str, Tensor]:
    """Return the gradients of every trained parameter and of the pixels."""
    given = {**examples(), **changes}
    pixels = given["pixel_values"].clone().requires_grad_()
    model(**{**given, "pixel_values": pixels}).loss.backward()
    assert pixels.grad is not None
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad} | {"pixels": pixels.grad}


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-3) -> None:
    """Compare in norm. Int8 layers round 32-bit activations to 16 bits."""
    assert (actual - expected).norm() <= rtol * expected.norm()


def assert_gradients_close(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Compare all gradients together. A single gradient may be off by more if much cancels, or if it is negligible."""
    assert actual.keys() == expected.keys()
    all_actual, all_expected = (torch.cat([of[name].flatten() for name in expected]) for of in (actual, expected))
    assert_close(all_actual, all_expected, rtol)
    negligible = 1e-2 * rtol * all_expected.norm()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= max(min(50 * rtol, 0.9) * gradient.norm(), negligible), name


# Over int8 layers


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_that_of_the_dequantised_weight(bias: bool) -> None:
    torch.manual_seed(0)
    layer = Int8Linear.from_linear(nn.Linear(40, 24, bias))
    x, results = torch.randn(5, 40), []
    for base in (layer, layer.dequantize()):
        model = nn.Sequential(base, nn.LayerNorm(24))  # PEFT needs a parameter in the model
        inputs, module = x.clone().requires_grad_(), adapted(model, target_modules=["0"], lora_bias=bias)
        out = module(inputs)
        out.pow(3).sum().backward()
        results.append([out, inputs.grad, *(parameter.grad for parameter in adapters(module).values())])
    assert len(results[0]) == 4 + bias
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected, 1e-4)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_bias": True}], ids=["lora", "rslora with bias"])
def test_gradients_are_those_of_the_dequantised_model(
    model: PaliGemma, twin: PaliGemma, options: dict[str, Any]
) -> None:
    if "lora_bias" in options:  # merging these needs a bias in the base layer
        options = {**options, "target_modules": ["fc1", "out_proj"]}
    ours, expected = adapted(model, **options), adapted(twin, **options)
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trained == set(adapters(ours))
    assert {type(module) for module in ours.modules() if hasattr(module, "base_layer")} == {LoraInt8Linear}
    assert_gradients_close(gradients(ours), gradients(expected), 1e-3)


def test_gradients_where_activations_are_int8(twin: PaliGemma) -> None:
    """Rounding to 8 bits counts as the identity in the backward."""
    dynamic = PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32, quantize="int8-dynamic")
    assert_gradients_close(gradients(adapted(dynamic)), gradients(adapted(twin)), 0.1)


def test_bfloat16_base_and_float32_adapters() -> None:
    model = PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.bfloat16, quantize="int8")
    ours = adapted(model)
    assert {parameter.dtype for parameter in adapters(ours).values()} == {torch.float32}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(ours).values())
    same = PeftModel(
        PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.bfloat16, quantize="int8"),
        register(LoraConfig(target_modules=TARGETS)),
        autocast_adapter_dtype=False,
    )
    assert {parameter.dtype for parameter in adapters(same).values()} == {torch.bfloat16}


def test_training_lowers_the_loss_and_leaves_the_base_alone(model: PaliGemma, numbers: dict[str, Tensor]) -> None:
    before = PROCESSOR.decode(model.generate(**PROMPT, max_new_tokens=12))
    ours = adapted(model, init_lora_weights=True, lora_dropout=0.05)
    assert PROCESSOR.decode(ours.generate(**PROMPT, max_new_tokens=12)) == before
    given = PROCESSOR([PICTURE], ["caption en"], suffixes=["an owl"])
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    ours.train()
    for _ in range(12):
        loss = ours(**given).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    ours.eval()
    assert PROCESSOR.decode(ours.generate(**PROMPT, max_new_tokens=12)) == ["an owl"]
    with ours.disable_adapter():
        assert PROCESSOR.decode(ours.generate(**PROMPT, max_new_tokens=12)) == before
    base = ours.unload()
    assert type(base.model.language_model.layers[0].mlp.gate_proj) is Int8Linear
    for name, module in base.named_modules():
        if isinstance(module, Int8Linear):
            assert torch.equal(module.weight.dequantize(), numbers[f"{name}.weight"])


def test_merging_gives_floats_and_unmerging_the_int8_layer(model: PaliGemma, twin: PaliGemma) -> None:
    ours, expected = adapted(model), adapted(twin)
    before = logits(ours)
    layers = {name: module.base_layer for name, module in ours.named_modules() if hasattr(module, "base_layer")}
    ours.merge_adapter()
    expected.merge_adapter()
    assert_close(logits(ours), logits(expected), 1e-4)
    assert_close(logits(ours), before)
    assert all(type(ours.get_submodule(name).base_layer) is nn.Linear for name in layers)
    ours.unmerge_adapter()
    assert all(ours.get_submodule(name).base_layer is layer for name, layer in layers.items())
    assert torch.equal(logits(ours), before)
    merged = ours.merge_and_unload()
    assert type(merged.model.language_model.layers[0].mlp.gate_proj) is nn.Linear
    assert type(merged.model.language_model.layers[0].mlp.up_proj) is Int8Linear
    again = quantize_(merged)
    assert_close(logits(again), before, 0.05)


def test_two_adapters(model: PaliGemma, twin: PaliGemma) -> None:
    pairs = []
    for base in (model, twin):
        both = adapted(base, lora_bias=True, target_modules=["fc1"])
        torch.manual_seed(1)
        both.add_adapter("other", register(LoraConfig(target_modules=["fc1"], r=2, init_lora_weights=False)))
        pairs.append(both)
    ours, expected = pairs
    results = []
    for name in ("default", "other"):
        for both in pairs:
            both.set_adapter(name)
        assert_close(logits(ours), logits(expected))
        results.append(logits(ours))
    assert not torch.allclose(*results, rtol=0.1, atol=0.1)
    for both in pairs:
        both.merge_adapter(["default", "other"])
    assert_close(logits(ours), logits(expected))
    ours.unmerge_adapter()
    torch.testing.assert_close(logits(ours), results[1], rtol=0, atol=0)


def test_adapters_for_each_example(model: PaliGemma) -> None:
    ours = adapted(model)
    given = {name: tensor for name, tensor in examples().items() if name != "labels"}
    with torch.no_grad():
        mixed = ours(**given, adapter_names=["__base__", "default"]).logits
        expected = ours(**given).logits
        with ours.disable_adapter():
            base = ours(**given).logits
    # The batch of the image encoder is that of the images, here one per example.
    assert_close(mixed[1], expected[1])
    assert_close(mixed[0], base[0])


# From one model to another


def test_what_we_save_transformers_loads(
    model: PaliGemma, theirs: PaliGemmaForConditionalGeneration, tmp_path: Path
) -> None:
    ours = adapted(model)
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(theirs, tmp_path)
    assert_close(logits(ours), logits(loaded))
    assert all(torch.equal(p, adapters(ours)[name]) for name, p in adapters(loaded).items())


@pytest.mark.parametrize("kind", ["int8", "float"])
def test_what_transformers_saves_we_load(
    kind: str, model: PaliGemma, twin: PaliGemma, theirs: PaliGemmaForConditionalGeneration, tmp_path: Path
) -> None:
    expected = adapted(theirs, task_type="CAUSAL_LM")
    expected.save_pretrained(tmp_path)
    config = register(LoraConfig.from_pretrained(tmp_path))
    ours = PeftModel.from_pretrained(model if kind == "int8" else twin, tmp_path, config=config, is_trainable=True)
    assert_close(logits(ours), logits(expected))
    assert all(torch.equal(p, adapters(expected)[name]) for name, p in adapters(ours).items())
    assert_gradients_close(gradients(ours.eval()), gradients(expected), 1e-3)


def test_another_adapter_is_loaded_beside_the_first(model: PaliGemma, tmp_path: Path) -> None:
    expected = adapted(copy.deepcopy(model), seed=1)
    expected.save_pretrained(tmp_path)
    ours = adapted(model)
    ours.load_adapter(tmp_path, "other")
    ours.set_adapter("other")
    torch.testing.assert_close(logits(ours), logits(expected), rtol=0, atol=0)


def test_transformers_model_with_int8_layers(theirs: PaliGemmaForConditionalGeneration, model: PaliGemma) -> None:
    ours, expected = adapted(quantize_(theirs), task_type="CAUSAL_LM"), adapted(model)
    ours.load_state_dict(adapters(expected), strict=False)
    assert_close(logits(ours), logits(expected))
    length = PROMPT["input_ids"].shape[1]
    tokens = ours.generate(**PROMPT, max_new_tokens=4, do_sample=False)[:, length:]
    assert torch.equal(tokens, expected.generate(**PROMPT, max_new_tokens=4))


# What else PEFT's users do


def test_kbit_training() -> None:
    """PEFT's preparation casts norms and biases to fp32 and leaves int8 layers. The model still trains and generates."""
    model = PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.bfloat16, quantize="int8")
    expected = model.generate(**PROMPT, max_new_tokens=8)
    ours = adapted(prepare_model_for_kbit_training(model), init_lora_weights=True)
    assert ours.base_model.model.model.language_model.norm.weight.dtype == torch.float32
    assert torch.equal(ours.generate(**PROMPT, max_new_tokens=8), expected)
    assert all(gradient.isfinite().all() for gradient in gradients(ours).values())


def test_gradient_checkpointing(model: PaliGemma) -> None:
    ours = adapted(model)
    expected = gradients(ours)
    ours.zero_grad()
    for layer in [*model.model.vision_tower.encoder.layers, *model.model.language_model.layers]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    actual = gradients(ours)
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


def test_adapted_output_head_counts_in_the_loss(twin: PaliGemma) -> None:
    ours, given = adapted(twin, target_modules=["lm_head"]), examples()
    with torch.no_grad():
        found = ours(**given, logits_to_keep=0).logits
    expected = nn.functional.cross_entropy(found[:, :-1].transpose(1, 2), given["labels"][:, 1:])
    loss = ours(**given).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapters(ours).values())


def test_no_cuda_graph_of_an_adapter(model: PaliGemma) -> None:
    adapted(model)
    reason = graphs.capture_unsupported_reason(model, torch.device("cuda"))
    assert reason is not None and "is a LoraInt8Linear, of which a graph might miss changes" in reason


def test_importing_the_package_imports_no_peft() -> None:
    code = "import sys, pg_kernels, pg_kernels.model, pg_kernels.integrations; sys.exit('peft' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "^init_lora_weights: 'pissa' looks at the base weight, which is int8"),
        ({"use_dora": True}, "^an int8 layer takes plain or rank-stabilised LoRA: .*use_dora"),
    ],
)
def test_other_kinds_of_lora(model: PaliGemma, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(model, **options)
    assert not adapters(model)


def test_dora_over_float_layers(twin: PaliGemma) -> None:
    ours = adapted(twin, use_dora=True)
    assert all(gradient.any() for gradient in gradients(ours).values())


def test_a_broken_adapter_is_not_merged(model: PaliGemma) -> None:
    ours = adapted(model)
    next(iter(adapters(ours).values())).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        ours.merge_adapter(safe_merge=True)
    assert not any(module.int8_layer for module in ours.modules() if isinstance(module, LoraInt8Linear))


def test_a_configuration_that_is_not_registered(model: PaliGemma) -> None:
    with pytest.raises(ValueError, match="^Target module Int8Linear.* is not supported"):
        get_peft_model(model, LoraConfig(target_modules=TARGETS))
