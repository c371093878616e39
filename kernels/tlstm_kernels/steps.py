"""Where the tile of one time step lies in the tensors that hold all steps, and loading it ahead of time.

A (rows, ...) tensor is dense and row-major; (t, b) is its row t * stride_t + b * stride_b, so time-first, batch-first
and a slice of a longer sequence are the same to a kernel.
"""

# The body of a kernel is Triton, not Python, and has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of_step(step, rows, T, backwards, stride_t, stride_b):
    """(BLOCK_B,) int64: the rows of batch rows `rows` at `step`, counted from the end if `backwards`."""
    t = tl.where(backwards == 1, T - 1 - step, step)
    return t.to(tl.int64) * stride_t + rows.to(tl.int64) * stride_b


@triton.jit
def load_units(
    pointer,  # (rows, ROW)
    step, rows, T, backwards, stride_t, stride_b,
    columns,  # (UNITS,)
    mask,  # (UNITS, BLOCK_B)
    ROW: tl.constexpr,
):  # fmt: skip
    """This program's tile (UNITS, BLOCK_B) at `step`, as stored; zero past the last step."""
    row = rows_of_step(step, rows, T, backwards, stride_t, stride_b)
    return tl.load(pointer + (row * ROW)[None, :] + columns[:, None], mask=mask & (step < T), other=0.0)


@triton.jit
def load_gates(
    pointer,  # (rows, D * 4 * WIDTH)
    step, rows, T, backwards, stride_t, stride_b,
    columns,  # (UNITS,) of gate i; the other gates' follow at distance WIDTH
    mask,  # (UNITS, BLOCK_B)
    WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The tiles (UNITS, BLOCK_B) of i, f, g, o at `step`, as stored; zero past the last step."""
    row = rows_of_step(step, rows, T, backwards, stride_t, stride_b)
    tile = pointer + (row * (D * 4 * WIDTH))[None, :] + columns[:, None]
    mask &= step < T
    i = tl.load(tile, mask=mask, other=0.0)
    f = tl.load(tile + WIDTH, mask=mask, other=0.0)
    g = tl.load(tile + 2 * WIDTH, mask=mask, other=0.0)
    o = tl.load(tile + 3 * WIDTH, mask=mask, other=0.0)
    return i, f, g, o
