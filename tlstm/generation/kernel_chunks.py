"""Launches of the decode kernel as the host reads them, token by token or all at once, and the texts in their slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tlstm.generation.sampling import check_some_token
from tlstm.generation.texts import Text
from tlstm.state import LSTMState

if TYPE_CHECKING:
    from tlstm_kernels.decode_launch import Chunk
    from tlstm_kernels.decode_shape import DecodePlan


@dataclass(eq=False, kw_only=True)
class KernelText(Text):
    """A text of the kernel.

    Fields:
        source, row, tokens: where it stood when it came: its row of a state, all its ids.
        place: where its state is now: chunk, step and slot; None where it has not moved, or has ended.
    """

    source: LSTMState
    row: int
    tokens: Tensor
    place: tuple[Chunk, int, int] | None = None

    def tail(self, count: int) -> list[int]:
        """The newest `count` ids."""
        if count <= len(self.new_tokens):
            return self.new_tokens[-count:]
        return [*self.tokens[-count:].tolist(), *self.new_tokens][-count:]

    def whole(self) -> Tensor:
        """All ids, 1-D int64."""
        return torch.cat([self.tokens, torch.tensor(self.new_tokens, dtype=torch.int64)])

    def state(self, plan: DecodePlan) -> LSTMState:
        """Where it stands now, without a copy."""
        if self.place is None:
            return self.source.row(self.row)
        chunk, step, slot = self.place
        return split_state(chunk.h[step, slot, None], chunk.c[step, slot, None], plan)


def split_state(h: Tensor, c: Tensor, plan: DecodePlan) -> LSTMState:
    """Rows of the kernel (n, STRIDE), all layers side by side, as a state of n streams, without a copy."""
    parts = list(zip(plan.shape.columns, plan.shape.widths, strict=False))
    split = [tuple(rows[:, first : first + width] for first, width in parts) for rows in (h, c)]
    return LSTMState(h=split[0], c=split[1])


def states_of_new(texts: Sequence[KernelText]) -> LSTMState:
    """Where texts that have not moved stand, as the streams of one state."""
    source = texts[0].source
    if all(text.source is source for text in texts):
        return source.select(torch.tensor([text.row for text in texts], device=source.device))
    return LSTMState.cat([text.source.row(text.row) for text in texts])


class RunningChunk:
    """A chunk that was launched.

    Attributes:
        texts: which text is in each slot, None for none, or for one whose further tokens count for nothing.
        read: steps that were read.
    """

    def __init__(self, chunk: Chunk, texts: list[KernelText | None]) -> None:
        self.chunk, self.texts, self.read = chunk, texts, 0

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is left to read."""
        return self.read == self.chunk.steps or not any(text is not None for text in self.texts)

    @cached_property
    def _tokens(self) -> Tensor:
        return self.chunk.tokens()

    @cached_property
    def slots(self) -> list[list[int]]:
        """The tokens of each slot, one a step, -1 from where its stream had ended; waits for the GPU."""
        return self._tokens.T.tolist()

    @cached_property
    def sound_steps(self) -> int:
        """How many steps come before the first one with a score that is no number to choose by."""
        wrong = ((self._tokens >= 0) & ~self.chunk.scores().isfinite()).any(1).nonzero()
        return int(wrong[0]) if len(wrong) else self.chunk.steps

    def check(self) -> None:
        """Raise `ValueError` where the next step chose from no token or from logits that are not finite."""
        if self.read >= self.sound_steps:
            slots = [slot for slot, text in enumerate(self.texts) if text is not None]
            check_some_token(self.chunk.scores()[self.read, slots])

    def rest(self, slot: int, steps: int) -> list[int]:
        """The tokens of a slot in the next steps, as far as its stream goes."""
        ids = self.slots[slot][self.read : self.read + steps]
        return ids if ids[-1] >= 0 else ids[: ids.index(-1)]
