"""Pieces of the decode kernel: its weights, and the products of a layer's h with what is above and beside it.

A matrix is packed as (P, OUT, WIDTH padded to whole chunks): the OUT rows of each program, ordered (gate, unit). Its
chunks (OUT, BLOCK_K) are on the chip, in the tuple `kept` from number FIRST on, or, with FIRST = -1, read from the L2
cache whenever they are used.

With SPLIT_K > 1 the columns of every chunk are cut into so many parts, multiplied by different warps and summed at the
end: a chunk of weights is (SPLIT_K, OUT, BLOCK_K / SPLIT_K), a sum that is not yet whole (SPLIT_K, OUT, BLOCK_B).
"""

# The body of a kernel is Triton, not Python, and has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .decode_exchange import add, received, sum_of_layers
from .exchange import as_elements, load_chunk, load_words
from .persistent_backward import split_columns


@triton.jit
def split_rows(w, SPLIT_K: tl.constexpr):
    """(OUT, BLOCK_K) -> (SPLIT_K, OUT, BLOCK_K / SPLIT_K), or as it is."""
    if SPLIT_K > 1:
        w = tl.permute(tl.reshape(w, (w.shape[0], SPLIT_K, w.shape[1] // SPLIT_K)), (1, 0, 2))
    return w


@triton.jit
def no_sums(OUT: tl.constexpr, BLOCK_B: tl.constexpr, SPLIT_K: tl.constexpr):
    return tl.zeros((OUT, BLOCK_B) if SPLIT_K == 1 else (SPLIT_K, OUT, BLOCK_B), tl.float32)


@triton.jit
def whole(sums, SPLIT_K: tl.constexpr):
    """(OUT, BLOCK_B)."""
    if SPLIT_K > 1:
        sums = tl.sum(sums, axis=0)
    return sums


@triton.jit
def load_weights(ptr, n, OUT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """Chunk n of this program's rows of a packed matrix."""
    PADDED: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    return split_rows(tl.load(ptr + out[:, None] * PADDED + (n * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]), SPLIT_K)


@triton.jit
def load_head(ptr, ids, n, V: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """Chunk n of these rows of the head (V, WIDTH)."""
    k = n * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (ids < V)[:, None] & (k < WIDTH)[None, :]
    return split_rows(tl.load(ptr + ids.to(tl.int64)[:, None] * WIDTH + k[None, :], mask=mask, other=0.0), SPLIT_K)


@triton.jit
def weights(
    kept, FIRST: tl.constexpr, ptr, n,
    OUT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    if FIRST >= 0:
        w = kept[FIRST + n]
    else:
        w = load_weights(ptr, n, OUT, WIDTH, BLOCK_K, SPLIT_K)
    return w


@triton.jit
def product(
    kept, FIRST: tl.constexpr, ptr,
    xs,  # chunks (BLOCK_B, BLOCK_K)
    OUT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """W x (OUT, BLOCK_B)."""
    sums = no_sums(OUT, xs[0].shape[0], SPLIT_K)
    for n in tl.static_range((WIDTH + BLOCK_K - 1) // BLOCK_K):
        w = weights(kept, FIRST, ptr, n, OUT, WIDTH, BLOCK_K, SPLIT_K)
        sums = tl.dot(w, split_columns(xs[n], SPLIT_K), sums, input_precision=INPUT_PRECISION)
    return whole(sums, SPLIT_K)


@triton.jit
def first_product(
    ptr,
    h_rows, mask,  # (BLOCK_B,) rows that have always been there
    steps,
    OUT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """W h (OUT, BLOCK_B), once before the loop over tokens.

    With weights of its own, which a hint to the cache tells apart from those on the chip: what is used on both sides
    of the loop's beginning the compiler would carry through the loop in registers. And as a loop whose length depends
    on the launch (without steps there is no product): unrolled, its loads would take the registers of everything else.
    """
    PADDED: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    z = tl.zeros((OUT, h_rows.shape[0]), tl.float32)
    rows = ptr + gate_rows(OUT)[:, None] * PADDED
    for n in range(tl.minimum(steps, 1) * (PADDED // BLOCK_K)):
        w = tl.load(rows + (n * BLOCK_K + tl.arange(0, BLOCK_K))[None, :], cache_modifier=".cg")
        h = load_chunk(h_rows, mask, n, WIDTH, WIDTH, WIDTH, BLOCK_K)
        z = tl.dot(w, tl.trans(h), z, input_precision=INPUT_PRECISION)
    return z


@triton.jit
def product_loaded_again(
    kept, FIRST: tl.constexpr, ptr,
    h_rows, active,  # (BLOCK_B,) rows that have been waited for
    OUT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """W h (OUT, BLOCK_B). As a matrix operand h takes eight times the registers that it takes as words: what two
    products share would be held from one to the other.
    """
    sums = no_sums(OUT, h_rows.shape[0], SPLIT_K)
    for n in tl.static_range((WIDTH + BLOCK_K - 1) // BLOCK_K):
        w = weights(kept, FIRST, ptr, n, OUT, WIDTH, BLOCK_K, SPLIT_K)
        h = load_chunk(h_rows, active, n, WIDTH, WIDTH, WIDTH, BLOCK_K)
        sums = tl.dot(w, split_columns(h, SPLIT_K), sums, input_precision=INPUT_PRECISION)
    return whole(sums, SPLIT_K)


@triton.jit
def chunks_of(words, DTYPE: tl.constexpr, NUM_CHUNKS: tl.constexpr):
    """What `exchange.receive` returned, as chunks (BLOCK_B, BLOCK_K)."""
    xs = ()
    for n in tl.static_range(NUM_CHUNKS):
        xs = xs + (as_elements(words[n], DTYPE),)  # noqa: RUF005
    return xs


@triton.jit
def added(xs, ys, NUM_CHUNKS: tl.constexpr):
    """Chunk by chunk x + y."""
    sums = ()
    for n in tl.static_range(NUM_CHUNKS):
        sums = sums + (add(xs[n], ys[n]),)  # noqa: RUF005
    return sums


@triton.jit
def receive_and_multiply(
    z,  # (OUT_ABOVE, BLOCK_B), used if ABOVE
    kept, FIRST_ABOVE: tl.constexpr, above_ptr, FIRST: tl.constexpr, ptr,
    h_rows, active, error_ptr, stage,
    layer: tl.constexpr, SUM_FROM: tl.constexpr, ABOVE: tl.constexpr, OUT: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, MAX_SPINS: tl.constexpr,
):  # fmt: skip
    """Receive h of a layer chunk by chunk, each used at once: z + W_ih (of the layer above) x, and W_hh h.

    A chunk is asked for before the one before it is used, so that only the first has to wait for the L2 cache.
    """
    NUM_CHUNKS: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    rows = h_rows + COLUMNS[layer]
    sums = no_sums(OUT, h_rows.shape[0], SPLIT_K)
    sums_above = no_sums(z.shape[0], h_rows.shape[0], SPLIT_K)
    words = load_words(rows, active, 0, WIDTH, WIDTH, WIDTH, BLOCK_K)
    for n in tl.static_range(NUM_CHUNKS):
        next_words = words
        if n + 1 < NUM_CHUNKS:
            next_words = load_words(rows, active, n + 1, WIDTH, WIDTH, WIDTH, BLOCK_K)
        h = received(words, rows, active, n, error_ptr, stage, WIDTH, BLOCK_K, MAX_SPINS)
        words = next_words
        w = weights(kept, FIRST, ptr, n, OUT, WIDTH, BLOCK_K, SPLIT_K)
        sums = tl.dot(w, split_columns(h, SPLIT_K), sums, input_precision=INPUT_PRECISION)
        if ABOVE:
            x = h
            if layer > SUM_FROM:
                x = add(sum_of_layers(h_rows, active, n, SUM_FROM, layer - 1, COLUMNS, WIDTH, BLOCK_K), h)
            w = weights(kept, FIRST_ABOVE, above_ptr, n, z.shape[0], WIDTH, BLOCK_K, SPLIT_K)
            sums_above = tl.dot(w, split_columns(x, SPLIT_K), sums_above, input_precision=INPUT_PRECISION)
    if ABOVE:
        z += whole(sums_above, SPLIT_K)
    return z, whole(sums, SPLIT_K)


@triton.jit
def gate_rows(OUT: tl.constexpr):
    """This program's entries of a packed bias (P, OUT)."""
    return tl.program_id(0) * OUT + tl.arange(0, OUT)


@triton.jit
def load_table(ptr, token, active, OUT: tl.constexpr):
    """What each stream's token adds to this program's gates: (OUT, BLOCK_B), from a table (V, P, OUT)."""
    rows = ptr + token.to(tl.int64) * (tl.num_programs(0) * OUT)
    return tl.load(rows[None, :] + gate_rows(OUT)[:, None], mask=active[None, :], other=0.0)


@triton.jit
def head_logits(
    kept, FIRST: tl.constexpr, head_ptr, head_bias_ptr,
    ids,  # (N,)
    xs,  # what the last layer hands upwards, as chunks, if KEEP_TILE; else it is loaded again
    h_rows, active, KEEP_TILE: tl.constexpr,
    last: tl.constexpr, SUM_FROM: tl.constexpr,
    COLUMNS: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits (N, BLOCK_B) in float32, rounded to the model's dtype as a model's own are."""
    DTYPE: tl.constexpr = h_rows.dtype.element_ty
    sums = no_sums(ids.shape[0], BLOCK_B, SPLIT_K)
    for n in tl.static_range((WIDTH + BLOCK_K - 1) // BLOCK_K):
        if FIRST >= 0:
            w = kept[FIRST + n]
        else:
            w = load_head(head_ptr, ids, n, V, WIDTH, BLOCK_K, SPLIT_K)
        if KEEP_TILE:
            x = xs[n]
        else:
            x = sum_of_layers(h_rows, active, n, SUM_FROM, last, COLUMNS, WIDTH, BLOCK_K)
        sums = tl.dot(w, split_columns(x, SPLIT_K), sums, input_precision=INPUT_PRECISION)
    z = whole(sums, SPLIT_K)
    if head_bias_ptr is not None:
        z += tl.load(head_bias_ptr + ids, mask=ids < V, other=0.0).to(tl.float32)[:, None]
    return z.to(DTYPE).to(tl.float32)


@triton.jit
def load_field(streams_ptr, field: tl.constexpr, rows, B):
    """(BLOCK_B,) int64: one of STREAM_FIELDS."""
    return tl.load(streams_ptr + field * B + rows, mask=rows < B, other=0)


@triton.jit
def store_field(streams_ptr, field: tl.constexpr, rows, B, values):
    tl.store(streams_ptr + field * B + rows, values.to(tl.int64), mask=rows < B)


@triton.jit
def store_streams(streams_ptr, before_ptr, rows, B, position, made, limit, least, token, active):
    """All STREAM_FIELDS; seeds and return indices are what they were before."""
    store_field(streams_ptr, 0, rows, B, load_field(before_ptr, 0, rows, B))
    store_field(streams_ptr, 1, rows, B, load_field(before_ptr, 1, rows, B))
    store_field(streams_ptr, 2, rows, B, position)
    store_field(streams_ptr, 3, rows, B, made)
    store_field(streams_ptr, 4, rows, B, limit)
    store_field(streams_ptr, 5, rows, B, least)
    store_field(streams_ptr, 6, rows, B, token)
    store_field(streams_ptr, 7, rows, B, active)
