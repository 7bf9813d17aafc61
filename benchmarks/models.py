"""The whole model under test, with random weights: its stages, ours and other people's on the same tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from pg_kernels import backend
from pg_kernels.model import PaliGemma
from pg_kernels.model.config import PaliGemmaConfig
from pg_kernels.model.generation import Decoder
from pg_kernels.model.graphs import Recorder, Replayed, capture_unsupported_reason
from pg_kernels.nn import Int8Embedding, Int8Linear, fuse_qkv_
from pg_kernels.quantization import ACTIVATIONS, quantize_

from .cases import ANSWER, PROMPT, Case
from .contenders import Contender
from .measure import Task
from .ops import Draw, Inputs, visible_pairs
from .trial import Candidate

LARGEST_DEVIATION = 0.05
"""Of logits, features and gradients, as a relative Frobenius norm.

Rounding to bf16 alone makes two right implementations of the 3B differ by 0.6 to 0.8 % in features and logits and by 1.9 % in
gradients (ours and transformers'); a wrong mask moves logits by far more.
"""
LARGEST_REGRET = 0.1
"""How far below the best logit a chosen token's may lie, in standard deviations of the logits; a token at random is at 4."""


@dataclass(frozen=True)
class Stage:
    """One op of the whole model, for our model and for transformers': inputs to a candidate."""

    ours: Callable[[Inputs], Candidate]
    theirs: Callable[[Inputs, Any], Candidate]
    """Its second argument is transformers' model."""
    llama: Callable[[Inputs], Candidate] | None = None


class ModelTrial:
    """A case of the whole model."""

    wall = True

    def __init__(self, case: Case, device: torch.device, *, full: bool = True) -> None:
        self.case, self.device, self.full = case, device, full
        self.config = _config(case.sizes)
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        with torch.device("meta"):
            self.shapes = PaliGemma(self.config)

    def contenders(self) -> list[Contender]:
        stage = STAGES[self.case.op]
        found = [Contender("pg_kernels", stage.ours, ours=True)]
        if self.case.op != "finetune_step" and not self.case.sweep:
            found += [
                Contender(
                    f"pg_kernels {mode}",
                    partial(_ours_int8, stage, mode),
                    ours=True,
                    int8_weights=True,
                    int8_activations=kept == "int8",
                )
                for mode, kept in ACTIVATIONS.items()
            ]
        found.append(Contender("transformers sdpa", partial(_theirs, stage, "sdpa"), "transformers", baseline=True))
        if self.case.sweep or not self.full:
            return found
        found.append(Contender("transformers eager", partial(_theirs, stage, "eager"), "transformers"))
        if self.case.op == "generate":
            found.append(Contender("transformers compiled, static cache", _compiled_generation, "transformers"))
        if self.case.op in ("decode_step", "generate"):
            theirs = partial(_theirs_int8, stage)
            found.append(Contender("transformers + torchao int8", theirs, "torchao", int8_weights=True))
        if stage.llama is not None:
            found.append(Contender("llama.cpp Q8_0 (decoder only)", stage.llama, "llama_cpp", int8_weights=True))
        return found

    def work(self, contender: Contender) -> tuple[int, int]:
        itemsize = 1 if contender.int8_weights else self.dtype.itemsize
        return _WORK[self.case.op](self, itemsize)

    def setup(self) -> tuple[int, int]:
        if self.case.op != "decode_step":
            return 0, 0
        prompt = self.config.vision_config.num_image_tokens + PROMPT
        bytes_ = _parameters(self.shapes) * self.dtype.itemsize
        return bytes_, _vision_flops(self, 1) + _decoder_flops(self, 1, prompt, prompt, prompt, 1)

    def needed_bytes(self) -> int:
        # In int8, too.
        weights = 0 if _holds(self.case, self.device) else _parameters(self.shapes) * (self.dtype.itemsize + 1)
        gradients = _parameters(self.shapes) * self.dtype.itemsize if self.case.op == "finetune_step" else 0
        # One layer's activations are few beside the weights, but training keeps those of all.
        kept = self._tokens() * self.config.text_config.intermediate_size * 4 * self.dtype.itemsize
        layers = self.config.text_config.num_hidden_layers if gradients else 2
        return weights + gradients + kept * layers

    def draw(self) -> None:
        model = _random_model(self.case, self.device)
        model.set_image_size(self.config.vision_config.image_size)
        draw, batch = Draw(self.dtype, self.device), self.case.sizes["batch"]
        image = self.config.vision_config.num_image_tokens
        words = _words(self.config)
        text = draw.integers(words, batch, PROMPT)
        ids = torch.cat((torch.full((batch, image), self.config.image_token_id, device=self.device), text), 1)
        size = self.config.vision_config.image_size
        self.inputs: dict[str, Any] = {
            "model": model,
            "input_ids": ids,
            "pixel_values": draw.normal(batch, 3, size, size, std=0.5),
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
            "suffix": draw.integers(words, batch, ANSWER),
        }
        self.truth = []
        if self.case.op != "generate":  # whose tokens are judged one by one
            with backend("reference"):
                self.truth = STAGES[self.case.op].ours(self.inputs).results()

    def build(self, contender: Contender) -> list[Candidate]:
        return [contender.build(self.inputs)]

    def error(self, contender: Contender, results: list[Tensor]) -> float:
        if self.case.op == "generate":
            shape = (self.case.sizes["batch"], ANSWER)
            return regret(self.inputs, results[0]) / LARGEST_REGRET if results[0].shape == shape else math.inf
        truth = self.truth
        if contender.package == "llama_cpp":  # causal, and without an image
            truth = [_causal_logits(self.inputs, decode=self.case.op == "decode_step")]
        errors = [
            float((out.float() - true.float()).norm() / true.float().norm()) / LARGEST_DEVIATION
            if out.shape == true.shape
            else math.inf
            for out, true in zip(results, truth, strict=True)
        ]
        return math.inf if any(math.isnan(error) for error in errors) else max(errors)

    def overhead_s(self, contender: Contender) -> float | None:
        return None

    def _tokens(self) -> int:
        return self.case.sizes["batch"] * (self.config.vision_config.num_image_tokens + PROMPT)


# --- the model


def _config(sizes: Mapping[str, Any]) -> PaliGemmaConfig:
    return PaliGemmaConfig.named(f"{sizes['model']}-{sizes['resolution']}")


def _words(config: PaliGemmaConfig) -> int:
    """How many ids are text: those after them are places, masks and the image's."""
    return min(256_000, config.text_config.vocab_size)


_held: dict[tuple[Any, ...], PaliGemma] = {}
"""The last model: gigabytes that several cases share."""
_quantised: dict[str, PaliGemma] = {}
"""The same in int8, by mode."""


def release() -> None:
    """Give the last model's memory back."""
    _held.clear()
    _quantised.clear()


def _key(case: Case, device: torch.device) -> tuple[Any, ...]:
    return case.sizes["model"], case.dtype, device


def _holds(case: Case, device: torch.device) -> bool:
    return _key(case, device) in _held


def _random_model(case: Case, device: torch.device) -> PaliGemma:
    key = _key(case, device)
    if key not in _held:
        release()
        _held[key] = filled(_config(case.sizes), getattr(torch, case.dtype), device)
    return _held[key]


@torch.no_grad()
def filled(config: PaliGemmaConfig, dtype: torch.dtype, device: torch.device) -> PaliGemma:
    """A model with random weights, in evaluation mode.

    They are Gaussian and keep the variance, from one block over and over: drawing billions of them takes minutes on a CPU.
    """
    with torch.device("meta"):
        model = PaliGemma(config).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn((1 << 24) + 1, generator=generator).to(next(model.parameters()))
    for name, parameter in model.named_parameters():
        std = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.05
        flat = parameter.view(-1)
        for start in range(0, flat.numel(), len(block)):
            part = flat[start : start + len(block)]
            torch.mul(block[: len(part)], std, out=part)
        if name.endswith("layernorm.weight") or "layer_norm" in name and name.endswith("weight"):
            parameter.add_(1.0 if "vision_tower" in name else 0.0)  # SigLIP's weights are stored as they are
    return model.eval()


def in_int8(model: PaliGemma, mode: str) -> PaliGemma:
    """A model in int8 that shares everything else with it; both modes share the weights."""
    if not _quantised:
        _quantised["int8"] = quantize_(_twin(model, model.parameters()), "int8")
    if mode not in _quantised:
        original = _quantised["int8"]
        shared = [m.weight for m in original.modules() if isinstance(m, (Int8Linear, Int8Embedding))]
        _quantised[mode] = _twin(original, [*original.parameters(), *shared])
        for module in _quantised[mode].modules():
            if isinstance(module, Int8Linear):
                module.activations = ACTIVATIONS[mode]
    return _quantised[mode]


def _twin(model: PaliGemma, shared: Iterable[Any]) -> PaliGemma:
    return copy.deepcopy(model, {id(thing): thing for thing in shared})


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- our stages


def _ours_int8(stage: Stage, mode: str, inputs: Inputs) -> Candidate:
    return stage.ours({**inputs, "model": in_int8(inputs["model"], mode)})


def _inference(call: Callable[[], Tensor], prepare: Callable[[], Any] = lambda: None) -> Candidate:
    """A call whose output is judged as it is, without gradients."""

    def run(_: Any) -> Tensor:
        with torch.inference_mode():
            return call()

    return Candidate(Task(run, prepare), lambda: [run(prepare())])


def _prompt(inputs: Inputs) -> dict[str, Any]:
    return {name: inputs[name] for name in ("input_ids", "pixel_values", "attention_mask", "token_type_ids")}


def _decoder(inputs: Inputs) -> Decoder:
    batch, length = inputs["input_ids"].shape
    return Decoder(inputs["model"], batch, length + ANSWER)


def _first_example(inputs: Inputs) -> Inputs:
    """The prompt that a whole batch decodes after: one prefill instead of many, which nobody times."""
    return {name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _our_siglip(inputs: Inputs) -> Candidate:
    return _inference(lambda: inputs["model"].get_image_features(inputs["pixel_values"]))


def _as_generated(model: PaliGemma, stage: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A stage as `generate` runs it: replayed as a CUDA graph, and captured by now, where there can be one."""
    if capture_unsupported_reason(model, next(model.parameters()).device) is not None:
        return stage
    fuse_qkv_(model)
    found: list[Tensor] = []

    def keep() -> None:
        found[:] = [stage()]

    replayed = Replayed(keep, Recorder(None))

    def call() -> Tensor:
        replayed()
        return found[0]

    with torch.inference_mode():
        for _ in range(2):
            call()
    return call


def _our_prefill(inputs: Inputs) -> Candidate:
    model, decoder = inputs["model"], _decoder(inputs)
    return _inference(_as_generated(model, lambda: model.logits(decoder.prefill(model, _prompt(inputs)))))


def _our_decode_step(inputs: Inputs) -> Candidate:
    model, first = inputs["model"], _first_example(inputs)
    decoder = _decoder(first)
    with torch.inference_mode():
        decoder.prefill(model, _prompt(first))
        decoder.select_rows(torch.zeros_like(inputs["suffix"][:, 0]))
        decoder.tokens.copy_(inputs["suffix"][:, 0])
        start = {name: lengths.clone() for name, lengths in vars(decoder.visible).items()}

    @torch.inference_mode()
    def rewind() -> None:
        for name, lengths in start.items():
            getattr(decoder.visible, name).copy_(lengths)

    return _inference(_as_generated(model, lambda: model.logits(decoder.step(model))), rewind)


def _our_generate(inputs: Inputs) -> Candidate:
    model = inputs["model"]
    return _inference(lambda: model.generate(**_prompt(inputs), max_new_tokens=ANSWER, eos_token_id=-1))


def _training_inputs(inputs: Inputs) -> dict[str, Tensor]:
    ids, suffix = inputs["input_ids"], inputs["suffix"]
    return {
        "input_ids": torch.cat((ids, suffix), 1),
        "pixel_values": inputs["pixel_values"],
        "attention_mask": torch.ones(len(ids), ids.shape[1] + suffix.shape[1], dtype=torch.int64, device=ids.device),
        "token_type_ids": torch.cat((torch.zeros_like(ids), torch.ones_like(suffix)), 1),
        "labels": torch.cat((torch.full_like(ids, -100), suffix), 1),
    }


def _finetune_step(model: nn.Module, inputs: Inputs) -> Candidate:
    """Forward, loss and the gradients of all parameters; the optimizer's step is the same for everybody and left out."""
    batch = _training_inputs(inputs)
    owner = inputs["model"].model  # the parameters are shared
    last = owner.language_model.layers[-1]
    watched = [owner.multi_modal_projector.linear.weight, last.mlp.down_proj.weight, last.self_attn.q_proj.weight]

    def forget() -> None:
        model.zero_grad(set_to_none=True)

    def run(_: Any) -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    def results() -> list[Tensor]:
        forget()
        found = [run(None), *(parameter.grad for parameter in watched)]
        forget()
        return found

    return Candidate(Task(run, forget), results)


# --- transformers' stages


def _theirs(stage: Stage, attention: str, inputs: Inputs) -> Candidate:
    return stage.theirs(inputs, transformers_model(inputs["model"], attention))


def _theirs_int8(stage: Stage, inputs: Inputs) -> Candidate:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = transformers_model(inputs["model"], "sdpa")
    quantize_(model, Int8WeightOnlyConfig())
    return stage.theirs(inputs, model)


def transformers_model(ours: PaliGemma, attention: str) -> Any:
    """transformers' PaliGemma around our parameters."""
    from accelerate import init_empty_weights
    from transformers import PaliGemmaConfig as TheirConfig
    from transformers import PaliGemmaForConditionalGeneration

    config = TheirConfig.from_dict(ours.config.to_dict())
    config._attn_implementation = attention
    with init_empty_weights(include_buffers=False):
        model = PaliGemmaForConditionalGeneration(config).eval()
    device = next(ours.parameters()).device
    model.load_state_dict(ours.state_dict(keep_vars=True), strict=True, assign=True)
    model.tie_weights()
    return model.to(device)


def _their_siglip(inputs: Inputs, model: Any) -> Candidate:
    def encode() -> Tensor:
        features = model.get_image_features(inputs["pixel_values"])
        return features if isinstance(features, Tensor) else features.pooler_output

    return _inference(encode)


def _their_prompt(inputs: Inputs) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("input_ids", "pixel_values", "attention_mask", "token_type_ids")}


def _their_prefill(inputs: Inputs, model: Any) -> Candidate:
    return _inference(lambda: model(**_their_prompt(inputs), use_cache=True, logits_to_keep=1).logits[:, -1].float())


def _their_decode_step(inputs: Inputs, model: Any) -> Candidate:
    with torch.inference_mode():
        prompt = _their_prompt(_first_example(inputs))
        cache = model(**prompt, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(inputs["suffix"]))
    length, token = inputs["input_ids"].shape[1], inputs["suffix"][:, :1]
    mask = torch.ones(len(token), length + 1, dtype=torch.int64, device=token.device)
    step = {"input_ids": token, "attention_mask": mask, "past_key_values": cache, "use_cache": True}

    def rewind() -> None:
        if cache.get_seq_length() > length:
            cache.crop(length - cache.get_seq_length())  # newer versions take negative numbers only

    return _inference(lambda: model(**step).logits[:, -1].float(), rewind)


def _their_generate(inputs: Inputs, model: Any, **options: Any) -> Candidate:
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, **options}
    return _inference(lambda: model.generate(**_their_prompt(inputs), **options)[:, length:])


def _compiled_generation(inputs: Inputs) -> Candidate:
    if inputs["input_ids"].device.type != "cuda":
        raise ValueError("transformers compiles on CUDA only")
    return _their_generate(inputs, transformers_model(inputs["model"], "sdpa"), cache_implementation="static")


# --- llama.cpp: the decoder alone, causal, on as many tokens


@contextmanager
def _gguf(model: PaliGemma) -> Any:
    from .llama_cpp import write_gguf

    with TemporaryDirectory() as folder:
        path = Path(folder) / "decoder.gguf"
        write_gguf(model, path)
        yield path


def _llama(inputs: Inputs) -> Any:
    from .llama_cpp import LlamaDecoder

    if len(inputs["input_ids"]) > 1:
        raise ValueError("compared at batch 1")
    with _gguf(inputs["model"]) as path:  # mapped into memory, the file may go
        length = inputs["input_ids"].shape[1] + ANSWER
        on_gpu = inputs["input_ids"].device.type == "cuda"
        return LlamaDecoder(path, threads=torch.get_num_threads(), context=length, gpu=on_gpu)


def _text_ids(inputs: Inputs) -> list[int]:
    """As many text tokens as the prompt has with its image."""
    ids = inputs["input_ids"][0]
    return (torch.arange(len(ids)) * 97 % _words(inputs["model"].config)).tolist()


def _llama_prefill(inputs: Inputs) -> Candidate:
    decoder, ids = _llama(inputs), _text_ids(inputs)

    def run(_: Any) -> Tensor:
        decoder.prefill(ids)
        return decoder.logits()[None]

    return Candidate(Task(run), lambda: [run(None)])


def _llama_decode_step(inputs: Inputs) -> Candidate:
    decoder, ids = _llama(inputs), _text_ids(inputs)
    decoder.prefill(ids)
    token = int(inputs["suffix"][0, 0])

    def run(_: Any) -> Tensor:
        decoder.decode(token)
        return decoder.logits()[None]

    def rewind() -> None:
        decoder.rewind(len(ids))

    def results() -> list[Tensor]:
        rewind()
        return [run(None)]

    return Candidate(Task(run, rewind), results)


# --- judging


def _causal_logits(inputs: Inputs, *, decode: bool) -> Tensor:
    ids = torch.tensor([_text_ids(inputs)], device=inputs["input_ids"].device)
    if decode:
        ids = torch.cat((ids, inputs["suffix"][:1, :1]), 1)
    with torch.inference_mode(), backend("reference"):
        return inputs["model"](ids, token_type_ids=torch.ones_like(ids), logits_to_keep=1).logits[:, 0].cpu()


def regret(inputs: Inputs, tokens: Tensor) -> float:
    """How much better the best token was than the chosen one, at worst, when the reference reads prompt and tokens [B, T]."""
    training = _training_inputs({**inputs, "suffix": tokens})
    del training["labels"]
    with torch.inference_mode(), backend("reference"):
        logits = inputs["model"](**training, logits_to_keep=tokens.shape[1] + 1).logits[:, :-1].float()
    chosen = logits.gather(2, tokens[..., None])[..., 0]
    return float(((logits.amax(2) - chosen) / logits.std(2)).max())


# --- arithmetic of the definition


def _vision_flops(trial: ModelTrial, batch: int) -> int:
    vision, width = trial.config.vision_config, trial.config.text_config.hidden_size
    n, d = vision.num_image_tokens, vision.hidden_size
    layer = 2 * n * (4 * d * d + 2 * d * vision.intermediate_size) + 4 * n * n * d
    patches = 2 * n * 3 * vision.patch_size**2 * d
    return batch * (patches + vision.num_hidden_layers * layer + 2 * n * d * width)


def _decoder_flops(trial: ModelTrial, batch: int, queries: int, tokens: int, prefix: int, scored: int) -> int:
    """Of each example's `queries` new tokens, the last of `tokens`, of which `scored` go through the output head.

    In generation that is one, and of the other tokens the last layer needs keys and values only.
    """
    text = trial.config.text_config
    q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim

    def layer(wanted: int) -> int:
        pairs = visible_pairs({"queries": wanted, "tokens": tokens, "prefix": prefix})
        products = queries * 2 * kv + wanted * (2 * q + 3 * text.intermediate_size)
        return 2 * text.hidden_size * products + 4 * q * pairs

    layers = (text.num_hidden_layers - 1) * layer(queries) + layer(1 if scored == 1 else queries)
    return batch * (layers + 2 * scored * text.hidden_size * text.vocab_size)


def _cache_bytes(trial: ModelTrial) -> int:
    text = trial.config.text_config
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * trial.dtype.itemsize
    return trial._tokens() * per_token


def _siglip_work(trial: ModelTrial, itemsize: int) -> tuple[int, int]:
    model = trial.shapes.model
    flops = _vision_flops(trial, trial.case.sizes["batch"])
    return itemsize * (_parameters(model.vision_tower) + _parameters(model.multi_modal_projector)), flops


def _prefill_work(trial: ModelTrial, itemsize: int) -> tuple[int, int]:
    prompt = trial.config.vision_config.num_image_tokens + PROMPT
    batch = trial.case.sizes["batch"]
    flops = _vision_flops(trial, batch) + _decoder_flops(trial, batch, prompt, prompt, prompt, 1)
    return itemsize * _parameters(trial.shapes) + _cache_bytes(trial), flops


def _decode_work(trial: ModelTrial, itemsize: int) -> tuple[int, int]:
    prompt = trial.config.vision_config.num_image_tokens + PROMPT
    bytes_ = itemsize * _parameters(trial.shapes.model.language_model) + _cache_bytes(trial)
    return bytes_, _decoder_flops(trial, trial.case.sizes["batch"], 1, prompt + 1, prompt, 1)


def _generate_work(trial: ModelTrial, itemsize: int) -> tuple[int, int]:
    prefill, decode = _prefill_work(trial, itemsize), _decode_work(trial, itemsize)
    return prefill[0] + (ANSWER - 1) * decode[0], prefill[1] + (ANSWER - 1) * decode[1]


def _finetune_work(trial: ModelTrial, itemsize: int) -> tuple[int, int]:
    """Weights are read forward and backward, and gradients written; a backward has twice the products of a forward."""
    prompt = trial.config.vision_config.num_image_tokens + PROMPT
    batch, tokens = trial.case.sizes["batch"], prompt + ANSWER
    flops = _vision_flops(trial, batch) + _decoder_flops(trial, batch, tokens, tokens, prompt, ANSWER)
    return 3 * itemsize * _parameters(trial.shapes), 3 * flops


_WORK: dict[str, Callable[[ModelTrial, int], tuple[int, int]]] = {
    "siglip": _siglip_work,
    "prefill": _prefill_work,
    "decode_step": _decode_work,
    "generate": _generate_work,
    "finetune_step": _finetune_work,
}

STAGES: dict[str, Stage] = {
    "siglip": Stage(_our_siglip, _their_siglip),
    "prefill": Stage(_our_prefill, _their_prefill, _llama_prefill),
    "decode_step": Stage(_our_decode_step, _their_decode_step, _llama_decode_step),
    "generate": Stage(_our_generate, _their_generate),
    "finetune_step": Stage(
        lambda inputs: _finetune_step(inputs["model"], inputs), lambda inputs, model: _finetune_step(model, inputs)
    ),
}
"""By the name that cases use."""
