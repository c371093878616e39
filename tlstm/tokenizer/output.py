"""What a tokenizer hands out: padded batches, and text piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

if TYPE_CHECKING:
    from tlstm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """A padded batch; unpacks into a model: `model.generate(**tokenizer(prompts))`."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64: 1 at text, 0 at padding

    def keys(self) -> list[str]:
        return ["input_ids", "attention_mask"]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)

    def to(self, device: torch.device | str) -> TokenizedText:
        return TokenizedText(self.input_ids.to(device), self.attention_mask.to(device))


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: str) -> TokenizedText:
    """Rows of ids to one rectangle; `side` is where the padding goes, "left" or "right"."""
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        input_ids[i, place] = torch.tensor(row, dtype=torch.int64)
        attention_mask[i, place] = 1
    return TokenizedText(input_ids, attention_mask)


class TextStream:
    """Turns ids into text as they come; never emits part of a UTF-8 character. From `Tokenizer.decode_stream`."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._restart()

    def _restart(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=self._skip)
        self._held: list[int] = []

    def step(self, token_id: int) -> str | None:
        """The text that this token completes, or None while a character is incomplete (or the token is skipped)."""
        token_id = int(token_id)
        self._tokenizer.check_ids([token_id])
        self._held.append(token_id)
        piece = self._stream.step(self._tokenizer.backend, token_id)
        if piece is not None:
            self._held = []
        return piece

    def flush(self) -> str:
        """What is still held back, incomplete bytes as U+FFFD; the stream is then ready for a new text."""
        rest = self._tokenizer.decode(self._held, skip_special_tokens=self._skip)
        self._restart()
        return rest
