"""Text generation: one prefill over the bidirectional prompt, then cached decoding; greedy, sampled, or by beams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pg_kernels.nn import fuse_qkv_
from pg_kernels.ops._common.devices import on_device_of

from .arguments import check_prompt, integer, number, token_ids
from .gemma import AttentionLengths
from .graphs import Recorder, Replayed, Shelf, capture_unsupported_reason

if TYPE_CHECKING:
    from .paligemma import PaliGemma

_CAPACITY_STEP = 128


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
    cuda_graph: bool | str = "auto",
) -> Tensor:
    """Continue each prompt until it ends or `max_new_tokens` are there.

    Args:
        input_ids, pixel_values, attention_mask, token_type_ids, image_features: as for the model's forward; padding on either
            side.
        max_new_tokens: at most so many tokens for each prompt.
        eos_token_id: one id or several that end an answer; default: the configuration's, which a checkpoint's
            generation_config.json may say, too. Nothing else of that file is read: neither lengths, temperature and beams, which
            are arguments here, nor penalties, forced and suppressed tokens, which there are none of.
        temperature: 0 takes the likeliest token; above it, tokens are drawn from softmax(logits / temperature).
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens that together reach this probability.
        num_beams: above 1, big_vision's beam search with so many live beams (no length penalty).
        generator: makes draws reproducible; it lives on the model's device.
        stream: called with each step's tokens [B] as they come; pad for prompts that have ended.
        cuda_graph: replay prefill and steps as CUDA graphs, which leave the host nothing to do for a token. "auto" does where it
            can: on a CUDA GPU, without beams, autocast, hooks and other people's layers; True raises where it cannot, False never
            does. The model keeps the last few sessions, with their caches and graphs, for calls with the same batch size, number
            of tokens up to a multiple of 128 and way of choosing: the first of such calls captures the step, the second one with
            a prompt of the same shape its prefill. `model.graph_cache.clear()` frees their memory.

    Returns:
        int64 [B, ≤ max_new_tokens]: new tokens only, the end token included, the configuration's pad after it.

    Raises:
        TypeError: an argument of another type.
        ValueError: options out of range or that exclude each other, no graph where `cuda_graph` is True, and whatever the forward
            refuses.
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
    top_k = None if top_k is None else integer("top_k", top_k)
    top_p = None if top_p is None else number("top_p", top_p)
    temperature = number("temperature", temperature)
    ends = token_ids("eos_token_id", model.config.eos_token_id if eos_token_id is None else eos_token_id)
    if generator is not None and not isinstance(getattr(generator, "device", None), torch.device):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    if stream is not None and not callable(stream):
        raise TypeError(f"stream: expected a function or None, got {type(stream).__name__}")
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
    if input_ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens: {input_ids.shape[1]} prompt tokens and {max_new_tokens} new ones are more than the "
            f"model's {limit} positions"
        )
    if not isinstance(cuda_graph, bool) and cuda_graph != "auto":
        raise ValueError(f"cuda_graph: expected 'auto', True or False, got {cuda_graph!r}")
    device = input_ids.device
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator: expected one on {device.type}, as the model, got one on {generator.device.type}")
    reason = "beam search reorders its cache" if num_beams > 1 else capture_unsupported_reason(model, device)
    if cuda_graph is True and reason is not None:
        raise ValueError(f"cuda_graph: there can be none here: {reason}")
    batch, capacity = len(input_ids), input_ids.shape[-1] + max_new_tokens
    with on_device_of(input_ids):
        if num_beams > 1:
            vocabulary = model.config.text_config.vocab_size
            known = torch.tensor([end for end in ends if 0 <= end < vocabulary], device=device)
            if not len(known):
                raise ValueError(f"eos_token_id: beam search needs one in [0, {vocabulary}), got {ends}")
            decoder = Decoder(model, batch, capacity)
            return _beam_search(model, decoder, prompt, max_new_tokens, known, num_beams)
        choice = Choice(ends, temperature, top_k, top_p, generator is not None)
        rest = (generator, max_new_tokens, stream)
        if reason is not None or cuda_graph is False:
            return DecodingSession(model, batch, capacity, choice, graphs=False).answer(model, prompt, *rest)
        # Prompts of other lengths share a session, and its graphs.
        capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        key = (batch, capacity, choice)
        session = model.graph_cache.of(model).take(key)
        if session is None:
            fuse_qkv_(model)
            model.graph_cache.of(model)  # which that may have changed
            session = DecodingSession(model, batch, capacity, choice, graphs=True)
        answer = session.answer(model, prompt, *rest)
        model.graph_cache.put(key, session)  # not after an error, which may leave it in any state
    return answer


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen from logits, and which of them end an answer."""

    ends: tuple[int, ...]
    temperature: float
    top_k: int | None
    top_p: float | None
    seeded: bool
    """Whether a generator comes with every call."""


class Decoder:
    """A batch of sequences with their cache, in tensors that stay where they are: each step appends `tokens`, one a row.

    It does not keep the model, which may keep it.
    """

    def __init__(self, model: PaliGemma, batch: int, capacity: int) -> None:
        self.cache = model.new_cache(batch, capacity)
        device = self.cache.keys.device
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        lengths = (torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(4))
        self.visible = AttentionLengths(*lengths)

    def prefill(self, model: PaliGemma, prompt: Mapping[str, Tensor]) -> Tensor:
        """Take prompts [B, S], the arguments of `generate` by name, and give the hidden states [B, D] of their last tokens."""
        input_ids = prompt["input_ids"]
        embeddings = model.embed(input_ids, prompt.get("pixel_values"), prompt.get("image_features"))
        masks = (prompt.get("attention_mask"), prompt.get("token_type_ids"))
        visible, positions = model.attention_lengths(input_ids, *masks)
        for name, lengths in vars(visible).items():
            getattr(self.visible, name).copy_(lengths)
        cache_positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(len(input_ids), -1)
        last = (visible.kv_lens - 1).clamp(min=0).long()
        return model.model.language_model(embeddings, positions, visible, self.cache, cache_positions, last)[:, 0]

    def step(self, model: PaliGemma) -> Tensor:
        """Append the tokens, each right behind its row's last one (over right padding), and give their states [B, D]."""
        visible = self.visible
        visible.q_starts.copy_(visible.kv_lens)
        visible.kv_lens.add_(1)
        embeddings = model.model.language_model.embed(self.tokens[:, None])
        cache_positions = visible.q_starts[:, None]
        positions = cache_positions - visible.kv_starts[:, None]
        return model.model.language_model(embeddings, positions, visible, self.cache, cache_positions.long())[:, 0]

    def select_rows(self, rows: Tensor) -> None:
        """Continue with these rows (int64 [B']) of the batch, some perhaps repeated."""
        self.cache.select_rows(rows)
        self.tokens = self.tokens[rows]
        self.visible = AttentionLengths(*(lengths[rows] for lengths in vars(self.visible).values()))


