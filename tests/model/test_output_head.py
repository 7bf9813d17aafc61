"""Whether the output head is tied to the embedding: the tensors decide, in files, in copies and in int8."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PaliGemmaForConditionalGeneration as HFPaliGemma

from pg_kernels import quantize_
from pg_kernels.model import PaliGemma, PaliGemmaConfig, TextConfig, VisionConfig
from pg_kernels.model.checkpoints.conversion import convert
from pg_kernels.nn import Int8Linear

TEXT = TextConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
CONFIG = PaliGemmaConfig(VisionConfig(32, 48, 1, 2, image_size=28), TEXT, image_token_id=63)
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"


def tied(config: PaliGemmaConfig = CONFIG) -> PaliGemma:
    torch.manual_seed(0)
    return PaliGemma(config).eval()


def doubled() -> PaliGemma:
    model = tied()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    return model


def trained_embedding() -> PaliGemma:
    """Return a model of which PEFT has trained only the embedding."""
    adapted = get_peft_model(tied(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    table = adapted.get_submodule("base_model.model.model.language_model.embed_tokens.modules_to_save.default")
    with torch.no_grad():
        table.weight.mul_(-1.5)
    return adapted.merge_and_unload().eval()


UNTIED = {
    "doubled": doubled,
    "trained embedding": trained_embedding,
    "copied": lambda: copy.deepcopy(doubled()),
    "cast": lambda: doubled().to(torch.bfloat16).to(torch.float32),
    "loaded": lambda: loaded(doubled().state_dict()),
    "assigned": lambda: loaded(doubled().state_dict(), assign=True),
}


def loaded(state: dict[str, Tensor], *, assign: bool = False) -> PaliGemma:
    model = tied()
    model.load_state_dict(state, assign=assign)
    return model


@torch.no_grad()
def logits(model: PaliGemma | HFPaliGemma) -> Tensor:
    ids = torch.tensor([[63, 63, 63, 63, 2, 5, 7, 11]])
    pixels = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    return model(input_ids=ids, pixel_values=pixels, attention_mask=mask, token_type_ids=mask * 0).logits


def declared(folder: Path) -> set[bool]:
    """Return `tie_word_embeddings` at both places of config.json that transformers has used."""
    content = json.loads((folder / "config.json").read_text())
    return {content["tie_word_embeddings"], content["text_config"]["tie_word_embeddings"]}


@pytest.mark.parametrize("make", UNTIED.values(), ids=UNTIED)
def test_another_head_is_written(make: Callable[[], PaliGemma], tmp_path: Path) -> None:
    model = make()
    assert not torch.equal(model.lm_head.weight, model.get_parameter(EMBEDDING))
    expected = logits(model)
    model.save_pretrained(tmp_path / "hf")
    assert declared(tmp_path / "hf") == {False}
    again = PaliGemma.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(again), expected) and not again.config.tie_word_embeddings
    theirs, info = HFPaliGemma.from_pretrained(tmp_path / "hf", output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    assert (logits(theirs.eval()) - expected).abs().max() <= 2e-5 * expected.abs().max()
    convert(tmp_path / "hf", tmp_path / "converted")
    assert torch.equal(logits(PaliGemma.from_pretrained(tmp_path / "converted")), expected)

    with pytest.raises(ValueError, match="no place for an output head"):
        model.save_big_vision(tmp_path / "p.npz")
    with pytest.raises(ValueError, match="no place for an output head"):
        convert(tmp_path / "hf", tmp_path / "p.npz")
    assert not (tmp_path / "p.npz").exists()

    quantised = quantize_(model)
    expected = logits(quantised)
    quantised.save_pretrained(tmp_path / "int8")
    assert declared(tmp_path / "int8") == {False}
    assert torch.equal(logits(PaliGemma.from_pretrained(tmp_path / "int8")), expected)
    assert torch.equal(logits(PaliGemma.from_pretrained(tmp_path / "hf", quantize="int8")), expected)
    with pytest.raises(ValueError, match=r"no int8 weights"):
        quantised.save_big_vision(tmp_path / "p.npz")


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_int8_head_beside_an_int8_embedding(scale: float, tmp_path: Path) -> None:
    """A doubled head has the same int8 levels. The scales decide, whatever config.json says."""
    model = quantize_(tied())
    head = nn.Linear(32, 64, bias=False)
    head.weight = nn.Parameter(model.lm_head.weight.dequantize(torch.float32) * scale)
    model.lm_head = Int8Linear.from_linear(head)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PaliGemma.from_pretrained(tmp_path)), expected) and declared(tmp_path) == {scale == 1.0}
    if scale != 1.0:
        content = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(content.replace('embeddings": false', 'embeddings": true'))
        assert torch.equal(logits(PaliGemma.from_pretrained(tmp_path)), expected)


def test_an_int8_embedding_under_a_float_head(tmp_path: Path) -> None:
    model = quantize_(tied())
    model.lm_head = nn.Linear(32, 64, bias=False)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PaliGemma.from_pretrained(tmp_path)), expected)


def test_loading_a_state_dict_with_another_int8_head_unties_it() -> None:
    # The doubled head has the embedding's int8 levels but other scales.
    model = quantize_(tied())
    state = model.state_dict()
    state["lm_head.weight_scale"] = state["lm_head.weight_scale"] * 2
    model.load_state_dict(state)
    assert torch.equal(model.state_dict()["lm_head.weight_scale"], 2 * model.state_dict()[f"{EMBEDDING}_scale"])
    model = tied()
    model.load_state_dict(tied().state_dict())
    assert model.lm_head.weight is model.get_parameter(EMBEDDING) and model.config.tie_word_embeddings


@pytest.mark.parametrize("same", ["memory", "values"])
@pytest.mark.parametrize("configured", [True, False])
def test_an_equal_head(same: str, configured: bool, tmp_path: Path) -> None:
    """If the configuration unties head and embedding, equal values stay separate, for training. Else they become one tensor."""
    model = tied(replace(CONFIG, tie_word_embeddings=configured))
    weight = model.get_parameter(EMBEDDING)
    model.lm_head.weight = weight if same == "memory" else nn.Parameter(weight.detach().clone())
    one = same == "memory" or configured
    expected = logits(model)
    model.save_pretrained(tmp_path / "hf")
    assert declared(tmp_path / "hf") == {one}
    names = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors").keys()
    assert ("language_model.lm_head.weight" in names) != one
    again = PaliGemma.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(again), expected)
    assert (again.lm_head.weight is again.get_parameter(EMBEDDING)) == one
    # An .npz has no head, so only equal values count.
    model.save_big_vision(tmp_path / "p.npz")
    convert(tmp_path / "hf", tmp_path / "q.npz")
    for name in ("p.npz", "q.npz"):
        state = PaliGemma.from_pretrained(tmp_path / name).state_dict()
        assert torch.equal(state[HEAD], weight) and torch.equal(state[EMBEDDING], weight)


def test_a_head_in_another_dtype_than_the_embedding(tmp_path: Path) -> None:
    model = tied()
    model.save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    weight = tensors["language_model.model.embed_tokens.weight"]
    for head, same in ((weight.bfloat16(), False), (weight, True), (weight.double() + 1e-12, False)):
        safetensors.torch.save_file(tensors | {HEAD: head.clone()}, tmp_path / "model.safetensors")
        again = PaliGemma.from_pretrained(tmp_path)
        assert (again.lm_head.weight is again.get_parameter(EMBEDDING)) == same
        assert torch.equal(again.lm_head.weight, head.float())
