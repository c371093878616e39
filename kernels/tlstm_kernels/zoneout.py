"""Zoneout: units of h and c that keep what they held before the step, drawn from a seed without storing a mask.

    c_t = d^c_t * c_{t-1} + (1 - d^c_t) * c~_t        c~_t = f_t * c_{t-1} + i_t * g_t
    h_t = d^h_t * h_{t-1} + (1 - d^h_t) * h~_t        h~_t = o_t * tanh(c~_t)

(Krueger et al. 2016, arXiv:1606.01305.) With a seed d is 1 with probability p, else 0, drawn for each step, row and
unit; without one d is its expectation p. `h_{t-1}` and `c_{t-1}` are what the step started from, also after a reset; a
projection belongs to h~_t. The kernels make the same masks, bit for bit: the words 0 (for h) and 1 (for c) of Philox
with the counter of `philox`, of which the upper 24 bits are compared with p in units of 2**-24.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .philox import key_of, philox4x32

ONE = 1 << 24  # probability 1 in the units in which masks are drawn
_NUMBERS = 1 << 20  # drawn at once: the words and their intermediates are int64


class Zoneout(NamedTuple):
    """How likely a unit of h and of c keeps its value; with a seed it does or does not, without one in part."""

    h: float
    c: float
    seed: Tensor | None = None  # () int64, all 64 bits of it

    @property
    def limits(self) -> tuple[int, int]:
        """Both probabilities in units of 2**-24: what the random bits are compared with."""
        return round(self.h * ONE), round(self.c * ONE)


Kept = Tensor | float  # (T, B, N) bool, or the share that every unit keeps


def zoneout_of(h: float, c: float, seed: Tensor | None) -> Zoneout | None:
    """None where nothing is ever kept."""
    return Zoneout(h, c, seed) if h > 0 or c > 0 else None


def kept_units(
    zoneout: Zoneout,
    shape: tuple[int, int, int],  # T, B, H
    width: int,  # of h: H, or P with a projection
    reverse: bool,
) -> tuple[Kept, Kept]:
    """What h (T, B, width) and c (T, B, H) keep at each step of one direction."""
    limit_h, limit_c = zoneout.limits
    if zoneout.seed is None:
        return limit_h / ONE, limit_c / ONE
    T, B, H = shape
    seed = zoneout.seed
    rows, units = torch.arange(B, device=seed.device)[:, None], torch.arange(H, device=seed.device)
    direction = torch.full_like(units, 2 if reverse else 1)
    steps = max(1, _NUMBERS // max(1, B * H))
    kept_h, kept_c = [], []
    for start in range(0, max(T, 1), steps):
        t = torch.arange(start, min(start + steps, T), device=seed.device)[:, None, None]
        word_h, word_c, _, _ = philox4x32((units, t, rows, direction), key_of(seed))
        kept_h.append((word_h[..., :width] >> 8) < limit_h)
        kept_c.append((word_c >> 8) < limit_c)
    return torch.cat(kept_h), torch.cat(kept_c)


def at_step(kept: Kept, t: int) -> Kept:
    """What is kept at one step: (B, N) bool, or the share."""
    return kept[t] if isinstance(kept, Tensor) else kept


def zoned_out(
    kept: Kept,  # (B, N) bool, or the share
    before: Tensor,  # (B, N)
    after: Tensor,  # (B, N)
) -> Tensor:
    """The state after a step that keeps part of the one before. What a mask leaves out is not read, not even a NaN."""
    if isinstance(kept, Tensor):
        return torch.where(kept, before, after)
    return kept * before + (1 - kept) * after


def split_gradient(
    kept: Kept,  # (B, N) bool, or the share
    d: Tensor,  # (B, N)
) -> tuple[Tensor, Tensor]:
    """The gradient of `zoned_out` as the parts of `before` and of `after`."""
    if isinstance(kept, Tensor):
        return d.masked_fill(~kept, 0), d.masked_fill(kept, 0)
    return kept * d, (1 - kept) * d
