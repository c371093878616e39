"""The work of `tlstm generate`: prompts from where they come, texts made from them, cleanly stopped where asked."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlstm.cli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from tlstm.generation.decoders import DecoderChoice
    from tlstm.generation.loop import Timings
    from tlstm.generation.state import GenerationState
    from tlstm.models import LSTMForCausalLM
    from tlstm.tokenizer.tokenizer import Tokenizer
    from tlstm.training.interrupt import StopRequest

INTERRUPTED = "interrupted"
# Tokens before the first new one that its decoding may depend on: a character's first bytes, a word's first blank.
_CONTEXT = 64


@dataclass
class Text:
    """One generated text.

    Fields:
        prompt: what it continues, empty where a saved state is continued. text, tokens: what was made.
        finish_reason: "eos", "stop_string", "length", "time" or "interrupted". seed: `None` without sampling.
        score: of a beam search.
    """

    prompt: str
    text: str
    tokens: list[int]
    finish_reason: str
    seed: int | None = None
    score: float | None = None


@dataclass
class Result:
    """What was made, where it stands (None: nothing was), how long it took, and in which way (None: by beam search).

    `reader_gone`: nobody reads our output any more.
    """

    texts: list[Text]
    state: GenerationState | None
    timings: Timings
    reader_gone: bool = False
    decoder: DecoderChoice | None = None


# ---- prompts ---------------------------------------------------------------------------------------------------------


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that the command line names; one empty prompt where it names none, nor a state.

    Raises:
        UsageError: two sources, no prompt in the file, or bytes that are not UTF-8.
    """
    if args.prompt_file is not None:
        lines = _decode(Path(args.prompt_file).read_bytes(), args.prompt_file).splitlines()
        if not lines:
            raise UsageError(f"{args.prompt_file}: expected one prompt a line, found an empty file")
        return lines
    if args.prompt == "-" or (args.prompt is None and args.state_in is None and _is_piped()):
        return [_decode(sys.stdin.buffer.read(), "standard input")]
    return [] if args.prompt is None and args.state_in is not None else [args.prompt or ""]


def _is_piped() -> bool:
    """Whether stdin is a pipe, a socket or a file: not a terminal, and not /dev/null."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # no stdin at all
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: expected UTF-8 text, byte {error.start} is not; convert it first") from None


def encode_prompt(prompt: str, tokenizer: Tokenizer, bos_token_id: int | None, *, continued: bool) -> list[int]:
    """The prompt's ids. An empty one, where nothing is continued, is the beginning of a text: bos, else a line end."""
    ids = tokenizer.encode(prompt)
    if ids or continued:
        return ids
    if bos_token_id is not None:
        return [bos_token_id]
    try:
        return tokenizer.encode("\n")
    except ValueError:
        raise UsageError(
            "the prompt is empty, and the model has neither a bos token nor a line end to begin with; use --prompt TEXT"
        ) from None


# ---- generation ------------------------------------------------------------------------------------------------------


def generate_one(
    model: LSTMForCausalLM,
    tokenizer: Tokenizer,
    prompt: tuple[str, list[int]] | None,
    state: GenerationState | None,
    settings: dict[str, Any],
    stop: StopRequest,
    emit: Callable[[str], None],
    *,
    echo: bool,
    decoder: str = "auto",
) -> Result:
    """One text, handed to `emit` piece by piece, after its prompt where `echo` says so.

    A stop request ends it after the token in the making.
    """
    words, ids = prompt if prompt is not None else ("", [])
    stream = model.generate_stream(
        [ids] if prompt is not None else None, state=state, tokenizer=tokenizer, decoder=decoder, **settings
    )
    decode = PieceDecoder(tokenizer, [*(state.tokens[0].tolist() if state is not None else ()), *ids])
    pieces: list[str] = []
    reader_gone = False

    def hand_out(piece: str) -> None:
        pieces.append(piece)
        emit(piece)

    try:
        if echo:  # only now: whatever is wrong with the settings has been told
            emit(words)
        while stop.signal is None:
            token = next(stream, None)
            if token is None:
                break
            hand_out(decode.step(token))
        hand_out(decode.flush())
    except BrokenPipeError:
        reader_gone = True
    after = stream.state
    text = Text(words, "".join(pieces), stream.new_tokens, stream.finish_reason or INTERRUPTED, _seeds(after)[0])
    return Result([text], after, stream.timings, reader_gone, stream.decoder)


