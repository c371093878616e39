"""Zoneout inside a kernel: what each unit of a tile keeps, drawn when it is needed and never stored."""

# The body of a kernel is Triton, not Python, and has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept_units(
    seed_ptr,  # () int64, or None: every unit keeps the same share
    limit_h, limit_c,  # probabilities in units of 2**-24
    t,  # the input's time step, also where it is read in reverse
    rows,  # (BLOCK_B,) of the whole batch
    units,  # (UNITS,) of the whole layer, all heads
    backwards,  # whether the layer reads in reverse
):  # fmt: skip
    """What h and c keep at one step: two tiles (UNITS, BLOCK_B) of 0 or 1, or two numbers, float32.

    The counter of `philox`, and the same masks as `zoneout.kept_units` has.
    """
    if seed_ptr is None:
        kept_h = limit_h.to(tl.float32) * (1 / (1 << 24))
        kept_c = limit_c.to(tl.float32) * (1 / (1 << 24))
    else:
        nothing = tl.zeros((units.shape[0], rows.shape[0]), tl.int32)
        direction = nothing + tl.where(backwards == 1, 2, 1)
        word_h, word_c, _, _ = tl.philox(
            tl.load(seed_ptr), nothing + units[:, None], nothing + t, nothing + rows[None, :], direction
        )
        # 24 bits, so that a limit of 2**24, which keeps everything, is a number of 32 bits with a sign.
        kept_h = ((word_h >> 8).to(tl.int32) < limit_h).to(tl.float32)
        kept_c = ((word_c >> 8).to(tl.int32) < limit_c).to(tl.float32)
    return kept_h, kept_c


@triton.jit
def zoned_out(kept, before, after, RANDOM: tl.constexpr):
    """The state after the step. What a mask leaves out is not read: no NaN of it comes through."""
    if RANDOM:
        state = tl.where(kept != 0, before, after)
    else:
        state = kept * before + (1 - kept) * after
    return state


@triton.jit
def split_gradient(kept, d, RANDOM: tl.constexpr):
    """The gradient of `zoned_out` as the parts of `before` and of `after`."""
    if RANDOM:
        d_before, d_after = tl.where(kept != 0, d, 0), tl.where(kept != 0, 0, d)
    else:
        d_before, d_after = kept * d, (1 - kept) * d
    return d_before, d_after
