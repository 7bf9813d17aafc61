"""Trials of the whole model: inputs, contenders, judging, and the arithmetic of each stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pg_kernels import backend
from pg_kernels.benchmarks.cases.catalogue import ANSWER, PROMPT, Case
from pg_kernels.benchmarks.cases.models import holds, model_config, num_parameters, num_text_ids, random_model
from pg_kernels.benchmarks.cases.ops import Draw, Inputs, visible_pairs
from pg_kernels.benchmarks.contenders.llama_cpp_stages import text_ids
from pg_kernels.benchmarks.contenders.ops import Contender
from pg_kernels.benchmarks.contenders.ours import training_inputs
from pg_kernels.benchmarks.contenders.stages import STAGES, stage_contenders
from pg_kernels.benchmarks.measure.timing import Candidate
from pg_kernels.model import PaliGemma

LARGEST_DEVIATION = 0.05
"""The largest deviation of logits, features and gradients, as a relative Frobenius norm.

By rounding to bf16, two right implementations of the 3B model differ by 0.6 to 0.8 % in features and logits and by 1.9 % in
gradients (ours and transformers'). A wrong mask changes logits by far more.
"""
LARGEST_REGRET = 0.1
"""The largest distance of a chosen token's logit from the best one, in standard deviations of the logits; at random it is 4."""


class ModelTrial:
    """A case of the whole model."""

    wall = True

    def __init__(self, case: Case, device: torch.device, *, full: bool = True) -> None:
        self.case, self.device, self.full = case, device, full
        self.config = model_config(case.sizes)
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        with torch.device("meta"):
            self.shapes = PaliGemma(self.config)

    def contenders(self) -> list[Contender]:
        return stage_contenders(self.case, full=self.full)

    def work(self, contender: Contender) -> tuple[int, int]:
        itemsize = 1 if contender.int8_weights else self.dtype.itemsize
        return _WORK[self.case.op](self, itemsize)

    def setup(self) -> tuple[int, int]:
        if self.case.op != "decode_step":
            return 0, 0
        prompt = self.config.vision_config.num_image_tokens + PROMPT
        bytes_ = num_parameters(self.shapes) * self.dtype.itemsize
        return bytes_, _vision_flops(self, 1) + _decoder_flops(self, 1, prompt, prompt, prompt, 1)

    def needed_bytes(self) -> int:
        # Count the int8 copy, too.
        weights = 0 if holds(self.case, self.device) else num_parameters(self.shapes) * (self.dtype.itemsize + 1)
        gradients = num_parameters(self.shapes) * self.dtype.itemsize if self.case.op == "finetune_step" else 0
        # One layer's activations are small beside the weights, but training keeps the activations of all layers.
        kept = self._tokens() * self.config.text_config.intermediate_size * 4 * self.dtype.itemsize
        layers = self.config.text_config.num_hidden_layers if gradients else 2
        return weights + gradients + kept * layers

    def draw(self) -> None:
        model = random_model(self.case, self.device)
        model.set_image_size(self.config.vision_config.image_size)
        draw, batch = Draw(self.dtype, self.device), self.case.sizes["batch"]
        image = self.config.vision_config.num_image_tokens
        words = num_text_ids(self.config)
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
        if self.case.op != "generate":  # generated tokens are judged one by one
            with backend("reference"):
                self.truth = STAGES[self.case.op].ours(self.inputs).results()

    def build(self, contender: Contender) -> list[Candidate]:
        return [contender.build(self.inputs)]

    def error(self, contender: Contender, results: list[Tensor]) -> float:
        if self.case.op == "generate":
            shape = (self.case.sizes["batch"], ANSWER)
            return regret(self.inputs, results[0]) / LARGEST_REGRET if results[0].shape == shape else math.inf
        truth = self.truth
        if contender.package == "llama_cpp":  # llama.cpp runs causally and without an image
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


def _causal_logits(inputs: Inputs, *, decode: bool) -> Tensor:
    ids = torch.tensor([text_ids(inputs)], device=inputs["input_ids"].device)
    if decode:
        ids = torch.cat((ids, inputs["suffix"][:1, :1]), 1)
    with torch.inference_mode(), backend("reference"):
        return inputs["model"](ids, token_type_ids=torch.ones_like(ids), logits_to_keep=1).logits[:, 0].cpu()


def regret(inputs: Inputs, tokens: Tensor) -> float:
    """Return how far at most a chosen token's logit lies below the best one; the reference reads the prompt and tokens [B, T]."""
    training = training_inputs({**inputs, "suffix": tokens})
    del training["labels"]
    with torch.inference_mode(), backend("reference"):
        logits = inputs["model"](**training, logits_to_keep=tokens.shape[1] + 1).logits[:, :-1].float()
    chosen = logits.gather(2, tokens[..., None])[..., 0]
    return float(((logits.amax(2) - chosen) / logits.std(2)).max())


def _vision_flops(trial: ModelTrial, batch: int) -> int:
    vision, width = trial.config.vision_config, trial.config.text_config.hidden_size
    n, d = vision.num_image_tokens, vision.hidden_size
    layer = 2 * n * (4 * d * d + 2 * d * vision.intermediate_size) + 4 * n * n * d
    patches = 2 * n * 3 * vision.patch_size**2 * d
    return batch * (patches + vision.num_hidden_layers * layer + 2 * n * d * width)


def _decoder_flops(trial: ModelTrial, batch: int, queries: int, tokens: int, prefix: int, scored: int) -> int:
    """Return the FLOPs of each example's `queries` new tokens, the last of `tokens`; `scored` of them go through the output head.

    In generation one token is scored, and the last layer computes only keys and values of the other tokens.
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
    return itemsize * (num_parameters(model.vision_tower) + num_parameters(model.multi_modal_projector)), flops


def _prefill_work(trial: ModelTrial, itemsize: int) -> tuple[int, int]:
    prompt = trial.config.vision_config.num_image_tokens + PROMPT
    batch = trial.case.sizes["batch"]
    flops = _vision_flops(trial, batch) + _decoder_flops(trial, batch, prompt, prompt, prompt, 1)
    return itemsize * num_parameters(trial.shapes) + _cache_bytes(trial), flops


def _decode_work(trial: ModelTrial, itemsize: int) -> tuple[int, int]:
    prompt = trial.config.vision_config.num_image_tokens + PROMPT
    bytes_ = itemsize * num_parameters(trial.shapes.model.language_model) + _cache_bytes(trial)
    return bytes_, _decoder_flops(trial, trial.case.sizes["batch"], 1, prompt + 1, prompt, 1)


def _generate_work(trial: ModelTrial, itemsize: int) -> tuple[int, int]:
    prefill, decode = _prefill_work(trial, itemsize), _decode_work(trial, itemsize)
    return prefill[0] + (ANSWER - 1) * decode[0], prefill[1] + (ANSWER - 1) * decode[1]


def _finetune_work(trial: ModelTrial, itemsize: int) -> tuple[int, int]:
    """Return bytes and FLOPs: both passes read the weights, gradients are written, a backward has twice a forward's products."""
    prompt = trial.config.vision_config.num_image_tokens + PROMPT
    batch, tokens = trial.case.sizes["batch"], prompt + ANSWER
    flops = _vision_flops(trial, batch) + _decoder_flops(trial, batch, tokens, tokens, prompt, ANSWER)
    return 3 * itemsize * num_parameters(trial.shapes), 3 * flops


_WORK: dict[str, Callable[[ModelTrial, int], tuple[int, int]]] = {
    "siglip": _siglip_work,
    "prefill": _prefill_work,
    "decode_step": _decode_work,
    "generate": _generate_work,
    "finetune_step": _finetune_work,
}
