"""`GenerationMixin`: the ways to generate with a recurrent language model. Token ids only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from tlstm.generation.batching import Prompt, TextBatcher
from tlstm.generation.beam_search import beam_search
from tlstm.generation.config import GenerationConfig
from tlstm.generation.inputs import TokenIds, resolve_config
from tlstm.generation.loop import Timings
from tlstm.generation.output import GenerateOutput, sequences, with_decode
from tlstm.generation.prefill import LanguageModel, evaluating, read_texts
from tlstm.generation.request import Request, read_request
from tlstm.generation.state import GenerationState
from tlstm.generation.stopping import Decoder
from tlstm.generation.streamers import Streamer, check_streamed_rows, check_streamer
from tlstm.generation.texts import FinishReason
from tlstm.state import LSTMState


class TokenStream(Iterator[int]):
    """The new tokens of one text as they are made; from `generate_stream`.

    Between any two tokens, and after leaving the iteration early, `state` is where the text stands: pass it to
    `generate(state=...)` to go on.
    """

    def __init__(self, model: LanguageModel, request: Request) -> None:
        self._prefill = request.timings
        self._loop, self.decoder = request.start(model)

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> int:
        if self._loop.finished:
            raise StopIteration
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
        return with_decode(self._prefill, self._loop.new_tokens, self._loop.seconds)


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
        decoder: str = "auto",
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
            decoder: "auto" (the fastest way that can serve the call), or one by name, see `tlstm.generation.decoders`.
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
                request = read_request(
                    model, input_ids, attention_mask, generation_config, state, tokenizer, decoder, overrides
                )
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
        decoder: str = "auto",
        **overrides: Any,
    ) -> TokenStream:
        """As `generate` for one text, but an iterator over the new ids as they are made, with a `state` at any moment.

        Raises:
            ValueError: as `generate`; or several texts, or beams.
        """
        model = cast(LanguageModel, self)
        with evaluating(model):
            request = read_request(
                model, input_ids, attention_mask, generation_config, state, tokenizer, decoder, overrides
            )
        if request.state.batch_size > 1 or request.config.num_beams > 1:
            raise ValueError(
                "generate_stream: expected one text and no beams; for several texts pass generate() a streamer with "
                "the attribute supports_batch = True"
            )
        return TokenStream(model, request)

    def generate_many(
        self,
        prompts: Iterable[Prompt],  # each (T,) int64, or a list of ids
        batch_size: int = 16,
        generation_config: GenerationConfig | None = None,
        *,
        tokenizer: Decoder | None = None,
        decoder: str = "auto",
        **overrides: Any,
    ) -> TextBatcher:
        """Continue any number of prompts, `batch_size` of them at a time: an iterator over the texts as they end.

        A text that ends makes room for the next prompt at once (continuous batching); `prompts` may be a generator, and
        is read no faster than rows become free. Each text is what `generate` makes of its prompt alone.

        Args:
            generation_config, tokenizer, decoder, **overrides: as in `generate`; no beams. A list of seeds has one per
                prompt.

        Raises:
            ValueError: wrong settings; while iterating: a wrong prompt, with its number.
        """
        return TextBatcher(
            cast(LanguageModel, self), prompts, batch_size, generation_config, tokenizer, decoder, overrides
        )

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

    def _decode(self, request: Request, streamer: Streamer | None) -> GenerateOutput:
        loop, choice = request.start(cast(LanguageModel, self))
        if streamer is None:
            loop.run()
        else:  # which is the user's, and does not run in inference mode
            streamer.put(request.prompts)
            while not loop.finished:
                streamer.put(torch.tensor([-1 if token is None else token for token in loop.step()]))
        config = request.config
        return GenerateOutput(
            sequences=sequences(request, loop.new_tokens),
            new_tokens=loop.new_tokens,
            finish_reasons=cast(list[FinishReason], list(loop.finish_reasons)),
            state=loop.state(),
            timings=with_decode(request.timings, loop.new_tokens, loop.seconds),
            scores=tuple(loop.scores) if config.output_scores else None,
            logits=tuple(loop.logits) if config.output_logits else None,
            decoder=choice,
        )

    def _search(self, request: Request) -> GenerateOutput:
        result = beam_search(
            cast(LanguageModel, self), request.state, request.config, stop=request.stop, deadline=request.deadline
        )
        return GenerateOutput(
            sequences=sequences(request, result.new_tokens),
            new_tokens=result.new_tokens,
            finish_reasons=result.finish_reasons,
            state=result.state,
            timings=with_decode(request.timings, result.new_tokens, result.seconds),
            sequences_scores=result.scores,
        )
