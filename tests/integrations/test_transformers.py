"""Patched transformers models, compared with the unpatched eager models on small random weights.

In fp32 the two differ only in the order of sums: 2e-4 relative and 2e-5 absolute for logits, 1e-3 and 1e-5 for gradients,
which sum over more terms. Random weights are large, so that a wrong mask or norm shows; transformers' initialisation hides it.
"""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaModel,
    LlamaConfig,
    LlamaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers import masking_utils as masks

import pg_kernels as pg
from pg_kernels.benchmarks.measure.timing import peak_bytes
from pg_kernels.integrations.transformers import apply_to_paligemma, attention, layers, patch, register, unpatch
from pg_kernels.integrations.transformers.masks import dense_mask, lengths_mask
from pg_kernels.nn import Int8Linear

IMAGE, VOCABULARY, IMAGE_TOKENS = 127, 128, 4
WINDOW = 6
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
VISION = {
    "model_type": "siglip_vision_model",
    "vision_use_head": False,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 28,
}
# transformers 5.24 renamed the argument and the output's field.
CACHE = "cache" if "cache" in inspect.signature(GemmaModel.forward).parameters else "past_key_values"
PALIGEMMAS = ["gemma", "gemma2", "gemma2-window"]
TEXTS = {
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
}


def randomised(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn_like(parameter) * spread)
    return model.eval()


def paligemma(kind: str = "gemma", attention: str = "eager", **text: Any) -> Any:
    """Return PaliGemma 1 or 2. "-window" has a window shorter than the sequences of a batch."""
    model_type, _, window = kind.partition("-")
    extra = {"query_pre_attn_scalar": 24} if model_type == "gemma2" else {}
    if window:
        extra["sliding_window"] = WINDOW
    config = PaliGemmaConfig(
        text_config={"model_type": model_type, **extra, **TEXT, **text},
        vision_config=VISION,
        projection_dim=TEXT["hidden_size"],
        hidden_size=TEXT["hidden_size"],
        image_token_index=IMAGE,
        **{"pad_token_id": 0},
    )
    config._attn_implementation = attention
    return randomised(PaliGemmaForConditionalGeneration(config))


def text_model(model_type: str, attention: str = "eager", **text: Any) -> Any:
    extra: dict[str, Any] = {}
    if model_type != "gemma":
        extra = {"query_pre_attn_scalar": 24, "sliding_window": WINDOW}
    if model_type == "gemma3":  # two bases, one of them scaled, as in the released models
        scaled = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
        plain = {"rope_type": "default", "rope_theta": 1e4}
        extra["rope_parameters"] = {"full_attention": scaled, "sliding_attention": plain}
        extra["layer_types"] = ["sliding_attention", "full_attention"]
    config = TEXTS[model_type](**{**TEXT, **extra, **text})
    return randomised(AutoModelForCausalLM.from_config(config, attn_implementation=attention))


