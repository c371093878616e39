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
    num_heads: int = 1
    recompute: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)  # of h and of c

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def weights_per_direction(self) -> int:
        """W_ih, W_hh, then b_ih, b_hh with bias, then W_hr with a projection."""
        return 2 + 2 * self.bias + (self.proj_size > 0)

    @property
    def drops(self) -> bool:
        """Whether this call drops anything between layers."""
        return self.training and self.dropout > 0 and self.num_layers > 1

    @property
    def zones_out(self) -> bool:
        """Whether units keep part of their state, in training at random, else in expectation."""
        return max(self.zoneout) > 0

    def one_layer(self) -> LSTMOptions:
        """The same for each layer by itself."""
        return self._replace(num_layers=1, dropout=0.0)


class Call(NamedTuple):
    """What one call asks for besides its input, state and weights."""

    lengths: Tensor | None = None  # (B,) integer, 0..T
    resets: Tensor | None = None  # (T, B) bool or integer
    reset_state: State | None = None  # h (L*D, B, P), c (L*D, B, H); None: zero
    dropout_seed: Tensor | None = None  # () int64; None: torch's generator
    with_cells: bool = False  # whether the cell states of all steps are a result
    batch_sizes: Tensor | None = None  # (T,) int64 on the CPU: the input is packed, (N, I) in the place of (T, B, I)
    rows: Tensor | None = None  # (B,) the rows of the batch as the caller knows them, where they were sorted
    zoneout_seed: Tensor | None = None  # () int64, of one layer; None: units keep their share
    from_zero: bool = False  # whether the initial state is known to be zero

    def of_layer(self, states: slice) -> Call:
        """The call of one layer, whose states these are."""
        if self.reset_state is None:
            return self
        return self._replace(reset_state=(self.reset_state[0][states], self.reset_state[1][states]))


def zero_state(x: Tensor, batch_size: int, weights: Weights, options: LSTMOptions) -> State:
    """The state before any input, in x's dtype."""
    rows, H = options.num_layers * options.num_directions, weights[0].shape[0] // 4
    return x.new_zeros(rows, batch_size, options.proj_size or H), x.new_zeros(rows, batch_size, H)


class Result(NamedTuple):
    """What every backend returns."""

    y: Tensor  # (T, B, D*P), or packed (N, D*P)
    state: State
    cells: tuple[Tensor, ...] = ()  # of each layer, where asked for: (T, B, D*H), or packed (N, D*H)
