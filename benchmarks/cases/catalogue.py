"""The declaration of the cases: every op and the whole model, at the shapes of the released PaliGemma models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pg_kernels.model.config import PaliGemmaConfig

PROMPT = 16
"""The number of text tokens of a prompt, after the image tokens."""
ANSWER = 16
"""The number of tokens with a loss in a fine-tuning example, and of generated tokens."""
CACHE = 64
"""The number of tokens generated before a decode step is timed."""

MODELS = ("paligemma-3b", "paligemma2-3b", "paligemma2-10b", "paligemma2-28b")
RESOLUTIONS = (224, 448, 896)
BATCHES = (1, 4, 8, 16, 32)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
VOCABULARIES = (32_000, 64_000, 128_000, 257_152)
MODES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Case:
    """One op at one shape. `sizes` holds the numbers that the op's entry in `ops.py` or `models.py` needs, by name."""

    op: str
    mode: str
    dtype: str
    shape: str
    sizes: Mapping[str, Any]
    quick: bool = False
    """Whether `make bench` runs the case; `make bench-full` runs all."""
    sweep: bool = False
    """Whether the case only shows how cost grows; then only our default and the baseline run it."""

    @cached_property
    def name(self) -> str:
        sizes = "-".join(f"{key}={value}" for key, value in self.sizes.items())
        return f"{self.op}-{self.mode}-{self.dtype}-{sizes}"

    def __hash__(self) -> int:
        return hash(self.name)


def select(*, full: bool, ops: tuple[str, ...] = (), whole_models: bool = True) -> list[Case]:
    """Return the quick cases, or with `full` all cases, of the named ops or of all ops. Repeated shapes occur once."""
    found: dict[str, Case] = {}
    for case in _cases():
        if (full or case.quick) and (not ops or case.op in ops) and (whole_models or case.op not in WHOLE_MODEL_OPS):
            found.setdefault(case.name, case)
    # The most important cases come first, for runs that end at a deadline.
    return sorted(found.values(), key=lambda case: (not case.quick, not case.sweep, case.op not in WHOLE_MODEL_OPS))


WHOLE_MODEL_OPS = ("siglip", "prefill", "decode_step", "generate", "finetune_step")
OPS = (
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
    "apply_rotary",
    "geglu",
    "geglu_mlp",
    "prefix_lm_attention",
    "linear_cross_entropy",
    "int8_linear",
    "quantize_int8",
)
"""All ops that have cases, except the whole model's."""


def _cases() -> Iterator[Case]:
    for model in MODELS:
        for resolution in RESOLUTIONS:
            yield from _ops(model, resolution, 1)
    for batch in BATCHES[1:]:
        yield from _ops("paligemma-3b", 224, batch)
    for dtype in ("float32", "float16"):
        yield from _ops("paligemma-3b", 224, 1, dtype)
    yield from _sweeps()
    yield from _whole_models()


