"""Text generation: greedy, sampled, or by beams; replayed as CUDA graphs where possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pg_kernels.nn import fuse_qkv_
from pg_kernels.ops._common.devices import on_device_of

from .arguments import check_prompt, integer, number, token_ids
from .beams import beam_search
from .decoding import DecodingSession, GenerationOutput, GenerativeModel, Hooks, SamplingConfig
from .grammar import TokenGrammar
from .graphs import GraphCache, GraphedDecodingSession, capture_unsupported_reason

_CAPACITY_STEP = 128
"""Sessions with CUDA graphs have capacities of multiples of it, so that prompts of other lengths share a session."""


class GraphCachingModel(GenerativeModel):
    """A model that keeps decoding sessions with CUDA graphs."""

    graph_cache: GraphCache[GraphedDecodingSession]


@torch.inference_mode()
def generate(
    model: GraphCachingModel,
    input_ids: Tensor,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    *,
    image_features: Tensor | None = None,
    max_new_tokens: int = 64,
    eos_token_id: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    num_return_sequences: int = 1,
    generator: torch.Generator | None = None,
    grammar: TokenGrammar | None = None,
    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None,
    stop: Callable[[Tensor], Tensor] | None = None,
    stream: Callable[[Tensor], None] | None = None,
    return_scores: bool = False,
    cuda_graph: bool | str = "auto",
) -> Tensor | GenerationOutput:
    """Continue each prompt until it ends or has `max_new_tokens` new tokens.

    Args:
        input_ids, pixel_values, attention_mask, token_type_ids, image_features: as for the model's forward; padding on either
            side.
        max_new_tokens: the most new tokens of each prompt.
        eos_token_id: one id or several that end an answer; default: the configuration's, which may come from the checkpoint's
            generation_config.json. Nothing else of that file is used: lengths, temperature and beams are arguments here;
            penalties, forced and suppressed tokens are not supported.
        temperature: 0 takes the most likely token; above 0, tokens are drawn from softmax(logits / temperature).
        top_k: draw from the k most likely tokens only.
        top_p: draw from the most likely tokens that together reach this probability.
        num_beams: above 1, big_vision's beam search with this many live beams (no length penalty).
        num_return_sequences: answers to each prompt, next to each other in the result: more draws, or the best ended beams.
        generator: makes draws reproducible; it must be on the model's device.
        grammar: allow only the answers of this grammar, such as boxes; see `Processor.grammar`.
        logits_processor: called at each step with the answers so far, int64 [B, T], and the logits fp32 [B, V]; returns the
            logits to use. A transformers LogitsProcessor that looks at new tokens only is one.
        stop: called after each step with the answers so far, int64 [B, T]; returns which of them end here, bool [B]. See
            `Processor.stop_at`.
        stream: called with each step's tokens [B]; prompts that have ended get pad.
        return_scores: also return the log-probability of each token.
        cuda_graph: replay prefill and steps as CUDA graphs. "auto" does so if possible: on a CUDA GPU, without beams, autocast,
            hooks and layers of other packages. True raises if it is not possible; False runs step by step. The model keeps the
            last few sessions, with their caches and graphs, for calls with the same batch size, sampling options and number of
            tokens up to a multiple of 128. The first such call captures the step, and the second one with a prompt of the same
            shape captures its prefill. `model.graph_cache.clear()` frees their memory.

    Returns:
        int64 [B · num_return_sequences, ≤ max_new_tokens]: the new tokens only, the end token included, then the configuration's
        pad. With `return_scores`, a named tuple of these `ids` and fp32 `scores` of the same shape. A score is the
        log-probability of the token in the distribution that it was chosen from: after temperature, top_k, top_p,
        logits_processor and grammar, as transformers' `compute_transition_scores(normalize_logits=True)`. With beams it is
        that of the model's own distribution. After the end it is 0.

    Raises:
        TypeError: an argument of another type.
        ValueError: options out of range or that exclude each other, no graph although `cuda_graph` is True, and what the forward
            raises.
    """
    others = {
        "pixel_values": pixel_values,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "image_features": image_features,
    }
    prompt: Mapping[str, Tensor] = {
        "input_ids": input_ids,
        **{name: tensor for name, tensor in others.items() if tensor is not None},
    }
    check_prompt(prompt)
    max_new_tokens, num_beams = integer("max_new_tokens", max_new_tokens), integer("num_beams", num_beams)
    sampling = SamplingConfig(
        eos_ids=token_ids("eos_token_id", model.config.eos_token_id if eos_token_id is None else eos_token_id),
        temperature=number("temperature", temperature),
        top_k=None if top_k is None else integer("top_k", top_k),
        top_p=None if top_p is None else number("top_p", top_p),
        seeded=generator is not None,
        scores=return_scores,
        grammar=grammar,
    )
    hooks = Hooks(logits_processor, stop, stream)
    num_return_sequences = integer("num_return_sequences", num_return_sequences)
    _check_sampling(sampling)
    _check_grammar(sampling, model)
    _check_length(model, input_ids, max_new_tokens)
    _check_beams(num_beams, num_return_sequences, sampling, hooks)
    _check_generator(generator, input_ids.device)
    for name, hook in vars(hooks).items():
        if hook is not None and not callable(hook):
            raise TypeError(f"{name}: expected a function or None, got {type(hook).__name__}")
    graphed = _is_graphed(model, cuda_graph, num_beams, hooks, input_ids.device)
    with on_device_of(input_ids):
        if num_beams > 1:
            output = beam_search(model, prompt, max_new_tokens, sampling, num_beams, num_return_sequences, hooks)
        else:
            prompt = _repeated(model, prompt, num_return_sequences)
            output = _answer(model, prompt, max_new_tokens, sampling, generator, hooks, graphed)
    return output if return_scores else output.ids


def _answer(
    model: GraphCachingModel,
    prompt: Mapping[str, Tensor],
    max_new_tokens: int,
    sampling: SamplingConfig,
    generator: torch.Generator | None,
    hooks: Hooks,
    graphed: bool,
) -> GenerationOutput:
    """Answer greedily or by draws, in a new session or in one with CUDA graphs that the model keeps."""
    arguments = (model, prompt, generator, max_new_tokens, hooks)
    batch, prompt_len = prompt["input_ids"].shape
    capacity = prompt_len + max_new_tokens
    if not graphed:
        return DecodingSession(model, batch, capacity, sampling).answer(*arguments)
    capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
    key = (batch, capacity, sampling)
    session = model.graph_cache.of(model).take(key)
    if session is None:
        fuse_qkv_(model)
        model.graph_cache.of(model)  # fusing moves weights, which empties the cache
        session = GraphedDecodingSession(model, batch, capacity, sampling)
    answer = session.answer(*arguments)
    model.graph_cache.put(key, session)  # not after an error, which may leave the session in any state
    return answer


def _check_sampling(sampling: SamplingConfig) -> None:
    if not sampling.temperature >= 0:
        raise ValueError(f"temperature: expected 0 or more, got {sampling.temperature}")
    if sampling.top_k is not None and sampling.top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {sampling.top_k}")
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {sampling.top_p}")
    if sampling.temperature == 0 and (sampling.top_k is not None or sampling.top_p is not None):
        raise ValueError("top_k and top_p: they need a temperature above 0")


def _check_length(model: GenerativeModel, input_ids: Tensor, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    limit = model.config.text_config.max_position_embeddings
    if input_ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens: {input_ids.shape[1]} prompt tokens and {max_new_tokens} new ones are more than the "
            f"model's {limit} positions"
        )


def _check_beams(num_beams: int, num_return_sequences: int, sampling: SamplingConfig, hooks: Hooks) -> None:
    if num_beams < 1:
        raise ValueError(f"num_beams: expected at least 1, got {num_beams}")
    if num_beams > 1 and (sampling.temperature > 0 or hooks.stream is not None or hooks.stop is not None):
        raise ValueError("num_beams: beam search neither draws (temperature), streams nor stops (stop)")
    if num_return_sequences < 1:
        raise ValueError(f"num_return_sequences: expected at least 1, got {num_return_sequences}")
    if num_beams > 1 and num_return_sequences > num_beams:
        raise ValueError(f"num_return_sequences: {num_return_sequences} are more than the {num_beams} beams")
    if num_beams == 1 and num_return_sequences > 1 and sampling.temperature == 0:
        raise ValueError("num_return_sequences: several answers need a temperature above 0 or beams")


def _check_grammar(sampling: SamplingConfig, model: GenerativeModel) -> None:
    grammar, vocabulary = sampling.grammar, model.config.text_config.vocab_size
    if grammar is None:
        return
    if not isinstance(grammar, TokenGrammar):
        raise TypeError(f"grammar: expected a TokenGrammar or None, got {type(grammar).__name__}")
    largest = max(int(ids.max()) for ids in (grammar.location_ids, grammar.code_ids, grammar.text_ids))
    if largest >= vocabulary:
        raise ValueError(f"grammar: its ids go up to {largest}, but the model's vocabulary has {vocabulary} tokens")
    if not any(0 <= eos_id < vocabulary for eos_id in sampling.eos_ids):
        raise ValueError(f"eos_token_id: a grammar needs one in [0, {vocabulary}), got {sampling.eos_ids}")


def _repeated(model: GenerativeModel, prompt: Mapping[str, Tensor], count: int) -> Mapping[str, Tensor]:
    """Repeat each prompt `count` times. Its images are encoded once."""
    if count == 1:
        return prompt
    repeated = dict(prompt)
    pixels, features = repeated.pop("pixel_values", None), repeated.pop("image_features", None)
    if pixels is not None:
        features = model.get_image_features(pixels)
    repeated = {name: tensor.repeat_interleave(count, 0) for name, tensor in repeated.items()}
    if features is not None:
        placeholders = (prompt["input_ids"] == model.config.image_token_id).sum(1)
        images = (placeholders // features.shape[1]).tolist()
        if sum(images) != len(features):
            raise ValueError(f"input_ids: placeholders of {sum(images)} images, but there are {len(features)} images")
        repeated["image_features"] = torch.cat([part for part in features.split(images) for _ in range(count)])
    return repeated


def _check_generator(generator: Any, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(getattr(generator, "device", None), torch.device):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    if generator.device.type != device.type:
        raise ValueError(f"generator: expected one on {device.type}, as the model, got one on {generator.device.type}")


def _is_graphed(
    model: GenerativeModel, cuda_graph: bool | str, num_beams: int, hooks: Hooks, device: torch.device
) -> bool:
    """Return whether to replay CUDA graphs. Raises ValueError if they are asked for but not possible."""
    if not isinstance(cuda_graph, bool) and cuda_graph != "auto":
        raise ValueError(f"cuda_graph: expected 'auto', True or False, got {cuda_graph!r}")
    if num_beams > 1:
        reason: str | None = "beam search reorders its cache"
    elif hooks.logits_processor is not None:
        reason = "the logits_processor runs on the host"
    else:
        reason = capture_unsupported_reason(model, device)
    if cuda_graph is True and reason is not None:
        raise ValueError(f"cuda_graph: there can be none here: {reason}")
    return reason is None and cuda_graph is not False