def batch(padding_side: str = "right", suffix: bool = True) -> dict[str, Tensor]:
    """Return three examples: image tokens, a prefix of 3 to 5 tokens, a suffix of 5 to 8, padding on one side."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for prefix_len, suffix_len in ((5, 8), (3, 5), (4, 7)):
        suffix_len *= suffix
        ids = torch.randint(3, 120, (prefix_len + suffix_len,), generator=generator)
        ids = torch.cat([torch.full((IMAGE_TOKENS,), IMAGE), ids])
        types = (torch.arange(len(ids)) >= len(ids) - suffix_len).long()
        rows.append((ids, torch.ones_like(ids), types))
    longest = max(len(ids) for ids, _, _ in rows)
    pads = [(longest - len(ids), 0) if padding_side == "left" else (0, longest - len(ids)) for ids, _, _ in rows]
    input_ids, mask, types = (
        torch.stack([nn.functional.pad(t, pad) for t, pad in zip(column, pads)]) for column in zip(*rows)
    )
    pixels = torch.rand(3, 3, 28, 28, generator=generator) * 2 - 1
    return {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": types, "pixel_values": pixels}


def labelled(padding_side: str = "right") -> dict[str, Tensor]:
    inputs = batch(padding_side)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 0, -100)}


def text_batch(padding_side: str = "right") -> dict[str, Tensor]:
    inputs = batch(padding_side)
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, 5)
    return {"input_ids": ids, "attention_mask": inputs["attention_mask"]}


def patched(model: Any, **options: Any) -> Any:
    return patch(copy.deepcopy(model), **options)


def assert_logits_equal(actual: Any, expected: Any, valid: Tensor | None = None) -> None:
    valid = torch.ones(actual.logits.shape[:2], dtype=torch.bool) if valid is None else valid.bool()
    torch.testing.assert_close(actual.logits[valid], expected.logits[valid], atol=2e-5, rtol=2e-4)


def assert_gradients_equal(actual: nn.Module, expected: nn.Module) -> None:
    gradients = {name: parameter.grad for name, parameter in expected.named_parameters()}
    assert gradients.keys() == {name for name, _ in actual.named_parameters()}
    for name, parameter in actual.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], atol=1e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


class Counter:
    """Count the calls of a function that the integration uses, and let them through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.calls, function = 0, getattr(module, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.calls += 1
            return function(*args, **options)

        monkeypatch.setattr(module, name, counted)


@pytest.fixture(scope="module", params=PALIGEMMAS)
def model(request: pytest.FixtureRequest) -> Any:
    return paligemma(request.param)


# The mask


def blocks(ids: list[list[int]]):
    return masks.or_masks(masks.causal_mask_function, masks.blockwise_overlay(torch.tensor(ids)))


def windowed(ids: list[list[int]]):
    return masks.or_masks(masks.sliding_window_causal_mask_function(3), masks.blockwise_overlay(torch.tensor(ids)))


PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]]).bool()
HOLE = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]]).bool()
PREFIX = [[0] * 5 + [-1] * 3, [0] * 3 + [-1] * 5]
PACKED = masks.packed_sequence_mask_function(torch.tensor([[0] * 4 + [1] * 4] * 2))
EXPRESSIBLE = {
    "causal": ({}, (1, 4)),
    "padded": ({"attention_mask": PADDED}, (1, 4)),
    "prefixes": ({"mask_function": blocks(PREFIX)}, (1, 4)),
    "padded prefixes": ({"mask_function": blocks(PREFIX), "attention_mask": PADDED}, (1, 4)),
    "all prefix": ({"mask_function": blocks([[0] * 8] * 2), "attention_mask": PADDED}, (1, 4)),
    "bidirectional": ({"mask_function": masks.bidirectional_mask_function, "attention_mask": PADDED}, (1, 4)),
    "window": (
        {"mask_function": masks.sliding_window_causal_mask_function(3), "local_size": 3, "attention_mask": PADDED},
        (1, 7),
    ),
    "window longer than the sequence": (
        {"mask_function": masks.sliding_window_causal_mask_function(8), "local_size": 8},
        (1, 4),
    ),
    "window that limits the prefix": ({"mask_function": windowed(PREFIX), "local_size": 3}, (2, 7)),
    "the same, padded": (
        {"mask_function": windowed(PREFIX), "local_size": 3, "attention_mask": PADDED},
        (2, 7),
    ),
    "cache": ({"q_length": 3, "q_offset": 5, "attention_mask": PADDED}, (1, 4)),
    "static cache": ({"q_length": 2, "q_offset": torch.tensor(3), "attention_mask": PADDED[:, :5]}, (1, 4)),
    "static cache without a mask": ({"q_length": 2, "q_offset": torch.tensor(3)}, (1, 4)),
    "one token in a window": (
        {
            "q_length": 1,
            "q_offset": 7,
            "mask_function": masks.sliding_window_causal_mask_function(3),
            "local_size": 3,
        },
        (1, 4),
    ),
    "cache of a window": (
        {
            "q_length": 2,
            "kv_length": 4,
            "q_offset": 6,
            "kv_offset": 4,
            "mask_function": masks.sliding_window_causal_mask_function(3),
            "local_size": 3,
            "attention_mask": PADDED,
        },
        (1, 7),
    ),
}
INEXPRESSIBLE = {
    "hole": {"attention_mask": HOLE},
    "hole, when decoding": {"q_length": 1, "q_offset": 7, "attention_mask": HOLE},
    "packed": {"mask_function": masks.and_masks(masks.causal_mask_function, PACKED)},
    "chunks": {"mask_function": masks.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long))},
    "two images": {"mask_function": blocks([[-1, 0, 0, -1, 1, 1, -1, -1]] * 2)},
    "image after text": {"mask_function": blocks([[-1, -1, 0, 0, 0, -1, -1, -1]] * 2)},
    # Only the rows at the end of a padding mask can be padding.
    "longer mask": {
        "q_length": 3,
        "attention_mask": PADDED[:1].expand(2, -1),
        "mask_function": lambda b, h, q, k: ((q == 0) & (k == 5)) | ((q > 0) & (k <= q + 4)),
    },
    "bidirectional window": {"mask_function": masks.sliding_window_bidirectional_mask_function(2), "local_size": 2},
}


GIVEN = {"q_offset": 0, "kv_offset": 0, "attention_mask": None, "config": GemmaConfig()}
"""Return the arguments with which transformers always calls a mask function."""


def both_masks(**options: Any) -> tuple[Tensor, Tensor]:
    """Return our mask and transformers' dense mask."""
    options = {**GIVEN, "batch_size": 2, "q_length": 8, "kv_length": 8, **options}
    dense = masks.sdpa_mask(**options, allow_is_causal_skip=False)
    return lengths_mask(**options), dense


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_masks_become_lengths(name: str) -> None:
    options, (parts, size) = EXPRESSIBLE[name]
    mask, dense = both_masks(**options)
    assert mask.dtype == torch.int32 and mask.shape == (2, parts, size, 1)
    assert all(length.is_contiguous() for length in mask.flatten(1).unbind(1))
    rows = torch.ones(dense.shape[:3], dtype=torch.bool)
    if "attention_mask" in options:
        first = int(options.get("q_offset", 0))
        rows[:, 0] = options["attention_mask"][:, first : first + dense.shape[2]]
    seen = dense_mask(mask, *dense.shape[2:])
    assert torch.equal(seen[rows], dense[rows])


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_other_masks_stay_dense(name: str) -> None:
    mask, dense = both_masks(**INEXPRESSIBLE[name])
    assert mask.dtype == torch.bool and torch.equal(mask, dense)


