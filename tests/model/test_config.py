"""config.json: invalid values are refused in one line that names the file and the field."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pg_kernels.model import PaliGemma, PaliGemmaConfig, TextConfig, VisionConfig

TEXT = TextConfig("gemma2", 64, 32, 48, 1, 2, 1, 16, 16, 50.0, 30.0, sliding_window=8)
CONFIG = PaliGemmaConfig(VisionConfig(32, 48, 1, 2, image_size=28), TEXT, image_token_id=63)
VISION_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
TEXT_SIZES = ("vocab_size", *VISION_SIZES[:4], "num_key_value_heads", "head_dim", "max_position_embeddings")
SIZES = [f"vision_config.{name}" for name in VISION_SIZES] + [f"text_config.{name}" for name in TEXT_SIZES]
NUMBERS = [
    "vision_config.layer_norm_eps",
    "text_config.rms_norm_eps",
    "text_config.rope_theta",
    "text_config.query_pre_attn_scalar",
    "text_config.attn_logit_softcapping",
    "text_config.final_logit_softcapping",
]
NO_SIZE: list[Any] = [0, -1, True, 18.0, 1.5, "18", [1], {}, float("nan"), float("inf"), 2**63, 10**400]
NO_NUMBER: list[Any] = [0, -1e-6, True, "1e-6", [], {"a": 1}, float("nan"), float("inf"), -float("inf"), 10**400]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint")
    PaliGemma(CONFIG).save_pretrained(path)
    return path


def changed(folder: Path, field: str, value: object) -> Path:
    content = CONFIG.to_dict()
    *sections, name = field.split(".")
    owner = content
    for section in sections:
        owner = owner.setdefault(section, {})
    owner[name] = value
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        (SIZES, [None, *NO_SIZE]),
        (["text_config.sliding_window"], NO_SIZE),
        (NUMBERS[:3], [None, *NO_NUMBER]),
        (NUMBERS[3:], NO_NUMBER),
        (["image_token_index"], [None, -1, True, 1.0, "63", []]),
        (["pad_token_id", "bos_token_id", "eos_token_id"], [-1, True, 1.0, "1", {}, [], [1, "2"], [[1]]]),
        (["tie_word_embeddings"], [None, 0, 1, "false", []]),
        (["text_config", "vision_config"], [None, [], "gemma", 3, True]),
        (["text_config.model_type"], [None, 3, [], "llama"]),
        (["text_config.rope_parameters"], [5, "default", [1]]),
        (["text_config.layer_types"], [5, "sliding_attention", {}]),
        (["quantization_config"], [5, [1], "int8", True, []]),
        (["dtype", "torch_dtype"], [5, [], {}, "int8", "complex64", "float8_e4m3fn", "nn", ""]),
        (["model_type"], [None, 3, [], {}]),
    ],
    ids=lambda parameter: str(parameter[0]),
)
def test_values_that_are_none_of_a_paligemmas(folder: Path, fields: list[str], values: list[Any]) -> None:
    for field in fields:
        for value in values:
            path = changed(folder, field, value)
            if field == "torch_dtype":
                path.write_text(path.read_text().replace('"dtype"', '"other"'))
            with pytest.raises(ValueError) as caught:
                PaliGemma.from_pretrained(folder)
            message = str(caught.value)
            assert str(path) in message and field in message and len(message) < 500, (field, value, message)


@pytest.mark.parametrize(
    "nested", [{"rope_theta": None}, {"rope_theta": "1e4"}, {"rope_type": 3}, {"full": {"rope_theta": 1}}]
)
def test_rope_parameters(folder: Path, nested: dict[str, Any]) -> None:
    path = changed(folder, "text_config.rope_parameters", nested)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: text_config.*(rope_theta|rotary)"):
        PaliGemma.from_pretrained(folder)


def test_rope_theta_of_either_form(folder: Path) -> None:
    """transformers 5 reads `rope_parameters` before `rope_theta`."""
    changed(folder, "text_config.rope_parameters", {"rope_theta": 500.0, "rope_type": "default"})
    assert PaliGemma.from_pretrained(folder).config.text_config.rope_theta == 500.0
    changed(folder, "text_config.rope_parameters", None)
    assert PaliGemma.from_pretrained(folder).config.text_config.rope_theta == TEXT.rope_theta


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [2**31, 2**62 + 2])
def test_absurd_sizes_are_refused_from_the_headers(folder: Path, field: str, value: int) -> None:
    path = changed(folder, field, value)
    if field == "text_config.max_position_embeddings":  # not the shape of any tensor
        assert PaliGemma.from_pretrained(folder).config.text_config.max_position_embeddings == value
        return
    started = time.process_time()
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        PaliGemma.from_pretrained(folder)
    assert time.process_time() - started < 1
    named = field if "layers" in field else "shape|config"
    assert re.search(named, str(caught.value)) and path.name


def test_the_depth_is_compared_with_the_weights(folder: Path) -> None:
    changed(folder, "text_config.num_hidden_layers", 2**31)
    with pytest.raises(ValueError, match=r"text_config\.num_hidden_layers is 2147483648, but the weights hold 1 layer"):
        PaliGemma.from_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"{}x", b"[]", b"3", b'{"model_type": "paligemma"', b""],
)
def test_files_that_are_no_json_object(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json cannot be read as a JSON object: "):
        PaliGemma.from_pretrained(folder)
    changed(folder, "pad_token_id", 0)
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be read as a JSON object: "):
        PaliGemma.from_pretrained(folder)
    (folder / "generation_config.json").unlink()


def test_several_end_tokens(folder: Path) -> None:
    changed(folder, "eos_token_id", [1, 49])
    config = PaliGemma.from_pretrained(folder).config
    assert config.eos_token_id == (1, 49)
    assert PaliGemmaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_python_gets_the_same_checks() -> None:
    for make in (
        lambda: TextConfig(hidden_size=2048.0),  # type: ignore[arg-type]
        lambda: VisionConfig(image_size=True),
        lambda: TextConfig(rms_norm_eps=float("nan")),
        lambda: PaliGemmaConfig(pad_token_id="0"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"(hidden_size|image_size|rms_norm_eps|pad_token_id) is .*, expected"):
            make()
