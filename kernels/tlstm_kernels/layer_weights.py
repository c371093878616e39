"""A layer's flat list of weights, as torch has it, taken apart by direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class DirectionWeights(NamedTuple):
    """The weights of one direction; None for those that the layer does not have."""

    w_ih: Tensor  # (4H, I)
    w_hh: Tensor  # (4H, P), or (4H, H / N) with N recurrent heads
    b_ih: Tensor | None  # (4H,)
    b_hh: Tensor | None  # (4H,)
    w_hr: Tensor | None  # (P, H)

    @property
    def heads(self) -> int:
        """N: the number of blocks of the recurrent weight."""
        return 1 if self.w_hr is not None else self.w_hh.shape[0] // 4 // self.w_hh.shape[1]

    def dense(self) -> DirectionWeights:
        """The same map with the recurrent weight written out, (4H, H)."""
        return self if self.heads == 1 else self._replace(w_hh=dense_recurrent(self.w_hh))

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


def dense_recurrent(
    w_hh: Tensor,  # (4H, H / N)
) -> Tensor:
    """(4H, H): a recurrent weight of N heads with the zeros between its blocks written out; differentiable.

    Row `q * H + n * (H / N) + u` belongs to gate q of unit u of head n, and multiplies the h of head n only.
    """
    rows, width = w_hh.shape
    H = rows // 4
    N = H // width
    if N == 1:
        return w_hh
    own = torch.eye(N, dtype=torch.bool, device=w_hh.device)[None, :, None, :, None]
    # Chosen, not multiplied by zero: NaN or infinity in one block is nothing to the others.
    return torch.where(own, w_hh.reshape(4, N, width, 1, width), 0).reshape(rows, H)


def diagonal_blocks(
    w_hh: Tensor,  # (4H, H)
    N: int,
) -> Tensor:
    """(4H, H / N): the blocks of N heads out of a dense recurrent weight, the inverse of `dense_recurrent`."""
    rows, H = w_hh.shape
    blocks = w_hh.reshape(4, N, H // N, N, H // N).diagonal(dim1=1, dim2=3)  # (4, H / N, H / N, N)
    return blocks.permute(0, 3, 1, 2).reshape(rows, H // N)
