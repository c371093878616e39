"""`KernelRows`: the decode loop inside a GPU kernel, some tokens of every text a launch.

What it gives is what the loop in Python gives, token for token and in the same order, with the state after any of them.
Meanwhile the GPU is ahead: while the host reads one chunk of tokens the next one is being made. A text that ends where
only the host sees it (a stop string, the time limit) is cut there, and what was made beyond is thrown away.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tlstm.generation.config import GenerationConfig
from tlstm.generation.gpu_model import flags_of, kernel_name, packed_weights, plan_for, refuse, settings_of
from tlstm.generation.kernel_chunks import KernelText, RunningChunk, split_state, states_of_new
from tlstm.generation.prefill import LanguageModel
from tlstm.generation.state import GenerationState
from tlstm.generation.stopping import StopStrings
from tlstm.generation.texts import Endings, Text, new_token_limits
from tlstm.state import LSTMState
from tlstm.trials import note_compiled

if TYPE_CHECKING:
    from tlstm_kernels.decode_shape import DecodePlan

# Steps: the first tokens of a text soon, then few launches. Where texts come and go all the time chunks stay small, and
# a slot is never empty for long.
_FIRST_CHUNK, _LARGEST_CHUNK = 8, 256
_CHUNK_BYTES = 1 << 26  # of a launch's buffers


class KernelRows:
    """The `TextRows` of the decode kernel. Texts wait for a slot in the order in which they came.

    A slot whose text has ended is filled between two launches; the texts in the other slots notice nothing.

    Args:
        places: texts at once, or fewer where the GPU takes fewer.
        deadline: `time.perf_counter()` value after which every text ends, or None.
        plan: how to cut the kernel, in place of the plan that suits the GPU. launcher: what runs it (tests).
        chunk: most steps of a launch. Half as many where stop strings may end a text, so that what the kernel has made
            beyond one, in the chunk that is read and the one behind it, is less than a chunk.
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
        self._launcher, self._most_steps = launcher, chunk if stop is None else max(1, chunk // 2)
        self.texts: list[KernelText] = []
        self.stepped: list[KernelText] = []
        self.made, self.seconds, self._stops = 0, 0.0, stop is not None
        self._is_noted = launcher is not None  # that the kernel is compiled
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
        self._slots: list[KernelText | None] = [None] * plan.streams
        self._waiting = deque(self.texts)
        self._queue: deque[RunningChunk] = deque()  # the chunk that is read, and the one behind it

    def add(self, state: GenerationState) -> list[KernelText]:
        limits = new_token_limits(state, self._config)
        new = [
            KernelText(
                limit,
                None if state.seeds is None else state.seeds[row],
                state.return_index[row],
                source=state.recurrent,
                row=row,
                tokens=state.tokens[row],
            )
            for row, limit in enumerate(limits)
        ]
        self.texts = self.texts + new
        self._waiting.extend(new)
        return new

    def step(self) -> list[KernelText]:
        return self._read(1)

    def advance(self) -> list[KernelText]:
        return self._read(self._largest)

    def _read(self, most: int) -> list[KernelText]:
        """Take up to so many steps of the chunk that is to be read; returns the texts in the order of their ends."""
        started, late = time.perf_counter(), self._endings.late()
        running = self._current()
        running.check()
        steps = 1 if late else min(most, running.sound_steps - running.read)
        going = [(slot, text) for slot, text in enumerate(running.texts) if text is not None]
        ended, made = [], 0
        for slot, text in going:
            ids = running.rest(slot, steps)
            count = 0
            # The kernel itself ends a text where its tokens do; only after a stop string there is more.
            for piece in [[token] for token in ids] if self._stops else [ids]:
                count += len(piece)
                text.new_tokens.extend(piece)
                text.place = (running.chunk, running.read + count - 1, slot)
                if self._ends(text, slot, late):
                    ended.append((count, text))
                    break
            else:
                assert count == steps, "host and kernel disagree on where a text ends"
            made += count
        running.read += steps
        in_order = [text for _, text in sorted(ended, key=lambda pair: pair[0])]
        if ended:
            self._take_out(running, in_order)
            self.texts = [text for text in self.texts if text.finish_reason is None]
        self.stepped = [text for _, text in going]
        self.made += made
        self.seconds += time.perf_counter() - started
        return in_order

    def _ends(self, text: KernelText, slot: int, late: bool) -> bool:
        """Whether its newest token ends a text, which it then does."""
        text.finish_reason = self._endings.reason(text, late, text.tail)
        if text.finish_reason is None:
            return False
        for running in self._queue:  # what the kernel made of it beyond this token counts for nothing
            running.texts = [None if t is text else t for t in running.texts]
        self._slots[slot] = None
        if text.finish_reason in ("stop_string", "time"):
            with torch.inference_mode():  # in which the streams were made
                self._session.release([slot])
        return True

    @torch.inference_mode()
    def _take_out(self, running: RunningChunk, ended: list[KernelText]) -> None:
        """Copy the states of texts that have ended out of their chunk, so that its memory can go."""
        places = [text.place[1:] for text in ended if text.place is not None]
        steps, slots = torch.tensor(places, device=self._model.device).T
        state = split_state(running.chunk.h[steps, slots], running.chunk.c[steps, slots], self._plan)
        for row, text in enumerate(ended):
            text.end = state.row(row), text.whole()
            text.place = None

    def _current(self) -> RunningChunk:
        """The chunk to read from, with the one after it launched."""
        while self._queue and self._queue[0].is_done:
            self._queue.popleft()
        if not self._queue:
            self._launch()
        running = self._queue[0]
        if running.read == 0 and len(self._queue) == 1 and self._more_after(running):
            self._launch()
        return running

    def _more_after(self, running: RunningChunk) -> bool:
        """Whether a text can move on from this chunk to another: may need more steps than it has, or wait for them."""
        steps = running.chunk.steps
        return bool(self._waiting and None in self._slots) or any(
            t is not None and len(t.new_tokens) + steps < t.limit for t in running.texts
        )

    @torch.inference_mode()
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
        if not self._is_noted:
            self._is_noted = True
            index = self._model.device.index
            assert index is not None
            note_compiled(kernel_name(self._plan, self._config), index)
        self._queue.append(RunningChunk(chunk, list(self._slots)))
        self._steps = min(2 * self._steps, self._largest)

    def _place_texts(self, taken: Sequence[tuple[int, KernelText]]) -> None:
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
        start = states_of_new(texts)
        self._session.place([slot for slot, _ in taken], start.h, start.c, fields, [text.tokens for text in texts])
        self._steps = min(_FIRST_CHUNK, self._largest)

    @torch.inference_mode()
    def now(self, text: Text) -> tuple[LSTMState, Tensor]:
        assert isinstance(text, KernelText)
        if text.end is not None:
            return text.end
        return text.state(self._plan).clone(), text.whole()
