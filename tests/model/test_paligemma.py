"""The model against transformers' eager implementation on small random checkpoints, and our own additions."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PaliGemmaConfig as HFConfig
from transformers import PaliGemmaForConditionalGeneration

from pg_kernels import quantize_
from pg_kernels.model import PaliGemma, PaliGemmaConfig, TextConfig, VisionConfig
from pg_kernels.model.paligemma import PaliGemmaOutput
from pg_kernels.model.siglip import resample_position_embedding

IMAGE, VOCABULARY, IMAGE_TOKENS = 319, 320, 9
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
}
VISION = {
    "hidden_size": 36,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 42,
}


@pytest.fixture(scope="module", params=["gemma", "gemma2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Return the same random weights in transformers and here, through a folder that transformers wrote."""
    torch.manual_seed(0)
    config = HFConfig(
        text_config={"model_type": request.param, "query_pre_attn_scalar": 24, **TEXT},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        projection_dim=TEXT["hidden_size"],
        hidden_size=TEXT["hidden_size"],
        image_token_index=IMAGE,
    )
    config._attn_implementation = "eager"
    theirs = PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():  # transformers' initialisation hides most mistakes: all norms 1, all biases 0, tiny weights
        for parameter in theirs.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else parameter[0].numel() ** -0.5)
            )
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, PaliGemma.from_pretrained(folder), folder


