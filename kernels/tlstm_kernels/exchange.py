"""How the programs of one grid hand a row of h (or of d_gates) to one another: the data is its own flag.

Every exchanged tensor has one slot per time step and is filled with the sentinel, the all-ones bit pattern, before the
launch. A producer stores an element once (`publish`). A consumer loads its tile again and again until no element is the
sentinel (`receive`). Nothing else is shared: no counter, no fence, no barrier between programs. kernels/README.md says
why that is safe.
"""

# The body of a kernel is Triton, not Python, and has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def without_sentinel(values):
    """The sentinel is a NaN. Where the model itself computed that very NaN, take its twin with the sign bit cleared."""
    BITS: tl.constexpr = values.dtype.primitive_bitwidth
    WORD: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    TWIN: tl.constexpr = 0x7FFF if BITS == 16 else 0x7FFFFFFF
    bits = values.to(WORD, bitcast=True)
    return tl.where(bits == -1, TWIN, bits).to(WORD).to(values.dtype, bitcast=True)


@triton.jit
def publish(pointers, values, mask):
    """Store `values`, in the buffer's dtype, for other programs to receive."""
    tl.store(pointers, without_sentinel(values.to(pointers.dtype.element_ty)), mask=mask)


@triton.jit
def load_words(
    row_pointers, row_mask,  # (BLOCK_B,), as in `receive`
    n, K: tl.constexpr, H: tl.constexpr, GATE_STRIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Columns n * BLOCK_K onwards of the tile as integers, zero outside it.

    (BLOCK_B, BLOCK_K) of the element's width; where H allows it, 16-bit elements come in pairs: (BLOCK_B, BLOCK_K / 2)
    of 32 bits, the lower column in the lower half.
    """
    BITS: tl.constexpr = row_pointers.dtype.element_ty.primitive_bitwidth
    PER_WORD: tl.constexpr = 2 if BITS == 16 and H % 2 == 0 else 1
    WORD: tl.constexpr = tl.int16 if BITS * PER_WORD == 16 else tl.int32
    k = (n * BLOCK_K // PER_WORD) + tl.arange(0, BLOCK_K // PER_WORD)
    columns = k
    if GATE_STRIDE != H:
        columns += (k // (H // PER_WORD)) * ((GATE_STRIDE - H) // PER_WORD)
    pointers = row_pointers.to(tl.pointer_type(WORD), bitcast=True)
    mask = row_mask[:, None] & (k < K // PER_WORD)[None, :]
    # volatile: from the L2 cache, where the other programs' stores arrive, never from this multiprocessor's own L1.
    return tl.load(pointers[:, None] + columns[None, :], mask=mask, other=0, volatile=True)


@triton.jit
def sentinel_bits(words, DTYPE: tl.constexpr):
    """Not zero where a word holds the sentinel, in an element or in half of a pair: only then has ~w a zero there."""
    if DTYPE.primitive_bitwidth == words.dtype.primitive_bitwidth:
        bits = (words == -1).to(tl.int32)
    else:
        # v - 1 borrows into the top bit of each half that is zero (or above one that is).
        bits = (-0x10002 - words) & words & -0x7FFF8000
    return bits


@triton.jit
def as_elements(words, DTYPE: tl.constexpr):
    """(BLOCK_B, BLOCK_K) values of the words' columns."""
    if DTYPE.primitive_bitwidth != words.dtype.primitive_bitwidth:
        pairs = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
        words = tl.reshape(pairs, (words.shape[0], 2 * words.shape[1]))
    return words.to(DTYPE, bitcast=True)


@triton.jit
def load_tile(
    row_pointers, row_mask, exchanged,  # (BLOCK_B,), as in `receive`
    K: tl.constexpr, H: tl.constexpr, GATE_STRIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All ceil(K / BLOCK_K) chunks of the tile as a tuple of words, and not 0 if an element of it is not written."""
    DTYPE: tl.constexpr = row_pointers.dtype.element_ty
    words = (load_words(row_pointers, row_mask, 0, K, H, GATE_STRIDE, BLOCK_K),)
    unwritten = sentinel_bits(words[0], DTYPE)
    for n in tl.static_range(1, (K + BLOCK_K - 1) // BLOCK_K):
        chunk = load_words(row_pointers, row_mask, n, K, H, GATE_STRIDE, BLOCK_K)
        unwritten |= sentinel_bits(chunk, DTYPE)
        words = words + (chunk,)  # noqa: RUF005  (the compiler has no unpacking)
    unwritten = (unwritten != 0) & exchanged[:, None]
    return words, tl.max(tl.max(unwritten.to(tl.int32), axis=1), axis=0)


@triton.jit
def scan_tile(
    row_pointers, row_mask, exchanged,  # (BLOCK_B,), as in `receive`
    K: tl.constexpr, H: tl.constexpr, GATE_STRIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Not 0 if an element of the tile is not written; in a loop, so that few of the tile's registers live at once."""
    DTYPE: tl.constexpr = row_pointers.dtype.element_ty
    unwritten = sentinel_bits(load_words(row_pointers, row_mask, 0, K, H, GATE_STRIDE, BLOCK_K), DTYPE)
    for n in range(1, (K + BLOCK_K - 1) // BLOCK_K):
        unwritten |= sentinel_bits(load_words(row_pointers, row_mask, n, K, H, GATE_STRIDE, BLOCK_K), DTYPE)
    unwritten = (unwritten != 0) & exchanged[:, None]
    return tl.max(tl.max(unwritten.to(tl.int32), axis=1), axis=0)


@triton.jit
def load_chunk(
    row_pointers, row_mask, n,
    K: tl.constexpr, H: tl.constexpr, GATE_STRIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Chunk n of a tile that has been waited for: (BLOCK_B, BLOCK_K) values."""
    words = load_words(row_pointers, row_mask, n, K, H, GATE_STRIDE, BLOCK_K)
    return as_elements(words, row_pointers.dtype.element_ty)


@triton.jit
def receive(
    row_pointers,  # (BLOCK_B,) where the K columns of each row start
    row_mask,  # (BLOCK_B,) rows to load; the others are zero
    exchanged,  # (BLOCK_B,) rows to wait for; the others have always been there (an initial state, say)
    error_ptr,  # (4,) int32 of this program, zero at first: see `report`
    step,
    K: tl.constexpr,  # columns of the tile: H for h, 4H for gates
    H: tl.constexpr,
    GATE_STRIDE: tl.constexpr,  # column k of the tile is at (k // H) * GATE_STRIDE + k % H of the row
    BLOCK_K: tl.constexpr,
    KEEP: tl.constexpr,  # 0: only wait; what is returned has no use
    MAX_SPINS: tl.constexpr,
):
    """Wait until every element of the tile is written; returns it as a tuple of words, for `as_elements`.

    With MAX_SPINS > 0 the wait ends after so many loads at the latest and what it was for is reported; from then on
    this program waits for nothing, so that the launch ends.
    """
    words = ()
    if KEEP:
        words, unwritten = load_tile(row_pointers, row_mask, exchanged, K, H, GATE_STRIDE, BLOCK_K)
    else:
        unwritten = scan_tile(row_pointers, row_mask, exchanged, K, H, GATE_STRIDE, BLOCK_K)
    spins_left = MAX_SPINS
    if MAX_SPINS > 0:
        spins_left = tl.where(tl.load(error_ptr, volatile=True) == 0, MAX_SPINS, 0)
    while unwritten != 0 if MAX_SPINS == 0 else (unwritten != 0) & (spins_left > 0):
        if KEEP:
            words, unwritten = load_tile(row_pointers, row_mask, exchanged, K, H, GATE_STRIDE, BLOCK_K)
        else:
            unwritten = scan_tile(row_pointers, row_mask, exchanged, K, H, GATE_STRIDE, BLOCK_K)
        if MAX_SPINS > 0:
            spins_left -= 1
    if MAX_SPINS > 0:  # noqa: SIM102  (known when compiling, unlike the next condition)
        if unwritten != 0:
            report(error_ptr, step, row_pointers, row_mask, exchanged, K, H, GATE_STRIDE, BLOCK_K)
    return words


@triton.jit
def report(
    error_ptr, step, row_pointers, row_mask, exchanged,
    K: tl.constexpr, H: tl.constexpr, GATE_STRIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write to `error_ptr`, the first time only: 1 + the step that could not go on, then the first missing row of the
    tile and its first missing column k (to be written by the program that owns unit k % H)."""
    NOTHING: tl.constexpr = 0x7FFFFFFF
    if tl.load(error_ptr, volatile=True) == 0:
        rows = tl.arange(0, row_mask.shape[0])
        first_row = tl.full((), NOTHING, tl.int32)
        first_column = tl.full((), NOTHING, tl.int32)
        for n in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
            values = load_chunk(row_pointers, row_mask, n, K, H, GATE_STRIDE, BLOCK_K)
            bits = values.to(tl.int16 if values.dtype.primitive_bitwidth == 16 else tl.int32, bitcast=True)
            unwritten = (bits == -1) & exchanged[:, None]
            columns = tl.where(unwritten, n * BLOCK_K + tl.arange(0, BLOCK_K)[None, :], NOTHING)
            column_of_row = tl.min(columns, axis=1)
            first_row = tl.minimum(first_row, tl.min(tl.where(column_of_row < NOTHING, rows, NOTHING), axis=0))
            first_column = tl.minimum(first_column, tl.min(column_of_row, axis=0))
        tl.store(error_ptr + 1, first_row)
        tl.store(error_ptr + 2, first_column)
        tl.store(error_ptr, step + 1)
