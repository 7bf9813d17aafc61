"""PEFT treats our model like transformers': a head tied to the embedding, accessors, and older names of layers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PaliGemmaConfig as HFConfig
from transformers import PaliGemmaForConditionalGeneration

from pg_kernels import quantize_
from pg_kernels.integrations.peft import register
from pg_kernels.model import PaliGemma
from pg_kernels.model.adapters import OLDER_NAMES
from pg_kernels.model.training.finetune import Lora, _merged, _save_adapter

VOCABULARY, IMAGE, IMAGE_TOKENS = 96, 95, 4
EMBEDDING = "model.language_model.embed_tokens"
pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word", "ignore:Model with `tie_word", "ignore:.*is_gradient_ch"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tied random model, as transformers writes it."""
    torch.manual_seed(0)
    text = {"model_type": "gemma", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "siglip_vision_model", "vision_use_head": False, "image_size": 28, "patch_size": 14}
    config = HFConfig(
        text_config={**text, **layers, "num_key_value_heads": 1},
        vision_config={**vision, **layers, "hidden_size": 32, "intermediate_size": 48},
        projection_dim=32,
        hidden_size=32,
        image_token_index=IMAGE,
    )
    model = PaliGemmaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else parameter[0].numel() ** -0.5)
            )
    folder = tmp_path_factory.mktemp("tied")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[PaliGemma, PaliGemmaForConditionalGeneration]:
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    return PaliGemma.from_pretrained(folder), theirs.eval()


@pytest.fixture
def ours(loaded: tuple[PaliGemma, PaliGemmaForConditionalGeneration]) -> PaliGemma:
    return copy.deepcopy(loaded[0])


@pytest.fixture
def theirs(loaded: tuple[PaliGemma, PaliGemmaForConditionalGeneration]) -> PaliGemmaForConditionalGeneration:
    return copy.deepcopy(loaded[1])


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.cat([torch.full((2, IMAGE_TOKENS), IMAGE), torch.arange(3, 17).view(2, 7)], 1)
    types = (torch.arange(11) > 7).long().expand(2, -1)
    return {
        "input_ids": ids,
        "token_type_ids": types,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 28, 28),
    }


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**inputs()).logits


def assert_same(actual: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    assert (actual - expected).norm() <= rtol * expected.norm()


def assert_other(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).norm() > 0.05 * expected.norm()


def adapted(model: nn.Module, config: Any = None, **options: Any) -> PeftModel:
    """Add an adapter of random numbers, the same for every model."""
    if config is None:
        config = register(LoraConfig(**{"r": 4, "init_lora_weights": False, **options}))
    model = get_peft_model(model, copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in sorted(model.named_parameters()):
        if re.search("lora_[AB]|lora_embedding|trainable_tokens|modules_to_save|hada_|ia3_", name):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


# A tied head


TIED = {
    "embedding": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "head": LoraConfig(r=4, target_modules=["lm_head"]),
    "both": LoraConfig(r=4, target_modules=r".*(embed_tokens|lm_head)", use_rslora=True),
    "dora": LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], use_dora=True),
    "tied embedding": LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True),
    "tied head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True),
    "saved embedding": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "saved head": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "saved tied": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True),
    "tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[4, 9]),
    "tokens of each": LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [4, 9], "lm_head": [9, 50]}
    ),
    "only tokens": TrainableTokensConfig(token_indices=[4, 9]),
    "loha": LoHaConfig(r=4, target_modules=["lm_head"]),
    "ia3": IA3Config(target_modules=["q_proj", "lm_head"], feedforward_modules=[]),
}


@pytest.mark.parametrize("kind", TIED)
def test_tied_head_and_embedding(
    kind: str, ours: PaliGemma, theirs: PaliGemmaForConditionalGeneration, tmp_path: Path
) -> None:
    """The adapted model equals transformers' one. Merged, saved and loaded it stays equal, although merging unties the head."""
    base, model = logits(ours), adapted(ours, TIED[kind])
    expected = logits(adapted(theirs, TIED[kind]))
    assert_other(expected, base)
    assert_same(logits(model), expected)
    with model.disable_adapter():
        assert_same(logits(model), base)
    merged = model.merge_and_unload(safe_merge=kind in ("both", "tied head", "ia3"))
    assert_same(logits(merged), expected)
    tied = merged.lm_head.weight is merged.model.language_model.embed_tokens.weight
    assert merged.config.tie_word_embeddings == tied == (kind == "saved tied")
    merged.save_pretrained(tmp_path)
    assert_same(logits(PaliGemma.from_pretrained(tmp_path)), expected)
    if kind in ("embedding", "head"):
        again = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
        assert_same(logits(again), expected)


