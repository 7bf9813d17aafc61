"""`patch` when transformers changes: unknown classes stay unpatched, with one warning, and results are unchanged."""

from __future__ import annotations
import __future__

import functools
import inspect
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, masking_utils
from transformers.models.gemma import modeling_gemma

import pg_kernels as pg
from pg_kernels.integrations.transformers import attention, patch, unpatch, versions
from pg_kernels.integrations.transformers.masks import dense_mask, lengths_mask
from pg_kernels.integrations.transformers.versions import SOURCES, digest, find

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
}
VISION = {
    "model_type": "siglip_vision_model",
    "vision_use_head": False,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 28,
}
IMAGE = 63


def randomised(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn_like(parameter) * spread)
    return model.eval()


def paligemma() -> Any:
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", **TEXT},
        vision_config=VISION,
        projection_dim=16,
        hidden_size=16,
        image_token_index=IMAGE,
    )
    config._attn_implementation = "eager"
    return randomised(PaliGemmaForConditionalGeneration(config))


def inputs() -> dict[str, Tensor]:
    ids = torch.cat((torch.full((2, 4), IMAGE), torch.arange(3, 15).view(2, 6)), 1)
    types = (torch.arange(10) >= 7).long().expand(2, -1)
    pixels = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "token_type_ids": types, "pixel_values": pixels, "labels": ids.where(types == 1, -100)}


def ours(model: Any) -> set[str]:
    """Names of the patched classes."""
    return {type(module).__name__ for module in model.modules() if hasattr(type(module), "_pg_kernels_original")}


ALL = {"PaliGemmaForConditionalGeneration", "GemmaAttention", "GemmaMLP", "GemmaRMSNorm"}


@pytest.mark.parametrize("path", SOURCES)
def test_sources_are_known(path: str) -> None:
    """Digests of the installed version. A failure prints the digest to add once the change is understood."""
    assert digest(find(path)) in SOURCES[path].split()


def test_known_code_is_patched_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours(patch(paligemma())) == ALL


# What a new version of transformers, or another package, might do


Replacements = tuple[tuple[str, str], ...]


def rewritten(function: Any, replacements: Replacements, folder: Path) -> Any:
    """Return a function of transformers with changed source, compiled in its own module."""
    inner = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(inner)).replace("@auto_docstring\n", "")  # needs a class around it
    for old, new in replacements:
        assert old in source
        source = source.replace(old, new)
    path = folder / f"{inner.__qualname__}.py"
    path.write_text(source)
    names: dict[str, Any] = {}
    exec(compile(source, path, "exec", __future__.annotations.compiler_flag), inner.__globals__, names)
    return names[inner.__name__]