def test_prefix_is_what_the_first_query_sees_of_the_future() -> None:
    for function, expected in ((masks.causal_mask_function, [0, 0]), (blocks(PREFIX), [5, 3])):
        assert both_masks(mask_function=function)[0][:, 0, 0, 0].tolist() == expected
    padded, _ = both_masks(mask_function=blocks(PREFIX), attention_mask=PADDED)
    assert padded[:, 0, :, 0].tolist() == [[3, 2, 8, 0], [3, 0, 5, 0]]  # prefix, start, end, first position


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("q_len", [1, 3])
def test_no_mask_means_what_it_means_to_sdpa(q_len: int, is_causal: bool | None, dropout: float) -> None:
    q, k, v = torch.randn(2, 2, q_len, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    outputs = []
    for attend in (attention.attention, attention.sdpa_attention_forward):
        torch.manual_seed(0)
        outputs.append(attend(nn.Module(), q, k, v, None, is_causal=is_causal, dropout=dropout)[0])
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    module = nn.Module().eval()  # transformers' eager attention, the fallback with a softcap, applies no dropout here
    module.num_key_value_groups = 1
    with_softcap = {"is_causal": is_causal, "softcap": 2.0, "scaling": 1.0}
    actual, _ = attention.attention(module, q, k, v, None, dropout=dropout, **with_softcap)
    expected, _ = attention.attention(module, q, k, v, None, **with_softcap)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


# Logits, losses, gradients


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_logits_and_loss(model: Any, padding_side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = labelled(padding_side)
    ours = patched(model)
    attends = Counter(monkeypatch, attention, "prefix_lm_attention")
    dense = [Counter(monkeypatch, attention, name) for name in ("sdpa_attention_forward", "eager_attention_forward")]
    with torch.no_grad():
        expected, actual = model(**inputs), ours(**inputs)
    assert_logits_equal(actual, expected, inputs["attention_mask"])
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)
    assert attends.calls == (
        4 if model.config.text_config.to_dict().get("sliding_window") == WINDOW else 3
    ) and not any(counter.calls for counter in dense)


def test_gradients(model: Any) -> None:
    theirs, ours = copy.deepcopy(model).train(), patched(model).train()
    expected, actual = theirs(**labelled()), ours(**labelled())
    assert actual.logits is None and expected.logits is not None
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)
    expected.loss.backward()
    actual.loss.backward()
    assert_gradients_equal(ours, theirs)


@pytest.mark.parametrize(
    "device",
    [pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else ["cpu"],  # in the interpreter
)
def test_triton_kernels(model: Any, device: str) -> None:
    """All modules are patched, also rotary embeddings. Models without them keep transformers'."""
    pytest.importorskip("triton")
    theirs, ours = copy.deepcopy(model).train().to(device), patched(model).train().to(device)
    inputs = {name: tensor.to(device) for name, tensor in labelled().items()}
    prompts = {name: tensor.to(device) for name, tensor in batch("left", suffix=False).items()}
    options = {"max_new_tokens": 2, "do_sample": False}
    expected = theirs(**inputs).loss
    with pg.backend("triton"):
        actual = ours(**inputs).loss
        actual.backward()
        tokens = ours.eval().generate(**prompts, **options)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    assert_gradients_equal(ours, theirs)
    assert torch.equal(tokens, theirs.eval().generate(**prompts, **options))


@pytest.mark.parametrize("model_type", TEXTS)
def test_text_models(model_type: str) -> None:
    """Gemma 2's and 3's window is shorter than the sequence. Gemma 3 normalises queries and keys."""
    theirs = text_model(model_type).train()
    ours = patched(theirs)
    for side in ("left", "right"):
        inputs = text_batch(side)
        # The first token is excluded: padding may precede it, whose states are undefined.
        valid = inputs["attention_mask"].bool()
        labels = inputs["input_ids"].where(valid & valid.roll(1, 1), -100)
        assert_logits_equal(ours(**inputs), theirs(**inputs), inputs["attention_mask"])
        # Trainer passes these when it accumulates gradients and when it splits sequences.
        options = {"num_items_in_batch": torch.tensor(17)}
        if side == "left":
            options["shift_labels"] = nn.functional.pad(labels, (1, -1), value=-100)
        expected, actual = (one(**inputs, labels=labels, **options) for one in (theirs, ours))
        torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)
        expected.loss.backward()
        actual.loss.backward()
    assert_gradients_equal(ours, theirs)


