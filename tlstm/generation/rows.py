"""`Rows`: texts that grow together, one token each a step. They may come and go at any step, each for itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tlstm.generation.config import DEFAULT_NEW_TOKENS, GenerationConfig
from tlstm.generation.history import TokenHistory
from tlstm.generation.model_step import Step
from tlstm.generation.philox import GumbelNoise
from tlstm.generation.sampling import LogitsProcessor, draw, greedy
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


class Rows:
    """A batch whose rows are texts, by greedy choice or sampling. A text that has ended leaves it at once.

    Args:
        step: a fresh one.
        deadline: `time.perf_counter()` value after which every text ends, or None.
    """

    def __init__(
        self,
        step: Step,
        config: GenerationConfig,
        vocab_size: int,
        device: torch.device,
        *,
        stop: StopStrings | None = None,
        deadline: float | None = None,
    ) -> None:
        self._model_step, self._config, self._stop, self._deadline = step, config, stop, deadline
        self._device = device
        self._process = LogitsProcessor(config, device)
        self._history = TokenHistory([], device, vocab_size if self._process.needs_seen else None)
        self._noise = GumbelNoise([], [], [], vocab_size, device) if config.do_sample else None
        self._eos = frozenset(config.eos_ids)
        self._shortest = 0  # no text reaches its limit in fewer steps than this
        self.texts: list[Text] = []  # of the rows, in order
        self.stepped: list[Text] = []  # those that the last step gave a token, in the order of these two:
        self.logits: Tensor | None = None  # (rows, V) float32 of the last step, valid until the next one
        self.scores: Tensor | None = None  # the same, processed
        self.seconds = 0.0  # that the steps took

    @torch.inference_mode()
    def add(self, state: GenerationState) -> list[Text]:
        """Take up the texts of `state` (with seeds, if the config samples) behind those that are there.

        Raises:
            ValueError: one of them has no room for a token.
        """
        limits = new_token_limits(state, self._config)
        seeds: Sequence[int | None] = state.seeds if state.seeds is not None else [None] * state.batch_size
        new = [Text(*values) for values in zip(limits, seeds, state.return_index, strict=True)]
        if self._noise is not None:
            assert state.seeds is not None
            self._noise.extend(state.seeds, state.return_index, [len(ids) for ids in state.tokens])
        self._history.extend(state.tokens)
        self._model_step.extend(state.recurrent)
        self._shortest = min([*limits, self._shortest] if self.texts else limits)
        self.texts = self.texts + new
        return new

    def step(self) -> list[Text]:
        """Make the next token of every text; returns those that it ended."""
        if torch.is_inference_mode_enabled():  # to enter it again would cost as much as ten operations of a step
            return self._step()
        with torch.inference_mode():
            return self._step()

    def _step(self) -> list[Text]:
        started = time.perf_counter()
        texts = self.texts
        logits = self._model_step(self._history.last())
        made = [len(text.new_tokens) for text in texts] if self._process.needs_count else 0
        history = self._history.tokens() if self._process.needs_history else None
        scores = self._process(logits, history, self._history.seen, made)
        tokens = greedy(scores) if self._noise is None else draw(scores, self._noise)
        self.logits, self.scores, self.stepped = logits, scores, texts
        self._history.append(tokens)
        ids = tokens.tolist()
        for text, token in zip(texts, ids, strict=True):
            text.new_tokens.append(token)
        self._shortest -= 1
        ended = self._end_rows(ids)
        self.seconds += time.perf_counter() - started
        return ended

    def _end_rows(self, ids: list[int]) -> list[Text]:
        late = self._deadline is not None and time.perf_counter() >= self._deadline
        if not (self._eos or self._stop or late or self._shortest <= 0):
            return []
        keep, ended = [], []
        for row, (text, token) in enumerate(zip(self.texts, ids, strict=True)):
            text.finish_reason = self._why_ended(row, text, token, late)
            if text.finish_reason is None:
                keep.append(row)
            else:
                text.end = self.now(row)
                ended.append(text)
        if ended:
            self.texts = [self.texts[row] for row in keep]
            rows = torch.tensor(keep, dtype=torch.int64, device=self._device)
            self._model_step.select(rows)
            self._history.select(keep)
            if self._noise is not None:
                self._noise.select(rows)
        self._shortest = min((text.limit - len(text.new_tokens) for text in self.texts), default=0)
        return ended

    def _why_ended(self, row: int, text: Text, token: int, late: bool) -> FinishReason | None:
        if token in self._eos:
            return "eos"
        if self._stop is not None and self._stop.completed_by_last(self._history.tail(row, self._stop.window)):
            return "stop_string"
        if len(text.new_tokens) >= text.limit:
            return "length"
        return "time" if late else None

    @torch.inference_mode()
    def now(self, row: int) -> tuple[LSTMState, Tensor]:
        """Where the text of a row stands: its recurrent state and all its tokens, as copies."""
        index = torch.tensor([row], dtype=torch.int64, device=self._device)
        return self._model_step.recurrent.select(index), self._history.text(row)


def state_of(texts: Sequence[Text], rows: Rows, vocab_size: int) -> GenerationState:
    """Where texts stand, those that have ended and those still in `rows`. Call it outside inference mode."""
    place = {id(text): row for row, text in enumerate(rows.texts)}
    parts = [text.end if text.end is not None else rows.now(place[id(text)]) for text in texts]
    seeds = [text.seed for text in texts if text.seed is not None]
    return GenerationState(
        # `cat` copies: ordinary tensors that autograd accepts, not those of inference mode.
        recurrent=LSTMState.cat([recurrent for recurrent, _ in parts]),
        tokens=tuple(ids.clone() for _, ids in parts),
        vocab_size=vocab_size,
        seeds=tuple(seeds) if texts and len(seeds) == len(texts) else None,
        return_index=tuple(text.return_index for text in texts),
    )
