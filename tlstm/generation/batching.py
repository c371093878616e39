"""Continuous batching: many prompts through a few rows; a row whose text has ended goes to the next prompt at once.

No row waits for another one: a batch that is cut to size and run until its longest text ends leaves most rows idle most
of the time. Each text is what `generate` makes of its prompt alone, whichever texts happened to run beside it. Rows may
be the slots of the GPU's decode kernel, which are filled between two launches, or those of a step in Python.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from tlstm.generation.config import DEFAULT_NEW_TOKENS, GenerationConfig
from tlstm.generation.decoders import choose_rows
from tlstm.generation.inputs import resolve_config
from tlstm.generation.loop import Timings
from tlstm.generation.prefill import LanguageModel, evaluating, read_texts
from tlstm.generation.state import GenerationState
from tlstm.generation.stopping import Decoder, StopStrings
from tlstm.generation.texts import FinishReason, Text, state_of
from tlstm.validation import check_int

Prompt = Sequence[int] | Tensor  # (T,) int64


@dataclass(frozen=True)
class BatchedText:
    """A text out of many.

    Fields:
        prompt: the number of its prompt, from 0. copy: which of the prompt's `num_return_sequences`, from 0.
        new_tokens: the new ids. finish_reason: as in `GenerateOutput`; None where it was not finished yet.
        seed: None without sampling. state: where it stands, to go on with `generate(state=...)`.
    """

    prompt: int
    copy: int
    new_tokens: list[int]
    finish_reason: FinishReason | None
    seed: int | None
    state: GenerationState


class TextBatcher(Iterator[BatchedText]):
    """The texts that continue `prompts`, in the order in which they end; from `generate_many`, which documents it.

    Iterate, or call `step` to look in between. `prompts` is read as rows become free.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Iterable[Prompt],
        batch_size: int,
        generation_config: GenerationConfig | None,
        tokenizer: Decoder | None,
        decoder: str,
        overrides: dict[str, Any],
    ) -> None:
        check_int("batch_size", batch_size, 1)
        config = resolve_config(generation_config, model.generation_config, model.config, overrides)
        if config.num_beams > 1:
            raise ValueError("generate_many: expected no beams, which have no rows to give away; use generate()")
        count = len(prompts) if isinstance(prompts, Sized) else None
        if isinstance(config.seed, list) and len(config.seed) != count:
            raise ValueError(
                f"seed: expected one per prompt ({'an unknown number' if count is None else count}), got "
                f"{len(config.seed)}; one number serves all"
            )
        places = batch_size if count is None else max(1, min(batch_size, count * config.num_return_sequences))
        self._model, self._config, self._places = model, config, places
        self._prompts, self._prompts_read = iter(prompts), 0
        self._waiting: deque[tuple[int, GenerationState]] = deque()  # prompt, read; one text each
        self._running: dict[int, tuple[int, Text]] = {}  # id of the text -> prompt, text; in the order they began
        self._ended: deque[BatchedText] = deque()
        limit = config.max_new_tokens or config.max_length or DEFAULT_NEW_TOKENS
        self._rows, self.decoder = choose_rows(
            model,
            config,
            places,
            limit * (places if count is None else max(1, count * config.num_return_sequences)),
            stop=StopStrings(config.stop_texts, cast(Decoder, tokenizer)) if config.stop_texts else None,
            deadline=None if config.max_time is None else time.perf_counter() + config.max_time,
            wanted=decoder,
        )
        self._timings = Timings()

    def __iter__(self) -> TextBatcher:
        return self

    def __next__(self) -> BatchedText:
        while not self._ended:
            if not self._advance():
                raise StopIteration
        return self._ended.popleft()

    def step(self) -> list[BatchedText] | None:
        """Make the next token in every row, filling free rows first; the decode kernel makes some at once.

        Returns:
            The texts that have ended; None when all have.

        Raises:
            ValueError: a prompt is not one, as in `generate`.
        """
        going = self._advance() or bool(self._ended)
        ended = list(self._ended)
        self._ended.clear()
        return ended if going else None

    def _advance(self) -> bool:
        self._fill_rows()
        if not self._rows.texts:
            return False
        for text in self._rows.advance():
            prompt, _ = self._running.pop(id(text))
            self._ended.append(self._batched(prompt, text))
        return True

    @property
    def unfinished(self) -> list[BatchedText]:
        """The texts in the rows as they stand now, in the order in which they began."""
        return [self._batched(prompt, text) for prompt, text in self._running.values()]

    @property
    def timings(self) -> Timings:
        """Tokens and seconds so far."""
        return replace(self._timings, decode_tokens=self._rows.made, decode_seconds=self._rows.seconds)

    # ---- the queue -----------------------------------------------------------------------------------------------

    def _fill_rows(self) -> None:
        free = self._places - len(self._rows.texts)
        while free > 0 and (self._waiting or self._read_prompts(free)):
            taken = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
            for prompt, state in taken:
                (text,) = self._rows.add(state)
                self._running[id(text)] = (prompt, text)
            free -= len(taken)

    def _read_prompts(self, texts: int) -> bool:
        """Read as many prompts as give about `texts` texts, all in one call of the model. False: there are no more."""
        copies, first = self._config.num_return_sequences, self._prompts_read
        prompts = [torch.as_tensor(ids).tolist() for ids in islice(self._prompts, max(1, texts // copies))]
        if not prompts:
            return False
        started = time.perf_counter()
        try:
            with evaluating(self._model):
                _, state, fed = read_texts(self._model, prompts, None, None, self._config)
        except ValueError as error:
            raise ValueError(f"prompts {first} to {first + len(prompts) - 1}: {error}") from None
        # The kernel is ahead: to wait for the prompts would be to wait for its chunk too. That time counts as decoding.
        if state.recurrent.device.type == "cuda" and self.decoder.name != "kernel":
            torch.cuda.synchronize(state.recurrent.device)
        self._timings.prefill_tokens += fed
        self._timings.prefill_seconds += time.perf_counter() - started
        self._prompts_read += len(prompts)
        if self._config.do_sample:
            state = replace(state, seeds=self._seeds(first, len(prompts)))
        if copies > 1:
            state = state.repeat_interleave(copies)
        self._waiting.extend((first + row // copies, state.select([row])) for row in range(state.batch_size))
        return True

    def _seeds(self, first: int, count: int) -> tuple[int, ...]:
        seed = self._config.seed
        if isinstance(seed, int):
            return (seed,) * count
        if isinstance(seed, list):
            return tuple(seed[first : first + count])
        return tuple(torch.randint(2**63 - 1, (count,)).tolist())

    def _batched(self, prompt: int, text: Text) -> BatchedText:
        state = state_of([text], self._rows, self._model.config.vocab_size)
        return BatchedText(prompt, text.return_index, list(text.new_tokens), text.finish_reason, text.seed, state)
