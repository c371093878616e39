"""What the programs of a decode kernel exchange besides whole rows of h: pieces of them, and the keys of a choice.

The rules are those of `exchange.py`: every element has one slot per step, holds the sentinel (all bits one) before the
launch, is stored once, and is loaded past the L1 cache until it is no sentinel.
"""

# The body of a kernel is Triton, not Python, and has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .exchange import as_elements, load_chunk, load_words, sentinel_bits


@triton.jit
def spins_for(error_ptr, MAX_SPINS: tl.constexpr):
    """How often to look for something: not again once this program has given up waiting for anything."""
    spins = MAX_SPINS
    if MAX_SPINS > 0:
        spins = tl.where(tl.load(error_ptr, volatile=True) == 0, MAX_SPINS, 0)
    return spins


@triton.jit
def give_up(error_ptr, step, row, column):
    """Write down what was missing, the first time only: see `exchange.report`."""
    if tl.load(error_ptr, volatile=True) == 0:
        tl.store(error_ptr + 1, row)
        tl.store(error_ptr + 2, column)
        tl.store(error_ptr, step + 1)


@triton.jit
def received(
    words,  # what `load_words` found of this chunk some time ago
    row_pointers, exchanged,  # (BLOCK_B,) where rows start, and which of them to wait for; the others are zero
    n,
    error_ptr, step,
    WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, MAX_SPINS: tl.constexpr,
):  # fmt: skip
    """Columns n * BLOCK_K onwards of the rows, once they are all written: (BLOCK_B, BLOCK_K) values."""
    DTYPE: tl.constexpr = row_pointers.dtype.element_ty
    missing = tl.max(tl.max((sentinel_bits(words, DTYPE) != 0).to(tl.int32), axis=1), axis=0)
    spins_left = spins_for(error_ptr, MAX_SPINS)
    while missing != 0 if MAX_SPINS == 0 else (missing != 0) & (spins_left > 0):
        words = load_words(row_pointers, exchanged, n, WIDTH, WIDTH, WIDTH, BLOCK_K)
        missing = tl.max(tl.max((sentinel_bits(words, DTYPE) != 0).to(tl.int32), axis=1), axis=0)
        if MAX_SPINS > 0:
            spins_left -= 1
    if MAX_SPINS > 0:  # noqa: SIM102  (known when compiling, unlike the next condition)
        if missing != 0:
            give_up(error_ptr, step, 0, n * BLOCK_K)
    return as_elements(words, DTYPE)


@triton.jit
def sum_of_layers(
    h_rows, active,  # (BLOCK_B,) where the rows of all layers start, at one step
    n,
    first, last,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Columns n * BLOCK_K onwards of h[first] + ... + h[last], all waited for before; each sum is rounded."""
    x = load_chunk(h_rows + COLUMNS[first], active, n, WIDTH, WIDTH, WIDTH, BLOCK_K)
    for layer in tl.static_range(first + 1, last + 1):
        x = add(x, load_chunk(h_rows + COLUMNS[layer], active, n, WIDTH, WIDTH, WIDTH, BLOCK_K))
    return x


@triton.jit
def add(x, y):
    """The sum, rounded to the dtype of x."""
    return (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)


@triton.jit
def receive_keys(
    pointers, mask,  # (BLOCK_B, N) of int64
    error_ptr, step,
    MAX_SPINS: tl.constexpr,
):  # fmt: skip
    """(BLOCK_B, N) keys, once all are written; the smallest key outside the mask."""
    NONE: tl.constexpr = -0x8000000000000000
    keys = tl.load(pointers, mask=mask, other=NONE, volatile=True)
    missing = tl.max(tl.max((keys == -1).to(tl.int32), axis=1), axis=0)
    spins_left = spins_for(error_ptr, MAX_SPINS)
    while missing != 0 if MAX_SPINS == 0 else (missing != 0) & (spins_left > 0):
        keys = tl.load(pointers, mask=mask, other=NONE, volatile=True)
        missing = tl.max(tl.max((keys == -1).to(tl.int32), axis=1), axis=0)
        if MAX_SPINS > 0:
            spins_left -= 1
    if MAX_SPINS > 0:  # noqa: SIM102  (known when compiling, unlike the next condition)
        if missing != 0:
            first = tl.min(tl.min(tl.where(keys == -1, tl.arange(0, keys.shape[1])[None, :], 0x7FFFFFFF), 1), 0)
            give_up(error_ptr, step, 0, first)
    return keys
