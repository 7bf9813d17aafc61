"""Recognise the code of transformers that the replacements in this package were written for.

A replacement computes what a class of transformers computed when the replacement was written. It is right only as long as that
class and the functions around it do not change. `SOURCES` has a digest of each of these functions in every supported version.
Where one has changed, `unknown_reason` names it, and `patch` leaves the class as it is.

For a new version of transformers: run its tests (`make test-transformers`), read what changed in each function that
`test_sources_are_known` names, adapt the replacement if it must be, and add the digest that the test prints.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

SOURCES = {
    "models.gemma.modeling_gemma.GemmaRMSNorm.forward": "717fd45258f6",
    "models.gemma.modeling_gemma.GemmaRMSNorm._norm": "f77770576326",
    "models.gemma.modeling_gemma.GemmaMLP.forward": "d53cb3e4f854",
    "models.gemma.modeling_gemma.GemmaAttention.forward": "7320344e1361 92eefde986c5",
    "models.gemma.modeling_gemma.GemmaDecoderLayer.forward": "63c454ac2ea5 c5968446ac4a",
    "models.gemma.modeling_gemma.GemmaModel.forward": "0596ef40dd86 259d31d1f850",
    "models.gemma.modeling_gemma.GemmaRotaryEmbedding.__init__": "f2205f883959 d4a7b0a6e80c",
    "models.gemma.modeling_gemma.GemmaRotaryEmbedding.compute_default_rope_parameters": "04568cbc37c6 c41ba30fa800",
    "models.gemma.modeling_gemma.GemmaRotaryEmbedding.forward": "9e7f4a24430a debf51089049 736713953485 dce12e1544ff",
    "models.gemma.modeling_gemma.apply_rotary_pos_emb": "8e497ba8c744",
    "models.gemma.modeling_gemma.rotate_half": "f224148c2150",
    "models.gemma.modeling_gemma.GemmaForCausalLM.forward": "103cf581e753 9ba2e1c47940 1086c2e21323",
    "models.gemma2.modeling_gemma2.Gemma2RMSNorm.forward": "717fd45258f6",
    "models.gemma2.modeling_gemma2.Gemma2RMSNorm._norm": "f77770576326",
    "models.gemma2.modeling_gemma2.Gemma2MLP.forward": "d53cb3e4f854",
    "models.gemma2.modeling_gemma2.Gemma2Attention.forward": "47e09bb27997 5c46bb308955",
    "models.gemma2.modeling_gemma2.Gemma2DecoderLayer.forward": "a26c0ddbbe1a 1ff2c3159ccf",
    "models.gemma2.modeling_gemma2.Gemma2Model.forward": "7a8498ac3907 a0c5d3ee4d16",
    "models.gemma2.modeling_gemma2.Gemma2RotaryEmbedding.__init__": "f2205f883959 d4a7b0a6e80c",
    "models.gemma2.modeling_gemma2.Gemma2RotaryEmbedding.compute_default_rope_parameters": "04568cbc37c6 c41ba30fa800",
    "models.gemma2.modeling_gemma2.Gemma2RotaryEmbedding.forward": (
        "096c8d9dccb2 9cf8a07168cd 736713953485 dce12e1544ff"
    ),
    "models.gemma2.modeling_gemma2.apply_rotary_pos_emb": "8e497ba8c744",
    "models.gemma2.modeling_gemma2.rotate_half": "f224148c2150",
    "models.gemma2.modeling_gemma2.eager_attention_forward": "5be18e16a457",
    "models.gemma2.modeling_gemma2.Gemma2ForCausalLM.forward": "09d45cc21b44 0a595be517e7 5153013892d1",
    "models.gemma3.modeling_gemma3.Gemma3RMSNorm.forward": "717fd45258f6",
    "models.gemma3.modeling_gemma3.Gemma3RMSNorm._norm": "f77770576326",
    "models.gemma3.modeling_gemma3.Gemma3MLP.forward": "d53cb3e4f854",
    "models.gemma3.modeling_gemma3.Gemma3Attention.forward": "4fe6f0101791 8cdc5be6694d",
    "models.gemma3.modeling_gemma3.Gemma3DecoderLayer.forward": "a26c0ddbbe1a 1ff2c3159ccf",
    "models.gemma3.modeling_gemma3.Gemma3TextModel.forward": "521138cf9f66 ea86ecc45ddb",
    "models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding.__init__": "c355a2453ef9 4e7942c4e5f2",
    "models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding.compute_default_rope_parameters": "ba453e8c1aa2 41733378dd05",
    "models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding.forward": (
        "59de39fc1647 5556b507df47 c653fb6d5407 0187350978c7"
    ),
    "models.gemma3.modeling_gemma3.apply_rotary_pos_emb": "8e497ba8c744",
    "models.gemma3.modeling_gemma3.rotate_half": "f224148c2150",
    "models.gemma3.modeling_gemma3.Gemma3ForCausalLM.forward": "09d45cc21b44 0a595be517e7 5153013892d1",
    "models.paligemma.modeling_paligemma.PaliGemmaForConditionalGeneration.forward": (
        "7f9864f53dff 45a130e475f1 99927b20705f 8a816f67c9ee 7c3b430db8ff"
    ),
    "models.siglip.modeling_siglip.SiglipAttention.forward": "477c08bed8d8",
    "loss.loss_utils.ForCausalLMLoss": "fbbd6415339f",
    "loss.loss_utils.fixed_cross_entropy": "ad0273196e02",
}
"""Functions of transformers, and `digest` of their sources in 5.17 to 5.24, oldest first."""


def _gemma(model: str, prefix: str, decoder: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """What the replacements of one version of Gemma rely on."""
    module = f"models.{model}.modeling_{model}."
    cls = module + prefix
    rotary = (f"{cls}RotaryEmbedding.{name}" for name in ("__init__", "compute_default_rope_parameters", "forward"))
    # Under a softcap and a mask without lengths, attention is Gemma 2's eager one.
    eager = (f"{module}eager_attention_forward",) if model == "gemma2" else ()
    return {
        ("rms_norm", f"{cls}RMSNorm"): (f"{cls}RMSNorm.forward", f"{cls}RMSNorm._norm"),
        ("mlp", f"{cls}MLP"): (f"{cls}MLP.forward",),
        ("attention", f"{cls}Attention"): (f"{cls}Attention.forward", *eager),
        ("rotary", f"{cls}Attention"): (
            f"{cls}Attention.forward",
            *rotary,
            f"{module}apply_rotary_pos_emb",
            f"{module}rotate_half",
            # These two hand the same positions to attention and to the rotary embedding.
            f"{cls}DecoderLayer.forward",
            f"{cls}{decoder}.forward",
        ),
        ("loss", f"{cls}ForCausalLM"): (f"{cls}ForCausalLM.forward", *_LOSS),
    }


_LOSS = ("loss.loss_utils.ForCausalLMLoss", "loss.loss_utils.fixed_cross_entropy")
_PALIGEMMA = "models.paligemma.modeling_paligemma.PaliGemmaForConditionalGeneration"
_SIGLIP = "models.siglip.modeling_siglip.SiglipAttention"
RELIES_ON = {
    ("loss", _PALIGEMMA): (f"{_PALIGEMMA}.forward", *_LOSS),
    ("attention", _SIGLIP): (f"{_SIGLIP}.forward",),
    **_gemma("gemma", "Gemma", "Model"),
    **_gemma("gemma2", "Gemma2", "Model"),
    **_gemma("gemma3", "Gemma3", "TextModel"),
}
"""By option of `patch` and class of transformers: the functions that the replacement relies on."""


def find(path: str) -> Any:
    """Return what transformers has under a dotted name, such as "models.gemma.modeling_gemma.GemmaMLP.forward", or None."""
    names = path.split(".")
    found: Any = importlib.import_module("transformers")
    try:
        for depth, name in enumerate(names, 1):
            if not hasattr(found, name):
                importlib.import_module(".".join(["transformers", *names[:depth]]))
            found = getattr(found, name)
    except (
        AttributeError,
        ImportError,
        RuntimeError,
    ):  # transformers loads its modules late, and raises the last of them
        return None
    return found


def class_path(cls: type) -> str:
    """Return the path of the class of `RELIES_ON` that `cls` is or inherits from; "" if there is none."""
    paths = {path for _, path in RELIES_ON}
    names = (f"{base.__module__}.{base.__qualname__}".removeprefix("transformers.") for base in cls.__mro__)
    return next((name for name in names if name in paths), "")


def unknown_reason(option: str, cls: type) -> str | None:
    """Return why the replacement of `patch`'s option may not compute what `cls` does, or None if it does."""
    path = class_path(cls)
    home, _, name = path.rpartition(".")
    if find(path) is not cls:
        return f"it is not transformers' own {name}"
    for source in RELIES_ON[option, path]:
        function, name = find(source), source.removeprefix(f"{home}.")
        if function is None:
            return f"transformers has no {name}"
        if digest(function) not in SOURCES[source].split():
            return f"{name} has changed"
    return None


