"""Decoding with a cache: one prefill over the bidirectional prompt, then a step for each token, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cache import AttentionLengths, KVCache
from .config import PaliGemmaConfig
from .grammar import GrammarState, TokenGrammar


class GenerativeModel(nn.Module):
    """What decoding needs of a model."""

    config: PaliGemmaConfig
    model: Any
    """Holds the decoder, `language_model`."""

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None, image_features: Tensor | None) -> Tensor:
        """Embed tokens [B, S] to [B, S, D], image features in the places of their placeholders."""
        raise NotImplementedError

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Encode and project images: [n, 3, H, W] to [n, N, D]."""
        raise NotImplementedError

    def attention_lengths(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> tuple[AttentionLengths, Tensor]:
        """Return the attention's lengths and the rotary positions [B, S] for masks [B, S]."""
        raise NotImplementedError

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Return an empty cache for `batch` rows of `capacity` tokens."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Score hidden states [..., D] over the vocabulary: fp32 [..., V]."""
        raise NotImplementedError

    def topk_logits(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest logits, fp32 [..., k] in descending order, and their ids [..., k]."""
        raise NotImplementedError


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen from logits, and which tokens end an answer."""

    eos_ids: tuple[int, ...]
    temperature: float
    top_k: int | None
    top_p: float | None
    seeded: bool
    """Whether every call brings a generator."""
    scores: bool = False
    """Whether to keep the log-probability of each chosen token."""
    grammar: TokenGrammar | None = None
    """The answers that are allowed; None allows all."""


@dataclass(frozen=True)
class Hooks:
    """A caller's functions of the answers so far, int64 [B, T]. They run on the host, so that a step cannot be captured."""

    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None
    """Returns the logits [B, V] to use instead of the given ones."""
    stop: Callable[[Tensor], Tensor] | None = None
    """Returns which answers end here, bool [B]."""
    stream: Callable[[Tensor], None] | None = None
    """Is called with each step's tokens [B]."""


class GenerationOutput(NamedTuple):
    """New tokens with their scores."""

    ids: Tensor
    """int64 [B, T]: the end token included, then the pad token."""
    scores: Tensor
    """fp32 [B, T]: the log-probability of each token in the distribution that it was chosen from; 0 after the end."""


class Decoder:
    """A batch of sequences with their cache, in tensors that stay in place. Each step appends `tokens`, one for each row.

    It does not hold the model: the model may hold it.
    """

    def __init__(self, model: GenerativeModel, batch: int, capacity: int) -> None:
        self.cache = model.new_cache(batch, capacity)
        device = self.cache.keys.device
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.lengths = AttentionLengths(*(torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(4)))

    def prefill(self, model: GenerativeModel, prompt: Mapping[str, Tensor]) -> Tensor:
        """Read prompts [B, S], the arguments of `generate` by name, and return the hidden states [B, D] of their last tokens."""
        input_ids = prompt["input_ids"]
        embeddings = model.embed(input_ids, prompt.get("pixel_values"), prompt.get("image_features"))
        masks = (prompt.get("attention_mask"), prompt.get("token_type_ids"))
        lengths, positions = model.attention_lengths(input_ids, *masks)
        for name, length in vars(lengths).items():
            getattr(self.lengths, name).copy_(length)
        cache_positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(len(input_ids), -1)
        last = (lengths.kv_lens - 1).clamp(min=0).long()
        return model.model.language_model(embeddings, positions, lengths, self.cache, cache_positions, last)[:, 0]

    def step(self, model: GenerativeModel) -> Tensor:
        """Append `tokens`, each after its row's last token (over right padding), and return their hidden states [B, D]."""
        lengths = self.lengths
        lengths.q_starts.copy_(lengths.kv_lens)
        lengths.kv_lens.add_(1)
        embeddings = model.model.language_model.embed(self.tokens[:, None])
        cache_positions = lengths.q_starts[:, None]
        positions = cache_positions - lengths.kv_starts[:, None]
        return model.model.language_model(embeddings, positions, lengths, self.cache, cache_positions.long())[:, 0]

    def select_rows(self, rows: Tensor) -> None:
        """Continue with the batch's rows `rows` (int64 [B']), which may repeat."""
        self.cache.select_rows(rows)
        self.tokens = self.tokens[rows]
        self.lengths = AttentionLengths(*(length[rows] for length in vars(self.lengths).values()))


class DecodingSession:
    """A batch of prompts of one size being answered, again and again: its cache, and the answers so far.

    All state lies in tensors that stay in place, so that `prefill` and `step` can be captured as CUDA graphs (see graphs.py).
    """

    def __init__(self, model: GenerativeModel, batch: int, capacity: int, sampling: SamplingConfig) -> None:
        self.decoder = Decoder(model, batch, capacity)
        self.sampling = sampling
        device = self.decoder.tokens.device
        self.generator = torch.Generator(device) if sampling.seeded else None
        """The session's own generator, which takes the caller's state: a captured graph draws from one generator only."""
        self._pad = model.config.pad_token_id
        self._eos_ids = torch.tensor(sampling.eos_ids, device=device)
        self._answers = torch.full((batch, capacity), self._pad, device=device)
        self._num_steps = torch.zeros(1, dtype=torch.int64, device=device)
        self._scores = torch.zeros(batch, capacity if sampling.scores else 0, device=device)
        self._grammar = (
            None
            if sampling.grammar is None
            else GrammarState(sampling.grammar, sampling.eos_ids, batch, model.config.text_config.vocab_size, device)
        )
        self._lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self._finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self._process: Callable[[Tensor, Tensor], Tensor] | None = None
        self._count = 0

    def answer(
        self,
        model: GenerativeModel,
        prompt: Mapping[str, Tensor],
        generator: torch.Generator | None,
        max_new_tokens: int,
        hooks: Hooks = Hooks(),  # noqa: B008
    ) -> GenerationOutput:
        """Continue each prompt: T ≤ max_new_tokens. Without `sampling.scores` the scores are empty."""
        if self.generator is not None and generator is not None:
            self.generator.set_state(generator.get_state())
        if self._grammar is not None:
            self._grammar.start(max_new_tokens)
        self._process, self._count = hooks.logits_processor, 0
        self.prefill(model, prompt)
        interval = _steps_between_checks(self._finished.device, hooks)
        for count in range(1, max_new_tokens + 1):
            if hooks.stop is not None:
                self._finished |= hooks.stop(self._answers[:, :count])
            if hooks.stream is not None:
                hooks.stream(self.decoder.tokens.clone())
            if count == max_new_tokens or (count % interval == 0 and bool(self._finished.all())):
                break
            self.step(model)
        if self.generator is not None and generator is not None:
            generator.set_state(self.generator.get_state())
        longest = int(self._lengths.max())
        return GenerationOutput(self._answers[:, :longest].clone(), self._scores[:, :longest].clone())

    def prefill(self, model: GenerativeModel, prompt: Mapping[str, Tensor]) -> None:
        """Read the prompts, the arguments of `generate` by name, and choose the first token of each answer."""
        self._num_steps.zero_()
        self._lengths.zero_()
        self._finished.zero_()
        self._append(model, self.decoder.prefill(model, prompt))

    def step(self, model: GenerativeModel) -> None:
        """Choose the next token of each answer."""
        self._append(model, self.decoder.step(model))

    def _adjustment(self) -> Callable[[Tensor], Tensor] | None:
        """Return the function that changes the logits: the caller's, then the grammar's mask. None changes nothing."""
        process, grammar = self._process, self._grammar
        if process is None:
            return None if grammar is None else grammar.mask
        answers = self._answers[:, : self._count]

        def adjust(logits: Tensor) -> Tensor:
            logits = process(answers, logits)
            return logits if grammar is None else grammar.mask(logits)

        return adjust

    def _append(self, model: GenerativeModel, hidden: Tensor) -> None:
        """Choose the token after each hidden state [B, D] and append it to its answer; pad after the end."""
        token, score = choose_tokens(model, hidden, self.sampling, self.generator, self._adjustment())
        token = token.masked_fill(self._finished, self._pad)
        self._answers.index_copy_(1, self._num_steps, token[:, None])
        if score is not None:
            self._scores.index_copy_(1, self._num_steps, score.masked_fill(self._finished, 0.0)[:, None])
        if self._grammar is not None:
            self._grammar.advance(token)
        self._count += 1
        self._num_steps.add_(1)
        self._lengths.add_(~self._finished)
        self._finished |= (token[:, None] == self._eos_ids).any(1)
        self.decoder.tokens.copy_(token)


def _steps_between_checks(device: torch.device, hooks: Hooks) -> int:
    """Return after how many steps to check whether all answers have ended. Each check synchronises the host with the device."""
    return 1 if device.type == "cpu" or hooks != Hooks() else 8


def choose_tokens(
    model: GenerativeModel,
    hidden: Tensor,
    sampling: SamplingConfig,
    generator: torch.Generator | None,
    adjust: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Choose the token [B] after each hidden state [B, D]. Return it and, with `sampling.scores`, its log-probability [B].

    `adjust` changes the logits [B, V] before the choice.
    """
    greedy, ids = sampling.temperature == 0, None
    # The log-probability of the most likely token needs the sum over all logits, the choice alone does not.
    k = sampling.top_k if not greedy else None if sampling.scores else 1
    if adjust is None and k is not None:
        logits, ids = model.topk_logits(hidden, min(k, model.config.text_config.vocab_size))
    else:
        logits = model.logits(hidden)
        logits = logits if adjust is None else adjust(logits)
        if k is not None:
            logits, ids = logits.topk(min(k, logits.shape[-1]))
    if greedy:
        column = logits.argmax(-1)
    else:
        logits = _nucleus(logits / sampling.temperature, sampling.top_p)
        column = _draw(logits, generator)
    score = logits.log_softmax(-1).gather(1, column[:, None])[:, 0] if sampling.scores else None
    return column if ids is None else ids.gather(1, column[:, None])[:, 0], score


def _nucleus(logits: Tensor, top_p: float | None) -> Tensor:
    """Mask all logits but those of the most likely tokens that together reach the probability `top_p`."""
    if top_p is None:
        return logits
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    # A token is kept if the tokens before it sum to less than top_p, so the most likely one is always kept.
    beyond = ordered.cumsum(-1) - ordered >= top_p
    return logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float("-inf"))


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a column [B] from each row of logits [B, n]."""
    # torch.multinomial draws the same way, but checks the probabilities first, which synchronises with the device.
    probabilities = logits.softmax(-1)
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1)