def generate_many(
    model: LSTMForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[tuple[str, list[int]]],
    state: GenerationState | None,
    settings: dict[str, Any],
    stop: StopRequest | None,
    decoder: str = "auto",
) -> Result:
    """Several texts in one batch: of several prompts, several of each, or by beam search (which cannot be stopped)."""
    from tlstm.generation.loop import Timings

    copies = settings.get("num_return_sequences", model.generation_config.num_return_sequences)
    watcher = _Watcher(stop) if stop is not None else None
    input_ids = [ids for _, ids in prompts] or None
    scores: list[float | None]
    try:
        output: Any = model.generate(
            input_ids,
            state=state,
            streamer=watcher,
            tokenizer=tokenizer,
            decoder=decoder,
            **settings | {"return_dict_in_generate": True},
        )
    except _StopAskedError:
        assert watcher is not None
        made, reasons, timings = watcher.rows(), [INTERRUPTED] * len(watcher.rows()), Timings()
        timings.decode_tokens = sum(map(len, made))
        after = _state_of(model, state, prompts, made, copies, settings.get("seed"))
        scores, choice = [None] * len(made), None
    else:
        made, reasons, timings, after = output.new_tokens, output.finish_reasons, output.timings, output.state
        scores = [None] * len(made) if output.sequences_scores is None else output.sequences_scores.tolist()
        choice = output.decoder
    given = list(prompts) or [("", [])] * (len(made) // copies)
    before = [[]] * len(given) if state is None else [ids.tolist() for ids in state.tokens]
    before = before * (len(given) // len(before))  # one state may serve several prompts
    texts = []
    for row, tokens in enumerate(made):
        words, ids = given[row // copies]
        decode = PieceDecoder(tokenizer, [*before[row // copies], *ids])
        text = "".join(map(decode.step, tokens)) + decode.flush()
        texts.append(Text(words, text, list(tokens), reasons[row], _seeds(after)[row], scores[row]))
    return Result(texts, after, timings, decoder=choice)


class PieceDecoder:
    """New tokens to text; knows the tokens before them, whose text is not repeated."""

    def __init__(self, tokenizer: Tokenizer, before: list[int]) -> None:
        self._stream = tokenizer.decode_stream(skip_special_tokens=True)
        for token in before[-_CONTEXT:]:
            self._stream.step(token)

    def step(self, token: int) -> str:
        return self._stream.step(token) or ""

    def flush(self) -> str:
        return self._stream.flush()


class _StopAskedError(Exception):
    """Raised between two steps to leave `generate`."""


class _Watcher:
    """A streamer that keeps what was made, and leaves the loop when a stop is asked for."""

    supports_batch = True

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._columns: list[list[int]] | None = None

    def put(self, value: Tensor) -> None:
        if self._columns is None:  # the prompts come first
            self._columns = []
        else:
            self._columns.append(value.tolist())
            if self._stop.signal is not None:
                raise _StopAskedError

    def end(self) -> None:
        """Nothing is held back."""

    def rows(self) -> list[list[int]]:
        """The new tokens of each text; -1 stands where one had ended."""
        return [[token for token in row if token >= 0] for row in zip(*(self._columns or []), strict=True)]


def _state_of(
    model: LSTMForCausalLM,
    state: GenerationState | None,
    prompts: Sequence[tuple[str, list[int]]],
    made: list[list[int]],
    copies: int,
    seed: int | list[int] | None,
) -> GenerationState:
    """Where interrupted texts stand, by reading what was made once more (within rounding of the steps themselves)."""
    given = [ids for _, ids in prompts] or [[]] * (len(made) // copies)
    if state is not None:
        if state.batch_size == 1 < len(given):
            state = state.select([0] * len(given))
        state = state.repeat_interleave(copies)
    after = model.prefill([[*given[row // copies], *tokens] for row, tokens in enumerate(made)], state=state)
    if state is None:
        after = replace(after, return_index=tuple(range(copies)) * len(given))
    if seed is not None:
        seeds = seed if isinstance(seed, list) else [seed] * len(given)
        after = replace(after, seeds=tuple(seeds[row // copies] for row in range(len(made))))
    return after


def _seeds(state: GenerationState) -> Sequence[int | None]:
    return state.seeds if state.seeds is not None else [None] * state.batch_size