class DecodingSession:
    """Answers batches of prompts of one size; with `graphs`, prefill and step are captured at their second run, and replayed."""

    def __init__(self, model: PaliGemma, batch: int, capacity: int, choice: Choice, *, graphs: bool) -> None:
        self.decoder = Decoder(model, batch, capacity)
        self.choice, self._graphs = choice, graphs
        device = self.decoder.tokens.device
        self._pad = model.config.pad_token_id
        self._ends = torch.tensor(choice.ends, device=device)
        self._ids = torch.full((batch, capacity), self._pad, device=device)
        self._next = torch.zeros(1, dtype=torch.int64, device=device)
        self._counts = torch.zeros(batch, dtype=torch.int64, device=device)
        self._finished = torch.zeros(batch, dtype=torch.bool, device=device)
        # Graphs draw from the generator that they were captured with.
        self._generator = torch.Generator(device) if choice.seeded else None
        self._recorder = Recorder(self._generator)
        # Of functions, not of methods: a session that refers to itself would keep its memory until the garbage collector comes.
        self._step = Replayed(DecodingSession._run_step, self._recorder) if graphs else DecodingSession._run_step
        self._prefills: Shelf[tuple[dict[str, Tensor], Replayed]] = Shelf()

    def answer(
        self,
        model: PaliGemma,
        prompt: Mapping[str, Tensor],
        generator: torch.Generator | None,
        max_new_tokens: int,
        stream: Callable[[Tensor], None] | None,
    ) -> Tensor:
        """Continue each prompt: int64 [B, ≤ max_new_tokens]."""
        if self._generator is not None and generator is not None:
            self._generator.set_state(generator.get_state())
        self._prefill(model, prompt)
        between_looks = _between_looks(self._finished.device, stream)
        for count in range(1, max_new_tokens + 1):
            if stream is not None:
                stream(self.decoder.tokens.clone())
            if count == max_new_tokens or (count % between_looks == 0 and bool(self._finished.all())):
                break
            self._step(self, model)
        if self._generator is not None and generator is not None:
            generator.set_state(self._generator.get_state())
        return self._ids[:, : int(self._counts.max())].clone()

    def _prefill(self, model: PaliGemma, prompt: Mapping[str, Tensor]) -> None:
        if not self._graphs:
            self._run_prefill(model, prompt)
            return
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in prompt.items())
        kept = self._prefills.take(key)
        if kept is None:
            inputs = {name: torch.empty_like(tensor) for name, tensor in prompt.items()}
            kept = inputs, Replayed(DecodingSession._run_prefill, self._recorder)
        inputs, run = kept
        for name, tensor in prompt.items():
            inputs[name].copy_(tensor)
        run(self, model, inputs)
        self._prefills.put(key, kept)

    def _run_prefill(self, model: PaliGemma, prompt: Mapping[str, Tensor]) -> None:
        self._next.zero_()
        self._counts.zero_()
        self._finished.zero_()
        self._record(model, self.decoder.prefill(model, prompt))

    def _run_step(self, model: PaliGemma) -> None:
        self._record(model, self.decoder.step(model))

    def _record(self, model: PaliGemma, hidden: Tensor) -> None:
        """Choose the token after each hidden state [B, D], and write it down."""
        token = _choose(model, hidden, self.choice, self._generator).masked_fill(self._finished, self._pad)
        self._ids.index_copy_(1, self._next, token[:, None])
        self._next.add_(1)
        self._counts.add_(~self._finished)
        self._finished |= (token[:, None] == self._ends).any(1)
        self.decoder.tokens.copy_(token)


