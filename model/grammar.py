"""Grammars of answers: which tokens may follow, decided by a small automaton on the model's device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FORBIDDEN, _TEXT, _END, _LOCATION, _CODE = range(5)
"""Classes of tokens. A forbidden token is never chosen."""


@dataclass(frozen=True, eq=False)
class TokenGrammar:
    """Answers of any number of objects: four locations of a box with an area, `num_codes` codes of a mask, and a label.

    `Processor.grammar` makes one.
    """

    location_ids: Tensor
    """Ids of <loc0000> to <loc1023> in this order, int64."""
    code_ids: Tensor
    """Ids of <seg000> to <seg127>, int64."""
    text_ids: Tensor
    """Ids of the tokens that a label may consist of, int64."""
    num_codes: int
    """Codes of each object: 0, or 16 for masks."""


class GrammarState:
    """The automaton for a batch of answers, in tensors that stay in place: no step looks at a value on the device.

    A state is the number of tokens in the current object: 0 at the start, then four locations and the codes. It stays at their
    number in the label, where an answer may end and another object may begin.
    """

    def __init__(
        self, grammar: TokenGrammar, end_ids: Sequence[int], batch: int, vocabulary: int, device: torch.device
    ) -> None:
        label = 4 + grammar.num_codes
        classes = torch.full((vocabulary,), _FORBIDDEN)
        values = torch.full((vocabulary,), -1)
        classes[grammar.text_ids] = _TEXT
        classes[grammar.location_ids] = _LOCATION
        classes[grammar.code_ids] = _CODE
        classes[[end_id for end_id in end_ids if 0 <= end_id < vocabulary]] = _END
        self._largest = len(grammar.location_ids) - 1
        values[grammar.location_ids] = torch.arange(len(grammar.location_ids))
        following = torch.full((label + 1, 5), -1)
        following[[0, label], _LOCATION] = 1
        following[[0, label], _END] = torch.tensor([0, label])
        following[label, _TEXT] = label
        for state in (1, 2, 3):
            following[state, _LOCATION] = state + 1
        for state in range(4, label):
            following[state, _CODE] = state + 1
        missing = torch.tensor([0, *range(label - 1, -1, -1)])
        self._classes, self._values = classes.to(device), values.to(device)
        self._following, self._missing = following.to(device), missing.to(device)
        """The next state by state and class, −1 for none; the number of tokens that a state's object still lacks."""
        self._state = torch.zeros(batch, dtype=torch.int64, device=device)
        self._corner = torch.zeros(batch, 2, dtype=torch.int64, device=device)
        """The first two locations of the current box: its top and its left edge."""
        self._remaining = torch.zeros((), dtype=torch.int64, device=device)

    def start(self, max_new_tokens: int) -> None:
        """Begin new answers of at most that many tokens. An object begins only if it can be completed."""
        self._state.zero_()
        self._remaining.fill_(max_new_tokens)

    def mask(self, logits: Tensor) -> Tensor:
        """Set the logits [B, V] of all tokens that must not follow to −∞."""
        following = self._following[self._state]  # [B, 5]
        completed = self._missing[following.clamp(min=0)] < self._remaining
        allowed = ((following >= 0) & completed)[:, self._classes]  # [B, V]
        # A box has an area: its lower edge lies below its upper one, and its right edge right of its left one.
        state = self._state[:, None]
        lowest = torch.where(state == 2, self._corner[:, :1], torch.where(state == 3, self._corner[:, 1:], -1))
        highest = torch.where((state == 2) | (state == 3), self._largest, self._largest - 1)
        is_location = self._classes == _LOCATION
        allowed &= ~is_location | (self._values > lowest) & (self._values <= highest)
        return logits.masked_fill(~allowed, float("-inf"))

    def advance(self, tokens: Tensor) -> None:
        """Follow the chosen tokens [B]. Tokens that must not follow, such as the padding of an ended answer, change nothing."""
        following = self._following[self._state, self._classes[tokens]]
        value = self._values[tokens]
        self._corner[:, 0].copy_(torch.where(following == 1, value, self._corner[:, 0]))
        self._corner[:, 1].copy_(torch.where(following == 2, value, self._corner[:, 1]))
        self._state.copy_(torch.where(following < 0, self._state, following))
        self._remaining.sub_(1)

    def select_rows(self, rows: Tensor) -> None:
        """Continue with the batch's rows `rows` (int64 [B']), which may repeat."""
        self._state, self._corner = self._state[rows], self._corner[rows]
