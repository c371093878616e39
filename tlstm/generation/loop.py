"""The decode loop: one token for every unfinished text a step, and everything a resume needs at any moment."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tlstm.generation.config import DEFAULT_NEW_TOKENS, GenerationConfig
from tlstm.generation.history import TokenHistory
from tlstm.generation.philox import GumbelNoise
from tlstm.generation.prefill import LanguageModel
from tlstm.generation.sampling import LogitsProcessor, draw, greedy
from tlstm.generation.state import GenerationState
from tlstm.generation.stopping import StopStrings
from tlstm.state import LSTMState

FinishReason = Literal["eos", "stop_string", "length", "time"]


@dataclass
class Timings:
    """Where the time of a call went; tokens of all rows together.

    Fields:
        prefill_tokens, prefill_seconds: prompt tokens fed before the first step (all but each prompt's last one).
        decode_tokens, decode_seconds: tokens made, and the time that the steps took.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens made a second, 0 where none were."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


def model_step(
    model: LanguageModel,
    tokens: Tensor,  # (rows,) int64
    recurrent: LSTMState,
) -> tuple[Tensor, LSTMState]:
    """Feed one token to each row: logits (rows, V) float32, and the state after it."""
    output = model(tokens[:, None], state=recurrent)
    return output.logits[:, -1].float(), output.state


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


class DecodeLoop:
    """Texts that grow together, by greedy choice or sampling, until each has ended.

    Rows that end leave the batch at once, so the work of a step is that of the texts still unfinished.

    Args:
        state: where the texts stand; with seeds, if the config samples.
        deadline: `time.perf_counter()` value after which every text ends, or None.
    """

    def __init__(
        self,
        model: LanguageModel,
        state: GenerationState,
        config: GenerationConfig,
        *,
        stop: StopStrings | None = None,
        deadline: float | None = None,
    ) -> None:
        device = model.device
        self._model, self._config, self._stop, self._deadline = model, config, stop, deadline
        self._start_state = state
        self._process = LogitsProcessor(config, device)
        vocab_size = state.vocab_size
        self._history = TokenHistory(state.tokens, device, vocab_size if self._process.needs_seen else None)
        self._recurrent = state.recurrent
        self._noise: GumbelNoise | None = None
        if config.do_sample:
            assert state.seeds is not None
            positions = [len(ids) for ids in state.tokens]
            self._noise = GumbelNoise(state.seeds, state.return_index, positions, vocab_size, device)
        self._eos = frozenset(config.eos_ids)
        self._limits = new_token_limits(state, config)
        self._first_limit = min(self._limits)
        self._active = list(range(state.batch_size))  # which text each row of the batch is
        self._ended: dict[int, tuple[LSTMState, Tensor]] = {}  # per ended text: its recurrent state and its tokens
        self._steps = 0
        self.new_tokens: list[list[int]] = [[] for _ in self._active]
        self.finish_reasons: list[FinishReason | None] = [None] * len(self._active)
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.seconds = 0.0

    @property
    def finished(self) -> bool:
        """Whether every text has ended."""
        return not self._active

    @torch.inference_mode()
    def step(self) -> list[int | None]:
        """Make the next token of every unfinished text; one entry per text, `None` where it had ended before."""
        started = time.perf_counter()
        logits, recurrent = model_step(self._model, self._history.last(), self._recurrent)
        scores = self._process(logits, self._history.tokens(), self._history.seen, self._steps)
        tokens = greedy(scores) if self._noise is None else draw(scores, self._noise)
        ids = tokens.tolist()
        if self._config.output_scores:
            self.scores.append(self._of_all_texts(scores))
        if self._config.output_logits:
            self.logits.append(self._of_all_texts(logits))

        self._history.append(tokens)
        self._recurrent = recurrent
        self._steps += 1
        new: list[int | None] = [None] * len(self.new_tokens)
        for text, token in zip(self._active, ids, strict=True):
            self.new_tokens[text].append(token)
            new[text] = token
        self._end_rows(ids)
        self.seconds += time.perf_counter() - started
        return new

    def _of_all_texts(self, values: Tensor) -> Tensor:
        """`values` `(rows, V)` of the unfinished texts as `(texts, V)`, -inf where a text has ended."""
        if len(values) == len(self.new_tokens):
            return values
        full = values.new_full((len(self.new_tokens), values.shape[1]), -torch.inf)
        full[torch.tensor(self._active, device=values.device)] = values
        return full

    def _end_rows(self, ids: list[int]) -> None:
        late = self._deadline is not None and time.perf_counter() >= self._deadline
        if not (self._eos or self._stop or late or self._steps >= self._first_limit):
            return
        keep = []
        for row, token in enumerate(ids):
            reason = self._why_ended(row, token, late)
            if reason is None:
                keep.append(row)
                continue
            text = self._active[row]
            self.finish_reasons[text] = reason
            self._ended[text] = (self._recurrent.select(self._index([row])), self._history.text(row))
        if len(keep) < len(ids):
            self._active = [self._active[row] for row in keep]
            if keep:
                rows = self._index(keep)
                self._recurrent = self._recurrent.select(rows)
                self._history.select(keep)
                if self._noise is not None:
                    self._noise.select(rows)

    def _why_ended(self, row: int, token: int, late: bool) -> FinishReason | None:
        if token in self._eos:
            return "eos"
        if self._stop is not None and self._stop.completed_by_last(self._history.tail(row, self._stop.window)):
            return "stop_string"
        if self._steps >= self._limits[self._active[row]]:
            return "length"
        return "time" if late else None

    def _index(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._recurrent.device)

    def state(self) -> GenerationState:
        """Where all texts stand now, ended ones included; may be asked between any two steps."""
        texts = len(self.new_tokens)
        ended = list(self._ended)
        parts = [self._ended[text][0] for text in ended]
        if self._active:
            parts.append(self._recurrent)
        place = {text: row for row, text in enumerate(ended + self._active)}
        tokens = {text: self._ended[text][1] for text in ended}
        tokens |= {text: self._history.text(row) for row, text in enumerate(self._active)}
        # Made outside inference mode, so the caller's tensors are ordinary ones that autograd accepts.
        recurrent = LSTMState.cat(parts).select(self._index([place[text] for text in range(texts)]))
        return replace(
            self._start_state, recurrent=recurrent, tokens=tuple(tokens[text].clone() for text in range(texts))
        )
