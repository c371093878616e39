"""`GenerationMixin`: `generate`, `generate_stream` and `prefill` for recurrent language models. Token ids only."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from tlstm.generation.beam_search import beam_search
from tlstm.generation.config import GenerationConfig
from tlstm.generation.inputs import TokenIds, resolve_config
from tlstm.generation.loop import DecodeLoop, FinishReason, Timings
from tlstm.generation.prefill import LanguageModel, evaluating, fill_id, read_texts
from tlstm.generation.state import GenerationState
from tlstm.generation.stopping import Decoder, StopStrings
from tlstm.generation.streamers import Streamer, check_streamed_rows, check_streamer
from tlstm.state import LSTMState


@dataclass
class GenerateOutput:
    """What `generate(return_dict_in_generate=True)` returns, for `R = B * num_return_sequences` sequences.

    Fields:
        sequences: `(R, T + N)` int64: the prompts as they were given, then the new tokens, padded on the right.
        new_tokens: the new ids of each sequence, without padding, as lists.
        finish_reasons: "eos", "stop_string", "length" or "time" for each sequence.
        state: where each text stands; `generate(state=...)` continues it.
        timings: tokens and seconds of prefill and decoding.
        scores: per step the processed logits `(R, V)` (-inf for a sequence that has ended), with `output_scores`.
        logits: per step the model's own logits `(R, V)`, with `output_logits`.
        sequences_scores: `(R,)`, with beams: sum of log-probabilities / length ** length_penalty.
    """

    sequences: Tensor
    new_tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    state: GenerationState
    timings: Timings
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    sequences_scores: Tensor | None = None


@dataclass
class _Request:
    """A call whose arguments are checked and whose prompt is read."""

    config: GenerationConfig
    prompts: Tensor  # (R, T) int64 on the CPU
    state: GenerationState
    stop: StopStrings | None
    deadline: float | None
    timings: Timings


class TokenStream(Iterator[int]):
    """The new tokens of one text as they are made; from `generate_stream`.

    Between any two tokens, and after leaving the iteration early, `state` is where the text stands: pass it to
    `generate(state=...)` to go on.
    """

    def __init__(self, model: LanguageModel, loop: DecodeLoop, timings: Timings) -> None:
        self._model, self._loop, self._timings = model, loop, timings

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> int:
        if self._loop.finished:
            raise StopIteration
        with evaluating(self._model):
            (token,) = self._loop.step()
        assert token is not None
        return token

    @property
    def new_tokens(self) -> list[int]:
        """The tokens made so far."""
        return list(self._loop.new_tokens[0])

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the text ended, `None` while it has not."""
        return self._loop.finish_reasons[0]

    @property
    def state(self) -> GenerationState:
        """Where the text stands now."""
        return self._loop.state()

    @property
    def timings(self) -> Timings:
        """Tokens and seconds so far."""
        return _timings(self._timings, self._loop.new_tokens, self._loop.seconds)