CACHE = "cache" if "cache" in inspect.signature(modeling_gemma.GemmaAttention.forward).parameters else "past_key_values"
GEMMA = "models.gemma.modeling_gemma"
CHANGES: dict[str, tuple[set[str], dict[str, Replacements]]] = {
    "renamed argument": (
        {"GemmaAttention"},
        {
            f"{GEMMA}.GemmaAttention.forward": ((CACHE, "store"),),
            f"{GEMMA}.GemmaDecoderLayer.forward": ((f"{CACHE}={CACHE}", f"store={CACHE}"),),
        },
    ),
    "reordered arguments": (
        {"GemmaAttention"},
        {
            f"{GEMMA}.GemmaAttention.forward": (
                ("hidden_states: torch.Tensor,", "attention_mask, hidden_states,"),
                ("attention_mask: torch.Tensor | None = None,", ""),
            )
        },
    ),
    "new argument": (
        {"GemmaAttention"},
        {f"{GEMMA}.GemmaAttention.forward": (("**kwargs:", "sharpness=2.0, **kwargs:"), ("self.scaling", "sharpness"))},
    ),
    "renamed attribute": (
        {"GemmaRMSNorm"},
        {
            f"{GEMMA}.GemmaRMSNorm.__init__": (
                ("self.eps = eps", "self.variance_epsilon = eps"),
                ("super().__init__()", "nn.Module.__init__(self)"),  # without a class around it
            ),
            f"{GEMMA}.GemmaRMSNorm._norm": (("self.eps", "self.variance_epsilon"),),
        },
    ),
    "norm": ({"GemmaRMSNorm"}, {f"{GEMMA}.GemmaRMSNorm.forward": (("1.0 + self.weight", "2.0 + self.weight"),)}),
    "MLP": ({"GemmaMLP"}, {f"{GEMMA}.GemmaMLP.forward": (("* self.up_proj", "+ self.up_proj"),)}),
    "rotation": ({"GemmaAttention"}, {f"{GEMMA}.rotate_half": (("(-x2, x1)", "(x2, -x1)"),)}),
    "frequencies": (
        {"GemmaAttention"},
        {f"{GEMMA}.GemmaRotaryEmbedding.compute_default_rope_parameters": (("1.0 / (", "3.0 / ("),)},
    ),
    "positions": (
        {"GemmaAttention"},
        {
            f"{GEMMA}.GemmaModel.forward": (
                ("position_ids=position_ids)\n\n    for", "position_ids=2 * position_ids)\n\n    for"),
            )
        },
    ),
    "head": (
        {"PaliGemmaForConditionalGeneration"},
        {
            "models.paligemma.modeling_paligemma.PaliGemmaForConditionalGeneration.forward": (
                ("self.lm_head(", "0.5 * self.lm_head("),
            )
        },
    ),
    "loss": (
        {"PaliGemmaForConditionalGeneration"},
        {"loss.loss_utils.fixed_cross_entropy": (("    return loss", "    return 2 * loss"),)},
    ),
    "SigLIP": (set(), {"models.siglip.modeling_siglip.SiglipAttention.forward": (("self.scale,", "2 * self.scale,"),)}),
}
"""Changes in functions, by name, and the classes that must then not be patched."""


def assert_left(model: Any, classes: set[str], attends: str = "pg_kernels", **options: Any) -> None:
    """`patch` leaves these classes, warns once and patches all others. Results stay, and `unpatch` restores everything."""
    batch = inputs()
    prompt = {name: batch[name][:, :7] for name in ("input_ids", "token_type_ids")} | {
        "pixel_values": batch["pixel_values"]
    }

    def numbers() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad(), pg.backend("reference"):  # with it, rotary embeddings are ours
            tokens = model.generate(**prompt, max_new_tokens=4, do_sample=False)
            return model(**batch).logits, model.train()(**batch).loss, model.eval() and tokens

    expected = numbers()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch(model, **options)
    assert len(caught) == 1 and transformers.__version__ in str(caught[0].message)
    assert all(name in str(caught[0].message) for name in classes)
    assert ours(model) == ALL - classes
    assert {config._attn_implementation for config in (model.config.text_config, model.config.vision_config)} == {
        attends
    }
    for actual, wanted in zip(numbers(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=2e-5, rtol=2e-4)
    unpatch(model)
    assert not ours(model) and model.config.text_config._attn_implementation == "eager"
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(numbers(), expected, strict=True))