def batch(padding_side: str, images: int = 1, suffix: bool = True) -> dict[str, Tensor]:
    """Return three examples of different lengths: image tokens, a prefix of 3 to 5 tokens, a suffix of 2 to 4, padding."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for prefix_len, suffix_len in ((5, 4), (3, 2), (4, 4)):
        suffix_len *= suffix
        text = torch.randint(3, 300, (prefix_len + suffix_len,), generator=generator)
        ids = torch.cat([torch.full((images * IMAGE_TOKENS,), IMAGE), text])
        types = torch.zeros_like(ids)
        types[len(ids) - suffix_len :] = suffix_len > 0
        rows.append((ids, torch.ones_like(ids), types))
    longest = max(len(ids) for ids, _, _ in rows)
    pad = [(longest - len(ids), 0) if padding_side == "left" else (0, longest - len(ids)) for ids, _, _ in rows]
    input_ids, mask, types = (
        torch.stack([torch.nn.functional.pad(t, p) for t, p in zip(column, pad)]) for column in zip(*rows)
    )
    pixels = torch.rand(3 * images, 3, 42, 42, generator=generator) * 2 - 1
    return {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": types, "pixel_values": pixels}


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_logits_and_loss_equal_transformers(pair, padding_side: str, images: int) -> None:
    theirs, ours, _ = pair
    inputs = batch(padding_side, images)
    labels = inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 0, -100)
    with torch.no_grad():
        expected = theirs(**inputs, labels=labels)
        actual = ours(**inputs, labels=labels, logits_to_keep=0)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual.logits[valid], expected.logits[valid], atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_greedy_generation_equals_transformers(pair, padding_side: str) -> None:
    theirs, ours, _ = pair
    options = {"max_new_tokens": 8, "eos_token_id": 7}
    expected = theirs.generate(**batch("left", suffix=False), do_sample=False, pad_token_id=0, **options)
    expected = expected[:, batch("left", suffix=False)["input_ids"].shape[1] :]
    actual = ours.generate(**batch(padding_side, suffix=False), **options)
    assert torch.equal(actual, expected)


def test_gradients_equal_transformers(pair) -> None:
    theirs, ours = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    inputs = batch("right")
    labels = inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 0, -100)
    theirs(**inputs, labels=labels).loss.backward()
    ours(**inputs, labels=labels).loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], atol=1e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_state_dict_keys_equal_transformers(pair) -> None:
    theirs, ours, _ = pair
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_written_folder_loads_in_transformers_with_identical_logits(pair, tmp_path: Path) -> None:
    theirs, ours, _ = pair
    ours.save_pretrained(tmp_path / "written")
    again, report = PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "written", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    inputs = batch("left")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, theirs(**inputs).logits)


def small(model_type: str = "gemma", **text) -> PaliGemmaConfig:
    text = TextConfig(model_type=model_type, **{**TEXT, **text})
    return PaliGemmaConfig(VisionConfig(**VISION), text, image_token_id=IMAGE)


@pytest.fixture(scope="module")
def model() -> PaliGemma:
    torch.manual_seed(0)
    return PaliGemma(small()).eval()


def test_every_released_model_has_its_published_size() -> None:
    sizes = {"paligemma-3b-224": 2.923e9, "paligemma2-3b-448": 3.032e9, "paligemma2-10b-224": 9.662e9}
    sizes |= {"paligemma2-28b-896": 27.650e9}
    for name, expected in sizes.items():
        with torch.device("meta"):
            model = PaliGemma(PaliGemmaConfig.named(name))
        assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(expected, rel=1e-3), name


def test_configuration_survives_config_json() -> None:
    for name in ("paligemma-3b-224", "paligemma2-10b-896", "paligemma2-28b-448"):
        config = PaliGemmaConfig.named(name)
        again = PaliGemmaConfig.from_dict(config.to_dict())
        assert again.vision_config == config.vision_config
        assert again.text_config.attention_scale == config.text_config.attention_scale
        assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "model_type is 'llava'"),
        ({"text_config": {"model_type": "llama"}}, "model_type is 'llama'"),
        ({"text_config": {"hidden_activation": "relu"}}, "activation 'relu'"),
        ({"text_config": {"head_dim": 15}}, "head_dim 15 is odd"),
        ({"text_config": {"num_key_value_heads": 3}}, "num_key_value_heads 3"),
        ({"vision_config": {"hidden_size": 100}}, "hidden_size 100"),
        ({"vision_config": {"num_hidden_layers": 0}}, "num_hidden_layers is 0"),
    ],
)
def test_unsupported_configurations_are_refused(change: dict, message: str) -> None:
    config = PaliGemmaConfig.named("paligemma-3b-224").to_dict()
    for name, value in change.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        PaliGemmaConfig.from_dict(config)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="paligemma2-28b"):
        PaliGemmaConfig.named("paligemma-7b-224")


def test_example_loss_averages_examples_and_logits_come_only_when_asked(model: PaliGemma) -> None:
    inputs = batch("right")
    labels = inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 0, -100)
    output = model(**inputs, labels=labels, loss_reduction="example")
    assert output.logits is None
    logits = model(**inputs).logits
    one_by_one = [
        torch.nn.functional.cross_entropy(row[:-1], label[1:]) for row, label in zip(logits, labels, strict=True)
    ]
    torch.testing.assert_close(output.loss, torch.stack(one_by_one).mean())


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("change", ["hook", "own forward", "bias"])
def test_a_head_that_is_more_than_a_product(model: PaliGemma, change: str, quantised: bool) -> None:
    """Such a head is called, for the loss and for the next token."""
    model = copy.deepcopy(model)
    if quantised:
        quantize_(model)
    inputs, seen = batch("right"), []
    labels = inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 0, -100)
    logits, hidden = model(**inputs).logits, torch.randn(2, TEXT["hidden_size"])
    scores, head = model.logits(hidden), model.lm_head
    if change == "hook":
        head.register_forward_hook(lambda *_: seen.append(1))
    elif change == "own forward":
        forward = head.forward
        head.forward = lambda x: seen.append(1) or forward(x)
    else:
        head.bias = nn.Parameter(torch.linspace(-9, 9, VOCABULARY))
        logits, scores = logits + head.bias, scores + head.bias
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.topk_logits(hidden, 2), tuple(scores.topk(2)), rtol=1e-4, atol=1e-4)
    assert len(seen) == (0 if change == "bias" else 2)


def test_padding_changes_nothing(model: PaliGemma) -> None:
    for side in ("left", "right"):
        inputs = batch(side)
        logits = model(**inputs).logits
        for row in range(3):
            valid = inputs["attention_mask"][row].bool()
            alone = model(
                inputs["input_ids"][row : row + 1, valid],
                inputs["pixel_values"][row : row + 1],
                token_type_ids=inputs["token_type_ids"][row : row + 1, valid],
            ).logits[0]
            torch.testing.assert_close(logits[row, valid], alone, atol=1e-5, rtol=1e-4)


def test_image_features_stand_in_for_pixels(model: PaliGemma) -> None:
    inputs = batch("left")
    expected = model(**inputs).logits
    pixels = inputs.pop("pixel_values")
    features = model.get_image_features(pixels)
    assert features.shape == (3, IMAGE_TOKENS, TEXT["hidden_size"])
    assert torch.equal(model(**inputs, image_features=features).logits, expected)
    assert torch.equal(model.get_image_features(pixels[:, None]), features)
    with pytest.raises(ValueError, match="give one of them"):
        model(**inputs, pixel_values=pixels, image_features=features)


def test_placeholder_beyond_the_vocabulary() -> None:
    """big_vision's checkpoints have no embedding row for <image>."""
    torch.manual_seed(0)
    config = small()
    model = PaliGemma(PaliGemmaConfig(config.vision_config, config.text_config, image_token_id=VOCABULARY))
    inputs = batch("left")
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = VOCABULARY
    assert model(**inputs).logits.isfinite().all()


def test_bfloat16_stays_close(pair) -> None:
    ours = pair[1]
    inputs = batch("left")
    low = copy.deepcopy(ours).to(torch.bfloat16)(**inputs).logits
    assert low.dtype == torch.float32
    exact = ours(**inputs).logits
    assert (low - exact).norm() / exact.norm() < 0.05


def test_autocast_and_compile_train(model: PaliGemma) -> None:
    model = copy.deepcopy(model)
    inputs = batch("right")
    labels = inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 0, -100)
    plain = model(**inputs, labels=labels).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, plain)
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**inputs, labels=labels).loss
    low.backward()
    assert low.dtype == torch.float32
    assert abs(low.item() - plain.item()) < 0.05 * plain.item()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("strict", [False, True])
