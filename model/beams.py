"""Beam search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .decoding import Decoder, GenerationOutput, GenerativeModel, Hooks, SamplingConfig
from .grammar import GrammarState


@dataclass
class _Ended:
    """The best ended sequences of each prompt so far, best first: totals [B, R], tokens and scores [B, R, max_new_tokens]."""

    totals: Tensor
    tokens: Tensor
    scores: Tensor


def beam_search(
    model: GenerativeModel,
    prompt: Mapping[str, Tensor],
    max_new_tokens: int,
    sampling: SamplingConfig,
    num_beams: int,
    num_return_sequences: int,
    hooks: Hooks,
) -> GenerationOutput:
    """Keep the `num_beams` best unfinished sequences. At every step each of them may also end; keep the best ended ones.

    A prompt is done once no live beam scores above its worst kept sequence: more tokens only lower a score.
    """
    batch, prompt_len = prompt["input_ids"].shape
    vocabulary, pad, device = model.config.text_config.vocab_size, model.config.pad_token_id, prompt["input_ids"].device
    ends = torch.tensor([eos_id for eos_id in sampling.eos_ids if 0 <= eos_id < vocabulary], device=device)
    if not len(ends):
        raise ValueError(f"eos_token_id: beam search needs one in [0, {vocabulary}), got {sampling.eos_ids}")
    decoder = Decoder(model, batch, prompt_len + max_new_tokens)
    hidden = decoder.prefill(model, prompt)
    decoder.select_rows(torch.arange(batch, device=device).repeat_interleave(num_beams))
    grammar = None
    if sampling.grammar is not None:
        grammar = GrammarState(sampling.grammar, sampling.eos_ids, batch * num_beams, vocabulary, device)
        grammar.start(max_new_tokens)
    live = torch.full((batch, num_beams), float("-inf"), device=device)
    live[:, 0] = 0.0
    tokens = torch.full((batch, num_beams, max_new_tokens), pad, device=device)
    scores = torch.zeros(tokens.shape, device=device)
    kept = (slice(None), slice(num_return_sequences))
    best = _Ended(torch.full_like(live[kept], float("-inf")), tokens[kept].clone(), scores[kept].clone())
    hidden = hidden.repeat_interleave(num_beams, 0)
    examples = torch.arange(batch, device=device)[:, None]
    for step in range(max_new_tokens):
        log_probs = model.logits(hidden).log_softmax(-1)
        if hooks.logits_processor is not None:
            log_probs = hooks.logits_processor(tokens.flatten(0, 1)[:, :step], log_probs)
        if grammar is not None:
            log_probs = grammar.mask(log_probs)
        log_probs = log_probs.view(batch, num_beams, vocabulary)
        best = _end_beams(best, live, log_probs, tokens, scores, ends, step)
        totals = live[:, :, None] + log_probs
        totals[:, :, ends] = float("-inf")
        live, flat = totals.flatten(1).topk(num_beams)
        if step + 1 == max_new_tokens or bool((live[:, 0] <= best.totals[:, -1]).all()):
            break
        parents, chosen = flat // vocabulary, flat % vocabulary
        tokens, scores = tokens[examples, parents], scores[examples, parents]
        tokens[:, :, step] = chosen
        scores[:, :, step] = log_probs.flatten(1).gather(1, flat)
        rows = (examples * num_beams + parents).flatten()
        decoder.select_rows(rows)
        decoder.tokens.copy_(chosen.flatten())
        if grammar is not None:
            grammar.select_rows(rows)
            grammar.advance(decoder.tokens)
        hidden = decoder.step(model)
    length = max(int((best.tokens != pad).sum(-1).max()), 1)
    return GenerationOutput(best.tokens.flatten(0, 1)[:, :length], best.scores.flatten(0, 1)[:, :length])


def _end_beams(
    best: _Ended, live: Tensor, log_probs: Tensor, tokens: Tensor, scores: Tensor, ends: Tensor, step: int
) -> _Ended:
    """Return the best sequences if every live beam may also end now, with each end token."""
    ending = log_probs[:, :, ends]  # [B, beams, ends]
    totals = torch.cat((best.totals, (live[:, :, None] + ending).flatten(1)), 1)
    ended = tokens[:, :, None].repeat(1, 1, len(ends), 1)
    ended[..., step] = ends
    ended_scores = scores[:, :, None].repeat(1, 1, len(ends), 1)
    ended_scores[..., step] = ending
    totals, order = totals.sort(dim=1, descending=True, stable=True)
    kept, order = best.totals.shape[1], order[..., None]
    all_tokens, all_scores = (
        torch.cat((old, new.flatten(1, 2)), 1) for old, new in ((best.tokens, ended), (best.scores, ended_scores))
    )
    chosen = order[:, :kept].expand(-1, -1, tokens.shape[-1])
    return _Ended(totals[:, :kept], all_tokens.gather(1, chosen), all_scores.gather(1, chosen))
