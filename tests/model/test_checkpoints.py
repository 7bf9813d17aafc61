from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import PaliGemmaConfig as HFConfig
from transformers import PaliGemmaForConditionalGeneration as HFPaliGemma

from pg_kernels.model.checkpoints import big_vision, huggingface
from pg_kernels.model.checkpoints.conversion import convert
from pg_kernels.model.config import PaliGemmaConfig
from pg_kernels.model.paligemma import PaliGemma

FIXTURES = Path(__file__).parents[1] / "fixtures"
EMBEDDING = "model.language_model.embed_tokens.weight"
VOCABULARY = 72


def hf_model(family: str, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> HFPaliGemma:
    torch.manual_seed(0)
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    }
    text = {
        "model_type": family,
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    if family == "gemma2":
        text["query_pre_attn_scalar"] = 6
    config = HFConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=VOCABULARY - 1,
        projection_dim=24,
        hidden_size=24,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
    )
    model = HFPaliGemma(config).to(dtype).eval()
    # Norms and biases are initialised as constants, which would hide mixed-up names.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def expected_state(model: HFPaliGemma) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def assert_same_state(model: PaliGemma, expected: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not model.training


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrite a folder's weights in place."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    safetensors.torch.save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def hf_logits(model: HFPaliGemma | PaliGemma) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(3, VOCABULARY - 1, (2, 5), generator=generator)
    input_ids = torch.cat([torch.full((2, 4), VOCABULARY - 1), text], dim=1)
    with torch.no_grad():
        return model(
            input_ids=input_ids,
            pixel_values=torch.randn(2, 3, 28, 28, generator=generator),
            attention_mask=torch.ones_like(input_ids),
            token_type_ids=(torch.arange(9) >= 7).long().expand(2, 9),
        ).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HFPaliGemma]:
    return {family: hf_model(family) for family in ("gemma", "gemma2")}


@pytest.fixture
def folder(saved: dict[str, HFPaliGemma], tmp_path: Path) -> Path:
    saved["gemma"].save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


# Hugging Face: reading


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_loads_what_transformers_writes(saved: dict[str, HFPaliGemma], family: str, tmp_path: Path) -> None:
    saved[family].save_pretrained(tmp_path)
    model = PaliGemma.from_pretrained(tmp_path)
    assert_same_state(model, expected_state(saved[family]))
    assert model.lm_head.weight is model.get_parameter(EMBEDDING)
    assert model.config.text_config.model_type == family


