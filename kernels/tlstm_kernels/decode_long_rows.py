"""Choosing a token inside a kernel from a row of logits that is too long for the registers of one program.

The same definitions as in `decode_sampling`, and the same thresholds, bit for bit where nothing is summed: a filter is
the lowest key that it keeps, found two bits at a time, with the row read in blocks once for each pair of bits. So 16
passes find a threshold of top-k or top-p. The noise is not made here: who computed a logit sends it with and without.
"""

# The body of a kernel is Triton, not Python, and has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .decode_sampling import ordered_bits, pack_keys
from .exchange import load_words, receive


@triton.jit
def load_block(row, n, V: tl.constexpr, BLOCK: tl.constexpr):
    """(1, BLOCK) float32: values n * BLOCK onwards of a row that has been waited for; -inf past the vocabulary."""
    words = load_words(row, tl.full((1,), 1, tl.int1), n, V, V, V, BLOCK)
    inside = n * BLOCK + tl.arange(0, BLOCK) < V
    return tl.where(inside[None, :], words.to(tl.float32, bitcast=True), float("-inf"))


@triton.jit
def value_of_bits(bits):
    """The float32 that `ordered_bits` made the integer of."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def largest_bits(row, V: tl.constexpr, BLOCK: tl.constexpr):
    """(1, 1) int32: `ordered_bits` of the row's largest value."""
    largest = tl.full((1, BLOCK), -0x80000000, tl.int32)
    for n in range((V + BLOCK - 1) // BLOCK):
        largest = tl.maximum(largest, ordered_bits(load_block(row, n, V, BLOCK)))
    return tl.max(largest, axis=1)[:, None]


@triton.jit
def masses(logits, bits, lowest, largest):
    """What each value weighs in a softmax over those from `lowest` on, times the sum of all."""
    return tl.where(bits < lowest, 0.0, tl.exp(logits - largest))


@triton.jit
def total_mass(row, lowest, largest, V: tl.constexpr, BLOCK: tl.constexpr):
    """(1, 1) float32."""
    sums = tl.zeros((1, BLOCK), tl.float32)
    for n in range((V + BLOCK - 1) // BLOCK):
        logits = load_block(row, n, V, BLOCK)
        sums += masses(logits, ordered_bits(logits), lowest, largest)
    return tl.sum(sums, axis=1)[:, None]


@triton.jit
def threshold(
    row,  # (1,) where the row starts
    bound,  # number of elements, or mass
    lowest, largest,  # (1, 1): what `masses` takes, used if BY_MASS
    V: tl.constexpr, BLOCK: tl.constexpr,
    BY_MASS: tl.constexpr,
):  # fmt: skip
    """(1, 1) int32: the largest threshold with at least `bound` elements at or above it or, BY_MASS, with a mass of at
    most `bound` below it. Counts and masses grow with the threshold, so of three candidates all fit up to some one.
    """
    DTYPE: tl.constexpr = tl.float32 if BY_MASS else tl.int32
    low = tl.full((1, 1), -0x80000000, tl.int64)
    for level in range(16):
        quarter = tl.full((1, 1), 0x40000000, tl.int64) >> (2 * level)
        first = (low + quarter).to(tl.int32)
        second = (low + 2 * quarter).to(tl.int32)
        third = (low + 3 * quarter).to(tl.int32)
        sums_1 = tl.zeros((1, BLOCK), DTYPE)
        sums_2 = tl.zeros((1, BLOCK), DTYPE)
        sums_3 = tl.zeros((1, BLOCK), DTYPE)
        logits = load_block(row, 0, V, BLOCK)
        for n in range((V + BLOCK - 1) // BLOCK):
            next_logits = load_block(row, n + 1, V, BLOCK)  # asked for before this one is used
            bits = ordered_bits(logits)
            if BY_MASS:
                mass = masses(logits, bits, lowest, largest)
                sums_1 += tl.where(bits < first, mass, 0.0)
                sums_2 += tl.where(bits < second, mass, 0.0)
                sums_3 += tl.where(bits < third, mass, 0.0)
            else:
                sums_1 += (bits >= first).to(tl.int32)
                sums_2 += (bits >= second).to(tl.int32)
                sums_3 += (bits >= third).to(tl.int32)
            logits = next_logits
        fitting = fits(sums_1, bound, BY_MASS) + fits(sums_2, bound, BY_MASS) + fits(sums_3, bound, BY_MASS)
        low += quarter * fitting
    return low.to(tl.int32)


@triton.jit
def fits(sums, bound, BY_MASS: tl.constexpr):
    """(1, 1) int64: 1 or 0."""
    whole = tl.sum(sums, axis=1)[:, None]
    if BY_MASS:
        fitting = whole <= bound
    else:
        fitting = whole >= bound
    return fitting.to(tl.int64)


@triton.jit
def choose_long_row(
    logits_row, scores_row,  # (1,) where the row's V logits start, and the same with noise
    error_ptr, stage,
    top_k, tail, log_min_p,
    V: tl.constexpr, BLOCK: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, MAX_SPINS: tl.constexpr,
):  # fmt: skip
    """(1,) int64: the key of the row's draw, once all programs have sent their logits and scores.

    NaN is above all: it makes every sum NaN, which fits nothing, so that it stays and is noticed.
    """
    wanted = tl.full((1,), 1, tl.int1)
    receive(logits_row, wanted, wanted, error_ptr, stage, V, V, V, BLOCK, 0, MAX_SPINS)
    receive(scores_row, wanted, wanted, error_ptr, stage, V, V, V, BLOCK, 0, MAX_SPINS)
    lowest = tl.full((1, 1), -0x80000000, tl.int32)
    top = lowest
    if TOP_P or MIN_P:
        top = largest_bits(logits_row, V, BLOCK)
    largest = value_of_bits(top)
    if TOP_K:
        lowest = threshold(logits_row, top_k, lowest, largest, V, BLOCK, 0)
    if TOP_P:
        bound = tail * total_mass(logits_row, lowest, largest, V, BLOCK)
        kept = threshold(logits_row, bound, lowest, largest, V, BLOCK, 1)
        lowest = tl.maximum(lowest, tl.minimum(kept, top))
    if MIN_P:
        lowest = tl.maximum(lowest, ordered_bits(largest + log_min_p))
    best = tl.full((1, BLOCK), -0x8000000000000000, tl.int64)
    for n in range((V + BLOCK - 1) // BLOCK):
        ids = n * BLOCK + tl.arange(0, BLOCK)[None, :]
        bits = ordered_bits(load_block(logits_row, n, V, BLOCK))
        scores = tl.where(bits < lowest, float("-inf"), load_block(scores_row, n, V, BLOCK))
        best = tl.maximum(best, tl.where(ids < V, pack_keys(scores, ids), -0x8000000000000000))
    return tl.max(best, axis=1)
