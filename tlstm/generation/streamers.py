"""Streamers: objects with `put` and `end` that `generate(streamer=...)` feeds while the text is made.

The contract is that of transformers, so its streamers work here too: `put` gets the prompt first, `(rows, T)`, then
the new token of every step, `(rows,)`; `end` is called once, also when the call fails or is interrupted. A streamer
that takes several rows says so with an attribute `supports_batch = True`; rows that have ended then hold -1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from queue import Queue
from typing import Protocol, TextIO

from torch import Tensor


class Streamer(Protocol):
    """What `generate` asks of a streamer."""

    def put(self, value: Tensor, /) -> None: ...

    def end(self) -> None: ...


class PieceStream(Protocol):
    """What a tokenizer's `decode_stream()` returns."""

    def step(self, token_id: int, /) -> str | None: ...

    def flush(self) -> str: ...


class StreamingTokenizer(Protocol):
    """What a text streamer asks of a tokenizer."""

    def decode_stream(self) -> PieceStream: ...


def check_streamer(streamer: object) -> None:
    """Raise `ValueError` unless `streamer` has `put` and `end`."""
    if not (callable(getattr(streamer, "put", None)) and callable(getattr(streamer, "end", None))):
        raise ValueError(
            f"streamer: expected an object with put(tokens) and end(), got {type(streamer).__name__}; "
            "for example tlstm.TextStreamer(tokenizer)"
        )


def check_streamed_rows(streamer: Streamer, rows: int, beams: int) -> None:
    """Raise `ValueError` unless `streamer` takes as many sequences as will be generated."""
    if beams > 1:
        raise ValueError("streamer: a beam search settles its tokens only at its end; use num_beams=1")
    if rows > 1 and not getattr(streamer, "supports_batch", False):
        raise ValueError(
            f"streamer: {type(streamer).__name__} takes one sequence, and {rows} are generated; stream one prompt at a "
            "time, or use a streamer with the attribute supports_batch = True"
        )


class TextStreamer:
    """Writes the text of one sequence to a file as it is made; never part of a UTF-8 character.

    Args:
        tokenizer: anything with `decode_stream()`, such as `tlstm.Tokenizer`.
        file: where the text goes; the standard output of the moment where none is given.
        skip_prompt: leave the prompt out.
    """

    def __init__(self, tokenizer: StreamingTokenizer, file: TextIO | None = None, *, skip_prompt: bool = False) -> None:
        self._tokenizer = tokenizer
        self._file = file
        self._skip_prompt = skip_prompt
        self._stream: PieceStream | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt `(1, T)` or new tokens `(n,)` and write the text they complete."""
        is_prompt = self._stream is None
        if is_prompt:
            self._stream = self._tokenizer.decode_stream()
        assert self._stream is not None
        pieces = [self._stream.step(token_id) or "" for token_id in value.flatten().tolist()]
        if is_prompt and self._skip_prompt:
            return  # it still went through the decoder, which may join the first new token to it
        self.on_text("".join(pieces))

    def end(self) -> None:
        """Write what was held back of an incomplete character, and be ready for another sequence."""
        rest = self._stream.flush() if self._stream is not None else ""
        self._stream = None
        self.on_text(rest, is_last=True)

    def on_text(self, text: str, *, is_last: bool = False) -> None:
        """Handle a piece of finished text; override to send it elsewhere."""
        file = self._file if self._file is not None else sys.stdout
        file.write(text + "\n" if is_last else text)
        file.flush()


class TextIteratorStreamer(TextStreamer):
    """The text of one sequence as an iterator, for a `generate` that runs in another thread.

    Args:
        tokenizer: anything with `decode_stream()`.
        skip_prompt: leave the prompt out.
        timeout: seconds to wait for the next piece before `queue.Empty` is raised; `None` waits for ever.
    """

    def __init__(
        self, tokenizer: StreamingTokenizer, *, skip_prompt: bool = False, timeout: float | None = None
    ) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt)
        self._pieces: Queue[str | None] = Queue()
        self._timeout = timeout

    def on_text(self, text: str, *, is_last: bool = False) -> None:
        if text:
            self._pieces.put(text)
        if is_last:
            self._pieces.put(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = self._pieces.get(timeout=self._timeout)
        if piece is None:
            raise StopIteration
        return piece
