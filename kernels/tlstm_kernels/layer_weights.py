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


def weight_kinds(weights: Sequence[Tensor], D: int) -> tuple[bool, bool]:
    """Whether a layer of D directions has biases, and whether it has a projection: its number of weights says both.

    Each direction has W_ih and W_hh, then b_ih and b_hh with bias, then W_hr with a projection.
    """
    n = len(weights) // D
    return n >= 4, n % 2 == 1


def split_weights(weights: Sequence[Tensor], D: int) -> list[DirectionWeights]:
    """The flat list of a layer of D directions, taken apart."""
    n = len(weights) // D
    has_bias, has_projection = weight_kinds(weights, D)
    directions = []
    for start in range(0, len(weights), n):
        w_ih, w_hh, *rest = weights[start : start + n]
        b_ih, b_hh = rest[:2] if has_bias else (None, None)
        directions.append(DirectionWeights(w_ih, w_hh, b_ih, b_hh, rest[-1] if has_projection else None))
    return directions
