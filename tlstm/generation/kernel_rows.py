"""`KernelRows`: the decode loop inside a GPU kernel, some tokens of every text a launch.

What it gives is what the loop in Python gives, token for token and in the same order, with the state after any of them.
Meanwhile the GPU is ahead: while the host reads one chunk of tokens the next one is being made. A text that ends where
only the host sees it (a stop string, the time limit) is cut there, and what was made beyond is thrown away.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tlstm.generation.config import GenerationConfig
from tlstm.generation.gpu_model import flags_of, packed_weights, plan_for, refuse, settings_of
from tlstm.generation.prefill import LanguageModel
from tlstm.generation.sampling import check_some_token
from tlstm.generation.state import GenerationState
from tlstm.generation.stopping import StopStrings
from tlstm.generation.texts import Endings, Text, new_token_limits
from tlstm.state import LSTMState

if TYPE_CHECKING:
    from tlstm_kernels.decode_launch import Chunk
    from tlstm_kernels.decode_shape import DecodePlan

# Steps: the first tokens of a text soon, then few launches. Where texts come and go all the time chunks stay small, and
# a slot is never empty for long.
_FIRST_CHUNK, _LARGEST_CHUNK = 8, 64
_CHUNK_BYTES = 1 << 26  # of a launch's buffers


@dataclass(eq=False, kw_only=True)
class _KernelText(Text):
    """A text of the kernel.

    Fields:
        recurrent, tokens: where it stood when it came: state of one row, all its ids.
        place: where its state is now: h and c of all layers side by side; None where it has not moved, or has ended.
    """

    recurrent: LSTMState
    tokens: Tensor
    place: tuple[Tensor, Tensor] | None = None

    def tail(self, count: int) -> list[int]:
        """The newest `count` ids."""
        return [*self.tokens[-count:].tolist(), *self.new_tokens[-count:]][-count:]


@dataclass
class _Running:
    """A chunk that was launched: its tokens when they are here, and which text was in each slot, None for none."""

    chunk: Chunk
    texts: list[_KernelText | None]
    tokens: list[list[int]] | None = None
    scores: Tensor | None = None
    read: int = 0  # steps


class KernelRows:
    """The `TextRows` of the decode kernel. Texts wait for a slot in the order in which they came.

    A slot whose text has ended is filled between two launches; the texts in the other slots notice nothing.

    Args:
        places: texts at once, or fewer where the GPU takes fewer.
        deadline: `time.perf_counter()` value after which every text ends, or None.
        plan: how to cut the kernel, in place of the plan that suits the GPU. launcher: what runs it (tests).
        chunk: most steps of a launch.
    """

    logits: Tensor | None = None  # which never leave the GPU
    scores: Tensor | None = None

    @staticmethod
    def refusal(model: LanguageModel, config: GenerationConfig) -> str | None:
        """Why the kernel cannot serve this request, or None."""
        return refuse(model, config)

    def __init__(
        self,
        model: LanguageModel,
        config: GenerationConfig,
        places: int,
        *,
        stop: StopStrings | None = None,
        deadline: float | None = None,
        plan: DecodePlan | None = None,
        launcher: Callable[..., None] | None = None,
        chunk: int = _LARGEST_CHUNK,
    ) -> None:
        self._model, self._config, self._places = model, config, places
        self._endings = Endings(config, stop, deadline)
        self._launcher, self._most_steps = launcher, chunk
        self.texts: list[_KernelText] = []
        self.stepped: list[_KernelText] = []
        self.seconds = 0.0
        self._open(plan or plan_for(model, config, places))

    @torch.inference_mode()
    def _open(self, plan: DecodePlan) -> None:
        """Begin with this plan: every text waits for a slot."""
        from tlstm_kernels.decode_launch import DecodeSession

        self._plan, vocab_size = plan, plan.shape.vocab_size
        self._session = DecodeSession(
            plan,
            packed_weights(self._model, plan),
            settings_of(self._config),
            flags_of(self._config, vocab_size, self._model.device),
            self._launcher,
        )
        step_bytes = plan.streams * (4 * plan.shape.stride + plan.logits_bytes)
        self._largest = max(1, min(self._most_steps, _CHUNK_BYTES // step_bytes))
        self._steps = min(_FIRST_CHUNK, self._largest)  # of the next launch
        self._slots: list[_KernelText | None] = [None] * plan.streams
        self._waiting = deque(self.texts)
        self._queue: deque[_Running] = deque()  # the chunk that is read, and the one behind it

    def add(self, state: GenerationState) -> list[_KernelText]:
        limits = new_token_limits(state, self._config)
        new = [
            _KernelText(
                limit,
                None if state.seeds is None else state.seeds[row],
                state.return_index[row],
                recurrent=_stream(state.recurrent, row),
                tokens=state.tokens[row],
            )
            for row, limit in enumerate(limits)
        ]
        self.texts = self.texts + new
        self._waiting.extend(new)
        return new

    @torch.inference_mode()
    def step(self) -> list[_KernelText]:
        started = time.perf_counter()
        running = self._current()
        assert running.tokens is not None
        assert running.scores is not None
        step, chunk = running.read, running.chunk
        going = [(slot, text) for slot, text in enumerate(running.texts) if text is not None]
        check_some_token(running.scores[step, [slot for slot, _ in going]])
        running.read += 1
        for slot, text in going:
            token = running.tokens[step][slot]
            assert token >= 0, "host and kernel disagree on where a text ends"
            text.new_tokens.append(token)
            text.place = (chunk.h[step, slot], chunk.c[step, slot])
        self.stepped = [text for _, text in going]
        late = self._endings.late()
        for slot, text in going:
            text.finish_reason = self._endings.reason(text, late, text.tail)
            if text.finish_reason is not None:
                self._end(slot, text)
        ended = [text for text in self.stepped if text.finish_reason is not None]
        if ended:
            self.texts = [text for text in self.texts if text.finish_reason is None]
        self.seconds += time.perf_counter() - started
        return ended

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
            if len(self._queue) == 1 and self._more_after(running):
                self._launch()
            running.tokens, running.scores = running.chunk.tokens(), running.chunk.scores()
        return running

    def _more_after(self, running: _Running) -> bool:
        """Whether a text can move on from this chunk to another: may need more steps than it has, or wait for them."""
        steps = running.chunk.steps
        return bool(self._waiting and None in self._slots) or any(
            t is not None and len(t.new_tokens) + steps < t.limit for t in running.texts
        )

    def _launch(self) -> None:
        from tlstm_kernels.decode_launch import PlanTooLargeError

        free = [slot for slot, text in enumerate(self._slots) if text is None]
        taken = [(slot, self._waiting.popleft()) for slot in free[: len(self._waiting)]]
        if taken:
            self._place_texts(taken)
        planned = sum(running.chunk.steps - running.read for running in self._queue)
        new = {id(text) for _, text in taken}
        left = [t.limit - len(t.new_tokens) - (0 if id(t) in new else planned) for t in self._slots if t is not None]
        steps = max(1, min(self._steps, max(left)))
        try:
            chunk = self._session.launch(steps)
        except PlanTooLargeError:  # found when the kernel is compiled, before anything was made
            self._open(plan_for(self._model, self._config, self._places))
            self._launch()
            return
        self._queue.append(_Running(chunk, list(self._slots)))
        self._steps = min(2 * self._steps, self._largest)

    def _place_texts(self, taken: Sequence[tuple[int, _KernelText]]) -> None:
        texts = [text for _, text in taken]
        for slot, text in taken:
            self._slots[slot] = text
        seeds = [text.seed or 0 for text in texts]
        fields = {
            "seed": [seed - (seed >> 63 << 64) for seed in seeds],  # as a signed word
            "return_index": [text.return_index for text in texts],
            "position": [len(text.tokens) for text in texts],
            "made": [0 for _ in texts],
            "limit": [text.limit for text in texts],
            "least": [self._config.min_new_tokens for _ in texts],
            "token": [int(text.tokens[-1]) for text in texts],
            "active": [1 for _ in texts],
        }
        start = LSTMState.cat([text.recurrent for text in texts])
        self._session.place([slot for slot, _ in taken], start.h, start.c, fields, [text.tokens for text in texts])
        self._steps = min(_FIRST_CHUNK, self._largest)

    def _end(self, slot: int, text: _KernelText) -> None:
        text.end, text.place = self.now(text), None  # so that the chunk's memory can go
        for running in self._queue:  # what the kernel made of it beyond this token counts for nothing
            running.texts = [None if t is text else t for t in running.texts]
        self._slots[slot] = None
        if text.finish_reason in ("stop_string", "time"):
            self._session.release([slot])

    @torch.inference_mode()
    def now(self, text: Text) -> tuple[LSTMState, Tensor]:
        assert isinstance(text, _KernelText)
        if text.end is not None:
            return text.end
        recurrent = text.recurrent
        if text.place is not None:
            parts = list(zip(self._plan.shape.columns, self._plan.shape.widths, strict=False))
            h, c = (tuple(both[None, first : first + width] for first, width in parts) for both in text.place)
            recurrent = LSTMState(h=h, c=c)
        return recurrent.clone(), torch.cat([text.tokens, torch.tensor(text.new_tokens, dtype=torch.int64)])


def _stream(state: LSTMState, row: int) -> LSTMState:
    """One stream of a state, without a copy."""
    return state.map(lambda tensor: tensor[row : row + 1])