LAYOUTS: dict[str, list[tuple[str, str]]] = {
    # transformers 5.23 writes `language_model.model.` and `vision_tower.` without `vision_model.`.
    "4.48": [(r"^vision_tower\.", "vision_tower.vision_model.")],
    "4.52": [
        (r"^language_model\.model\.", "model.language_model."),
        (r"^vision_tower\.", "model.vision_tower.vision_model."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    ],
    "5.x in memory": [
        (r"^language_model\.model\.", "model.language_model."),
        (r"^vision_tower\.", "model.vision_tower."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    ],
}


def renamed(tensors: dict[str, torch.Tensor], rules: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    result = {}
    for key, tensor in tensors.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        result[key] = tensor
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_every_key_layout(saved: dict[str, HFPaliGemma], folder: Path, layout: str) -> None:
    rewrite(folder, lambda tensors: renamed(tensors, LAYOUTS[layout]))
    assert_same_state(PaliGemma.from_pretrained(folder), expected_state(saved["gemma"]))


def test_ignores_the_pooling_head_and_old_buffers(saved: dict[str, HFPaliGemma], folder: Path) -> None:
    extra = {
        "vision_tower.vision_model.head.probe": torch.zeros(1, 1, 32),
        "vision_tower.head.layernorm.weight": torch.zeros(32),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(4)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    rewrite(folder, lambda tensors: tensors | extra)
    assert_same_state(PaliGemma.from_pretrained(folder), expected_state(saved["gemma"]))


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_logits_are_transformers(saved: dict[str, HFPaliGemma], family: str, tmp_path: Path) -> None:
    saved[family].save_pretrained(tmp_path)
    expected = hf_logits(saved[family])
    difference = (hf_logits(PaliGemma.from_pretrained(tmp_path)) - expected).abs().max()
    assert difference <= 2e-5 * expected.abs().max()


def test_reads_shards(saved: dict[str, HFPaliGemma], tmp_path: Path) -> None:
    saved["gemma2"].save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert_same_state(PaliGemma.from_pretrained(tmp_path), expected_state(saved["gemma2"]))


def test_mapping_a_file_anew_loses_nothing(
    saved: dict[str, HFPaliGemma], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "_MAPPED_BYTES", 5000)
    assert_same_state(PaliGemma.from_pretrained(folder), expected_state(saved["gemma"]))


def test_reads_an_untied_head(tmp_path: Path) -> None:
    source = hf_model("gemma", tied=False)
    source.save_pretrained(tmp_path)
    model = PaliGemma.from_pretrained(tmp_path)
    assert_same_state(model, expected_state(source))
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.get_parameter(EMBEDDING)


@pytest.mark.parametrize("head_key", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_different_head_is_kept_although_the_configuration_ties_it(
    saved: dict[str, HFPaliGemma], folder: Path, head_key: str
) -> None:
    head = torch.randn(VOCABULARY, 24)
    rewrite(folder, lambda tensors: tensors | {head_key: head})
    model = PaliGemma.from_pretrained(folder)
    assert_same_state(model, expected_state(saved["gemma"]) | {"lm_head.weight": head})
    assert not model.config.tie_word_embeddings


def test_an_equal_head_is_tied(saved: dict[str, HFPaliGemma], folder: Path) -> None:
    rewrite(
        folder, lambda t: t | {"language_model.lm_head.weight": t["language_model.model.embed_tokens.weight"].clone()}
    )
    model = PaliGemma.from_pretrained(folder)
    assert_same_state(model, expected_state(saved["gemma"]))
    assert model.lm_head.weight is model.get_parameter(EMBEDDING)


def test_reads_a_head_without_an_embedding(saved: dict[str, HFPaliGemma], folder: Path) -> None:
    rewrite(folder, lambda t: renamed(t, [(r"^language_model\.model\.embed_tokens", "lm_head")]))
    model = PaliGemma.from_pretrained(folder)
    assert_same_state(model, expected_state(saved["gemma"]))
    assert model.lm_head.weight is model.get_parameter(EMBEDDING)


def test_dtype_is_config_jsons_then_the_tensors_then_the_arguments(tmp_path: Path) -> None:
    source = hf_model("gemma", dtype=torch.bfloat16)
    source.save_pretrained(tmp_path)
    assert_same_state(PaliGemma.from_pretrained(tmp_path), expected_state(source))
    edit_config(tmp_path, dtype="float16")
    assert PaliGemma.from_pretrained(tmp_path).lm_head.weight.dtype == torch.float16
    edit_config(tmp_path, dtype=None, torch_dtype="float32")
    assert PaliGemma.from_pretrained(tmp_path).lm_head.weight.dtype == torch.float32
    edit_config(tmp_path, dtype=None, torch_dtype=None)
    assert PaliGemma.from_pretrained(tmp_path).lm_head.weight.dtype == torch.bfloat16
    assert_same_state(
        PaliGemma.from_pretrained(tmp_path, dtype=torch.float32),
        {k: v.float() for k, v in expected_state(source).items()},
    )
    with pytest.raises(TypeError, match="torch.int8"):
        PaliGemma.from_pretrained(tmp_path, dtype=torch.int8)


def test_parameters_do_not_follow_the_file(saved: dict[str, HFPaliGemma], folder: Path) -> None:
    model = PaliGemma.from_pretrained(folder)
    file = folder / "model.safetensors"
    with file.open("r+b") as handle:
        handle.seek(file.stat().st_size // 2)
        handle.write(b"\xff" * (file.stat().st_size // 2))
    assert_same_state(model, expected_state(saved["gemma"]))


def test_a_given_config_replaces_config_json(folder: Path) -> None:
    config = PaliGemma.from_pretrained(folder).config
    config = replace(config, text_config=replace(config.text_config, rope_theta=500.0))
    assert PaliGemma.from_pretrained(folder, config=config).config == config


# Peak resident memory, mapped pages included: a second copy would add 128 MB.
_MEASURE = """
import re, sys
import torch
from pg_kernels.model import PaliGemma
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
PaliGemma.from_pretrained(sys.argv[1])
before = peak()
for path in sys.argv[2:]:
    model = PaliGemma.from_pretrained(path)
    print(peak() - before, sum(p.nbytes for p in model.parameters()))
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_loading_holds_one_copy(folder: Path, tmp_path: Path) -> None:
    small = PaliGemma.from_pretrained(folder)
    text = replace(small.config.text_config, hidden_size=512, intermediate_size=4096, num_hidden_layers=5)
    model = PaliGemma(replace(small.config, text_config=text))
    model.save_pretrained(tmp_path / "large", max_shard_bytes=6e7)
    model.save_big_vision(tmp_path / "large.npz")
    arguments = [folder, tmp_path / "large", tmp_path / "large.npz"]
    output = subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    for line in output.stdout.splitlines():
        peak, size = map(int, line.split())
        assert size > 120e6
        assert peak < 1.6 * size, output.stdout


# Hugging Face: errors


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="google/paligemma-3b-pt-224 does not exist"):
        PaliGemma.from_pretrained(tmp_path / "google/paligemma-3b-pt-224")


def test_missing_config_json(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{folder / 'config.json'} does not exist")):
        PaliGemma.from_pretrained(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="PEFT adapter"):
        PaliGemma.from_pretrained(folder)


def test_malformed_config_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json cannot be read as a JSON object"):
        PaliGemma.from_pretrained(folder)


def test_other_architectures_and_quantised_weights(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match=r"config\.json: the weights are quantised \(bitsandbytes\)"):
        PaliGemma.from_pretrained(folder)
    edit_config(folder, model_type="llava")
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'llava', expected 'paligemma'"):
        PaliGemma.from_pretrained(folder)


def test_weights_in_another_format(folder: Path) -> None:
    """The error's command makes a folder that loads."""
    model = HFPaliGemma.from_pretrained(folder)
    expected = PaliGemma.from_pretrained(folder).state_dict()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = r"neither model\.safetensors .*pytorch_model\.bin is not read, because unpickling runs code"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        PaliGemma.from_pretrained(folder)
    program = str(caught.value).partition('python -c "')[2].removesuffix('"').replace("'OUT'", repr(str(folder)))
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    loaded = PaliGemma.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_missing_shard(saved: dict[str, HFPaliGemma], tmp_path: Path) -> None:
    saved["gemma"].save_pretrained(tmp_path, max_shard_size="30KB")
    shard = sorted(tmp_path.glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{shard} does not exist, but")):
        PaliGemma.from_pretrained(tmp_path)


def test_an_index_that_points_elsewhere(saved: dict[str, HFPaliGemma], tmp_path: Path) -> None:
    saved["gemma"].save_pretrained(tmp_path, max_shard_size="30KB")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(ValueError, match=r"'\.\./secret\.safetensors'"):
        PaliGemma.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [4, 100, -8])
def test_truncated_safetensors(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=re.escape(f"{file} cannot be read as safetensors")):
        PaliGemma.from_pretrained(folder)


def test_a_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        PaliGemma.from_pretrained(folder)


def test_a_wrong_shape(folder: Path) -> None:
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors | {key: torch.zeros(40, 23)})
    with pytest.raises(ValueError, match=rf"model\.safetensors: {re.escape(key)} has shape \[40, 23\].*\[40, 24\]"):
        PaliGemma.from_pretrained(folder)


def test_missing_and_unexpected_tensors(folder: Path) -> None:
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors | {f"extra.{i}": torch.zeros(1) for i in range(7)})
    with pytest.raises(ValueError, match=r"7 unexpected tensor\(s\): .*model\.safetensors: extra\.0; .*…"):
        PaliGemma.from_pretrained(folder)
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != key and not k.startswith("extra")})
    with pytest.raises(ValueError, match=rf"1 tensor\(s\) missing: {re.escape(key)}"):
        PaliGemma.from_pretrained(folder)


def test_a_parameter_stored_twice(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"model.language_model.norm.weight": torch.zeros(24)})
    with pytest.raises(ValueError, match="language_model.norm.weight holds the same parameter"):
        PaliGemma.from_pretrained(folder)


def test_an_integer_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t | {"language_model.model.norm.weight": torch.zeros(24, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"language_model\.model\.norm\.weight has dtype I8"):
        PaliGemma.from_pretrained(folder)


# Hugging Face: writing


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [5e9, 8e4])
def test_transformers_loads_what_is_written(family: str, tied: bool, max_shard_bytes: float, tmp_path: Path) -> None:
    source = hf_model(family, tied=tied)
    source.save_pretrained(tmp_path / "in")
    model = PaliGemma.from_pretrained(tmp_path / "in")
    model.save_pretrained(tmp_path / "out", max_shard_bytes=max_shard_bytes)
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert (len(sizes) == 1) == (max_shard_bytes == 5e9)
    assert max(sizes) < max_shard_bytes + 5000  # the header adds to it

    reloaded, info = HFPaliGemma.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(hf_logits(reloaded.eval()), hf_logits(source))
    again = PaliGemma.from_pretrained(tmp_path / "out")
    assert_same_state(again, expected_state(source))
    assert again.config == model.config


def test_mixed_dtypes_survive(folder: Path, tmp_path: Path) -> None:
    model = PaliGemma.from_pretrained(folder, dtype=torch.bfloat16)
    for name in ("layers.0.mlp.up_proj", "norm"):
        module = model.get_submodule(f"model.language_model.{name}")
        module.weight = torch.nn.Parameter(module.weight.detach().float())
    model.save_pretrained(tmp_path / "out")
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["language_model.model.norm.weight"].dtype == torch.float32
    assert tensors["language_model.model.embed_tokens.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    assert_same_state(
        PaliGemma.from_pretrained(tmp_path / "out"), {name: t.float() for name, t in model.state_dict().items()}
    )


def test_an_existing_folder_keeps_other_files_and_no_old_weights(folder: Path, tmp_path: Path) -> None:
    model = PaliGemma.from_pretrained(folder)
    target = tmp_path / "out"
    model.save_pretrained(target, max_shard_bytes=2e4)
    (target / "tokenizer.model").write_bytes(b"pieces")
    model.save_pretrained(target)
    assert {p.name for p in target.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
    }
    model.save_pretrained(target, max_shard_bytes=2e4)
    assert not (target / "model.safetensors").exists()
    assert_same_state(PaliGemma.from_pretrained(target), model.state_dict())


@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_write_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    model = PaliGemma.from_pretrained(folder)
    target = tmp_path / "target" / "out"
    if existing:
        model.save_pretrained(target)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    state = model.state_dict()
    calls = iter(range(10))

    def full(tensor: torch.Tensor) -> memoryview:
        if next(calls) == 5:
            raise OSError(28, "No space left on device")
        return memoryview(b"\0" * tensor.nbytes)

    monkeypatch.setattr(huggingface, "raw_bytes", full)
    monkeypatch.setattr(big_vision, "raw_bytes", full)
    with pytest.raises(OSError, match=f"{re.escape(str(target))}.*|No space left on device") as caught:
        model.save_pretrained(target)
    assert str(target) in str(caught.value)
    assert caught.value.errno == 28
    calls = iter(range(10))
    with pytest.raises(OSError, match=re.escape(f"{target}.npz")):
        model.save_big_vision(f"{target}.npz")
    assert sorted(p.name for p in tmp_path.rglob("*")) == (before if existing else sorted([*before, "target"]))
    if existing:
        assert_same_state(PaliGemma.from_pretrained(target), state)


def test_unwritable_targets(folder: Path, tmp_path: Path) -> None:
    model = PaliGemma.from_pretrained(folder)
    (tmp_path / "file").write_text("kept")
    for save in (PaliGemma.save_pretrained, PaliGemma.save_big_vision):
        with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'file' / 'out'}")):
            save(model, tmp_path / "file" / "out")
    with pytest.raises(NotADirectoryError, match="file"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, got 0"):
        model.save_pretrained(tmp_path / "out", max_shard_bytes=0)
    assert not (tmp_path / "out").exists()


def test_models_that_are_not_plain_are_refused(folder: Path, tmp_path: Path) -> None:
    model = PaliGemma.from_pretrained(folder)
    norm = model.get_submodule("model.language_model.norm")
    norm.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"unexpected parameter.*norm\.lora_A"):
        model.save_pretrained(tmp_path / "out")
    del norm.lora_A, norm.weight
    with pytest.raises(ValueError, match=r"model\.language_model\.norm\.weight is missing"):
        model.save_big_vision(tmp_path / "out.npz")


# big_vision: reading

Arrays = dict[str, np.ndarray]


def fixture_arrays(version: int) -> Arrays:
    with np.load(FIXTURES / f"bigvision_v{version}.params.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module", params=[1, 2])
def version(request: pytest.FixtureRequest) -> int:
    return request.param


def torch_state(arrays: Arrays) -> dict[str, torch.Tensor]:
    """Return the tensors converted by a second, independent implementation: einsums and reshapes of whole numpy arrays."""
    a = {key.removeprefix("params/"): value for key, value in arrays.items()}
    state: dict[str, np.ndarray] = {}
    tower, decoder = "model.vision_tower", "model.language_model"
    state[f"{tower}.embeddings.patch_embedding.weight"] = np.einsum("hwcd->dchw", a["img/embedding/kernel"])
    state[f"{tower}.embeddings.patch_embedding.bias"] = a["img/embedding/bias"]
    state[f"{tower}.embeddings.position_embedding.weight"] = a["img/pos_embedding"][0]
    state[f"{tower}.post_layernorm.weight"] = a["img/Transformer/encoder_norm/scale"]
    state[f"{tower}.post_layernorm.bias"] = a["img/Transformer/encoder_norm/bias"]
    state["model.multi_modal_projector.linear.weight"] = a["img/head/kernel"].T
    state["model.multi_modal_projector.linear.bias"] = a["img/head/bias"]
    state[EMBEDDING] = state["lm_head.weight"] = a["llm/embedder/input_embedding"]
    state[f"{decoder}.norm.weight"] = a["llm/final_norm/scale"]
    block = {k.removeprefix("img/Transformer/encoderblock/"): v for k, v in a.items() if "/encoderblock/" in k}
    attention = "MultiHeadDotProductAttention_0"
    for i in range(len(block["LayerNorm_0/scale"])):
        layer = f"{tower}.encoder.layers.{i}"
        for j in (0, 1):
            state[f"{layer}.layer_norm{j + 1}.weight"] = block[f"LayerNorm_{j}/scale"][i]
            state[f"{layer}.layer_norm{j + 1}.bias"] = block[f"LayerNorm_{j}/bias"][i]
            state[f"{layer}.mlp.fc{j + 1}.weight"] = block[f"MlpBlock_0/Dense_{j}/kernel"][i].T
            state[f"{layer}.mlp.fc{j + 1}.bias"] = block[f"MlpBlock_0/Dense_{j}/bias"][i]
        for long in ("query", "key", "value"):
            kernel, bias = block[f"{attention}/{long}/kernel"][i], block[f"{attention}/{long}/bias"][i]
            state[f"{layer}.self_attn.{long[0]}_proj.weight"] = kernel.reshape(len(kernel), -1).T
            state[f"{layer}.self_attn.{long[0]}_proj.bias"] = bias.reshape(-1)
        kernel = block[f"{attention}/out/kernel"][i]
        state[f"{layer}.self_attn.out_proj.weight"] = kernel.reshape(-1, kernel.shape[-1]).T
        state[f"{layer}.self_attn.out_proj.bias"] = block[f"{attention}/out/bias"][i]
    block = {k.removeprefix("llm/layers/"): v for k, v in a.items() if k.startswith("llm/layers/")}
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if "post_ffw_norm/scale" in block:
        norms |= {
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    for i in range(len(block["mlp/linear"])):
        layer = f"{decoder}.layers.{i}"
        for theirs, ours in norms.items():
            state[f"{layer}.{ours}.weight"] = block[f"{theirs}/scale"][i]
        width = block["mlp/linear"].shape[-1]
        state[f"{layer}.self_attn.q_proj.weight"] = np.einsum("ndh->nhd", block["attn/q_einsum/w"][i]).reshape(
            -1, width
        )
        for j, name in enumerate("kv"):
            heads = np.einsum("ndh->nhd", block["attn/kv_einsum/w"][i, j])
            state[f"{layer}.self_attn.{name}_proj.weight"] = heads.reshape(-1, width)
        output = np.einsum("nhd->dnh", block["attn/attn_vec_einsum/w"][i])
        state[f"{layer}.self_attn.o_proj.weight"] = output.reshape(width, -1)
        state[f"{layer}.mlp.gate_proj.weight"] = block["mlp/gating_einsum"][i, 0].T
        state[f"{layer}.mlp.up_proj.weight"] = block["mlp/gating_einsum"][i, 1].T
        state[f"{layer}.mlp.down_proj.weight"] = block["mlp/linear"][i].T
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}


def test_reads_the_original_files(version: int) -> None:
    model = PaliGemma.from_pretrained(FIXTURES / f"bigvision_v{version}.params.npz")
    assert_same_state(model, torch_state(fixture_arrays(version)))
    assert model.lm_head.weight is model.get_parameter(EMBEDDING)


def test_infers_the_configuration_from_the_shapes() -> None:
    v1 = PaliGemma.from_pretrained(FIXTURES / "bigvision_v1.params.npz").config
    vision, text = v1.vision_config, v1.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.intermediate_size) == (144, 2, 272)
    assert (vision.num_attention_heads, vision.patch_size, vision.image_size) == (2, 14, 56)
    assert (text.model_type, text.hidden_size, text.num_hidden_layers, text.intermediate_size) == ("gemma", 96, 3, 208)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim, text.vocab_size) == (4, 1, 32, 320)
    assert (text.attn_logit_softcapping, text.final_logit_softcapping, text.sliding_window) == (None, None, None)
    assert v1.image_token_id == 320
    text = PaliGemma.from_pretrained(FIXTURES / "bigvision_v2.params.npz").config.text_config
    assert (text.model_type, text.num_key_value_heads, text.head_dim) == ("gemma2", 2, 16)
    assert (text.attn_logit_softcapping, text.final_logit_softcapping, text.sliding_window) == (50.0, 30.0, None)
    assert text.attention_scale == 16**-0.5


