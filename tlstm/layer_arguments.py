"""What `tlstm.LSTM` is called with, checked and brought to one form: time first, with a batch dimension."""

from __future__ import annotations

from typing import Any, NamedTuple

from tlstm_kernels.checks import (
    ArgumentError,
    check_input,
    check_lengths,
    check_reset_state,
    check_resets,
    check_state,
)
from torch import Tensor

Shape = tuple[int, ...]


class StateShapes(NamedTuple):
    """Rows and widths of a layer's state."""

    rows: int  # L * D
    h: int  # P
    c: int  # H

    def of(self, batch_size: int | None) -> tuple[Shape, Shape]:
        """Shapes of h and c; without the batch dimension for None."""
        leading = (self.rows,) if batch_size is None else (self.rows, batch_size)
        return (*leading, self.h), (*leading, self.c)


def padded_arguments(
    input: Any,  # (T, B, I), (B, T, I) with batch_first, or (T, I)
    hx: Any,
    lengths: Any,
    resets: Any,
    reset_state: Any,
    shapes: StateShapes,
    input_size: int,
    batch_first: bool,
    weight: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor | None, tuple[Tensor, Tensor] | None]:
    """Check a call on a padded batch or a single sequence.

    Returns:
        x (T, B, I), the initial state (L*D, B, .) or None, resets (T, B) and the state after them (L*D, B, .).
    """
    check_input(input, (2, 3), input_size, weight)
    batched = input.dim() == 3
    if not batched:
        _refuse_batch_options(input, lengths, resets, reset_state)
    x = input.unsqueeze(1) if not batched else input.transpose(0, 1) if batch_first else input
    B = x.size(1)
    if lengths is not None:
        check_lengths(lengths, B, x.size(0))
    if resets is not None:
        check_resets(resets, tuple(input.shape[:2]), "(batch, time)" if batch_first else "(time, batch)")
        resets = resets.transpose(0, 1) if batch_first else resets
    if reset_state is not None:
        if isinstance(reset_state, (tuple, list)):
            reset_state = tuple(
                s.unsqueeze(1).expand(-1, B, -1) if isinstance(s, Tensor) and s.dim() == 2 else s for s in reset_state
            )
        check_reset_state(reset_state, resets, *shapes.of(B), weight)
    if hx is None:
        return x, None, resets, reset_state
    check_state(hx, *shapes.of(B if batched else None), weight)
    state = (hx[0], hx[1]) if batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
    return x, state, resets, reset_state


def refuse_padding_options(lengths: Any, resets: Any, reset_state: Any) -> None:
    """A PackedSequence has lengths of its own, and no place for resets."""
    if resets is not None or reset_state is not None:
        raise ArgumentError(
            "resets: expected None with a PackedSequence, which has no (time, batch) to mark; received both. "
            "Pass a padded batch (torch.nn.utils.rnn.pad_packed_sequence) with lengths and resets."
        )
    if lengths is not None:
        raise ArgumentError(
            "lengths: expected None with a PackedSequence, which has its own; received both. Pass only one."
        )


def _refuse_batch_options(input: Tensor, lengths: Any, resets: Any, reset_state: Any) -> None:
    if lengths is not None:
        raise ArgumentError(
            "lengths: expected None for an unbatched input; received lengths and an input of shape "
            f"{tuple(input.shape)}. Cut the input instead, or add a batch dimension."
        )
    if resets is not None or reset_state is not None:
        raise ArgumentError(
            "resets: expected None for an unbatched input; received resets and an input of shape "
            f"{tuple(input.shape)}. Add a batch dimension to both: input.unsqueeze(1), resets.unsqueeze(1)."
        )