@pytest.mark.parametrize("model_type", TEXTS)
def test_fused_rotary(model_type: str) -> None:
    """A CPU has no fused kernel, so transformers' own code runs unless a backend is requested."""
    theirs = text_model(model_type)
    ours = patched(theirs, rms_norm=False, mlp=False, attention=False, loss=False)
    inputs = text_batch("left")
    with pg.backend("reference"), torch.no_grad():
        assert_logits_equal(ours(**inputs), theirs(**inputs), inputs["attention_mask"])
        expected = theirs.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(ours.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
        again = unpatch(ours)(**inputs)
        assert torch.equal(again.logits, theirs(**inputs).logits)


@pytest.mark.parametrize("model_type", TEXTS)
def test_fused_rotary_passes_on_what_any_attention_gets(model_type: str) -> None:
    """Attention functions other than ours may need the window."""
    seen: list[dict[str, Any]] = []

    def record(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
        seen.append({name: value for name, value in options.items() if not isinstance(value, Tensor)})
        return v.repeat_interleave(2, 1).transpose(1, 2), None

    AttentionInterface.register("record", record)
    theirs = text_model(model_type, "record", attention_dropout=0.25).train()
    theirs(**text_batch())
    with pg.backend("reference"):
        patched(theirs, attention=False)(**text_batch())
    layers = len(seen) // 2
    assert layers == 2 and seen[layers:] == seen[:layers]


def test_siglip() -> None:
    config = SiglipVisionConfig(**{name: value for name, value in VISION.items() if name != "model_type"})
    config._attn_implementation = "eager"
    theirs = randomised(SiglipVisionModel(config))
    pixels = batch()["pixel_values"]
    actual, expected = patched(theirs)(pixels), theirs(pixels)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=2e-5, rtol=2e-4)


# Generation


@pytest.mark.parametrize("beams", [1, 3])
def test_generation(model: Any, beams: int) -> None:
    """Generation continues past the end of the window."""
    options = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    prompts = batch("left", suffix=False)
    expected = model.generate(**prompts, **options)
    assert torch.equal(patched(model).generate(**prompts, **options), expected)


@pytest.mark.parametrize(
    "make", [lambda: paligemma("gemma"), lambda: text_model("gemma2"), lambda: text_model("gemma3")]
)
def test_generation_with_a_static_cache(make: Any) -> None:
    """PaliGemma 2 is excluded: transformers itself cannot do this, up to 5.24."""
    theirs = make()
    prompts = batch("left", suffix=False) if hasattr(theirs.config, "vision_config") else text_batch("left")
    options = {"max_new_tokens": 2 * WINDOW, "do_sample": False, "eos_token_id": None}
    expected = theirs.generate(**prompts, **options, cache_implementation="static")
    assert torch.equal(patched(theirs).generate(**prompts, **options, cache_implementation="static"), expected)


def test_prefill_in_chunks() -> None:
    theirs = text_model("gemma2")
    ours = patched(theirs)
    ids = text_batch()["input_ids"]
    for make in (lambda: None, lambda: StaticCache(config=theirs.config, max_cache_len=24)):
        caches = make(), make()
        for start, end in ((0, 5), (5, 9), (9, 10), (10, 17)):
            chunk = ids[:, start:end]
            actual = ours(chunk, **{CACHE: caches[0]}, use_cache=True)
            expected = theirs(chunk, **{CACHE: caches[1]}, use_cache=True)
            assert_logits_equal(actual, expected)
            caches = actual[CACHE], expected[CACHE]


# What is left to transformers


def custom_masks() -> dict[str, dict[str, Tensor]]:
    visible = torch.rand(3, 1, 17, 17, generator=torch.Generator().manual_seed(2)) < 0.5
    visible |= torch.eye(17, dtype=torch.bool)
    bias = torch.zeros(()).where(visible, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(9), torch.arange(8)]).expand(3, -1)
    hole = torch.ones(3, 17, dtype=torch.long)
    hole[1, 4] = 0
    return {
        "additive mask": {"attention_mask": bias},
        "packed sequences": {"position_ids": positions},
        "hole in the mask": {"attention_mask": hole},
    }


@pytest.mark.parametrize("name", custom_masks())
@pytest.mark.parametrize("model_type", ["gemma", "gemma2"])
def test_masks_without_lengths(model_type: str, name: str) -> None:
    theirs = text_model(model_type)
    inputs = custom_masks()[name]
    if model_type == "gemma2" and inputs.get("attention_mask", torch.empty(0)).dim() == 4:
        inputs = {"attention_mask": dict.fromkeys(("full_attention", "sliding_attention"), inputs["attention_mask"])}
    ids = text_batch()["input_ids"]
    rows = inputs.get("attention_mask")
    with torch.no_grad():
        actual, expected = patched(theirs)(ids, **inputs), theirs(ids, **inputs)
    assert_logits_equal(actual, expected, rows if isinstance(rows, Tensor) and rows.dim() == 2 else None)


@pytest.mark.parametrize(("model_type", "same_as"), [("gemma", "sdpa"), ("gemma2", "eager")])
def test_dropout(model_type: str, same_as: str) -> None:
    """The same random numbers in the same order drop the same weights."""
    theirs = text_model(model_type, same_as, attention_dropout=0.5).train()
    ours = patched(theirs)
    inputs = text_batch("left")
    outputs = []
    for one in (ours, theirs, theirs):
        torch.manual_seed(len(outputs) == 2)
        outputs.append(one(**inputs))
    assert_logits_equal(outputs[0], outputs[1], inputs["attention_mask"])
    assert not torch.allclose(outputs[1].logits, outputs[2].logits)


