"""What an LSTM is built with, and what one call of it asks for: the arguments that every backend takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

State = tuple[Tensor, Tensor]  # h (L*D, B, P), c (L*D, B, H)
Weights = list[Tensor] | tuple[Tensor, ...]  # flat, in torch's order


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run; the message says why."""


class LSTMOptions(NamedTuple):
    """What `tlstm.LSTM` is built with, as far as its forward pass needs it."""

    num_layers: int = 1
    bias: bool = True
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    proj_size: int = 0

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def weights_per_direction(self) -> int:
        """W_ih, W_hh, then b_ih, b_hh with bias, then W_hr with a projection."""
        return 2 + 2 * self.bias + (self.proj_size > 0)


class Call(NamedTuple):
    """What one call asks for besides its input, state and weights."""

    lengths: Tensor | None = None  # (B,) integer, 0..T
    resets: Tensor | None = None  # (T, B) bool or integer
    reset_state: State | None = None  # h (L*D, B, P), c (L*D, B, H); None: zero
