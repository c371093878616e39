"""`TokenHistory`: the tokens of several texts that grow together, one column a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NO_TOKEN = -1  # fills the columns before a text's first token


class TokenHistory:
    """The token ids of `rows` texts of unequal length, aligned at their newest token.

    A step appends one column to all of them, without copying what is there: columns are put into the buffer when
    somebody looks at the texts, and it doubles when it is full.

    Args:
        texts: one 1-D int64 tensor per row, each of at least one id.
        device: where penalties read the ids, the device of the logits.
        vocab_size: where given, `seen` is kept up to date.
    """

    def __init__(
        self,
        texts: Sequence[Tensor],
        device: torch.device | str = "cpu",
        vocab_size: int | None = None,
    ) -> None:
        self.end = 0  # of the columns in the buffer
        self._new: list[Tensor] = []  # columns that are not in it yet
        self._buffer = torch.empty(0, 0, dtype=torch.int64, device=device)
        self.start: list[int] = []
        self.seen: Tensor | None = None  # (rows, V) bool: the ids that occur in each text
        if vocab_size is not None:
            self.seen = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        if texts:
            self.extend(texts)

    def __len__(self) -> int:
        return len(self.start)

    def tokens(self) -> Tensor:
        """All texts, `(rows, N)` int64, padded on the left with -1: a view, valid until the next step."""
        self._settle()
        return self._buffer[:, : self.end]

    def last(self) -> Tensor:
        """The newest token of each text, `(rows,)`."""
        return self._new[-1] if self._new else self._buffer[:, self.end - 1]

    def append(
        self,
        tokens: Tensor,  # (rows,) int64, which stays as it is
    ) -> None:
        """Add one token to every text."""
        self._new.append(tokens)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)

    def _settle(self) -> None:
        """Put the columns that came since the last look at the texts into the buffer."""
        if not self._new:
            return
        end = self.end + len(self._new)
        if end > self._buffer.shape[1]:
            more = torch.full((len(self.start), max(end, 64)), NO_TOKEN, device=self._buffer.device)
            self._buffer = torch.cat([self._buffer, more], dim=1)
        self._buffer[:, self.end : end] = torch.stack(self._new, dim=1)
        self.end, self._new = end, []

    def select(
        self,
        rows: Sequence[int],
    ) -> None:
        """Keep only these rows, in this order, repeats allowed."""
        self._settle()
        index = torch.tensor(rows, dtype=torch.int64, device=self._buffer.device)
        self._buffer = self._buffer[index]
        self.start = [self.start[row] for row in rows]
        if self.seen is not None:
            self.seen = self.seen[index]

    def extend(self, texts: Sequence[Tensor]) -> None:
        """Add texts as further rows. Columns that only texts gone by had are dropped."""
        self._settle()
        old = self.end - min(self.start, default=self.end)
        end = max(old, *(len(ids) for ids in texts))
        buffer = torch.full((len(self.start) + len(texts), end + 64), NO_TOKEN, dtype=torch.int64)
        for row, ids in enumerate(texts, start=len(self.start)):
            buffer[row, end - len(ids) : end] = ids
        buffer = buffer.to(self._buffer.device)
        buffer[: len(self.start), end - old : end] = self._buffer[:, self.end - old : self.end]
        self.start = [start + end - self.end for start in self.start] + [end - len(ids) for ids in texts]
        self._buffer, self.end = buffer, end
        if self.seen is not None:
            seen = torch.zeros(len(texts), self.seen.shape[1], dtype=torch.bool, device=buffer.device)
            for row, ids in enumerate(texts):
                seen[row, ids.to(buffer.device)] = True
            self.seen = torch.cat([self.seen, seen])

    def text(self, row: int) -> Tensor:
        """One whole text, 1-D int64, a copy on the CPU."""
        self._settle()
        return self._buffer[row, self.start[row] : self.end].to("cpu", copy=True)

    def tail(self, row: int, count: int) -> list[int]:
        """The newest `count` tokens of one text, or all of them where it is shorter."""
        self._settle()
        return self._buffer[row, max(self.start[row], self.end - count) : self.end].tolist()