def test_attention_alone_serves_other_models() -> None:
    register()
    config = LlamaConfig(**{**TEXT, "num_key_value_heads": 2})
    theirs = randomised(LlamaForCausalLM._from_config(config, attn_implementation="eager"))
    ours = randomised(LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation="pg_kernels"))
    assert ours.config._attn_implementation == "pg_kernels"
    inputs = text_batch("left")
    assert_logits_equal(ours(**inputs), theirs(**inputs), inputs["attention_mask"])


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("length", [4, 6])
@pytest.mark.parametrize(
    ("model_type", "auto"),
    [("bloom", AutoModelForCausalLM), ("doge", AutoModelForCausalLM), ("mpnet", AutoModel), ("bert", AutoModel)],
)
def test_models_that_do_more_with_a_mask_than_hand_it_on(model_type: str, auto: Any, length: int) -> None:
    """Dense masks can be added to biases, sliced, and passed to eager attention. A mask of four keys is not taken for lengths."""
    register()
    config = AutoConfig.for_model(model_type, **SMALL, pad_token_id=0)
    theirs, ours = (
        randomised(auto.from_config(copy.deepcopy(config), attn_implementation=name))
        for name in ("eager", "pg_kernels")
    )
    ids = torch.randint(4, 60, (2, length))
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    with torch.no_grad():
        actual, expected = (model(input_ids=ids, attention_mask=mask)[0] for model in (ours, theirs))
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("queries", [3, 5, 7])
@pytest.mark.parametrize("missing", [slice(0, 0), slice(3, 5), slice(0, 2), slice(0, 4)], ids=str)
def test_cross_attention(queries: int, missing: slice) -> None:
    """Padding among an encoder's five tokens does not concern the decoder."""
    register()
    sizes = {
        f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))
    }
    config = BartConfig(vocab_size=64, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes)
    theirs, ours = (
        randomised(BartModel._from_config(copy.deepcopy(config), attn_implementation=name))
        for name in ("eager", "pg_kernels")
    )
    ids, mask = torch.randint(4, 60, (2, 5)), torch.ones(2, 5, dtype=torch.int64)
    mask[1, missing] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(4, 60, (2, queries))}
    with torch.no_grad():
        actual, expected = (model(**inputs).last_hidden_state for model in (ours, theirs))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-4)
    # The lengths, for a model that takes them.
    arguments = {**GIVEN, "batch_size": 2, "q_length": queries, "kv_length": 5, "attention_mask": mask.bool()}
    arguments["mask_function"] = masks.bidirectional_mask_function
    dense = masks.sdpa_mask(**arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    assert torch.equal(dense_mask(lengths_mask(**arguments), queries, 5), dense)


def test_queries_for_a_whole_batch() -> None:
    register()
    q, k = torch.randn(1, 2, 3, 16), torch.randn(4, 2, 5, 16)
    module = nn.Module()
    out, _ = attention.attention(module, q, k, k, None, is_causal=False)
    expected = nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("option", ["s_aux", "sinks", "cache", "indices", "block_indices", "position_bias"])
def test_unknown_attention_is_refused(option: str) -> None:
    q = torch.zeros(1, 1, 2, 4)
    softcap = 50.0 if option == "position_bias" else None  # without a mask SDPA uses it
    with pytest.raises(ValueError, match=f"{option}: not supported"):
        attention.attention(nn.Module(), q, q, q, None, softcap=softcap, **{option: q})


def test_hooks_see_their_layers() -> None:
    theirs = paligemma().train()
    ours, seen = patched(theirs), []
    hooked = {"lm_head": ours.lm_head, "up_proj": ours.model.language_model.layers[1].mlp.up_proj}
    for name, layer in hooked.items():
        layer.register_forward_hook(lambda module, inputs, output, name=name: seen.append(name))
    output = ours(**labelled())
    assert seen == ["up_proj", "lm_head"] and output.logits is not None
    torch.testing.assert_close(output.loss, theirs(**labelled()).loss, atol=1e-5, rtol=1e-5)


def test_changed_mask_is_refused() -> None:
    """Some of transformers' models compute with the mask as if it were dense."""
    q = torch.zeros(2, 1, 8, 4)
    lengths, _ = both_masks()
    with pytest.raises(ValueError, match="has changed the mask"):
        attention.attention(nn.Module(), q, q, q, lengths * torch.ones(2, 1, 1, 8, dtype=torch.int32))


def test_loss_is_left_to_transformers_where_it_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = patched(paligemma()).train()
    losses = Counter(monkeypatch, layers, "linear_cross_entropy")
    assert ours(**labelled(), skip_logits=False).logits is not None
    assert ours(**labelled(), logits_to_keep=17).logits is not None
    assert ours.eval()(**labelled()).logits is not None
    assert not losses.calls
    assert ours(**labelled(), skip_logits=True).logits is None
    loss, *_ = ours(**labelled(), skip_logits=True, return_dict=False)
    assert loss.dim() == 0 and losses.calls == 2
    inputs = labelled()
    inputs["labels"] = inputs["labels"].clamp(min=-1)
    expected = paligemma()(**inputs, ignore_index=-1).loss
    torch.testing.assert_close(ours.train()(**inputs, ignore_index=-1).loss, expected, atol=1e-5, rtol=1e-5)
    ours.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 3
    output = ours(**labelled())
    assert output.loss == 3 and output.logits is not None


# Undoing


def traces(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return everything visible of a model: classes, attributes and their contents, configurations."""
    return [(name, type(module), sorted(vars(module)), str(vars(module))) for name, module in model.named_modules()]


def test_unpatch_leaves_nothing_behind(model: Any) -> None:
    ours = copy.deepcopy(model)
    before, names = traces(ours), list(ours.state_dict())
    assert patch(ours) is ours
    assert list(ours.state_dict()) == names and traces(ours) != before
    assert type(ours).__name__ == type(model).__name__ and isinstance(ours, PaliGemmaForConditionalGeneration)
    copied = copy.deepcopy(ours)
    assert unpatch(ours) is ours
    assert traces(ours) == before
    inputs = batch()
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(ours(**inputs).logits, expected)
        assert not torch.equal(copied(**inputs).logits, expected)  # otherwise the copy would not be patched
        assert torch.equal(unpatch(copied)(**inputs).logits, expected)


def test_each_option_alone(model: Any) -> None:
    inputs = labelled()
    options = ["rms_norm", "rotary", "mlp", "attention", "loss"]
    for chosen in options:
        ours = patched(model, **{option: option == chosen for option in options})
        changed = {type(module).__name__ for module in ours.modules() if "_pg_kernels_original" in vars(type(module))}
        parts = {"rms_norm": "RMSNorm", "rotary": "Attention", "mlp": "MLP", "loss": "PaliGemma"}
        assert len(changed) == (chosen != "attention") and all(parts[chosen] in name for name in changed)
        used = {config._attn_implementation for config in (ours.config.text_config, ours.config.vision_config)}
        assert used == {"pg_kernels" if chosen == "attention" else "eager"}
        torch.testing.assert_close(ours.train()(**inputs).loss, model(**inputs).loss, atol=1e-5, rtol=1e-5)


def test_bad_use_is_refused() -> None:
    ours = patched(paligemma())
    with pytest.raises(ValueError, match="already patched"):
        patch(ours)
    with pytest.raises(ValueError, match="not patched"):
        unpatch(unpatch(ours))
    config = LlamaConfig(**{**TEXT, "num_key_value_heads": 2})
    with pytest.raises(ValueError, match="LlamaForCausalLM holds nothing to patch"):
        patch(LlamaForCausalLM(config))
    with pytest.raises(ValueError, match="nothing to patch"):
        patch(ours, rms_norm=False, rotary=False, mlp=False, attention=False, loss=False)
    before = traces(ours)
    with pytest.raises(ValueError, match="mode: got 'int4'"):
        patch(ours, int8="int4")
    assert traces(ours) == before
    ours.forward = ours.forward
    with pytest.raises(ValueError, match="a forward of its own"):
        patch(ours)


def test_a_shared_configuration_gets_its_attention_back() -> None:
    config = GemmaConfig(**TEXT)
    config._attn_implementation = "sdpa"
    both = nn.ModuleList(randomised(GemmaModel(config)) for _ in range(2))
    assert both[0].config is both[1].config
    for model in both:
        patch(model)
    unpatch(both)
    assert config._attn_implementation == "sdpa"


def test_a_class_made_from_a_patched_one_is_noticed() -> None:
    ours = patched(paligemma())
    before, cls = traces(ours), type(ours)
    ours.__class__ = type("FSDP", (cls,), {})
    with pytest.raises(ValueError, match="FSDP was made from a patched class"):
        unpatch(ours)
    ours.__class__ = cls
    assert traces(ours) == before
    unpatch(ours)


def test_pickling(tmp_path: Path) -> None:
    theirs = paligemma()
    ours = patched(theirs)
    torch.save(ours, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(loaded) is type(ours)
    inputs = batch()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, ours(**inputs).logits)
        assert torch.equal(unpatch(loaded)(**inputs).logits, theirs(**inputs).logits)


@pytest.mark.skipif(not hasattr(transformers, "PI0Config"), reason="this version of transformers has no pi0")
def test_transformers_own_robot_policy() -> None:
    """pi0: an action expert over PaliGemma's keys and values."""
    decoder = {"model_type": "gemma", **TEXT, "num_key_value_heads": 1}
    vlm = {"model_type": "paligemma", "text_config": decoder, "vision_config": VISION, "image_token_id": IMAGE}
    config = transformers.PI0Config(
        vlm_config={**vlm, "projection_dim": TEXT["hidden_size"]},
        dit_config={**decoder, "hidden_size": 16},
        chunk_size=5,
        num_inference_steps=2,
    )
    theirs = randomised(transformers.PI0ForConditionalGeneration(config))
    ids = torch.cat((torch.full((2, IMAGE_TOKENS), IMAGE), torch.randint(3, 120, (2, 5))), 1)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    inputs = {
        "state": torch.randn(2, 32), "input_ids": ids, "attention_mask": mask, "noise": torch.randn(2, 5, 32),
        "pixel_values": torch.randn(2, 1, 3, 28, 28), "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
    }  # fmt: skip
    expected = theirs.sample_actions(**inputs)
    ours = patched(theirs)
    torch.testing.assert_close(ours.sample_actions(**inputs), expected, atol=1e-4, rtol=2e-4)
    assert torch.equal(unpatch(ours).sample_actions(**inputs), expected)
    error = (patched(theirs, int8="int8").sample_actions(**inputs) - expected).norm() / expected.norm()
    assert 0 < error < 0.1


def test_other_activations_keep_their_mlp() -> None:
    theirs = text_model("gemma", hidden_act="silu")
    inputs = text_batch()
    assert_logits_equal(patched(theirs)(**inputs), theirs(**inputs), inputs["attention_mask"])


def test_applied_before_construction(tmp_path: Path) -> None:
    theirs = paligemma()
    theirs.save_pretrained(tmp_path)
    undo = apply_to_paligemma(mlp=False)
    try:
        ours = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="applied already"):
            apply_to_paligemma()
    finally:
        undo()
    assert ours.config.text_config._attn_implementation == "pg_kernels"
    changed = {type(module).__name__ for module in ours.modules() if "_pg_kernels_original" in vars(type(module))}
    assert changed == {"PaliGemmaForConditionalGeneration", "GemmaAttention", "GemmaRMSNorm"}
    assert_logits_equal(ours(**batch()), theirs(**batch()), batch()["attention_mask"])
    later = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(unpatch_to_eager(ours)(**batch()).logits, later(**batch()).logits)
    with pytest.raises(TypeError, match="got int8"):
        apply_to_paligemma(int8="int8")


def unpatch_to_eager(model: Any) -> Any:
    unpatch(model).set_attn_implementation("eager")
    return model


# Together with what people use


def test_save_and_load(model: Any, tmp_path: Path) -> None:
    patched(model).save_pretrained(tmp_path)
    written = (tmp_path / "config.json").read_text()
    assert "pg_kernels" not in written
    assert json.loads(written)["architectures"] == ["PaliGemmaForConditionalGeneration"]
    loaded, report = PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    register()
    named = PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="pg_kernels", device_map="cpu"
    )
    assert_logits_equal(named(**batch()), model(**batch()), batch()["attention_mask"])