def _between_looks(device: torch.device, stream: object | None) -> int:
    """Steps after which to look whether all answers have ended: the host waits for a GPU then, which next waits for the host."""
    return 1 if device.type == "cpu" or stream is not None else 8


def _choose(model: PaliGemma, hidden: Tensor, choice: Choice, generator: torch.Generator | None) -> Tensor:
    """Pick the token [B] after each hidden state [B, D]."""
    if choice.temperature == 0:
        return model.topk_logits(hidden, 1)[1][:, 0]
    if choice.top_k is None:
        return _draw(model.logits(hidden) / choice.temperature, choice.top_p, generator)
    logits, ids = model.topk_logits(hidden, min(choice.top_k, model.config.text_config.vocab_size))
    return ids.gather(1, _draw(logits / choice.temperature, choice.top_p, generator)[:, None])[:, 0]


def _draw(logits: Tensor, top_p: float | None, generator: torch.Generator | None) -> Tensor:
    """Draw a column [B] from each row of logits [B, n]."""
    if top_p is not None:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        # A token stays when those before it fall short of top_p, so the likeliest always does.
        beyond = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float("-inf"))
    # As torch.multinomial draws one, without its look at the numbers, for which the host would wait.
    probabilities = logits.softmax(-1)
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1)


@dataclass
class _Finished:
    """The best ended sequence of each prompt so far: its score [B] and its tokens [B, max_new_tokens]."""

    scores: Tensor
    tokens: Tensor


def _beam_search(
    model: PaliGemma, decoder: Decoder, prompt: Mapping[str, Tensor], max_new_tokens: int, ends: Tensor, beams: int
) -> Tensor:
    """Keep the `beams` best unfinished sequences; at every step each of them may also end, and the best ended one is kept.

    A prompt is done once no live beam scores above its best ended sequence: more tokens only lower a score.
    """
    hidden = decoder.prefill(model, prompt)
    pad, device = model.config.pad_token_id, hidden.device
    batch, vocabulary = len(hidden), model.config.text_config.vocab_size
    decoder.select_rows(torch.arange(batch, device=device).repeat_interleave(beams))
    live = torch.full((batch, beams), float("-inf"), device=device)
    live[:, 0] = 0.0
    tokens = torch.full((batch, beams, max_new_tokens), pad, device=device)
    best = _Finished(torch.full((batch,), float("-inf"), device=device), tokens[:, 0].clone())
    hidden = hidden.repeat_interleave(beams, 0)
    examples = torch.arange(batch, device=device)[:, None]
    for step in range(max_new_tokens):
        log_probs = model.logits(hidden).log_softmax(-1)
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
        decoder.tokens.copy_(chosen.flatten())
        hidden = decoder.step(model)
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
