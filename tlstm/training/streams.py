"""`StreamBatches`: a long token stream as batches for stateful truncated back-propagation through time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlstm.validation import check_int

# Merity et al. 2017, section 5: the window's length is N(base, 5) tokens, and base is halved in 5 % of the draws.
WINDOW_STD = 5.0
HALF_WINDOW_PROBABILITY = 0.05
SHORTEST_WINDOW = 5


@dataclass(frozen=True)
class Batch:
    """One window of every stream of this process.

    Fields:
        inputs: (B, T) int64 token ids. targets: (B, T) int64, the ids one position later.
        starts_epoch: the recurrent state must be reset before this batch.
        ends_epoch: the last batch of its epoch.
    """

    inputs: Tensor
    targets: Tensor
    starts_epoch: bool
    ends_epoch: bool


class StreamBatches:
    """Cut `ids` into `batch_size` contiguous streams and walk them side by side, window by window.

    Stream `b` of an epoch covers `ids[offset + b * length : offset + (b + 1) * length]`; the recurrent state of one
    window continues in the next. `offset`, in `[0, window)`, and with `random_window` the windows' lengths, are drawn
    anew in each epoch from a generator seeded with `(seed, epoch)` alone: any position can be rebuilt from two numbers.

    Args:
        ids: (N,) integer array of token ids, usually a memory map.
        batch_size: streams over all processes. window: tokens per window, `T`.
        random_window: draw the windows' lengths, see `TrainingConfig`.
        rank, world_size: this process takes the `rank`-th block of `batch_size / world_size` streams.

    Raises:
        ValueError: the text is too short for one window per stream, or the batch does not split over the processes.
    """

    def __init__(
        self,
        ids: np.ndarray,  # (N,)
        *,
        batch_size: int,
        window: int,
        random_window: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size: expected a multiple of the {world_size} processes, got {batch_size}")
        # One length for all offsets, so that every epoch has the same number of tokens.
        self.length = (len(ids) - window) // batch_size
        if self.length < window:
            raise ValueError(
                f"the training text is too short: {batch_size} streams of {window}-token windows need at least "
                f"{(batch_size + 1) * window} tokens, got {len(ids)}; use a smaller batch_size or window, or more text"
            )
        self.ids = ids
        self.batch_size, self.window, self.random_window = batch_size, window, random_window
        self.seed = seed
        rows = batch_size // world_size
        self.rows = slice(rank * rows, (rank + 1) * rows)
        self.epoch = self.index = self._position = 0
        self._lengths: list[int] = []
        self._inputs = self._targets = ids[:0]  # (batch_size, length) views of `ids`, one position apart
        self._enter(epoch=0, index=0)

    def plan(self, epoch: int) -> tuple[int, list[int]]:
        """Offset and window lengths of an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        offset = int(rng.integers(self.window))
        if not self.random_window:
            return offset, [self.window] * (self.length // self.window)
        shortest = min(SHORTEST_WINDOW, self.window)
        lengths, left = [], self.length
        while left >= shortest:
            base = self.window / 2 if rng.random() < HALF_WINDOW_PROBABILITY else self.window
            drawn = max(shortest, int(rng.normal(base, WINDOW_STD)))
            lengths.append(min(drawn, left))
            left -= lengths[-1]
        return offset, lengths

    def steps(self, epochs: float) -> int:
        """Number of batches in so many epochs; the last, partial epoch is rounded down, to at least one batch."""
        whole = int(epochs)
        count = sum(len(self.plan(epoch)[1]) for epoch in range(whole)) if self.random_window else None
        if count is None:
            return max(1, int(epochs * (self.length // self.window)))
        return max(1, count + int((epochs - whole) * len(self.plan(whole)[1])))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next window; never ends, one epoch follows the other."""
        if self.index == len(self._lengths):
            self._enter(self.epoch + 1, 0)
        start, stop = self._position, self._position + self._lengths[self.index]
        batch = Batch(
            inputs=self._tensor(self._inputs[self.rows, start:stop]),
            targets=self._tensor(self._targets[self.rows, start:stop]),
            starts_epoch=self.index == 0,
            ends_epoch=self.index + 1 == len(self._lengths),
        )
        self._position = stop
        self.index += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position: epoch and number of windows already given out in it."""
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        epoch, index = state["epoch"], state["index"]
        check_int("epoch", epoch, 0, 2**31)
        check_int("index", index, 0, len(self.plan(epoch)[1]))
        self._enter(epoch, index)

    @property
    def epochs_done(self) -> float:
        """Passes over the data so far, as a fraction."""
        return self.epoch + self._position / sum(self._lengths)

    def _enter(self, epoch: int, index: int) -> None:
        self.epoch, self.index = epoch, index
        offset, self._lengths = self.plan(epoch)
        self._position = sum(self._lengths[:index])
        end = offset + self.batch_size * self.length
        self._inputs = self.ids[offset:end].reshape(self.batch_size, self.length)
        self._targets = self.ids[offset + 1 : end + 1].reshape(self.batch_size, self.length)

    @staticmethod
    def _tensor(block: np.ndarray) -> Tensor:
        return torch.from_numpy(block.astype(np.int64))
