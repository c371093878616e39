"""From logits to a token inside a kernel: penalties, filters, noise, and the key by which scores are compared.

The same definitions, in the same order and in float32, as the sampling of a language model in Python has them: penalty,
forbidden tokens, temperature, top-k, top-p, min-p, then the largest `logit + Gumbel noise`, the lowest id among equals.
The noise of token `v` at position `p` of a stream comes from word `v & 3` of Philox4x32-10 with the stream's seed as
key and `(v >> 2, p, return index, 0)` as counter: it depends on nothing else, so any program can make any part of it.

A threshold of top-k or top-p is found by bisection over the 32 bits of a float: counts and masses grow with the
threshold, so that no sort is needed, and what ties with the last element that is kept is kept too.
"""

# The body of a kernel is Triton, not Python, and has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .exchange import as_elements, receive


@triton.jit
def philox_round(c0, c1, c2, c3, k0, k1):
    p0 = c0.to(tl.uint64) * 0xD2511F53
    p1 = c2.to(tl.uint64) * 0xCD9E8D57
    c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
    c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
    return c0, p1.to(tl.uint32), c2, p0.to(tl.uint32)


@triton.jit
def gumbel_noise(
    first,  # scalar, a multiple of 4
    COUNT: tl.constexpr,  # token ids first, first + 1, ...: a power of two, 4 or more
    positions, return_index,  # (R,) int32
    seeds,  # (R,) int64
):  # fmt: skip
    """Standard Gumbel noise (COUNT, R) float32 of these token ids at each row's position."""
    R: tl.constexpr = positions.shape[0]
    groups = (first // 4 + tl.arange(0, COUNT // 4)).to(tl.uint32)
    zero = tl.zeros((COUNT // 4, R), tl.uint32)
    c0, c1, c2, c3 = (
        zero + groups[:, None],
        zero + positions.to(tl.uint32)[None, :],
        zero + return_index.to(tl.uint32)[None, :],
        zero,
    )
    k0 = zero + (seeds & 0xFFFFFFFF).to(tl.uint32)[None, :]
    k1 = zero + ((seeds >> 32) & 0xFFFFFFFF).to(tl.uint32)[None, :]
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
        # In 64 bits: the interpreter takes a sum of 32 bits that wraps for a mistake.
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    # (COUNT / 4, R, 2, 2): the last two dimensions are the high and the low bit of the word's number, swapped.
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), (COUNT, R))
    u = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23
    # In float64 and rounded once, as in Python: the value then does not depend on whose float32 logarithm it is.
    return (-tl.log(-tl.log(u.to(tl.float64)))).to(tl.float32)


# ---- comparing scores ------------------------------------------------------------------------------------------------


@triton.jit
def ordered_bits(x):
    """float32 to int32 that compares in the same order; 0 and -0 are the same, NaN is above all."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, bits)


@triton.jit
def pack_keys(scores, ids):
    """One int64 that is larger for the larger score and, where those are equal, for the lower id. Never -1."""
    return (ordered_bits(scores).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def token_of_key(keys):
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def has_finite_score(keys):
    """False where every token is forbidden (-inf), or where the logits overflowed or are NaN."""
    score = (keys >> 32).to(tl.int32)
    return (score < 0x7F800000) & (score >= -0x7F800000)


# ---- one block of the vocabulary, as the head computes it ------------------------------------------------------------


@triton.jit
def processed_logits(
    logits,  # (N, BLOCK_B) float32
    ids,  # (N,) token ids
    token,  # (BLOCK_B,) the newest token of each stream
    allow_end,  # (BLOCK_B,) whether the stream may end now
    active, rows,  # (BLOCK_B,)
    flags_ptr,  # (V,) int8 or None: 1 where the token is forbidden, + 2 where it ends a stream
    seen_ptr,  # (B, V) int8 or None: not zero where the stream has the token
    penalty, temperature,
    V: tl.constexpr,
    SAMPLE: tl.constexpr,
):  # fmt: skip
    """Logits after penalty, forbidden tokens and temperature."""
    inside = (ids < V)[:, None] & active[None, :]
    if seen_ptr is not None:
        # Only this program stores to and loads from its part, and in a step all its threads meet at barriers (in every
        # wait), so that the next step sees what this one stored.
        seen_pointers = seen_ptr + rows.to(tl.int64)[None, :] * V + ids[:, None]
        newest = ids[:, None] == token[None, :]
        tl.store(seen_pointers, tl.full((1, 1), 1, tl.int8), mask=newest & inside)
        seen = newest | (tl.load(seen_pointers, mask=inside, other=0) != 0)
        penalised = tl.where(logits < 0, logits * penalty, tl.div_rn(logits, penalty))
        logits = tl.where(seen, penalised, logits)
    if flags_ptr is not None:
        flags = tl.load(flags_ptr + ids, mask=ids < V, other=0).to(tl.int32)
        forbidden = ((flags & 1) != 0)[:, None] | (((flags & 2) != 0)[:, None] & (allow_end == 0)[None, :])
        logits = tl.where(forbidden, float("-inf"), logits)
    if SAMPLE:
        logits = tl.div_rn(logits, tl.zeros(logits.shape, tl.float32) + temperature)
    return logits


# ---- all logits of some rows -----------------------------------------------------------------------------------------


@triton.jit
def bisect(
    keys,  # (R, N) int32, from ordered_bits
    weights,  # (R, N) float32: what each element counts for, or None: 1
    bound,
):
    """(R, 1) int32: the largest threshold with at least `bound` elements at or above it (`weights` None), or with a
    total weight of at most `bound` below it.
    """
    low = tl.full((keys.shape[0], 1), -0x80000000, tl.int64)
    for n in range(32):
        candidate = low + (tl.full((1, 1), 0x80000000, tl.int64) >> n)
        above = keys >= candidate.to(tl.int32)
        if weights is None:
            fits = tl.sum(above.to(tl.int32), axis=1)[:, None] >= bound
        else:
            fits = tl.sum(tl.where(above, 0.0, weights), axis=1)[:, None] <= bound
        low = tl.where(fits, candidate, low)
    return low.to(tl.int32)


@triton.jit
def filtered(
    logits,  # (R, N) float32, -inf past the vocabulary
    top_k,  # number of tokens
    tail,  # float32: 1 - top_p
    log_min_p,  # float32
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
):  # fmt: skip
    """The logits with -inf where a filter drops the token. NaN stays, so that it is noticed."""
    keys = ordered_bits(logits)
    if TOP_K:
        dropped = keys < bisect(keys, None, top_k)
        logits = tl.where(dropped, float("-inf"), logits)
    if TOP_P:
        largest = tl.max(logits, axis=1)[:, None]
        mass = tl.exp(logits - largest)
        mass = mass / tl.sum(mass, axis=1)[:, None]
        threshold = tl.minimum(bisect(ordered_bits(logits), mass, tail), tl.max(keys, axis=1)[:, None])
        logits = tl.where(keys < threshold, float("-inf"), logits)
    if MIN_P:
        logits = tl.where(logits < tl.max(logits, axis=1)[:, None] + log_min_p, float("-inf"), logits)
    return logits


@triton.jit
def sample_rows(
    logits,  # (R, N) float32, N a power of two, after temperature; -inf past the vocabulary
    positions, return_index, seeds,  # (R,)
    top_k, tail, log_min_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
):  # fmt: skip
    """(R,) int64: the key of each row's draw."""
    R: tl.constexpr = logits.shape[0]
    N: tl.constexpr = logits.shape[1]
    logits = filtered(logits, top_k, tail, log_min_p, TOP_K, TOP_P, MIN_P)
    scores = logits + tl.trans(gumbel_noise(0, N, positions, return_index, seeds))
    ids = tl.zeros((R, N), tl.int32) + tl.arange(0, N)[None, :]
    return tl.max(pack_keys(scores, ids), axis=1)


@triton.jit
def choose_row(
    row_pointer,  # (1,) where the row's V logits start
    position, return_index, seed,  # (1,)
    error_ptr, stage,
    top_k, tail, log_min_p,
    V: tl.constexpr, ROW_V: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, MAX_SPINS: tl.constexpr,
):  # fmt: skip
    """(1,) int64: the key of the row's draw, once all programs have sent their logits."""
    wanted = tl.full((1,), 1, tl.int1)
    words = receive(row_pointer, wanted, wanted, error_ptr, stage, V, V, V, ROW_V, 1, MAX_SPINS)
    logits = tl.where(tl.arange(0, ROW_V)[None, :] < V, as_elements(words[0], tl.float32), float("-inf"))
    return sample_rows(logits, position, return_index, seed, top_k, tail, log_min_p, TOP_K, TOP_P, MIN_P)


@triton.jit
def only(values, mask):
    """(1,): the one of (N,) values that the mask picks."""
    return tl.sum(tl.where(mask, values, 0), axis=0) + tl.zeros((1,), values.dtype)