def hollow(path: Path, config: PaliGemmaConfig) -> Path:
    """Write a file with a released model's headers and no data. Inferring the configuration reads only headers."""
    text, vision = config.text_config, config.vision_config
    depth, width = text.num_hidden_layers, text.hidden_size
    image, hd = vision.hidden_size, vision.hidden_size // vision.num_attention_heads
    block, layers = "img/Transformer/encoderblock", "llm/layers"
    shapes: dict[str, tuple[int, ...]] = {
        "img/embedding/kernel": (14, 14, 3, image),
        "img/pos_embedding": (1, vision.num_image_tokens, image),
        f"{block}/MlpBlock_0/Dense_0/kernel": (vision.num_hidden_layers, image, vision.intermediate_size),
        f"{block}/MultiHeadDotProductAttention_0/query/kernel": (vision.num_hidden_layers, image, image // hd, hd),
        "llm/embedder/input_embedding": (257_152, width),
        f"{layers}/attn/q_einsum/w": (depth, text.num_attention_heads, width, text.head_dim),
        f"{layers}/attn/kv_einsum/w": (depth, 2, text.num_key_value_heads, width, text.head_dim),
        f"{layers}/mlp/linear": (depth, text.intermediate_size, width),
    }
    if text.model_type == "gemma2":
        shapes[f"{layers}/post_ffw_norm/scale"] = (depth, width)
    with zipfile.ZipFile(path, "w") as archive:
        for key, shape in shapes.items():
            with archive.open(f"params/{key}.npy", "w") as file:
                header = {"descr": "|V2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
    return path


@pytest.mark.parametrize(
    "name", ["paligemma-3b-224", "paligemma-3b-896", "paligemma2-3b-448", "paligemma2-10b-224", "paligemma2-28b-224"]
)
def test_infers_the_released_configurations(name: str, tmp_path: Path) -> None:
    released = PaliGemmaConfig.named(name)
    released = replace(released, text_config=replace(released.text_config, vocab_size=257_152))
    found = big_vision.BigVisionReader(hollow(tmp_path / "p.npz", released)).read_config()
    assert found == released


def unstacked(arrays: Arrays, image: str, text: str) -> Arrays:
    result = {}
    for key, array in arrays.items():
        for block, layer in (("img/Transformer/encoderblock", image), ("llm/layers", text)):
            if f"{block}/" in key:
                prefix, rest = key.split(f"{block}/")
                result |= {f"{prefix}{layer.format(i=i)}/{rest}": part for i, part in enumerate(array)}
                break
        else:
            result[key] = array
    return result


def variants() -> Iterator[tuple[str, Callable[[Arrays], Arrays]]]:
    yield "no prefix", lambda a: {k.removeprefix("params/"): v for k, v in a.items()}
    yield "unstacked", lambda a: unstacked(a, "img/Transformer/encoderblock_{i}", "llm/layers_{i}")
    yield "unstacked folders", lambda a: unstacked(a, "img/Transformer/encoderblock_{i}", "llm/layers/{i}")
    yield "column-major", lambda a: {k: np.asfortranarray(v) for k, v in a.items()}
    yield (
        "training state",
        lambda a: (
            a
            | {"opt/0/mu/params/llm/final_norm/scale": np.zeros(3, np.float32), "chrono/step": np.zeros((), np.int64)}
            | {"params/img/MAPHead_0/probe": np.zeros((1, 1, 4), np.float32)}
        ),
    )


@pytest.mark.parametrize(("change"), [pytest.param(c, id=n) for n, c in variants()])
def test_reads_every_variant(version: int, change: Callable[[Arrays], Arrays], tmp_path: Path) -> None:
    arrays = fixture_arrays(version)
    np.savez(tmp_path / "p.npz", **change(arrays))
    model = PaliGemma.from_pretrained(tmp_path / "p.npz")
    assert_same_state(model, torch_state(arrays))
    assert model.config == PaliGemma.from_pretrained(FIXTURES / f"bigvision_v{version}.params.npz").config


def multi_head(arrays: Arrays) -> tuple[Arrays, Arrays]:
    """Return the same weights with as many key as query heads, once as q_einsum + kv_einsum and once as qkv_einsum."""
    separate = dict(arrays)
    q, kv = arrays["params/llm/layers/attn/q_einsum/w"], arrays["params/llm/layers/attn/kv_einsum/w"]
    kv = (
        np.repeat(kv, q.shape[1] // kv.shape[2], axis=2) * np.arange(1, q.shape[1] + 1, dtype=np.float32)[:, None, None]
    )
    separate["params/llm/layers/attn/kv_einsum/w"] = kv
    fused = {k: v for k, v in arrays.items() if "q_einsum" not in k and "kv_einsum" not in k}
    fused["params/llm/layers/attn/qkv_einsum/w"] = np.concatenate([q[:, None], kv], axis=1)
    return separate, fused


def test_reads_and_writes_fused_qkv(version: int, tmp_path: Path) -> None:
    separate, fused = multi_head(fixture_arrays(version))
    np.savez(tmp_path / "p.npz", **fused)
    model = PaliGemma.from_pretrained(tmp_path / "p.npz")
    assert_same_state(model, torch_state(separate))
    assert model.config.text_config.num_key_value_heads == 4
    model.save_big_vision(tmp_path / "out.npz")
    assert_same_arrays(tmp_path / "out.npz", fused)

    without_w = {key.removesuffix("/w"): array for key, array in fused.items()}
    np.savez(tmp_path / "p.npz", **unstacked(without_w, "img/Transformer/encoderblock_{i}", "llm/layers_{i}"))
    assert_same_state(PaliGemma.from_pretrained(tmp_path / "p.npz"), torch_state(separate))


def bfloat16_bits(array: np.ndarray) -> np.ndarray:
    return torch.from_numpy(array).to(torch.bfloat16).view(torch.uint16).numpy().view("V2")


def test_reads_float16_and_bfloat16(version: int, tmp_path: Path) -> None:
    arrays = fixture_arrays(version)
    np.savez(tmp_path / "p.npz", **{k: v.astype(np.float16) for k, v in arrays.items()})
    assert_same_state(
        PaliGemma.from_pretrained(tmp_path / "p.npz"), {k: v.half() for k, v in torch_state(arrays).items()}
    )
    np.savez(tmp_path / "p.npz", **{k: bfloat16_bits(v) for k, v in arrays.items()})
    expected = {k: v.bfloat16() for k, v in torch_state(arrays).items()}
    assert_same_state(PaliGemma.from_pretrained(tmp_path / "p.npz"), expected)
    assert_same_state(
        PaliGemma.from_pretrained(tmp_path / "p.npz", dtype=torch.float32), {k: v.float() for k, v in expected.items()}
    )


def test_a_given_config_replaces_the_inferred_one(tmp_path: Path) -> None:
    path = FIXTURES / "bigvision_v2.params.npz"
    config = PaliGemma.from_pretrained(path).config
    config = replace(config, text_config=replace(config.text_config, query_pre_attn_scalar=24.0))
    assert PaliGemma.from_pretrained(path, config=config).config == config
    wrong = replace(config, text_config=replace(config.text_config, intermediate_size=161))
    with pytest.raises(ValueError, match=r"gating_einsum has shape \[160, 96\] .*expected \[161, 96\]"):
        PaliGemma.from_pretrained(path, config=wrong)


def test_parameters_keep_only_their_own_memory(version: int) -> None:
    for name, parameter in PaliGemma.from_pretrained(FIXTURES / f"bigvision_v{version}.params.npz").named_parameters():
        assert parameter.is_contiguous(), name
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name


# big_vision: errors


def test_not_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    path.write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read as .npz")):
        PaliGemma.from_pretrained(path)
    path.write_bytes((FIXTURES / "bigvision_v1.params.npz").read_bytes()[:-100])
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read as .npz")):
        PaliGemma.from_pretrained(path)


def test_a_safetensors_file_instead_of_its_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match="give the folder"):
        PaliGemma.from_pretrained(folder / "model.safetensors")


def test_object_arrays_are_never_unpickled(tmp_path: Path) -> None:
    arrays = fixture_arrays(1) | {"params/llm/final_norm/scale": np.array([{}], dtype=object)}
    np.savez(tmp_path / "p.npz", **arrays)
    with pytest.raises(ValueError, match=r"p\.npz: params/llm/final_norm/scale: is an array of Python objects"):
        PaliGemma.from_pretrained(tmp_path / "p.npz")


def test_npz_with_wrong_tensors(tmp_path: Path) -> None:
    def reload(changes: Arrays, without: str = "") -> None:
        kept = {k: v for k, v in fixture_arrays(2).items() if not without or without not in k}
        np.savez(tmp_path / "p.npz", **(kept | changes))
        PaliGemma.from_pretrained(tmp_path / "p.npz")

    linear = "params/llm/layers/mlp/linear"
    with pytest.raises(ValueError, match=rf"p\.npz: {linear}: has dtype int32"):
        reload({linear: np.zeros((4, 160, 96), np.int32)})
    with pytest.raises(ValueError, match=rf"p\.npz: {linear}: has shape \[160, 96\], expected layers, then 2"):
        reload({linear: np.zeros((160, 96), np.float32)})
    with pytest.raises(ValueError, match=r"gating_einsum: has shape \[4, 3, 96, 160\].*the first of them 2"):
        reload({"params/llm/layers/mlp/gating_einsum": np.zeros((4, 3, 96, 160), np.float32)})
    with pytest.raises(ValueError, match=rf"p\.npz: {linear} has shape \[95, 160\].*down_proj.*expected \[96, 160\]"):
        reload({linear: np.zeros((4, 160, 95), np.float32)})
    with pytest.raises(ValueError, match=r"p\.npz: 4 tensor\(s\) missing: llm/layers/pre_ffw_norm/scale \(layer 0\); "):
        reload({}, without="pre_ffw_norm")
    with pytest.raises(ValueError, match=r"p\.npz: 1 tensor\(s\) missing: .*Dense_1/bias \(layer 2\)"):
        reload({"params/img/Transformer/encoderblock/MlpBlock_0/Dense_1/bias": np.zeros((2, 64), np.float32)})
    with pytest.raises(ValueError, match=r"p\.npz: 1 unexpected tensor\(s\): params/llm/extra"):
        reload({"params/llm/extra": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"p\.npz: img/embedding/kernel is missing"):
        reload({}, without="img/embedding/kernel")
    with pytest.raises(ValueError, match=r"img/pos_embedding has 8 positions, expected a square"):
        reload({"params/img/pos_embedding": np.zeros((1, 8, 64), np.float32)})
    with pytest.raises(ValueError, match="holds the same parameter"):
        reload({"params/llm/layers_0/mlp/linear": np.zeros((160, 96), np.float32)})


def test_damaged_array_data(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    arrays = fixture_arrays(1)
    np.savez(path, **arrays)
    content = bytearray(path.read_bytes())
    position = content.index(arrays["params/llm/embedder/input_embedding"].tobytes())
    content[position + 10] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"p\.npz: params/llm/embedder/input_embedding: cannot be read: Bad CRC"):
        PaliGemma.from_pretrained(path)


# big_vision: writing, and converting


def assert_same_arrays(path: Path, expected: Arrays) -> None:
    with np.load(path, allow_pickle=False) as file:
        assert set(file.files) == set(expected)
        for key, array in expected.items():
            assert file[key].dtype == array.dtype, key
            assert file[key].tobytes() == np.ascontiguousarray(array).tobytes(), key
            assert file[key].shape == array.shape, key


def test_writes_the_original_arrays_back(version: int, tmp_path: Path) -> None:
    arrays = fixture_arrays(version)
    model = PaliGemma.from_pretrained(FIXTURES / f"bigvision_v{version}.params.npz")
    model.save_big_vision(tmp_path / "p.npz")
    assert_same_arrays(tmp_path / "p.npz", arrays)
    model.save_big_vision(tmp_path / "p.npz", dtype=torch.bfloat16)
    assert_same_arrays(tmp_path / "p.npz", {k: bfloat16_bits(v) for k, v in arrays.items()})
    model.save_big_vision(tmp_path / "p.npz", dtype=torch.float16)
    assert_same_arrays(tmp_path / "p.npz", {k: v.astype(np.float16) for k, v in arrays.items()})


def test_converts_back_and_forth(version: int, tmp_path: Path) -> None:
    original = FIXTURES / f"bigvision_v{version}.params.npz"
    (tmp_path / "sp.model").write_bytes(b"pieces")
    convert(original, tmp_path / "hf", tokenizer=tmp_path / "sp.model")
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"pieces"
    assert_same_state(PaliGemma.from_pretrained(tmp_path / "hf"), torch_state(fixture_arrays(version)))
    config, inferred = PaliGemma.from_pretrained(tmp_path / "hf").config, PaliGemma.from_pretrained(original).config
    assert config.text_config.attention_scale == inferred.text_config.attention_scale
    text = replace(config.text_config, query_pre_attn_scalar=inferred.text_config.query_pre_attn_scalar)
    assert replace(config, text_config=text) == inferred
    _, info = HFPaliGemma.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    convert(tmp_path / "hf", tmp_path / "back.npz")
    assert_same_arrays(tmp_path / "back.npz", fixture_arrays(version))
    convert(original, tmp_path / "half.npz", dtype=torch.bfloat16)
    assert_same_arrays(tmp_path / "half.npz", {k: bfloat16_bits(v) for k, v in fixture_arrays(version).items()})


def test_converting_a_folder_takes_its_other_files_along(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "preprocessor_config.json", "README.md"):
        (folder / name).write_text(name)
    convert(folder, tmp_path / "out", dtype=torch.bfloat16)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "preprocessor_config.json", "config.json", "model.safetensors"} <= names
    assert "README.md" not in names
    expected = {name: tensor.bfloat16() for name, tensor in PaliGemma.from_pretrained(folder).state_dict().items()}
    assert_same_state(PaliGemma.from_pretrained(tmp_path / "out"), expected)


def test_a_folder_can_be_converted_in_place(saved: dict[str, HFPaliGemma], folder: Path) -> None:
    convert(folder, folder, dtype=torch.bfloat16)
    assert_same_state(
        PaliGemma.from_pretrained(folder), {name: t.bfloat16() for name, t in expected_state(saved["gemma"]).items()}
    )


def test_hugging_faces_extra_rows_are_left_out_of_npz(folder: Path, tmp_path: Path) -> None:
    config = PaliGemma.from_pretrained(folder).config
    text = replace(config.text_config, vocab_size=257_216, hidden_size=8, head_dim=2, intermediate_size=8)
    model = PaliGemma(replace(config, text_config=text, image_token_id=257_152))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_big_vision(tmp_path / "p.npz", dtype=torch.float16)
    reloaded = PaliGemma.from_pretrained(tmp_path / "p.npz")
    assert reloaded.config.text_config.vocab_size == 257_152
    assert reloaded.config.image_token_id == 257_152
    assert torch.equal(reloaded.lm_head.weight, model.lm_head.weight[:257_152].half())


def test_conversions_that_cannot_be_done(tmp_path: Path, folder: Path) -> None:
    hf_model("gemma", tied=False).save_pretrained(tmp_path / "untied")
    with pytest.raises(ValueError, match="no place for an output head"):
        convert(tmp_path / "untied", tmp_path / "p.npz")
    with pytest.raises(FileNotFoundError, match=r"sp\.model does not exist"):
        convert(folder, tmp_path / "out", tokenizer=tmp_path / "sp.model")
    with pytest.raises(ValueError, match=r"tokenizer is given, but .*p\.npz"):
        convert(folder, tmp_path / "p.npz", tokenizer=folder / "config.json")
    assert not (tmp_path / "p.npz").exists()
    assert not (tmp_path / "out").exists()
