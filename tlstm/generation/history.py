"""`TokenHistory`: the tokens of several texts that grow together, one column a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NO_TOKEN = -1  # fills the columns before a text's first token


class TokenHistory:
    """The token ids of `rows` texts of unequal length, aligned at their newest token.

    A step appends one column to all of them, without copying what is there: the buffer doubles when it is full.

    Args:
        texts: one 1-D int64 tensor per row.
        device: where penalties read the ids, the device of the logits.
        vocab_size: where given, `seen` is kept up to date.
    """

    def __init__(
        self,
        texts: Sequence[Tensor],
        device: torch.device | str = "cpu",
        vocab_size: int | None = None,
    ) -> None:
        self.end = max(len(ids) for ids in texts)
        self._buffer = torch.full((len(texts), self.end + 64), NO_TOKEN, dtype=torch.int64)
        for row, ids in enumerate(texts):
            self._buffer[row, self.end - len(ids) : self.end] = ids
        self._buffer = self._buffer.to(device)
        self.start = [self.end - len(ids) for ids in texts]
        self.seen: Tensor | None = None  # (rows, V) bool: the ids that occur in each text
        if vocab_size is not None:
            self.seen = torch.zeros(len(texts), vocab_size, dtype=torch.bool, device=device)
            for row, ids in enumerate(texts):
                self.seen[row, ids.to(device)] = True

    def __len__(self) -> int:
        return len(self.start)

    def tokens(self) -> Tensor:
        """All texts, `(rows, N)` int64, padded on the left with -1: a view, valid until the next step."""
        return self._buffer[:, : self.end]

    def last(self) -> Tensor:
        """The newest token of each text, `(rows,)`."""
        return self._buffer[:, self.end - 1]

    def append(
        self,
        tokens: Tensor,  # (rows,) int64
    ) -> None:
        """Add one token to every text."""
        if self.end == self._buffer.shape[1]:
            self._buffer = torch.cat([self._buffer, torch.full_like(self._buffer, NO_TOKEN)], dim=1)
        self._buffer[:, self.end] = tokens
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        self.end += 1

    def select(
        self,
        rows: Sequence[int],
    ) -> None:
        """Keep only these rows, in this order, repeats allowed."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._buffer.device)
        self._buffer = self._buffer[index]
        self.start = [self.start[row] for row in rows]
        if self.seen is not None:
            self.seen = self.seen[index]

    def text(self, row: int) -> Tensor:
        """One whole text, 1-D int64, a copy on the CPU."""
        return self._buffer[row, self.start[row] : self.end].to("cpu", copy=True)

    def tail(self, row: int, count: int) -> list[int]:
        """The newest `count` tokens of one text, or all of them where it is shorter."""
        return self._buffer[row, max(self.start[row], self.end - count) : self.end].tolist()
