"""A step of the model: one token into every row of a batch. The interface, and the plain way that serves any model."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tlstm.generation.prefill import LanguageModel, evaluating
from tlstm.state import LSTMState


class Step(Protocol):
    """Feeds one token to every row and carries the rows' recurrent state. It begins without rows."""

    @property
    def recurrent(self) -> LSTMState:
        """The state of all rows, at least one: valid until the next call of anything here, so copy what is to stay."""
        ...

    def extend(self, more: LSTMState, /) -> None:
        """Add rows after the present ones."""
        ...

    def select(
        self,
        rows: Tensor,  # (n,) int64, on the state's device
        /,
    ) -> None:
        """Keep only these rows, in this order."""
        ...

    def __call__(
        self,
        tokens: Tensor,  # (rows,) int64
        /,
    ) -> Tensor:
        """The logits `(rows, V)` float32 after these tokens: valid until the next call."""
        ...


def model_step(
    model: LanguageModel,
    tokens: Tensor,  # (rows,) int64
    recurrent: LSTMState,
) -> tuple[Tensor, LSTMState]:
    """Feed one token to each row: logits (rows, V) float32, and the state after it. Dropout is off meanwhile."""
    with evaluating(model):
        output = model(tokens[:, None], state=recurrent)
    return output.logits[:, -1].float(), output.state


class PlainStep:
    """The step as a call of the model: what every other one must agree with."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._recurrent: LSTMState | None = None

    @property
    def recurrent(self) -> LSTMState:
        assert self._recurrent is not None
        return self._recurrent

    def extend(self, more: LSTMState) -> None:
        self._recurrent = more if self._recurrent is None else LSTMState.cat([self._recurrent, more])

    def select(self, rows: Tensor) -> None:
        self._recurrent = self.recurrent.select(rows) if len(rows) else None

    def __call__(self, tokens: Tensor) -> Tensor:
        logits, self._recurrent = model_step(self._model, tokens, self.recurrent)
        return logits