class GenerationMixin:
    """Text generation for a model with `forward(input_ids, state=...)`, a `model` backbone and `zero_state`."""

    generation_config: GenerationConfig

    def generate(
        self,
        input_ids: TokenIds | None = None,  # (B, T) or (T,) int64, or lists of ids
        attention_mask: Tensor | None = None,  # (B, T), non-zero at real tokens
        generation_config: GenerationConfig | None = None,
        streamer: Streamer | None = None,
        state: GenerationState | LSTMState | None = None,
        *,
        tokenizer: Decoder | None = None,
        **overrides: Any,
    ) -> Tensor | GenerateOutput:
        """Continue texts. Each one comes out as it would alone: neither padding nor the rest of the batch changes it.

        Args:
            input_ids: the prompts. A tensor may be padded on the left or right, with its `attention_mask`; lists may
                differ in length. With none, the text begins with `bos_token_id`, or where `state` stands.
            generation_config: settings in place of the model's own `generation_config`.
            streamer: gets the prompt and then every new token (see `tlstm.generation.streamers`).
            state: what to continue. A `GenerationState` holds the text so far; `input_ids` then add to it, and one
                state serves several prompts. A bare `LSTMState` is one that has consumed all earlier text.
            tokenizer: anything with `decode(ids) -> str`; needed for `stop_strings` only.
            **overrides: any field of `GenerationConfig`.

        Returns:
            `(B * num_return_sequences, T + N)` int64 on the model's device: the prompts as given, then the new tokens,
            shorter rows filled with `pad_token_id` (else the first eos id). Or a `GenerateOutput`, with
            `return_dict_in_generate=True`.

        Raises:
            ValueError: wrong ids, mask, state or settings, with the remedy. TypeError: an unknown setting.
        """
        model = cast(LanguageModel, self)
        if streamer is not None:
            check_streamer(streamer)
        try:
            with evaluating(model):
                request = self._start(input_ids, attention_mask, generation_config, state, tokenizer, overrides)
                if streamer is not None:
                    check_streamed_rows(streamer, request.state.batch_size, request.config.num_beams)
                output = self._search(request) if request.config.num_beams > 1 else self._decode(request, streamer)
        finally:  # whatever happens: text held back is not lost, and a thread that reads the streamer does not hang
            if streamer is not None:
                streamer.end()
        return output if request.config.return_dict_in_generate else output.sequences

    def generate_stream(
        self,
        input_ids: TokenIds | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        state: GenerationState | LSTMState | None = None,
        *,
        tokenizer: Decoder | None = None,
        **overrides: Any,
    ) -> TokenStream:
        """As `generate` for one text, but an iterator over the new ids as they are made, with a `state` at any moment.

        Raises:
            ValueError: as `generate`; or several texts, or beams.
        """
        model = cast(LanguageModel, self)
        with evaluating(model):
            request = self._start(input_ids, attention_mask, generation_config, state, tokenizer, overrides)
        if request.state.batch_size > 1 or request.config.num_beams > 1:
            raise ValueError(
                "generate_stream: expected one text and no beams; for several texts pass generate() a streamer with "
                "the attribute supports_batch = True"
            )
        return TokenStream(model, choose_decoder(model, request), request.timings)

    def prefill(
        self,
        input_ids: TokenIds | None = None,
        attention_mask: Tensor | None = None,
        state: GenerationState | LSTMState | None = None,
    ) -> GenerationState:
        """Read a prompt once, to be continued any number of times with `generate(..., state=...)`.

        Arguments and errors as in `generate`. The state of an LSTM has one size whatever the prompt's length.
        """
        model = cast(LanguageModel, self)
        with evaluating(model):
            config = resolve_config(None, self.generation_config, model.config, {})
            return read_texts(model, input_ids, attention_mask, state, config)[1]

    # ---- the parts -----------------------------------------------------------------------------------------------

    def _start(
        self,
        input_ids: TokenIds | None,
        attention_mask: Tensor | None,
        generation_config: GenerationConfig | None,
        state: GenerationState | LSTMState | None,
        tokenizer: Decoder | None,
        overrides: dict[str, Any],
    ) -> _Request:
        model = cast(LanguageModel, self)
        started = time.perf_counter()
        config = resolve_config(generation_config, self.generation_config, model.config, overrides)
        stop = StopStrings(config.stop_texts, cast(Decoder, tokenizer)) if config.stop_texts else None
        prompts, current, fed = read_texts(model, input_ids, attention_mask, state, config)
        if current.recurrent.device.type == "cuda":
            torch.cuda.synchronize(current.recurrent.device)
        seconds = time.perf_counter() - started
        if config.do_sample:
            current = replace(current, seeds=_seeds(config, current))
        padded = prompts.padded if prompts is not None else torch.zeros(current.batch_size, 0, dtype=torch.int64)
        if config.num_beams == 1 and config.num_return_sequences > 1:
            current = current.repeat_interleave(config.num_return_sequences)
        return _Request(
            config=config,
            prompts=padded.repeat_interleave(config.num_return_sequences, dim=0),
            state=current,
            stop=stop,
            deadline=None if config.max_time is None else started + config.max_time,
            timings=Timings(prefill_tokens=fed, prefill_seconds=seconds),
        )

    def _decode(self, request: _Request, streamer: Streamer | None) -> GenerateOutput:
        loop = choose_decoder(cast(LanguageModel, self), request)
        if streamer is not None:
            streamer.put(request.prompts)
        while not loop.finished:
            new = loop.step()
            if streamer is not None:
                streamer.put(torch.tensor([-1 if token is None else token for token in new]))
        config = request.config
        return GenerateOutput(
            sequences=_sequences(request, loop.new_tokens),
            new_tokens=loop.new_tokens,
            finish_reasons=cast(list[FinishReason], loop.finish_reasons),
            state=loop.state(),
            timings=_timings(request.timings, loop.new_tokens, loop.seconds),
            scores=tuple(loop.scores) if config.output_scores else None,
            logits=tuple(loop.logits) if config.output_logits else None,
        )

    def _search(self, request: _Request) -> GenerateOutput:
        result = beam_search(
            cast(LanguageModel, self), request.state, request.config, stop=request.stop, deadline=request.deadline
        )
        return GenerateOutput(
            sequences=_sequences(request, result.new_tokens),
            new_tokens=result.new_tokens,
            finish_reasons=result.finish_reasons,
            state=result.state,
            timings=_timings(request.timings, result.new_tokens, result.seconds),
            sequences_scores=result.scores,
        )


def choose_decoder(model: LanguageModel, request: _Request) -> DecodeLoop:
    """The decode path of a request. Every path starts here and gives the same tokens for the same request."""
    return DecodeLoop(model, request.state, request.config, stop=request.stop, deadline=request.deadline)


def _seeds(config: GenerationConfig, state: GenerationState) -> tuple[int, ...]:
    """One seed per text: the caller's, else those the texts began with, else fresh ones from torch's generator."""
    if isinstance(config.seed, int):
        return (config.seed,) * state.batch_size
    if isinstance(config.seed, list):
        if len(config.seed) != state.batch_size:
            raise ValueError(
                f"seed: expected one per prompt ({state.batch_size}), got {len(config.seed)}; one number serves all"
            )
        return tuple(config.seed)
    if state.seeds is not None:
        return state.seeds
    return tuple(torch.randint(2**63 - 1, (state.batch_size,)).tolist())


def _sequences(request: _Request, new_tokens: Sequence[Sequence[int]]) -> Tensor:
    """Prompts and new tokens as one rectangle, on the model's device."""
    width = max(map(len, new_tokens))
    config = request.config
    filled = config.pad_token_id is None and not config.eos_ids and any(len(ids) < width for ids in new_tokens)
    if filled and not config.return_dict_in_generate:  # `new_tokens` tells where each one ends
        warnings.warn(
            "the sequences differ in length and there is no pad_token_id, so the shorter ones are filled with id 0; "
            "set pad_token_id, or read new_tokens with return_dict_in_generate=True",
            stacklevel=5,
        )
    new = torch.full((len(new_tokens), width), fill_id(config), dtype=torch.int64)
    for row, ids in enumerate(new_tokens):
        new[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return torch.cat([request.prompts, new], dim=1).to(request.state.recurrent.device)


def _timings(prefill: Timings, new_tokens: Sequence[Sequence[int]], seconds: float) -> Timings:
    return replace(prefill, decode_tokens=sum(map(len, new_tokens)), decode_seconds=seconds)