@functools.cache
def digest(function: Callable[..., Any]) -> str:
    """Hash the syntax tree of a function's source: signature, decorators and body, without annotations and docstring.

    Returns "" for a function without a source, and for one that code outside transformers and torch has wrapped.
    """
    inner = function
    while hasattr(inner, "__wrapped__"):
        wrapper = getattr(inner, "__globals__", {}).get("__name__", "")
        if wrapper.partition(".")[0] not in ("transformers", "torch"):
            return ""
        inner = inner.__wrapped__
    try:
        source = inspect.getsource(inner)
        # A method's source is indented, and dedent would miss it where a docstring has a line at the margin.
        tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    except (OSError, TypeError, SyntaxError):
        return ""
    definition = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    if ast.get_docstring(definition, clean=False) is not None:
        del definition.body[0]
    return hashlib.sha256(repr(_shape(definition)).encode()).hexdigest()[:12]


def _shape(node: Any) -> Any:
    """A syntax tree as tuples that are the same in every version of Python."""
    if isinstance(node, list):
        return tuple(map(_shape, node))
    if not isinstance(node, ast.AST):
        return node
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    without = ("annotation", "returns", "type_comment", "ctx", "kind")
    return (type(node).__name__, *((name, _shape(value)) for name, value in fields.items() if name not in without))
