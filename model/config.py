"""Shapes of the released PaliGemma models, and their translation from and to Hugging Face's `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from .files import read_json_object, shown

IMAGE_TOKEN_ID = 257_152
"""Id of `<image>` in the released vocabulary: it follows 256,000 text, 1,024 loc and 128 seg pieces."""


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP's image encoder; the defaults are So400m/14 at 224 pixels."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_fields(self, "vision_config.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision_config: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.image_size < self.patch_size:
            raise ValueError(f"vision_config: image_size {self.image_size} is below patch_size {self.patch_size}")

    @property
    def num_image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """The Gemma or Gemma 2 decoder; the defaults are Gemma 2B.

    Queries are scaled by `query_pre_attn_scalar` to the power −1/2 (`None`: head_dim). `sliding_window` applies to the even
    layers of Gemma 2; the original code has no window.
    """

    model_type: str = "gemma"
    vocab_size: int = 257_216
    hidden_size: int = 2048
    intermediate_size: int = 16_384
    num_hidden_layers: int = 18
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 256
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.model_type not in ("gemma", "gemma2"):
            raise ValueError(f"text_config.model_type is {shown(self.model_type)}; supported are 'gemma' and 'gemma2'")
        _check_fields(self, "text_config.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"text_config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"text_config: head_dim {self.head_dim} is odd, rotary embeddings need pairs")

    @property
    def attention_scale(self) -> float:
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5


@dataclass
class PaliGemmaConfig:
    """A whole PaliGemma: image encoder, decoder and special ids.

    `eos_token_id` is the id that ends an answer, or a tuple of such ids.
    """

    model_type: ClassVar = "paligemma"
    vision_config: VisionConfig = field(default_factory=VisionConfig)
    text_config: TextConfig = field(default_factory=TextConfig)
    image_token_id: int = IMAGE_TOKEN_ID
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int | tuple[int, ...] = 1
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        _check_fields(self, "", least=0)

    @classmethod
    def named(cls, name: str) -> PaliGemmaConfig:
        """Return the shapes of a released model, e.g. `paligemma-3b-224` or `paligemma2-10b-448`.

        Raises ValueError for an unknown name.
        """
        family, _, resolution = name.rpartition("-")
        if family not in _RELEASED or resolution not in ("224", "448", "896"):
            known = ", ".join(f"{f}-{{224,448,896}}" for f in _RELEASED)
            raise ValueError(f"no released model is named {name!r}; there are {known}")
        return cls(vision_config=VisionConfig(image_size=int(resolution)), text_config=_RELEASED[family])

    @classmethod
    def from_file(cls, path: Path) -> PaliGemmaConfig:
        """Read a Hugging Face `config.json`. Raises ValueError naming file and field if it does not describe a PaliGemma."""
        content = read_json_object(path)
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> PaliGemmaConfig:
        """Read the content of a Hugging Face `config.json`, in any form from transformers 4.41 to 5.x.

        Missing fields have Hugging Face's defaults. Raises ValueError naming the architecture or the field if the file does not
        describe a PaliGemma.
        """
        if config.get("model_type") != "paligemma":
            raise ValueError(f"model_type is {shown(config.get('model_type'))}, expected 'paligemma'")
        text, vision = _section(config, "text_config"), _section(config, "vision_config")
        for name, section in (("text_config", text), ("vision_config", vision)):
            activation = _first(section.get("hidden_activation"), section.get("hidden_act"), "gelu_pytorch_tanh")
            # Early Gemma files say "gelu"; transformers has always run them with the tanh form that Gemma was trained with.
            if activation not in ("gelu_pytorch_tanh", "gelu_fast") and not (
                name == "text_config" and activation == "gelu"
            ):
                raise ValueError(f"{name} has activation {shown(activation)}, expected 'gelu_pytorch_tanh'")
        rope = text.get("rope_parameters")
        if not isinstance(rope, dict | None):
            raise ValueError(f"text_config.rope_parameters is {shown(rope)}, expected an object")
        rope = rope or {}
        scaling = text.get("rope_scaling") or rope.get("rope_type", "default") != "default"
        if scaling or any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(f"text_config scales its rotary embeddings ({shown(rope or text['rope_scaling'])})")
        text.setdefault("model_type", "gemma")
        text.setdefault("vocab_size", config.get("vocab_size", TextConfig.vocab_size))
        text["rope_theta"] = rope.get("rope_theta", text.get("rope_theta", TextConfig.rope_theta))
        if text["model_type"] == "gemma2":
            text = {**_HF_GEMMA2_DEFAULTS, **text}
            types = text.get("layer_types")
            if types is not None and not isinstance(types, list):
                raise ValueError(f"text_config.layer_types is {shown(types)}, expected a list")
            if types is not None and "sliding_attention" not in types:
                text["sliding_window"] = None
            elif types is not None and text["sliding_window"] is not None:
                expected = ["full_attention" if i % 2 else "sliding_attention" for i in range(len(types))]
                if types != expected:
                    raise ValueError("text_config.layer_types is not sliding, full, sliding, full, …")
        else:
            text.update(sliding_window=None, attn_logit_softcapping=None, final_logit_softcapping=None)
            text["query_pre_attn_scalar"] = None
        image_field = "image_token_index" if "image_token_index" in config else "image_token_id"
        image_token_id = config.get(image_field, IMAGE_TOKEN_ID)
        _check(image_field, image_token_id, "int", 0)
        ends = _first(config.get("eos_token_id"), text.get("eos_token_id"), 1)
        return cls(
            vision_config=VisionConfig(**_known_fields(VisionConfig, vision)),
            text_config=TextConfig(**_known_fields(TextConfig, text)),
            image_token_id=image_token_id,
            pad_token_id=_first(config.get("pad_token_id"), text.get("pad_token_id"), 0),
            bos_token_id=_first(config.get("bos_token_id"), text.get("bos_token_id"), 2),
            eos_token_id=end_ids(ends, "eos_token_id"),
            tie_word_embeddings=config.get("tie_word_embeddings", True),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a `config.json` that transformers 4.48 and newer load."""
        ids = {"pad_token_id": self.pad_token_id, "bos_token_id": self.bos_token_id, "eos_token_id": self.eos_token_id}
        text = {name: value for name, value in asdict(self.text_config).items() if name != "query_pre_attn_scalar"}
        text.update(ids, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh")
        text.update(num_image_tokens=self.vision_config.num_image_tokens, tie_word_embeddings=self.tie_word_embeddings)
        if self.text_config.model_type == "gemma2":
            scalar = self.text_config.query_pre_attn_scalar or self.text_config.head_dim
            sliding = self.text_config.sliding_window is not None
            text["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
            text["layer_types"] = [
                "sliding_attention" if sliding and i % 2 == 0 else "full_attention"
                for i in range(self.text_config.num_hidden_layers)
            ]
        else:
            for name in ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window"):
                del text[name]
        return {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            **ids,
            "hidden_size": self.text_config.hidden_size,
            "image_token_index": self.image_token_id,
            "projection_dim": self.text_config.hidden_size,
            "vocab_size": self.text_config.vocab_size,
            "tie_word_embeddings": self.tie_word_embeddings,
            "text_config": text,
            "vision_config": {
                "model_type": "siglip_vision_model",
                **asdict(self.vision_config),
                "hidden_act": "gelu_pytorch_tanh",
                "num_channels": 3,
                "projection_dim": self.text_config.hidden_size,
                "num_image_tokens": self.vision_config.num_image_tokens,
                "vision_use_head": False,
            },
        }

    def with_image_size(self, image_size: int) -> PaliGemmaConfig:
        """Return this configuration with another image size, in pixels."""
        return replace(self, vision_config=replace(self.vision_config, image_size=image_size))


def end_ids(value: object, where: str) -> int | tuple[int, ...]:
    """Read a file's `eos_token_id`, an id or a list of ids. Raises ValueError that begins with `where` for anything else."""
    ids: list[Any] = value if isinstance(value, list) else [value]
    if not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ValueError(f"{where}: expected a token id or a list of them, got {value!r:.80}")
    return ids[0] if len(ids) == 1 else tuple(ids)


def _known_fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    return {f.name: values[f.name] for f in fields(cls) if f.name in values}


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a copy of a nested object; empty if the file lacks it."""
    section = config.get(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"{name} is {shown(section)}, expected an object")
    return dict(section)


def _check_fields(config: VisionConfig | TextConfig | PaliGemmaConfig, path: str, *, least: int = 1) -> None:
    """Raise ValueError naming a field that has another type, is not finite, or is out of range; integers start at `least`."""
    for f in fields(config):
        _check(path + f.name, getattr(config, f.name), str(f.type), least)


def _check(name: str, value: Any, kind: str, least: int) -> None:
    if value is None and kind.endswith(" | None"):
        return
    if kind.startswith("int"):
        several = isinstance(value, tuple) and kind.endswith("tuple[int, ...]") and value
        # No tensor has a size beyond 64 bits.
        valid = all(type(v) is int and least <= v < 2**63 for v in (value if several else [value]))
        expected = f"an integer of at least {least}"
    elif kind.startswith("float"):
        valid = type(value) in (int, float) and 0 < value < 2**63  # NaN is not
        expected = "a positive number"
    elif kind == "bool":
        valid, expected = type(value) is bool, "true or false"
    else:
        return
    if not valid:
        raise ValueError(f"{name} is {shown(value)}, expected {expected}")


def _gemma2(**shape: Any) -> TextConfig:
    return TextConfig(model_type="gemma2", attn_logit_softcapping=50.0, final_logit_softcapping=30.0, **shape)


_RELEASED = {
    "paligemma-3b": TextConfig(),
    "paligemma2-3b": _gemma2(
        hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4
    ),
    "paligemma2-10b": _gemma2(
        hidden_size=3584, intermediate_size=14_336, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8
    ),
    "paligemma2-28b": _gemma2(
        hidden_size=4608,
        intermediate_size=36_864,
        num_hidden_layers=46,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144.0,
    ),
}

_HF_GEMMA2_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}
