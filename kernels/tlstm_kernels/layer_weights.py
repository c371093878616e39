"""A layer's flat list of weights, as torch has it, taken apart by direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class DirectionWeights(NamedTuple):
    """The weights of one direction; None for those that the layer does not have."""

    w_ih: Tensor  # (4H, I)
    w_hh: Tensor  # (4H, P)
    b_ih: Tensor | None  # (4H,)
    b_hh: Tensor | None  # (4H,)
    w_hr: Tensor | None  # (P, H)

    def flat(self) -> list[Tensor]:
        """Back in torch's order, without those that are None."""
        return [w for w in self if w is not None]


def split_weights(weights: Sequence[Tensor], has_bias: bool, has_projection: bool) -> list[DirectionWeights]:
    """Take a flat list apart: for each direction W_ih, W_hh, then b_ih, b_hh with bias, then W_hr with a projection."""
    n = 2 + 2 * has_bias + has_projection
    assert len(weights) in (n, 2 * n), "the number of weights does not fit one or two directions"
    directions = []
    for start in range(0, len(weights), n):
        w_ih, w_hh, *rest = weights[start : start + n]
        b_ih, b_hh = rest[:2] if has_bias else (None, None)
        directions.append(DirectionWeights(w_ih, w_hh, b_ih, b_hh, rest[-1] if has_projection else None))
    return directions
