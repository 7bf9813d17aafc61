"""The whole model's stages on transformers' PaliGemma, around our parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pg_kernels.benchmarks.cases.catalogue import ANSWER
from pg_kernels.benchmarks.cases.ops import Inputs
from pg_kernels.benchmarks.contenders.ours import first_example, inference, prompt
from pg_kernels.benchmarks.measure.timing import Candidate
from pg_kernels.model import PaliGemma


def transformers_model(ours: PaliGemma, attention: str) -> Any:
    """Return transformers' PaliGemma around our parameters."""
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


def siglip(inputs: Inputs, model: Any) -> Candidate:
    def encode() -> Tensor:
        features = model.get_image_features(inputs["pixel_values"])
        return features if isinstance(features, Tensor) else features.pooler_output

    return inference(encode)


def prefill(inputs: Inputs, model: Any) -> Candidate:
    return inference(lambda: model(**prompt(inputs), use_cache=True, logits_to_keep=1).logits[:, -1].float())


def decode_step(inputs: Inputs, model: Any) -> Candidate:
    with torch.inference_mode():
        first = prompt(first_example(inputs))
        cache = model(**first, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(inputs["suffix"]))
    length, token = inputs["input_ids"].shape[1], inputs["suffix"][:, :1]
    mask = torch.ones(len(token), length + 1, dtype=torch.int64, device=token.device)
    step = {"input_ids": token, "attention_mask": mask, "past_key_values": cache, "use_cache": True}

    def rewind() -> None:
        if cache.get_seq_length() > length:
            cache.crop(length - cache.get_seq_length())  # newer versions accept only negative numbers

    return inference(lambda: model(**step).logits[:, -1].float(), rewind)


def generate(inputs: Inputs, model: Any, **options: Any) -> Candidate:
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, **options}
    return inference(lambda: model.generate(**prompt(inputs), **options)[:, length:])


def compiled_generation(inputs: Inputs) -> Candidate:
    if inputs["input_ids"].device.type != "cuda":
        raise ValueError("transformers compiles on CUDA only")
    return generate(inputs, transformers_model(inputs["model"], "sdpa"), cache_implementation="static")
