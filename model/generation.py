"""Text generation: one prefill over the bidirectional prompt, then cached decoding; greedy, sampled, or by beams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .gemma import KVCache, Visibility

if TYPE_CHECKING:
    from .paligemma import PaliGemma


@torch.inference_mode()
def generate(
    model: PaliGemma,
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
) -> Tensor:
    """Continue each prompt until it ends or `max_new_tokens` are there.

    Args:
        input_ids, pixel_values, attention_mask, token_type_ids, image_features: as for the model's forward; padding on either
            side.
        max_new_tokens: at most so many tokens for each prompt.
        eos_token_id: one id or several that end an answer; default: the configuration's.
        temperature: 0 takes the likeliest token; above it, tokens are drawn from softmax(logits / temperature).
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens that together reach this probability.
        num_beams: above 1, big_vision's beam search with so many live beams (no length penalty).
        generator: makes draws reproducible; it lives on the model's device.
        stream: called with each step's tokens [B] as they come; pad for prompts that have ended.

    Returns:
        int64 [B, ≤ max_new_tokens]: new tokens only, the end token included, the configuration's pad after it.

    Raises:
        ValueError: options out of range or that exclude each other, and whatever the forward refuses.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    if num_beams < 1:
        raise ValueError(f"num_beams: expected at least 1, got {num_beams}")
    if num_beams > 1 and (temperature > 0 or stream is not None):
        raise ValueError("num_beams: beam search neither draws (temperature) nor streams")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p: they need a temperature above 0")
    limit = model.config.text_config.max_position_embeddings
    if input_ids.dim() == 2 and input_ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens: {input_ids.shape[1]} prompt tokens and {max_new_tokens} new ones are more than the "
            f"model's {limit} positions"
        )
    end_ids = model.config.eos_token_id if eos_token_id is None else eos_token_id
    ends = torch.tensor([end_ids] if isinstance(end_ids, int) else list(end_ids), device=input_ids.device)
    decoder = Decoder(model, max_new_tokens)
    hidden = decoder.prefill(input_ids, pixel_values, attention_mask, token_type_ids, image_features)
    if num_beams > 1:
        return _beam_search(decoder, hidden, max_new_tokens, ends, num_beams)

    pad = model.config.pad_token_id
    finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    tokens: list[Tensor] = []
    while True:
        token = _choose(model, hidden, temperature, top_k, top_p, generator).masked_fill(finished, pad)
        tokens.append(token)
        if stream is not None:
            stream(token)
        finished |= torch.isin(token, ends)
        if len(tokens) == max_new_tokens or bool(finished.all()):
            return torch.stack(tokens, 1)
        hidden = decoder.step(token)


class Decoder:
    """A batch of sequences with their cache: each step feeds one token a row and gives the state that predicts the next one."""

    cache: KVCache
    visible: Visibility

    def __init__(self, model: PaliGemma, max_new_tokens: int) -> None:
        self.model = model
        self.max_new_tokens = max_new_tokens

    def prefill(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        image_features: Tensor | None,
    ) -> Tensor:
        """Take the prompts [B, S] and give the hidden states [B, D] of their last tokens."""
        batch, length = input_ids.shape
        embeddings = self.model.embed(input_ids, pixel_values, image_features)
        self.visible, positions = self.model.visibility(input_ids, attention_mask, token_type_ids)
        self.cache = self.model.new_cache(batch, length + self.max_new_tokens)
        slots = torch.arange(length, device=input_ids.device).expand(batch, -1)
        last = (self.visible.kv_lens - 1).clamp(min=0).long()
        return self.model.model.language_model(embeddings, positions, self.visible, self.cache, slots, last)[:, 0]

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens [B], each right behind its row's last one (over right padding), and give their states [B, D]."""
        slots = self.visible.kv_lens
        self.visible = replace(self.visible, kv_lens=slots + 1, q_starts=slots)
        embeddings = self.model.model.language_model.embed(tokens[:, None])
        positions = (slots - self.visible.kv_starts)[:, None]
        return self.model.model.language_model(embeddings, positions, self.visible, self.cache, slots[:, None].long())[
            :, 0
        ]

    def select_rows(self, rows: Tensor) -> None:
        """Continue with these rows (int64 [B']) of the batch, some perhaps repeated."""
        self.cache.select_rows(rows)
        visible = self.visible
        self.visible = Visibility(
            visible.prefix_lens[rows], visible.kv_starts[rows], visible.kv_lens[rows], visible.q_starts[rows]
        )