def test_merging_and_unmerging_again_and_several_adapters(ours: PaliGemma) -> None:
    base, model = logits(ours), adapted(ours, target_modules=["lm_head", "q_proj"])
    model.add_adapter("other", register(LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)))
    first = logits(model)
    model.merge_adapter(["default"])
    assert_same(logits(model), first)
    model.unmerge_adapter()
    model.set_adapter("other")
    second = logits(model)
    assert_other(second, first)
    assert_other(second, base)
    assert_same(logits(model.merge_and_unload()), second)


def test_another_model_of_the_same_configuration_stays_tied(ours: PaliGemma) -> None:
    other = PaliGemma(ours.config)
    assert not adapted(ours, target_modules=["lm_head"]).merge_and_unload().config.tie_word_embeddings
    assert other.config.tie_word_embeddings


def test_merging_over_int8_unties(ours: PaliGemma) -> None:
    model = adapted(quantize_(ours), target_modules=["lm_head", "q_proj"])
    expected = logits(model)
    merged = model.merge_and_unload()
    assert_same(logits(merged), expected, 1e-3)
    assert type(merged.lm_head) is nn.Linear and not merged.config.tie_word_embeddings


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("targets", [".*(q_proj|embed_tokens)", ".*lm_head|lm_head"])
def test_what_finetune_merges(targets: str, quantised: bool, ours: PaliGemma, folder: Path, tmp_path: Path) -> None:
    base = quantize_(ours) if quantised else ours
    if quantised and "embed" in targets:
        with pytest.raises(ValueError, match="Target module Int8Embedding.* is not supported"):
            Lora(4, targets=targets).adapt(base)
        return
    model = Lora(4, targets=targets).adapt(base)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    merged = _merged(model.eval(), PaliGemma.from_pretrained(folder), tmp_path)
    assert_same(logits(merged), logits(model), 0.05 if quantised else 1e-5)
    merged.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(PaliGemma.from_pretrained(tmp_path / "out")), logits(merged))
    _save_adapter(model, tmp_path)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "multi_modal_projector", "linear"])
def test_an_int8_module_to_save(ours: PaliGemma, name: str) -> None:
    with pytest.raises(ValueError, match=f"modules_to_save: {name} is int8, which cannot be trained"):
        adapted(quantize_(ours), target_modules=["q_proj"], modules_to_save=[name])


def test_int8_tokens_and_prompts_are_refused(ours: PaliGemma) -> None:
    with pytest.raises(TypeError):
        get_peft_model(ours, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(TypeError, match="an int8 weight cannot be indexed.* load the model in floats"):
        adapted(quantize_(ours), target_modules=["q_proj"], trainable_token_indices=[4])


# Accessors


def test_accessors_are_those_of_transformers(ours: PaliGemma, theirs: PaliGemmaForConditionalGeneration) -> None:
    for model in (ours, theirs):
        assert model.get_input_embeddings() is model.model.language_model.embed_tokens
        assert model.get_output_embeddings() is model.lm_head
        assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
        head, table = nn.Linear(32, VOCABULARY, bias=False), nn.Embedding(VOCABULARY, 32)
        model.set_output_embeddings(head)
        model.set_input_embeddings(table)
        assert model.lm_head is head and model.model.language_model.embed_tokens is table
    assert ours._tied_weights_keys == theirs._tied_weights_keys
    assert quantize_(ours.to(torch.bfloat16)).dtype == torch.bfloat16


def test_peft_causal_language_model(ours: PaliGemma, theirs: PaliGemmaForConditionalGeneration) -> None:
    """PEFT's forward passes arguments of transformers' models, and its generate reads a generation_config."""
    options = {"target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}
    model, expected = adapted(ours, **options), adapted(theirs, **options)
    given = inputs()
    given["labels"] = given["input_ids"].masked_fill(given["token_type_ids"] == 0, -100)
    torch.testing.assert_close(model(**given).loss, expected(**given).loss)
    prompt = {**inputs(), "token_type_ids": torch.zeros(2, 11, dtype=torch.int64)}
    tokens = expected.generate(**prompt, max_new_tokens=3, do_sample=False, eos_token_id=None)[:, 11:]
    assert torch.equal(model.generate(**prompt, max_new_tokens=3, eos_token_id=-1), tokens)
    with pytest.raises(TypeError, match="output_hidden_states: PaliGemma takes no such argument"):
        model(**given, output_hidden_states=True)
    with pytest.raises(TypeError, match="lables: PaliGemma takes no such argument"):
        ours(**inputs(), lables=None)


def test_no_input_is_made_to_require_gradients(ours: PaliGemma) -> None:
    """PEFT's hook for gradient checkpointing would rule out CUDA graphs and send gradients to the embedding."""
    adapted(ours, target_modules=["o_proj"])
    assert not ours.get_input_embeddings()._forward_hooks


# Names of older transformers


def older(name: str) -> str:
    """Return the name of an adapter's tensor in transformers up to 4.51."""
    for current, former in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        name = re.sub(rf"^base_model\.model\.{re.escape(current)}", f"base_model.model.{former}", name)
    return name


def newer(name: str) -> str:
    """Return its name in transformers 4.52 to 4.57."""
    return name.replace("model.vision_tower.", "model.vision_tower.vision_model.")


def write(model: PeftModel, folder: Path, rename: Callable[[str], str]) -> None:
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)


def load(base: nn.Module, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base, folder, config=register(LoraConfig.from_pretrained(folder)))


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("rename", [older, newer, str])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "fc1", "gate_proj", "linear"], "use_rslora": True, "task_type": "CAUSAL_LM"},
        {"target_modules": ["v_proj", "lm_head"]},
        {"target_modules": ["v_proj", "embed_tokens", "fc2"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "multi_modal_projector"]},
        {"target_modules": ["out_proj"], "trainable_token_indices": [4, 9]},
        {"target_modules": ["q_proj", "fc1"], "use_dora": True},
    ],
    ids=["layers", "head", "embedding", "saved", "tokens", "dora"],
)
def test_names_of_every_transformers(
    rename: Callable[[str], str],
    options: dict[str, Any],
    ours: PaliGemma,
    theirs: PaliGemmaForConditionalGeneration,
    tmp_path: Path,
) -> None:
    model = adapted(theirs, **options)
    write(model, tmp_path, rename)
    expected = logits(model)
    assert_other(logits(ours), expected)
    assert_same(logits(load(ours, tmp_path)), expected)


