"""Which positions of a padded batch count, where a state is replaced, and what state each step started from."""

from __future__ import annotations

import torch
from torch import Tensor


def valid_positions(lengths: Tensor | None, T: int) -> Tensor | None:
    """(T, B, 1) bool: True where a row still has input."""
    if lengths is None:
        return None
    return (torch.arange(T, device=lengths.device)[:, None] < lengths[None, :])[..., None]


def reset_positions(
    resets: Tensor | None,  # (T, B) bool or integer
    valid: Tensor | None,  # (T, B, 1) bool
    reverse: bool,
) -> Tensor | None:
    """(T, B, 1) bool: True where a row's state is replaced before the step, in the order of reading.

    A reset at t is a boundary between t - 1 and t. Read in reverse, it is crossed on the way to t - 1.
    """
    if resets is None:
        return None
    reset = (resets != 0)[..., None]
    if valid is not None:
        reset = reset & valid
    return torch.cat((reset[1:], torch.zeros_like(reset[:1]))) if reverse else reset


def replaced(
    state: Tensor,  # (B, N) or (T, B, N)
    reset: Tensor,  # (B, 1) or (T, B, 1) bool
    given: Tensor | None,  # (B, N)
) -> Tensor:
    """The state with the given one, or zero, where it is reset."""
    return state.masked_fill(reset, 0) if given is None else torch.where(reset, given.to(state.dtype), state)


def zero_padding(x: Tensor, valid: Tensor | None) -> Tensor:
    """x (T, B, N) with zeros where a row has no input."""
    return x if valid is None else x.masked_fill(~valid, 0)


def state_before(
    first: Tensor,  # (B, N), the initial state
    after: Tensor,  # (T, B, N), the states after the steps
    reverse: bool,
) -> Tensor:
    """(T, B, N): the state after the step before each one, in the order of reading."""
    if after.shape[0] == 0:
        return after
    first = first.to(after.dtype)[None]
    return torch.cat((after[1:], first)) if reverse else torch.cat((first, after[:-1]))