def test_gradient_checkpointing(model: Any) -> None:
    plain, ours = patched(model).train(), patched(model).train()
    ours.gradient_checkpointing_enable()
    plain(**labelled()).loss.backward()
    ours(**labelled()).loss.backward()
    assert any(layer.gradient_checkpointing for layer in ours.model.language_model.layers)
    assert_gradients_equal(ours, plain)


def test_autocast(model: Any) -> None:
    """bf16 keeps 8 bits: losses agree within 2 %, and gradients point where those of transformers under autocast do."""
    losses, directions = [], []
    for one in (copy.deepcopy(model), patched(model)):
        one.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = one(**labelled()).loss
        assert loss.dtype == torch.float32
        loss.backward()
        losses.append(loss.item())
        directions.append(torch.cat([parameter.grad.flatten() for parameter in one.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert torch.cosine_similarity(*directions, dim=0) > 0.99


def test_compile() -> None:
    theirs = paligemma("gemma2-window", num_hidden_layers=1)
    plain, ours = patched(theirs).train(), patched(theirs).train()
    expected = plain(**labelled()).loss
    torch.compiler.reset()
    actual = torch.compile(ours, backend="aot_eager")(**labelled()).loss
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    actual.backward()
    assert_gradients_equal(ours, plain)


def test_compiled_decoding_with_a_static_cache() -> None:
    """As `generate` does on GPUs, the masks are made first and the step is one graph."""
    theirs = text_model("gemma2")
    ours = patched(theirs)
    inputs = text_batch("left")
    caches = [StaticCache(config=one.config, max_cache_len=24) for one in (theirs, ours)]
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    attention_mask = inputs["attention_mask"]
    with torch.no_grad():
        theirs(**inputs, **{CACHE: caches[0]})
        ours(**inputs, **{CACHE: caches[1]})
        for _ in range(2):
            attention_mask = nn.functional.pad(attention_mask, (0, 1), value=1)
            tokens = {"input_ids": torch.full((3, 1), 9), "position_ids": attention_mask.sum(1, keepdim=True) - 1}
            lengths = masks.create_masks_for_generate(
                ours.config, torch.empty(3, 1, 0), attention_mask, caches[1], tokens["position_ids"]
            )
            assert {mask.dtype for mask in lengths.values()} == {torch.int32}
            expected = theirs(**tokens, attention_mask=attention_mask, **{CACHE: caches[0]})
            actual = compiled(**tokens, attention_mask=lengths, **{CACHE: caches[1]})
            assert_logits_equal(actual, expected)


def test_hidden_states_and_offloaded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloading keeps weights on the meta device, and hooks load them when a module is called."""
    from accelerate import cpu_offload

    theirs = paligemma()
    offloaded = cpu_offload(copy.deepcopy(theirs), execution_device=torch.device("cpu"))
    ours = patch(offloaded)
    assert next(ours.model.language_model.layers[0].mlp.parameters()).is_meta
    inputs = batch()
    with torch.no_grad():
        actual, expected = (one(**inputs, output_hidden_states=True) for one in (ours, theirs))
        assert_logits_equal(actual, expected, inputs["attention_mask"])
        assert len(actual.hidden_states) == len(expected.hidden_states) == 3
        norms = Counter(monkeypatch, layers, "rms_norm")
        ours(**inputs)
        assert norms.calls == 5
        assert torch.equal(unpatch(ours)(**inputs).logits, expected.logits)
        assert norms.calls == 5


def lora(model: Any, seed: int = 0) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False, r=4))


@pytest.mark.parametrize("order", ["patch first", "PEFT first"])
def test_peft(model: Any, order: str) -> None:
    theirs = lora(copy.deepcopy(model)).train()
    ours = (lora(patched(model)) if order == "patch first" else patch(lora(copy.deepcopy(model)))).train()
    expected, actual = theirs(**labelled()), ours(**labelled())
    assert actual.logits is None
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)
    expected.loss.backward()
    actual.loss.backward()
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (mine.grad is None) == ("lora_" not in name), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-3)
    prompts = batch("left", suffix=False)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(ours.eval().generate(**prompts, **options), theirs.eval().generate(**prompts, **options))
    with torch.no_grad():
        assert torch.equal(unpatch(ours)(**batch()).logits, theirs(**batch()).logits)


@pytest.mark.parametrize("mode", ["int8", "int8-dynamic"])
def test_int8(mode: str, tmp_path: Path) -> None:
    """Rounding to 8 bits changes weights by up to 0.4 % of their row's largest. Random logits move by a few per cent."""
    theirs = paligemma()
    ours = patched(theirs, int8=mode)
    inputs = labelled()
    with torch.no_grad():
        actual, expected = ours(**inputs), theirs(**inputs)
    assert (actual.logits - expected.logits).norm() < 0.05 * expected.logits.norm()
    torch.testing.assert_close(ours(**inputs, skip_logits=True).loss, actual.loss, atol=0.05, rtol=0)
    assert sum(type(module) is Int8Linear for module in ours.modules()) == 2 * 7 + 6 + 2
    with pytest.raises(ValueError, match="int8 has replaced the float weights"):
        unpatch(ours)
    with pytest.raises(ValueError, match="transformers cannot load int8 weights"):
        ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the embedding is int8"):
        ours.resize_token_embeddings(VOCABULARY + 8)
    ours.tie_weights()
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, actual.logits)
    adapted = patch(lora(copy.deepcopy(theirs)), int8=mode).train()
    adapted(**inputs).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained and trained == {name for name, _ in adapted.named_parameters() if "lora_" in name}
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


class Examples(torch.utils.data.Dataset):
    """Return rows of a batch, repeated, without the image so that a text model can take them."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index % 3] for name, tensor in self.inputs.items()}


def losses_of_training(model: Any, inputs: dict[str, Tensor], folder: Path, **options: Any) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        num_train_epochs=1,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Examples(inputs), eval_dataset=Examples(inputs))
    trainer.train()
    steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*steps, trainer.evaluate()["eval_loss"]]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer(model: Any, accumulation: int, tmp_path: Path) -> None:
    """Also in evaluation, which asks for logits."""
    options = {"gradient_accumulation_steps": accumulation}
    expected = losses_of_training(copy.deepcopy(model), labelled(), tmp_path, **options)
    actual = losses_of_training(patched(model), labelled(), tmp_path, **options)
    assert len(expected) == 6 // accumulation + 1 and expected[0] > expected[-1]
    # Adam divides by the magnitude of small gradients, and six steps add up.
    assert actual == pytest.approx(expected, rel=1e-3)


def test_trainer_in_bf16_then_unpatched(tmp_path: Path) -> None:
    """accelerate's autocast keeps the forward that it found."""
    theirs = text_model("gemma")
    inputs = text_batch()
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    ours = patched(theirs)
    expected = losses_of_training(theirs, inputs, tmp_path, bf16=True)
    assert losses_of_training(ours, inputs, tmp_path, bf16=True) == pytest.approx(expected, rel=0.03)
    assert unpatch(ours).train()(**inputs).logits is not None


def test_loss_holds_no_logits() -> None:
    """With a real vocabulary the logits, their float32 copy and their gradient take most of a step's memory."""
    theirs = paligemma(vocab_size=32_000).train()
    ours = patched(theirs)
    inputs = labelled()
    inputs = {name: tensor.repeat(8, *[1] * (tensor.dim() - 1)) for name, tensor in inputs.items()}
    before, after = (
        peak_bytes(lambda one=one: one(**inputs).loss.backward(), torch.device("cpu")) for one in (theirs, ours)
    )
    assert before - after > inputs["labels"].numel() * 32_000 * 4


def test_package_does_not_import_transformers() -> None:
    code = "import sys, pg_kernels, pg_kernels.integrations, pg_kernels.model; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