@pytest.mark.parametrize("rename", [older, newer])
def test_older_names_over_int8(
    rename: Callable[[str], str], ours: PaliGemma, theirs: PaliGemmaForConditionalGeneration, tmp_path: Path
) -> None:
    model = adapted(theirs, target_modules=["q_proj", "fc1", "down_proj", "linear"])
    write(model, tmp_path, rename)
    assert_same(logits(load(quantize_(ours), tmp_path)), logits(model), 0.05)


@pytest.mark.parametrize("rename", [older, newer])
def test_a_second_adapter_with_older_names(
    rename: Callable[[str], str], ours: PaliGemma, theirs: PaliGemmaForConditionalGeneration, tmp_path: Path
) -> None:
    """PEFT does not rename anything here without a key mapping. Without one, loading is an error, not silent."""
    options = {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["multi_modal_projector"]}
    expected = adapted(theirs, **options)
    write(expected, tmp_path, rename)
    model = adapted(ours, target_modules=["q_proj", "fc1"])
    with pytest.raises((RuntimeError, KeyError)):
        model.load_adapter(tmp_path, "other")
    model.delete_adapter("other")
    model.load_adapter(tmp_path, "other", key_mapping=OLDER_NAMES)
    model.set_adapter("other")
    assert_same(logits(model), logits(expected))


@pytest.mark.parametrize(
    "names",
    [
        {"target_modules": r"language_model\.model\.layers\.\d+\..*\.(q_proj|v_proj)|vision_tower.vision_model.*fc1"},
        {"target_modules": r"^(?:.*vision_model.*fc1|language_model.model.layers.*(q_proj|v_proj))$"},
        {
            "target_modules": [
                "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
                "q_proj",
                "language_model.lm_head",
            ],
            "modules_to_save": ["language_model.model.norm"],
            "rank_pattern": {"language_model.model.layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {r"language_model\.model\.layers\.0\..*": 32},
        },
    ],
)
def test_a_configuration_with_older_names(names: dict[str, Any], ours: PaliGemma, folder: Path, tmp_path: Path) -> None:
    """The adapter applies to the layers of the older transformers, with the same ranks and scales."""
    model = adapted(ours, **names)
    layers = {name for name, module in ours.named_modules() if hasattr(module, "scaling")}
    assert len(layers) == 6
    if "rank_pattern" in names:
        assert "lm_head" in layers and hasattr(ours.model.language_model.norm, "modules_to_save")
        first, second = (layer.self_attn.q_proj for layer in ours.model.language_model.layers)
        assert (first.r, second.r) == ({"default": 4}, {"default": 2})
        assert (first.scaling, second.scaling) == ({"default": 8}, {"default": 4})
    write(model, tmp_path, older)
    loaded = load(PaliGemma.from_pretrained(folder), tmp_path)
    assert_same(logits(loaded), logits(model))
    config = LoraConfig.from_pretrained(tmp_path)
    assert register(copy.deepcopy(config)).to_dict() == config.to_dict()


def test_tensors_that_fit_nothing_are_an_error(ours: PaliGemma, folder: Path, tmp_path: Path) -> None:
    adapted(ours, target_modules=["q_proj", "fc1"]).save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    config.target_modules = {"q_proj"}
    message = (
        r"4 tensor\(s\) fit no layer that is adapted here: model.vision_tower.*fc1.lora_A.weight.* target_modules must"
    )
    with pytest.raises(RuntimeError, match=message):
        PeftModel.from_pretrained(PaliGemma.from_pretrained(folder), tmp_path, config=config)
