"""Text generation: greedy, sampled, or by beams; replayed as CUDA graphs where possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pg_kernels.nn import fuse_qkv_
from pg_kernels.ops._common.devices import on_device_of

from .arguments import check_prompt, integer, number, token_ids
from .decoding import Decoder, DecodingSession, GenerativeModel, SamplingConfig
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
    generator: torch.Generator | None = None,
    stream: Callable[[Tensor], None] | None = None,
    cuda_graph: bool | str = "auto",
) -> Tensor:
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
        generator: makes draws reproducible; it must be on the model's device.
        stream: called with each step's tokens [B]; prompts that have ended get pad.
        cuda_graph: replay prefill and steps as CUDA graphs. "auto" does so if possible: on a CUDA GPU, without beams, autocast,
            hooks and layers of other packages. True raises if it is not possible; False runs step by step. The model keeps the
            last few sessions, with their caches and graphs, for calls with the same batch size, sampling options and number of
            tokens up to a multiple of 128. The first such call captures the step, and the second one with a prompt of the same
            shape captures its prefill. `model.graph_cache.clear()` frees their memory.

    Returns:
        int64 [B, ≤ max_new_tokens]: the new tokens only, the end token included, then the configuration's pad.

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
    prompt = {"input_ids": input_ids, **{name: tensor for name, tensor in others.items() if tensor is not None}}
    check_prompt(prompt)
    max_new_tokens, num_beams = integer("max_new_tokens", max_new_tokens), integer("num_beams", num_beams)
    sampling = SamplingConfig(
        eos_ids=token_ids("eos_token_id", model.config.eos_token_id if eos_token_id is None else eos_token_id),
        temperature=number("temperature", temperature),
        top_k=None if top_k is None else integer("top_k", top_k),
        top_p=None if top_p is None else number("top_p", top_p),
        seeded=generator is not None,
    )
    _check_sampling(sampling)
    _check_length(model, input_ids, max_new_tokens)
    _check_beams(num_beams, sampling, stream)
    _check_generator(generator, input_ids.device)
    if stream is not None and not callable(stream):
        raise TypeError(f"stream: expected a function or None, got {type(stream).__name__}")
    graphed = _is_graphed(model, cuda_graph, num_beams, input_ids.device)
    with on_device_of(input_ids):
        if num_beams > 1:
            return _beam_search(model, prompt, max_new_tokens, sampling.eos_ids, num_beams)
        arguments = (model, prompt, generator, max_new_tokens, stream)
        batch, capacity = len(input_ids), input_ids.shape[1] + max_new_tokens
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


def _check_beams(num_beams: int, sampling: SamplingConfig, stream: object) -> None:
    if num_beams < 1:
        raise ValueError(f"num_beams: expected at least 1, got {num_beams}")
    if num_beams > 1 and (sampling.temperature > 0 or stream is not None):
        raise ValueError("num_beams: beam search neither draws (temperature) nor streams")


def _check_generator(generator: Any, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(getattr(generator, "device", None), torch.device):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    if generator.device.type != device.type:
        raise ValueError(f"generator: expected one on {device.type}, as the model, got one on {generator.device.type}")


def _is_graphed(model: GenerativeModel, cuda_graph: bool | str, num_beams: int, device: torch.device) -> bool:
    """Return whether to replay CUDA graphs. Raises ValueError if they are asked for but not possible."""
    if not isinstance(cuda_graph, bool) and cuda_graph != "auto":
        raise ValueError(f"cuda_graph: expected 'auto', True or False, got {cuda_graph!r}")
    reason = "beam search reorders its cache" if num_beams > 1 else capture_unsupported_reason(model, device)
    if cuda_graph is True and reason is not None:
        raise ValueError(f"cuda_graph: there can be none here: {reason}")
    return reason is None and cuda_graph is not False


@dataclass
class _Ended:
    """The best ended sequence of each prompt so far: scores [B] and tokens [B, max_new_tokens]."""

    scores: Tensor
    tokens: Tensor


def _beam_search(
    model: GenerativeModel,
    prompt: Mapping[str, Tensor],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    num_beams: int,
) -> Tensor:
    """Keep the `num_beams` best unfinished sequences. At every step each of them may also end; keep the best ended one.

    A prompt is done once no live beam scores above its best ended sequence: more tokens only lower a score.
    """
    batch, prompt_len = prompt["input_ids"].shape
    vocabulary, pad, device = model.config.text_config.vocab_size, model.config.pad_token_id, prompt["input_ids"].device
    ends = torch.tensor([eos_id for eos_id in eos_ids if 0 <= eos_id < vocabulary], device=device)
    if not len(ends):
        raise ValueError(f"eos_token_id: beam search needs one in [0, {vocabulary}), got {eos_ids}")
    decoder = Decoder(model, batch, prompt_len + max_new_tokens)
    hidden = decoder.prefill(model, prompt)
    decoder.select_rows(torch.arange(batch, device=device).repeat_interleave(num_beams))
    live = torch.full((batch, num_beams), float("-inf"), device=device)
    live[:, 0] = 0.0
    tokens = torch.full((batch, num_beams, max_new_tokens), pad, device=device)
    best = _Ended(torch.full((batch,), float("-inf"), device=device), tokens[:, 0].clone())
    hidden = hidden.repeat_interleave(num_beams, 0)
    examples = torch.arange(batch, device=device)[:, None]
    for step in range(max_new_tokens):
        log_probs = model.logits(hidden).log_softmax(-1)
        scores = live[:, :, None] + log_probs.view(batch, num_beams, vocabulary)
        _end_beams(best, scores[:, :, ends], tokens, ends, step)
        scores[:, :, ends] = float("-inf")
        live, flat = scores.flatten(1).topk(num_beams)
        if step + 1 == max_new_tokens or bool((live[:, 0] <= best.scores).all()):
            break
        parents, chosen = flat // vocabulary, flat % vocabulary
        tokens = tokens[examples, parents]
        tokens[:, :, step] = chosen
        decoder.select_rows((examples * num_beams + parents).flatten())
        decoder.tokens.copy_(chosen.flatten())
        hidden = decoder.step(model)
    length = int((best.tokens != pad).sum(1).max())
    return best.tokens[:, : max(length, 1)]


def _end_beams(best: _Ended, scores: Tensor, tokens: Tensor, ends: Tensor, step: int) -> None:
    """Let every live beam end now with its most likely end token; scores [B, beams, ends]."""
    score, flat = scores.flatten(1).max(1)
    better = score > best.scores
    ended = tokens[torch.arange(len(flat), device=flat.device), flat // len(ends)]
    ended[:, step] = ends[flat % len(ends)]
    best.scores = torch.where(better, score, best.scores)
    best.tokens = torch.where(better[:, None], ended, best.tokens)