def _ops(model: str, resolution: int, batch: int, dtype: str = "bfloat16") -> Iterator[Case]:
    """Yield the ops of one model for images of one resolution."""
    config = PaliGemmaConfig.named(f"{model}-{resolution}")
    text, vision = config.text_config, config.vision_config
    image, tokens = vision.num_image_tokens, vision.num_image_tokens + PROMPT
    quick = (model, resolution, batch, dtype) == ("paligemma-3b", 224, 1, "bfloat16")
    label = f"{model} {resolution} px, batch {batch}"
    common: dict[str, Any] = {"model": model, "batch": batch}
    width = {**common, "tokens": tokens, "width": text.hidden_size}
    heads = {"heads": text.num_attention_heads, "kv_heads": text.num_key_value_heads, "head_dim": text.head_dim}
    hidden = {"hidden": text.intermediate_size}
    softcap = {} if text.attn_logit_softcapping is None else {"softcap": int(text.attn_logit_softcapping)}
    final = {} if text.final_logit_softcapping is None else {"softcap": int(text.final_logit_softcapping)}

    for mode in MODES:
        is_quick = quick and mode != "backward"

        def case(op: str, what: str, sizes: Mapping[str, Any], quick: bool = is_quick, mode: str = mode) -> Case:
            return Case(op, mode, dtype, f"{label}{what}", sizes, quick)

        yield case("rms_norm", "", width)
        yield case("add_rms_norm", "", width, quick=is_quick and mode == "forward")
        yield case("layer_norm", ", SigLIP", {"batch": batch, "tokens": image, "width": vision.hidden_size})
        yield case("apply_rotary", "", {**common, "tokens": tokens, **heads})
        yield case("geglu", "", {**common, "tokens": tokens, **hidden})
        yield case("geglu_mlp", "", {**width, **hidden}, quick=is_quick and mode == "forward")
        siglip_heads = {"heads": vision.num_attention_heads, "kv_heads": vision.num_attention_heads}
        siglip = {**siglip_heads, "head_dim": vision.hidden_size // vision.num_attention_heads}
        attention = {**common, "queries": tokens, "tokens": tokens, "prefix": tokens, **heads, **softcap}
        if mode == "forward":
            yield case("prefix_lm_attention", ", prefill", attention)
            cached = tokens + CACHE
            decode = {**common, "queries": 1, "tokens": cached, "prefix": tokens, **heads, **softcap}
            yield case("prefix_lm_attention", ", decode", decode)
        trained = tokens + ANSWER
        suffix = {**common, "queries": trained, "tokens": trained, "prefix": tokens, **heads, **softcap}
        yield case("prefix_lm_attention", ", fine-tuning", suffix)
        encoder = {"batch": batch, "queries": image, "tokens": image, "prefix": image, **siglip, "causal": 0}
        yield case("prefix_lm_attention", ", SigLIP", encoder, quick=is_quick and mode == "forward")
        vocabulary = {"vocabulary": text.vocab_size}
        labels = {"model": model, "tokens": batch * ANSWER, "width": text.hidden_size, **vocabulary, **final}
        yield case("linear_cross_entropy", f", {batch * ANSWER} labels", labels, quick=is_quick and mode == "forward")

    def int8(what: str, rows: int, inputs: int, outputs: int, group: int = 0, quick: bool = quick) -> Case:
        grouped = {"group": group} if group else {}
        sizes = {"model": model, "tokens": rows, "inputs": inputs, "outputs": outputs, **grouped}
        of_group = f", groups of {group}" if group else ""
        shape = f"{model}, {what}, {rows} row{'s' * (rows > 1)}{of_group}"
        return Case("int8_linear", "forward", dtype, shape, sizes, quick)

    kv_width, q_width = text.num_key_value_heads * text.head_dim, text.num_attention_heads * text.head_dim
    for rows in (batch, batch * tokens):
        yield int8("gate", rows, text.hidden_size, text.intermediate_size, quick=quick and rows == batch)
        yield int8("down", rows, text.intermediate_size, text.hidden_size, quick=False)
        yield int8("down", rows, text.intermediate_size, text.hidden_size, group=128, quick=False)
        yield int8("q", rows, text.hidden_size, q_width, quick=quick and rows > batch)
        yield int8("k", rows, text.hidden_size, kv_width, quick=False)
    yield int8("head", batch, text.hidden_size, text.vocab_size, quick=False)
    patch = 3 * vision.patch_size**2
    for what, inputs, outputs in (
        ("SigLIP patch", patch, vision.hidden_size),
        ("SigLIP q", vision.hidden_size, vision.hidden_size),
        ("SigLIP fc1", vision.hidden_size, vision.intermediate_size),
        ("SigLIP fc2", vision.intermediate_size, vision.hidden_size),
    ):
        yield int8(what, batch * image, inputs, outputs, quick=False)
    gate = {"model": model, "inputs": text.hidden_size, "outputs": text.intermediate_size}
    yield Case("quantize_int8", "forward", dtype, f"{model}, gate", gate, quick)


def _sweeps() -> Iterator[Case]:
    """Yield Gemma 2B's ops with one size varied at a time."""
    model = "paligemma-3b"
    text = PaliGemmaConfig.named(f"{model}-224").text_config
    heads = {"heads": text.num_attention_heads, "kv_heads": text.num_key_value_heads, "head_dim": text.head_dim}
    width = {"width": text.hidden_size}

    def case(op: str, mode: str, what: str, sizes: Mapping[str, Any]) -> Case:
        return Case(op, mode, "bfloat16", f"{model}, {what}", {"model": model, **sizes}, sweep=True)

    for mode in ("forward", "both"):
        for tokens in LENGTHS:
            rows = {"batch": 1, "tokens": tokens}
            what = f"{tokens} tokens"
            yield case("rms_norm", mode, what, {**rows, **width})
            yield case("apply_rotary", mode, what, {**rows, **heads})
            yield case("geglu_mlp", mode, what, {**rows, **width, "hidden": text.intermediate_size})
            prefix_lm = {"batch": 1, "queries": tokens, "tokens": tokens, "prefix": 256, **heads}
            yield case("prefix_lm_attention", mode, f"{what}, prefix 256", prefix_lm)
            head = {"tokens": tokens, **width, "vocabulary": text.vocab_size}
            yield case("linear_cross_entropy", mode, f"{tokens} labels", head)
        for vocabulary in VOCABULARIES:
            head = {"tokens": 256, **width, "vocabulary": vocabulary}
            yield case("linear_cross_entropy", mode, f"256 labels, {vocabulary:,} rows", head)


def _whole_models() -> Iterator[Case]:
    """Yield the stages of the models, PaliGemma 3B's also with resolution and batch varied."""

    def case(op: str, model: str, resolution: int, batch: int, **flags: bool) -> Case:
        sizes = {"model": model, "resolution": resolution, "batch": batch}
        shape = f"{model} {resolution} px, batch {batch}"
        return Case(op, MODE_OF.get(op, "forward"), "bfloat16", shape, sizes, **flags)

    for op in WHOLE_MODEL_OPS:
        yield case(op, "paligemma-3b", 224, 1, quick=op in ("siglip", "prefill", "decode_step"))
    for resolution in RESOLUTIONS[1:]:
        for op in ("siglip", "prefill", "decode_step"):
            yield case(op, "paligemma-3b", resolution, 1, sweep=True)
    for batch in BATCHES[1:]:
        for op in WHOLE_MODEL_OPS:
            yield case(op, "paligemma-3b", 224, batch, sweep=op == "decode_step")
    for model in MODELS[1:3]:
        for op in ("prefill", "decode_step", "generate"):
            yield case(op, model, 224, 1)


MODE_OF = {"finetune_step": "both"}
"""The whole-model ops that also run backward."""