def test_exported_program(strict: bool) -> None:
    """The exported model gives the same logits and loss for other batches and lengths than traced, and can be saved."""
    torch.manual_seed(0)
    config = small("gemma2", num_hidden_layers=1, final_logit_softcapping=9.0)
    model = PaliGemma(replace(config, vision_config=replace(config.vision_config, num_hidden_layers=1)))
    inputs = batch("right")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 0, -100)
    rows, length = torch.export.Dim("rows", max=512), torch.export.Dim("length", min=4, max=512)
    shapes: dict = {name: {0: rows} if name == "pixel_values" else {0: rows, 1: length} for name in inputs}
    program = torch.export.export(
        model, (), {**inputs, "logits_to_keep": 0}, dynamic_shapes={**shapes, "logits_to_keep": None}, strict=strict
    )
    torch.export.save(program, file := io.BytesIO())
    exported = torch.export.load(io.BytesIO(file.getvalue())).module()
    for name in inputs:
        other = inputs[name] if name == "pixel_values" else F.pad(inputs[name], (0, 3), value=-100 * (name == "labels"))
        inputs[name] = torch.cat([other, other[:2]])
    for given in (batch("left"), batch("right"), inputs):
        given = {"labels": given["input_ids"], **given, "logits_to_keep": 0}
        actual, expected = exported(**given), model(**given)
        assert isinstance(actual, PaliGemmaOutput)
        torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(actual.loss, expected.loss)


def test_output_is_a_tree_of_tensors_and_can_be_copied() -> None:
    output = PaliGemmaOutput(logits=torch.ones(2), loss=None)
    doubled = tree_map(lambda tensor: 2 * tensor, output)
    assert type(doubled) is PaliGemmaOutput and doubled.loss is None and doubled.logits.tolist() == [2, 2]
    for again in (copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert torch.equal(again.logits, output.logits) and again.loss is None


def test_lora_trains_and_generates() -> None:
    """Adapters replace projections by modules whose `.weight` is only a part of the weight."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = PaliGemma(small())
    inputs = batch("right")
    labels = inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 0, -100)
    before = model(**inputs, labels=labels).loss
    targets = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False, r=4))
    loss = adapted(**inputs, labels=labels).loss
    assert loss != before
    loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    decoder = [name for name in trained if "language_model" in name]
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in decoder} == set(targets)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert adapted.generate(**batch("left", suffix=False), max_new_tokens=2).shape == (3, 2)


def test_other_resolution_resamples_position_embeddings(pair) -> None:
    folder = pair[2]
    larger = PaliGemma.from_pretrained(folder, image_size=84)
    assert larger.config.vision_config.num_image_tokens == 36
    assert larger.get_image_features(torch.zeros(1, 3, 84, 84)).shape == (1, 36, TEXT["hidden_size"])


def test_resampling_keeps_corners_and_linear_grids() -> None:
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(3.0), indexing="ij")
    grid = torch.stack((rows, columns), -1).flatten(0, 1)
    expected = torch.stack(torch.meshgrid(*[torch.linspace(0, 2, 5)] * 2, indexing="ij"), -1).flatten(0, 1)
    torch.testing.assert_close(resample_position_embedding(grid, 25), expected)
    with pytest.raises(ValueError, match="8 tokens do not form a square"):
        resample_position_embedding(grid, 8)


def bad(**changes) -> dict[str, Tensor]:
    return {**batch("left"), **changes}


HOLE = torch.ones(3, 18, dtype=torch.int64)
HOLE[0, 4] = 0
MIXED = batch("left")["token_type_ids"].flip(1)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (bad(pixel_values=torch.zeros(2, 3, 42, 42)), "27 image placeholders .* 2 image.* 18 features"),
        (bad(pixel_values=None), "27 image placeholders .* 0 image"),
        (bad(pixel_values=torch.zeros(3, 3, 28, 28)), r"pixel_values: expected shape \[n, 3, 42, 42\]"),
        (bad(attention_mask=HOLE), "attention_mask: padding may stand before or after"),
        (bad(attention_mask=torch.ones(3, 5)), "attention_mask: expected shape"),
        (bad(token_type_ids=MIXED), "token_type_ids: the prefix"),
        (bad(labels=torch.zeros(3, 18, dtype=torch.int64), token_type_ids=None), "token_type_ids: needed with labels"),
        (bad(input_ids=batch("left")["input_ids"] + 1), "input_ids: "),
        (bad(input_ids=torch.zeros(18, dtype=torch.int64)), r"input_ids: expected shape \[B, S\]"),
        (bad(input_ids=torch.full((1, 9000), 5), attention_mask=None, token_type_ids=None), "9000 tokens .* 8192"),
        (bad(loss_reduction="median"), "loss_reduction: got 'median'"),
    ],
)
def test_bad_input_is_refused(model: PaliGemma, inputs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**inputs)
