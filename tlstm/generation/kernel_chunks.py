"""`RunningChunk`: a launch of the decode kernel as the host reads it, token by token or all at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

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
        recurrent, tokens: where it stood when it came: state of one row, all its ids.
        place: where its state is now: chunk, step and slot; None where it has not moved, or has ended.
    """

    recurrent: LSTMState
    tokens: Tensor
    place: tuple[Chunk, int, int] | None = None

    def tail(self, count: int) -> list[int]:
        """The newest `count` ids."""
        if count <= len(self.new_tokens):
            return self.new_tokens[-count:]
        return [*self.tokens[-count:].tolist(), *self.new_tokens][-count:]

    def state(self, plan: DecodePlan) -> LSTMState:
        """Where it stands now."""
        if self.place is None:
            return self.recurrent
        chunk, step, slot = self.place
        parts = list(zip(plan.shape.columns, plan.shape.widths, strict=False))
        h, c = (
            tuple(both[step, slot, None, first : first + width] for first, width in parts)
            for both in (chunk.h, chunk.c)
        )
        return LSTMState(h=h, c=c)


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

    @property
    def has_arrived(self) -> bool:
        """Whether somebody has waited for it."""
        return "_tokens" in self.__dict__

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