def _choose(
    model: PaliGemma,
    hidden: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Pick the token [B] after each hidden state [B, D]."""
    if temperature == 0:
        return model.likeliest(hidden, 1)[1][:, 0]
    if top_k is None:
        return _draw(model.logits(hidden) / temperature, top_p, generator)
    logits, ids = model.likeliest(hidden, min(top_k, model.config.text_config.vocab_size))
    return ids.gather(1, _draw(logits / temperature, top_p, generator)[:, None])[:, 0]


def _draw(logits: Tensor, top_p: float | None, generator: torch.Generator | None) -> Tensor:
    """Draw a column [B] from each row of logits [B, n]."""
    if top_p is not None:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        # A token stays when those before it fall short of top_p, so the likeliest always does.
        beyond = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@dataclass
class _Finished:
    """The best ended sequence of each prompt so far: its score [B] and its tokens [B, max_new_tokens]."""

    scores: Tensor
    tokens: Tensor


def _beam_search(decoder: Decoder, hidden: Tensor, max_new_tokens: int, ends: Tensor, beams: int) -> Tensor:
    """Keep the `beams` best unfinished sequences; at every step each of them may also end, and the best ended one is kept.

    A prompt is done once no live beam scores above its best ended sequence: more tokens only lower a score.
    """
    pad, device = decoder.model.config.pad_token_id, hidden.device
    batch, vocabulary = len(hidden), decoder.model.config.text_config.vocab_size
    decoder.select_rows(torch.arange(batch, device=device).repeat_interleave(beams))
    live = torch.full((batch, beams), float("-inf"), device=device)
    live[:, 0] = 0.0
    tokens = torch.full((batch, beams, max_new_tokens), pad, device=device)
    best = _Finished(torch.full((batch,), float("-inf"), device=device), tokens[:, 0].clone())
    hidden = hidden.repeat_interleave(beams, 0)
    examples = torch.arange(batch, device=device)[:, None]
    for step in range(max_new_tokens):
        log_probs = decoder.model.logits(hidden).log_softmax(-1)
        scores = live[:, :, None] + log_probs.view(batch, beams, vocabulary)
        _finish(best, scores[:, :, ends], tokens, ends, step)
        scores[:, :, ends] = float("-inf")
        live, flat = scores.flatten(1).topk(beams)
        if step + 1 == max_new_tokens or bool((live[:, 0] <= best.scores).all()):
            break
        parents, chosen = flat // vocabulary, flat % vocabulary
        tokens = tokens[examples, parents]
        tokens[:, :, step] = chosen
        decoder.select_rows((examples * beams + parents).flatten())
        hidden = decoder.step(chosen.flatten())
    length = int((best.tokens != pad).sum(1).max())
    return best.tokens[:, : max(length, 1)]


def _finish(best: _Finished, scores: Tensor, tokens: Tensor, ends: Tensor, step: int) -> None:
    """Let every live beam end now with its likeliest end token; scores [B, beams, ends]."""
    score, flat = scores.flatten(1).max(1)
    better = score > best.scores
    ended = tokens[torch.arange(len(flat), device=flat.device), flat // len(ends)]
    ended[:, step] = ends[flat % len(ends)]
    best.scores = torch.where(better, score, best.scores)
    best.tokens = torch.where(better[:, None], ended, best.tokens)
