"""The model in int8: loading, saving, generating, and its distance from the original."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from pg_kernels import backend, quantize_
from pg_kernels.model import EMBEDDED_CHECKPOINT, PaliGemma, PaliGemmaConfig, Processor, TextConfig, VisionConfig
from pg_kernels.model.checkpoints.conversion import convert
from pg_kernels.model.decoding import Decoder
from pg_kernels.model.quality import compare
from pg_kernels.nn import Int8Embedding, Int8Linear

MODES = ["int8", "int8-dynamic"]
SAMPLE = EMBEDDED_CHECKPOINT / "samples" / "banana_and_owl.png"
VISION = VisionConfig(24, 40, 1, 2, image_size=28)
TEXT = TextConfig("gemma2", 64, 32, 48, 2, 4, 2, 8, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
CONFIG = PaliGemmaConfig(VISION, TEXT, image_token_id=64)
CONFIGS = {
    "gemma2": CONFIG,
    "gemma": replace(CONFIG, text_config=replace(TEXT, model_type="gemma", attn_logit_softcapping=None)),
    "untied": replace(CONFIG, tie_word_embeddings=False),
}


def model(config: PaliGemmaConfig = CONFIG, dtype: torch.dtype = torch.float32) -> PaliGemma:
    torch.manual_seed(0)
    return PaliGemma(config).to(dtype).eval()


def prompts(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 60, (3, 9), generator=generator)
    ids[:, :4] = 64
    mask = torch.ones_like(ids)
    ids[1, 7:], mask[1, 7:] = 0, 0
    pixels = torch.rand(3, 3, 28, 28, generator=generator) * 2 - 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels.to(dtype)}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model(CONFIGS[request.param]).save_pretrained(tmp_path / "original")
    return tmp_path / "original"


@torch.inference_mode()
def logits(of: PaliGemma) -> Tensor:
    dtype = of.model.language_model.norm.weight.dtype
    return of(**prompts(dtype)).logits


# Loading and saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_loading_quantises_as_quantize_does(folder: Path, mode: str, dtype: torch.dtype) -> None:
    loaded = PaliGemma.from_pretrained(folder, quantize=mode, dtype=dtype)
    expected = quantize_(PaliGemma.from_pretrained(folder, dtype=dtype), mode)
    assert torch.equal(logits(loaded), logits(expected))
    head, embedding = loaded.lm_head, loaded.model.language_model.embed_tokens
    assert type(head) is Int8Linear and head.activations == ("keep" if mode == "int8" else "int8")
    assert (head.weight is getattr(embedding, "weight", None)) == loaded.config.tie_word_embeddings
    assert not any(type(module) is torch.nn.Linear for module in loaded.modules()) and not loaded.training
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert embedding(torch.tensor([1])).dtype == dtype


@pytest.mark.parametrize("shard", [5e9, 4_000])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("mode", MODES)
def test_what_was_saved_comes_back(
    folder: Path, tmp_path: Path, mode: str, group_size: int | None, shard: float
) -> None:
    quantised = quantize_(PaliGemma.from_pretrained(folder, dtype=torch.bfloat16), mode, group_size=group_size)
    quantised.save_pretrained(tmp_path / "int8", max_shard_bytes=shard)
    files = sorted((tmp_path / "int8").glob("*.safetensors"))
    assert (len(files) > 1) == (shard < 1e6)
    tensors = {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}
    levels = tensors["language_model.model.layers.0.mlp.down_proj.weight"]
    scale = tensors["language_model.model.layers.0.mlp.down_proj.weight_scale"]
    assert (levels.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert scale.shape == ((32,) if group_size is None else (32, 3))
    loaded = PaliGemma.from_pretrained(tmp_path / "int8")
    assert torch.equal(logits(loaded), logits(quantised))
    assert loaded.lm_head.activations == quantised.lm_head.activations
    assert loaded.state_dict().keys() == quantised.state_dict().keys()
    # saving again gives the same bytes
    loaded.save_pretrained(tmp_path / "again", max_shard_bytes=shard)
    for file in (tmp_path / "int8").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_saved_model_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    quantize_(PaliGemma.from_pretrained(folder), "int8-dynamic").save_pretrained(tmp_path / "int8")
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "pg_kernels", "bits": 8, "activations": "int8"}
    assert config["torch_dtype"] == "float32"
    assert PaliGemma.from_pretrained(tmp_path / "int8", quantize="int8").lm_head.activations == "keep"


def test_some_layers_may_stay_as_they_are(tmp_path: Path) -> None:
    mixed = quantize_(model(dtype=torch.bfloat16), skip=lambda name, _: "vision_tower" in name or name == "lm_head")
    mixed.save_pretrained(tmp_path)
    loaded = PaliGemma.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(mixed))
    assert type(loaded.lm_head) is torch.nn.Linear and loaded.lm_head.weight.dtype == torch.bfloat16
    assert type(loaded.model.multi_modal_projector.linear) is Int8Linear


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()} | changes
    safetensors.torch.save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


GATE = "language_model.model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{GATE}_scale": torch.ones(47)}, r"gate_proj\.weight_scale has shape \[47\] .*, expected \[48\]"),
        ({f"{GATE}_scale": torch.ones(48, 5)}, r"gate_proj\.weight.*5 groups cannot share 32 columns"),
        ({f"{GATE}_scale": torch.full((48,), torch.nan)}, r"gate_proj\.weight.*scale: holds NaN or infinity"),
        ({f"{GATE}_scale": None}, r"gate_proj.*int8 without a scale"),
        ({GATE: torch.ones(48, 31, dtype=torch.int8)}, r"gate_proj\.weight has shape \[48, 31\]"),
        (
            {"language_model.model.norm.weight": torch.ones(32, dtype=torch.int8)},
            r"norm\.weight: it is int8 without a scale",
        ),
        ({f"{GATE}_scale": torch.ones(48).half()}, r"gate_proj\.weight.*expected torch.float32, got torch.float16"),
        ({GATE: torch.ones(48, 32)}, r"gate_proj\.weight has a scale, but is not int8"),
        ({"more.weight_scale": torch.ones(3)}, r"unexpected tensor"),
    ],
)
def test_damaged_files(tmp_path: Path, changes: dict[str, Tensor | None], message: str) -> None:
    quantize_(model()).save_pretrained(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        PaliGemma.from_pretrained(tmp_path)


def test_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^quantize: got 'int4', expected one of 'int8', 'int8-dynamic' or None"):
        PaliGemma.from_pretrained(folder, quantize="int4")
    quantised = quantize_(PaliGemma.from_pretrained(folder))
    with pytest.raises(ValueError, match=r"\.npz files hold no int8 weights"):
        quantised.save_big_vision(tmp_path / "model.npz")
    quantised.save_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match="holds int8 weights, which are not converted"):
        convert(tmp_path / "int8", tmp_path / "out")
    with pytest.raises(ValueError, match="holds int8 weights, which are not converted"):
        convert(tmp_path / "int8", tmp_path / "out.npz")
    quantised.lm_head.activations = "int8"
    with pytest.raises(ValueError, match="some of its int8 layers quantise activations and some do not"):
        quantised.save_pretrained(tmp_path / "mixed")
    assert not any((tmp_path / name).exists() for name in ("model.npz", "out", "out.npz", "mixed"))


def test_int8_without_any_scale(tmp_path: Path) -> None:
    quantize_(model()).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, **{name: None for name in tensors if name.endswith("_scale")})
    for mode in (None, "int8"):
        with pytest.raises(ValueError, match="int8 without a scale"):
            PaliGemma.from_pretrained(tmp_path, quantize=mode)


@pytest.mark.parametrize("content", ["int8", {"quant_method": "pg_kernels", "activations": ["x"]}], ids=str)
def test_configurations_that_say_something_else(tmp_path: Path, content: object) -> None:
    quantize_(model()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": content}))
    with pytest.raises(ValueError, match=r"config\.json"):
        PaliGemma.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    rewrite(tmp_path, **{GATE: torch.full((48, 32), torch.inf)})
    with pytest.raises(ValueError, match=rf"model\.safetensors: {GATE}: weight: holds NaN or infinity"):
        PaliGemma.from_pretrained(tmp_path, quantize="int8")


# Running


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_int8_is_the_model_of_its_dequantised_weights(config: PaliGemmaConfig, mode: str) -> None:
    quantised, exact = quantize_(model(config), mode), model(config)
    for name, module in exact.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.copy_(quantised.get_submodule(name).weight.dequantize())
    expected = logits(exact)
    error = (logits(quantised) - expected).norm() / expected.norm()
    assert error < {"int8": 1e-3, "int8-dynamic": 0.05}[mode]
    types = (torch.arange(9) >= 6).long().expand(3, -1)
    options = {**prompts(), "token_type_ids": types, "labels": prompts()["input_ids"].masked_fill(types == 0, -100)}
    torch.testing.assert_close(quantised(**options).loss, exact(**options).loss, rtol=0.05, atol=0.05)


@torch.inference_mode()
@pytest.mark.parametrize("k", [1, 5, 64])
@pytest.mark.parametrize("make", [model, lambda: quantize_(model())], ids=["float", "int8"])
def test_likeliest_tokens_are_those_of_the_logits(make, k: int) -> None:
    of = make()
    prompt = prompts()
    hidden = Decoder(of, *prompt["input_ids"].shape).prefill(of, prompt)
    values, ids = of.topk_logits(hidden, k)
    every = of.logits(hidden)
    expected = every.sort(descending=True, stable=True)
    assert torch.equal(ids, expected.indices[:, :k])
    torch.testing.assert_close(values, expected.values[:, :k], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_decoding_with_a_cache_changes_nothing(mode: str) -> None:
    quantised = quantize_(model(), mode)
    inputs = {name: tensor[:1] for name, tensor in prompts().items()}
    ids = inputs["input_ids"]
    for _ in range(6):
        types = (torch.arange(ids.shape[1]) >= 9).long()[None]
        found = quantised(ids, inputs["pixel_values"], token_type_ids=types, logits_to_keep=1).logits[:, -1]
        ids = torch.cat((ids, found.argmax(-1, keepdim=True)), 1)
    assert torch.equal(quantised.generate(**inputs, max_new_tokens=6, eos_token_id=-1), ids[:, 9:])


def test_generation_options() -> None:
    quantised = quantize_(model())
    greedy = quantised.generate(**prompts(), max_new_tokens=6)
    draw = {"temperature": 1.5, "generator": torch.Generator().manual_seed(0)}
    assert torch.equal(quantised.generate(**prompts(), max_new_tokens=6, top_k=1, **draw), greedy)
    assert quantised.generate(**prompts(), max_new_tokens=6, top_k=7, top_p=0.9, **draw).shape[0] == 3
    assert quantised.generate(**prompts(), max_new_tokens=6, num_beams=2).shape[0] == 3
    with backend("reference"):
        assert torch.equal(quantised.generate(**prompts(), max_new_tokens=6), greedy)


@pytest.mark.parametrize("mode", MODES)
def test_the_built_in_model_still_sees(mode: str) -> None:
    quantised = PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT, quantize=mode)
    processor = Processor.from_pretrained(EMBEDDED_CHECKPOINT)
    answers = processor.decode(quantised.generate(**processor([SAMPLE] * 2, ["caption en", "detect owl"])))
    assert answers[0] == "a banana and an owl"
    assert [thing.label for thing in processor.parse(answers[1], size=Image.open(SAMPLE).size)] == ["owl"]


# Comparing


def test_comparison_with_itself_finds_nothing() -> None:
    original, processor = PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT), Processor.from_pretrained(EMBEDDED_CHECKPOINT)
    tasks = [(Image.open(SAMPLE), prompt) for prompt in ("caption en", "detect owl", "detect banana")]
    found = compare(original, original, processor, tasks, batch_size=2)
    assert set(found.layers.values()) == {0.0} and found.kl_divergence == 0
    assert (found.top1_agreement, found.same_answers, found.prompts) == (1, 1, 3)
    assert len(found.layers) == 6 + 1 + 4 and found.tokens >= 3 * 3


def test_comparison_finds_what_was_changed() -> None:
    original, processor = PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT), Processor.from_pretrained(EMBEDDED_CHECKPOINT)
    other = PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT)
    with torch.no_grad():
        other.model.language_model.layers[2].mlp.down_proj.weight.mul_(1.5)
    found = compare(original, other, processor, [(Image.open(SAMPLE), "caption en")])
    errors = list(found.layers.values())
    assert max(errors[:-2]) == 0 and min(errors[-2:]) > 0.01 and found.kl_divergence > 0
    quantised = compare(
        original,
        quantize_(PaliGemma.from_pretrained(EMBEDDED_CHECKPOINT)),
        processor,
        [(Image.open(SAMPLE), "caption en")],
    )
    assert all(0 < error < 0.03 for error in quantised.layers.values()) and quantised.kl_divergence < 0.01
    with pytest.raises(ValueError, match="^tasks: expected at least one"):
        compare(original, other, processor, [])


def test_both_kinds_of_int8_modules_are_loaded(tmp_path: Path) -> None:
    quantize_(model()).save_pretrained(tmp_path)
    kinds = {type(module) for module in PaliGemma.from_pretrained(tmp_path).modules()}
    assert {Int8Linear, Int8Embedding} <= kinds
