"""`Rows`: texts that grow together, one call of a step for a token of each. They may come and go at any step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tlstm.generation.config import GenerationConfig
from tlstm.generation.history import TokenHistory
from tlstm.generation.model_step import Step
from tlstm.generation.philox import GumbelNoise
from tlstm.generation.sampling import LogitsProcessor, draw, greedy
from tlstm.generation.state import GenerationState
from tlstm.generation.stopping import StopStrings
from tlstm.generation.texts import Endings, Text, new_token_limits
from tlstm.state import LSTMState


class Rows:
    """A batch whose rows are texts, by greedy choice or sampling; the `TextRows` of a `Step`.

    A text that has ended leaves the batch at once, so the work of a step is that of the texts still unfinished.

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
        self._model_step, self._config, self._device = step, config, device
        self._endings = Endings(config, stop, deadline)
        self._process = LogitsProcessor(config, device)
        self._history = TokenHistory([], device, vocab_size if self._process.needs_seen else None)
        self._noise = GumbelNoise([], [], [], vocab_size, device) if config.do_sample else None
        self._shortest = 0  # no text reaches its limit in fewer steps than this
        self.texts: list[Text] = []  # of the rows, in order
        self.stepped: list[Text] = []
        self.logits: Tensor | None = None
        self.scores: Tensor | None = None
        self.made, self.seconds = 0, 0.0

    @torch.inference_mode()
    def add(self, state: GenerationState) -> list[Text]:
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
        if torch.is_inference_mode_enabled():  # to enter it again would cost as much as ten operations of a step
            return self._step()
        with torch.inference_mode():
            return self._step()

    def advance(self) -> list[Text]:
        return self.step()  # nothing is made ahead

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
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.new_tokens.append(token)
        self.made += len(texts)
        self._shortest -= 1
        ended = self._end_rows()
        self.seconds += time.perf_counter() - started
        return ended

    def _end_rows(self) -> list[Text]:
        late = self._endings.late()
        if not (self._endings.by_tokens or late or self._shortest <= 0):
            return []
        keep, ended = [], []
        for row, text in enumerate(self.texts):
            text.finish_reason = self._endings.reason(text, late, partial(self._history.tail, row))
            if text.finish_reason is None:
                keep.append(row)
            else:
                text.end = self._now(row)
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

    @torch.inference_mode()
    def now(self, text: Text) -> tuple[LSTMState, Tensor]:
        return text.end or self._now(self.texts.index(text))

    def _now(self, row: int) -> tuple[LSTMState, Tensor]:
        index = torch.tensor([row], dtype=torch.int64, device=self._device)
        return self._model_step.recurrent.select(index), self._history.text(row)
