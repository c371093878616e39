"""`GpuDecoder`: the decode loop inside a GPU kernel, some tokens of every text a launch.

What it gives is what the loop in Python gives, token for token and in the same order, with the state after any of them.
Meanwhile the GPU is ahead: while the host reads one chunk of tokens the next one is being made. A text that ends where
only the host sees it (a stop string, the time limit) is cut there, and what was made beyond is thrown away.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tlstm.generation.config import GenerationConfig
from tlstm.generation.gpu_model import choice_of, flags_of, packed_weights, refuse, settings_of, shape_of
from tlstm.generation.prefill import LanguageModel
from tlstm.generation.rows import FinishReason, new_token_limits
from tlstm.generation.sampling import check_some_token
from tlstm.generation.state import GenerationState
from tlstm.generation.stopping import StopStrings
from tlstm.state import LSTMState

if TYPE_CHECKING:
    from tlstm_kernels.decode_launch import Chunk
    from tlstm_kernels.decode_shape import DecodePlan

_FIRST_CHUNK, _LARGEST_CHUNK = 8, 64  # steps: the first tokens soon, then few launches
_CHUNK_BYTES = 1 << 26  # of a launch's buffers


@dataclass
class _Running:
    """A chunk that was launched: its tokens when they are here, and which text was in each slot, None for none."""

    chunk: Chunk
    texts: list[int | None]
    tokens: list[list[int]] | None = None
    scores: Tensor | None = None
    read: int = 0  # steps


class GpuDecoder:
    """Texts that grow together, as `DecodeLoop` has it, with its arguments and results.

    Args:
        plan: how to cut the kernel, in place of the plan that suits the GPU. launcher: what runs it (tests).
        chunk: most steps of a launch.
    """

    @staticmethod
    def refusal(model: LanguageModel, config: GenerationConfig) -> str | None:
        """Why the kernel cannot serve this request, or None."""
        return refuse(model, config)

    def __init__(
        self,
        model: LanguageModel,
        state: GenerationState,
        config: GenerationConfig,
        *,
        stop: StopStrings | None = None,
        deadline: float | None = None,
        plan: DecodePlan | None = None,
        launcher: Callable[..., None] | None = None,
        chunk: int = _LARGEST_CHUNK,
    ) -> None:
        self._model, self._config, self._stop, self._deadline = model, config, stop, deadline
        self._start = state
        self._limits = new_token_limits(state, config)
        self._eos = frozenset(config.eos_ids)
        self._launcher, self._most_steps = launcher, chunk
        self._open(plan or _plan_for(model, config, state.batch_size))
        # Where each text's state is: h and c of all layers side by side, or None where it has not moved.
        self._place: list[tuple[Tensor, Tensor] | None] = [None] * state.batch_size
        self.new_tokens: list[list[int]] = [[] for _ in range(state.batch_size)]
        self.finish_reasons: list[FinishReason | None] = [None] * state.batch_size
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.seconds = 0.0

    def _open(self, plan: DecodePlan) -> None:
        """Begin with this plan: every text waits for a slot."""
        from tlstm_kernels.decode_launch import DecodeSession

        self._plan, vocab_size = plan, self._start.vocab_size
        self._session = DecodeSession(
            plan,
            packed_weights(self._model, plan),
            settings_of(self._config),
            flags_of(self._config, vocab_size, self._model.device),
            self._launcher,
        )
        row_bytes = plan.streams * (4 * plan.shape.stride + (0 if plan.mode == "reduce" else 4 * vocab_size))
        self._largest = max(1, min(self._most_steps, _CHUNK_BYTES // row_bytes))
        self._steps = min(_FIRST_CHUNK, self._largest)
        self._slots: list[int | None] = [None] * plan.streams  # the text in each slot
        self._waiting = deque(range(self._start.batch_size))
        self._queue: deque[_Running] = deque()  # the chunk that is read, and the one behind it

    @property
    def finished(self) -> bool:
        """Whether every text has ended."""
        return all(self.finish_reasons)

    def step(self) -> list[int | None]:
        """The next token of every unfinished text that has a slot; `None` for the others."""
        started = time.perf_counter()
        running = self._current()
        assert running.tokens is not None
        assert running.scores is not None
        step, chunk = running.read, running.chunk
        going = [(slot, text) for slot, text in enumerate(running.texts) if text is not None]
        check_some_token(running.scores[step, [slot for slot, _ in going]])
        running.read += 1
        new: list[int | None] = [None] * len(self.new_tokens)
        for slot, text in going:
            token = running.tokens[step][slot]
            assert token >= 0, "host and kernel disagree on where a text ends"
            self.new_tokens[text].append(token)
            self._place[text] = (chunk.h[step, slot], chunk.c[step, slot])
            new[text] = token
        late = self._deadline is not None and time.perf_counter() >= self._deadline
        for slot, text in going:
            reason = self._why_ended(text, late)
            if reason is not None:
                self._end(slot, text, reason)
        self.seconds += time.perf_counter() - started
        return new

    def _current(self) -> _Running:
        """The chunk to read from, with the one after it launched."""
        while self._queue and (
            self._queue[0].read == self._queue[0].chunk.steps or not any(t is not None for t in self._queue[0].texts)
        ):
            self._queue.popleft()
        if not self._queue:
            self._launch()
        running = self._queue[0]
        if running.tokens is None:
            if len(self._queue) == 1 and self._goes_on_after(running):
                self._launch()
            running.tokens, running.scores = running.chunk.tokens(), running.chunk.scores()
        return running

    def _goes_on_after(self, running: _Running) -> bool:
        """Whether a text may need more steps than this chunk has; who else waits gets a slot only when one is free."""
        steps = running.chunk.steps
        return any(t is not None and len(self.new_tokens[t]) + steps < self._limits[t] for t in running.texts)

    def _launch(self) -> None:
        from tlstm_kernels.decode_launch import PlanTooLargeError

        free = [slot for slot, text in enumerate(self._slots) if text is None]
        taken = [(slot, self._waiting.popleft()) for slot in free[: len(self._waiting)]]
        if taken:
            self._place_texts(taken)
        planned = sum(running.chunk.steps - running.read for running in self._queue)
        left = [self._limits[t] - len(self.new_tokens[t]) - planned for t in self._slots if t is not None]
        steps = max(1, min(self._steps, max(left)))
        try:
            chunk = self._session.launch(steps)
        except PlanTooLargeError:  # found when the kernel is compiled, before anything was made
            self._open(_plan_for(self._model, self._config, self._start.batch_size))
            self._launch()
            return
        self._queue.append(_Running(chunk, list(self._slots)))
        self._steps = min(2 * self._steps, self._largest)

    def _place_texts(self, taken: list[tuple[int, int]]) -> None:
        state, texts = self._start, [text for _, text in taken]
        rows = torch.tensor(texts, device=state.recurrent.device)
        recurrent = state.recurrent.select(rows)
        for slot, text in taken:
            self._slots[slot] = text
        seeds = state.seeds or (0,) * state.batch_size
        fields = {
            "seed": [seeds[t] - (seeds[t] >> 63 << 64) for t in texts],  # as a signed word
            "return_index": [state.return_index[t] for t in texts],
            "position": [len(state.tokens[t]) for t in texts],
            "made": [0 for _ in texts],
            "limit": [self._limits[t] for t in texts],
            "least": [self._config.min_new_tokens for _ in texts],
            "token": [int(state.tokens[t][-1]) for t in texts],
            "active": [1 for _ in texts],
        }
        self._session.place([s for s, _ in taken], recurrent.h, recurrent.c, fields, [state.tokens[t] for t in texts])

    def _why_ended(self, text: int, late: bool) -> FinishReason | None:
        tokens = self.new_tokens[text]
        if tokens[-1] in self._eos:
            return "eos"
        if self._stop is not None and self._stop.completed_by_last(self._tail(text, self._stop.window)):
            return "stop_string"
        if len(tokens) >= self._limits[text]:
            return "length"
        return "time" if late else None

    def _tail(self, text: int, count: int) -> list[int]:
        new = self.new_tokens[text]
        return [*self._start.tokens[text][-count:].tolist(), *new[-count:]][-count:]

    def _end(self, slot: int, text: int, reason: FinishReason) -> None:
        self.finish_reasons[text] = reason
        place = self._place[text]
        assert place is not None
        self._place[text] = (place[0].clone(), place[1].clone())  # so that the chunk's memory can go
        for running in self._queue:  # what the kernel made of it beyond this token counts for nothing
            running.texts = [None if t == text else t for t in running.texts]
        self._slots[slot] = None
        if reason in ("stop_string", "time"):
            self._session.release([slot])

    def state(self) -> GenerationState:
        """Where all texts stand now, ended ones included; may be asked between any two steps."""
        start, columns, widths = self._start, self._plan.shape.columns, self._plan.shape.widths
        h, c = ([t.clone() for t in part] for part in (start.recurrent.h, start.recurrent.c))
        for text, place in enumerate(self._place):
            if place is not None:
                for layer, (column, width) in enumerate(zip(columns, widths, strict=False)):
                    h[layer][text] = place[0][column : column + width]
                    c[layer][text] = place[1][column : column + width]
        tokens = [
            torch.cat([old, torch.tensor(new, dtype=torch.int64)])
            for old, new in zip(start.tokens, self.new_tokens, strict=True)
        ]
        return replace(start, recurrent=LSTMState(h=tuple(h), c=tuple(c)), tokens=tuple(tokens))


def _plan_for(model: LanguageModel, config: GenerationConfig, texts: int) -> DecodePlan:
    """The plan for as many texts at once as the GPU takes."""
    from tlstm_kernels.decode_launch import too_large
    from tlstm_kernels.decode_plan import choose_decode_plan
    from tlstm_kernels.plan_at_hand import gpu_of

    shape, choice = shape_of(model), choice_of(config)
    index: Any = model.device.index
    gpu = gpu_of(index)
    plan = choose_decode_plan(shape, choice, texts, gpu, frozenset(too_large))
    while plan is None and texts > 1:
        texts = -(-texts // 2)
        plan = choose_decode_plan(shape, choice, texts, gpu, frozenset(too_large))
    if plan is None:
        raise RuntimeError(f"no plan of the decode kernel fits on {gpu.name}; pass decoder='graph' or 'loop'")
    return plan
