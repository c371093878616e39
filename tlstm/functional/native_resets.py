"""Resets for the `native` backend: the pieces between them are sequences of their own in one packed batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Cuts(NamedTuple):
    """A padded batch cut into S sequences, packed, longest first: where each token and each state comes from.

    The second entry of what has two is for the direction that reads in reverse.
    """

    tokens: Tensor  # (N,) position t * B + b of each packed token
    row_of: Tensor  # (S,) the row of each sequence
    carries: Tensor  # (2, S) bool: whether it starts from its row's initial state, not from the one after a reset
    rows: Tensor  # (R,) the rows that have a token
    final: Tensor  # (2, R) of each of these rows, the sequence that ends it

    def initial(
        self,
        state: Tensor,  # (L*D, B, N)
        reset_state: Tensor | None,  # (L*D, B, N), or zero
        D: int,
    ) -> Tensor:
        """(L*D, S, N): the state from which each sequence starts."""
        after_reset = torch.zeros_like(state) if reset_state is None else reset_state
        parts = [
            torch.where(
                self.carries[k][:, None],
                state[k::D].index_select(1, self.row_of),
                after_reset[k::D].index_select(1, self.row_of),
            )
            for k in range(D)
        ]
        return torch.stack(parts, 1).flatten(0, 1)

    def final_state(
        self,
        state: Tensor,  # (L*D, B, N), which rows without tokens keep
        after: Tensor,  # (L*D, S, N)
        D: int,
    ) -> Tensor:
        """(L*D, B, N): the state in which each row ends."""
        parts = [after[k::D].index_select(1, self.final[k]) for k in range(D)]
        return state.to(after.dtype).index_copy(1, self.rows, torch.stack(parts, 1).flatten(0, 1))


def cut(
    resets: Tensor,  # (T, B) bool on the CPU
    lengths: Tensor | None,  # (B,) on the CPU, not all of them 0
) -> tuple[Cuts, Tensor]:
    """Cut each row where it resets; returns the cuts and the batch sizes of the packed sequences, on the CPU."""
    T, B = resets.shape
    ends = torch.full((B,), T) if lengths is None else lengths.long()
    # Row after row from here on, without the padding.
    valid = torch.arange(T)[None, :] < ends[:, None]  # (B, T)
    row_of, t_of = valid.nonzero().unbind(1)
    begins = resets.T[valid] | (t_of == 0)  # (N,)
    sequence_of = begins.long().cumsum(0) - 1
    start_of = begins.nonzero().squeeze(1)  # (S,)
    offset = torch.arange(row_of.numel()) - start_of[sequence_of]
    order = sequence_of.bincount().argsort(descending=True, stable=True)  # (S,) longest first
    place_of = order.argsort()
    batch_sizes = offset.bincount()
    place = (batch_sizes.cumsum(0) - batch_sizes)[offset] + place_of[sequence_of]
    tokens = torch.empty_like(place)
    tokens[place] = t_of * B + row_of

    rows = (ends > 0).nonzero().squeeze(1)
    stop = ends[rows].cumsum(0)
    first, last = sequence_of[stop - ends[rows]], sequence_of[stop - 1]  # of each row
    carries = torch.zeros(2, start_of.numel(), dtype=torch.bool)
    carries[0, first] = ~resets[0, rows]
    carries[1, last] = True  # read in reverse, nothing resets a row before its end
    final = torch.stack((place_of[last], place_of[first]))
    return Cuts(tokens, row_of[start_of][order], carries[:, order], rows, final), batch_sizes
