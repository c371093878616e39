"""Texts in the making: what each one is, when it ends, and `TextRows`, in which they grow side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from tlstm.generation.config import DEFAULT_NEW_TOKENS, GenerationConfig
from tlstm.generation.state import GenerationState
from tlstm.generation.stopping import StopStrings
from tlstm.state import LSTMState

FinishReason = Literal["eos", "stop_string", "length", "time"]


def new_token_limits(state: GenerationState, config: GenerationConfig) -> list[int]:
    """How many tokens each text may still get. `ValueError` where one has none left."""
    most = config.max_new_tokens
    if most is None and config.max_length is None:
        most = DEFAULT_NEW_TOKENS
    limits = []
    for row, ids in enumerate(state.tokens):
        room = None if config.max_length is None else config.max_length - len(ids)
        if room is not None and room < 1:
            raise ValueError(
                f"max_length={config.max_length} leaves no room: text {row} has {len(ids)} tokens already; raise it, "
                "or use max_new_tokens, which does not count the prompt"
            )
        limits.append(min(limit for limit in (most, room) if limit is not None))
    return limits


@dataclass(eq=False)
class Text:
    """One text in the making.

    Fields:
        limit: most new tokens. seed, return_index: what its random numbers depend on; the seed is None without any.
        new_tokens: what was made. finish_reason: None while it grows.
        end: where it ended: recurrent state of one row and the whole text, 1-D int64.
    """

    limit: int
    seed: int | None
    return_index: int
    new_tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    end: tuple[LSTMState, Tensor] | None = None


class Endings:
    """When texts end.

    Args:
        deadline: `time.perf_counter()` value after which every text ends, or None.
    """

    def __init__(self, config: GenerationConfig, stop: StopStrings | None, deadline: float | None) -> None:
        self._eos, self._stop, self._deadline = frozenset(config.eos_ids), stop, deadline
        self.by_tokens = bool(self._eos or stop)  # whether a token may end a text

    def late(self) -> bool:
        """Whether the time is up."""
        return self._deadline is not None and time.perf_counter() >= self._deadline

    def reason(
        self,
        text: Text,
        late: bool,
        tail: Callable[[int], list[int]],  # n -> the newest n ids of the whole text, or all of a shorter one
    ) -> FinishReason | None:
        """Why its newest token ends the text, None where it does not."""
        if text.new_tokens[-1] in self._eos:
            return "eos"
        if self._stop is not None and self._stop.completed_by_last(tail(self._stop.window)):
            return "stop_string"
        if len(text.new_tokens) >= text.limit:
            return "length"
        return "time" if late else None


class TextRows(Protocol):
    """Texts that grow side by side, and come and go at any step: each is what it is alone."""

    @property
    def texts(self) -> Sequence[Text]:
        """Those that have not ended, in the order in which they came."""
        ...

    @property
    def stepped(self) -> Sequence[Text]:
        """Those that the last step gave a token, in the order of the next two."""
        ...

    @property
    def logits(self) -> Tensor | None:
        """(stepped, V) float32 of the last step, valid until the next one; None where nobody can ask for them."""
        ...

    @property
    def scores(self) -> Tensor | None:
        """The same, processed."""
        ...

    @property
    def made(self) -> int:
        """Tokens made so far."""
        ...

    @property
    def seconds(self) -> float:
        """Time that the steps took."""
        ...

    def add(self, state: GenerationState, /) -> Sequence[Text]:
        """Take up the texts of `state` (with seeds, if the config samples), from the next step on or a later one.

        Raises:
            ValueError: one of them has no room for a token.
        """
        ...

    def step(self) -> Sequence[Text]:
        """Make the next token of every text that is not waiting for a place; returns those that it ended."""
        ...

    def advance(self) -> Sequence[Text]:
        """As `step`, but all tokens that are there already; the texts in the order in which they ended."""
        ...

    def now(self, text: Text, /) -> tuple[LSTMState, Tensor]:
        """Where one of these texts stands, or ended: recurrent state of one row and all its tokens, as copies."""
        ...


def state_of(texts: Sequence[Text], rows: TextRows, vocab_size: int) -> GenerationState:
    """Where texts of `rows` stand, those that have ended too. Call it outside inference mode."""
    parts = [rows.now(text) for text in texts]
    seeds = [text.seed for text in texts if text.seed is not None]
    return GenerationState(
        # `cat` copies: ordinary tensors that autograd accepts, not those of inference mode.
        recurrent=LSTMState.cat([recurrent for recurrent, _ in parts]),
        tokens=tuple(ids.clone() for _, ids in parts),
        vocab_size=vocab_size,
        seeds=tuple(seeds) if texts and len(seeds) == len(texts) else None,
        return_index=tuple(text.return_index for text in texts),
    )