@pytest.mark.parametrize(
    ("name", "attend"), [(name, attend) for name in CHANGES for attend in (True, False) if attend or name != "SigLIP"]
)
def test_changed_code_is_left_alone(name: str, attend: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    classes, changes = CHANGES[name]
    for path, replacements in changes.items():
        owner, attribute = find(path.rpartition(".")[0]), path.rpartition(".")[2]
        monkeypatch.setattr(owner, attribute, rewritten(getattr(owner, attribute), replacements, tmp_path))
    unknown = any("Attention.forward" in path for path in changes)
    assert_left(paligemma(), classes, "pg_kernels" if attend and not unknown else "eager", attention=attend)


def test_a_wrapper_of_another_package_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = modeling_gemma.GemmaMLP.forward

    @functools.wraps(forward)
    def doubled(self: Any, x: Tensor) -> Tensor:
        return 2 * forward(self, x)

    monkeypatch.setattr(modeling_gemma.GemmaMLP, "forward", doubled)
    assert_left(paligemma(), {"GemmaMLP"})


def test_a_subclass_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnNorm(modeling_gemma.GemmaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    monkeypatch.setattr(modeling_gemma, "GemmaRMSNorm", OwnNorm)
    model = paligemma()
    monkeypatch.undo()
    assert_left(model, {"GemmaRMSNorm"})


@pytest.mark.parametrize("name", ["GemmaRMSNorm", "GemmaMLP", "GemmaAttention", "apply_rotary_pos_emb"])
def test_code_that_is_gone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = paligemma()
    monkeypatch.delattr(modeling_gemma, name)
    with pytest.warns(UserWarning, match=name):
        patch(model)
    assert ours(model) == ALL - {"GemmaAttention" if name.startswith("apply") else name}


def test_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose classes have all changed runs unpatched instead of failing."""
    monkeypatch.setattr(versions, "SOURCES", dict.fromkeys(SOURCES, ""))
    assert_left(paligemma(), ALL, "eager")


def test_a_pickled_model_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch(paligemma())
    pickled = pickle.dumps(model.model.language_model.layers[0].mlp)
    assert type(pickle.loads(pickled)) is not modeling_gemma.GemmaMLP
    monkeypatch.setattr(versions, "SOURCES", dict.fromkeys(SOURCES, ""))
    with pytest.warns(UserWarning, match="GemmaMLP is loaded unpatched"):
        assert type(pickle.loads(pickled)) is modeling_gemma.GemmaMLP


# Attention and masks under their names


def test_unknown_options_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend with a dense mask, if the mask is needed."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *args, **options: seen.update(options, mask=args[4])
    )
    q = torch.zeros(2, 1, 8, 4)
    lengths = lengths_mask(**MASK)
    assert lengths.dtype == torch.int32
    attention.attention(nn.Module(), q, q, q, lengths, sharpness=2.0, position_ids=torch.arange(8))
    assert seen["sharpness"] == 2.0 and torch.equal(
        seen["mask"], masking_utils.sdpa_mask(**MASK, allow_is_causal_skip=False)
    )


MASK = {
    "batch_size": 2,
    "q_length": 8,
    "kv_length": 8,
    "q_offset": 0,
    "kv_offset": 0,
    "attention_mask": torch.tensor([[0] * 3 + [1] * 5, [1] * 8]).bool(),
    "config": GemmaConfig(),
}


@pytest.mark.parametrize("name", ["attention_mask", "q_offset", "kv_offset", "batch_size"])
def test_renamed_arguments_of_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense mask is transformers' own, with all arguments passed on."""
    dense = masking_utils.sdpa_mask

    def renamed(**options: Any) -> Tensor:
        return dense(**{name if option == "renamed" else option: value for option, value in options.items()})

    monkeypatch.setitem(attention.MASKS._global_mapping, "sdpa", renamed)
    arguments = {"renamed" if option == name else option: value for option, value in MASK.items()}
    expected = dense(**MASK, allow_is_causal_skip=False)
    actual = lengths_mask(**arguments)
    assert torch.equal(actual if actual.dtype == torch.bool else dense_mask(actual, 8, 8), expected)


def test_masks_of_unknown_models_are_numbers() -> None:
    for config in ({}, {"config": None}, {"config": nn.Module()}):
        mask = lengths_mask(**{name: value for name, value in MASK.items() if name != "config"}, **config)
        assert mask.dtype == torch.float32 and mask.shape == (2, 1, 8, 8)


# Imports


def test_imports_survive_what_is_gone() -> None:
    """Import works without transformers' private names and attention interfaces. It runs in a process of its own."""
    code = """
import sys, warnings, transformers
from transformers.loss import loss_utils
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.siglip import modeling_siglip
model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14))
gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    vocab_size=64))
del modeling_gemma2.eager_attention_forward, loss_utils.ForCausalLMLoss, loss_utils.fixed_cross_entropy
vars(sys.modules["transformers"])["AttentionMaskInterface"] = None  # which need not be what import gave
from pg_kernels.integrations.transformers import patch, register
try:
    register()
except ImportError as error:
    print(error)
warnings.simplefilter("error")
for model in (model, gemma):
    try:
        patch(model)
    except UserWarning as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    registered, siglip, gemma = run.stdout.splitlines()
    assert "transformers has no AttentionMaskInterface" in registered
    assert "SiglipAttention (attention): transformers has no AttentionMaskInterface" in siglip
    assert "Gemma2ForCausalLM (loss): transformers has no loss.loss_utils.ForCausalLMLoss" in gemma
