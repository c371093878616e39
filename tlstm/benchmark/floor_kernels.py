"""What a step cannot do without, each part alone: the exchange, the chain of matrix instructions, the loop itself.

The exchange is that of `tlstm_kernels.exchange`, with no arithmetic between what is received and what is sent; with two
programs and a tile of a few elements it is the hop from one multiprocessor to another.
"""

# The body of a kernel is Triton, not Python, and has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from tlstm_kernels.exchange import publish, receive


@triton.jit(do_not_specialize=["T", "B"])
def exchange_kernel(
    buffer_ptr,  # (T, B, K) out, filled with the sentinel; slot t holds t % 64 when all is done
    error_ptr,  # (programs, 4) int32, zero, or None without MAX_SPINS
    T, B,
    K: tl.constexpr,  # columns that every program receives: H, or 4H for gates
    COLUMNS: tl.constexpr,  # columns that one program sends, a power of two
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    KEEP_TILE: tl.constexpr,
    MAX_SPINS: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(K / COLUMNS), ceil(B / BLOCK_B)), all resident at once. T - 1 exchanges follow one another."""
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask = rows < B
    mask = row_mask[:, None] & (columns < K)[None, :]
    if error_ptr is not None:
        error_ptr += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 4
    for step in range(T):
        slot = buffer_ptr + (step * B + rows).to(tl.int64) * K
        here = row_mask & (step > 0)
        before = slot - B * K
        if K % 16 == 0:
            before = tl.multiple_of(before, 16)
        receive(before, here, here, error_ptr, step, K, K, K, BLOCK_K, KEEP_TILE, MAX_SPINS)
        values = tl.zeros((BLOCK_B, COLUMNS), tl.float32) + step % 64
        publish(slot[:, None] + columns[None, :], values, mask)


@triton.jit(do_not_specialize=["T"])
def chain_kernel(
    w_ptr,  # (M, K) contiguous
    h_ptr,  # (BLOCK_B, BLOCK_K) contiguous
    z_ptr,  # (programs, M, BLOCK_B) float32 out: T times the sum over the chunks of W_{n mod HELD} h^T
    T,
    K: tl.constexpr, M: tl.constexpr,
    CHUNKS: tl.constexpr,  # products of one step
    HELD: tl.constexpr,  # chunks of W that are on chip: all, or 1 for weights that would be streamed
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (programs,). The products of T steps with W on chip, each adding to the sum of the one before."""
    m, b, k = tl.arange(0, M), tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_K)
    w_chunks = ()
    for n in tl.static_range(HELD):
        columns = n * BLOCK_K + k
        chunk = tl.load(w_ptr + m[:, None] * K + columns[None, :], mask=(columns < K)[None, :], other=0.0)
        w_chunks = w_chunks + (chunk,)  # noqa: RUF005  (the compiler has no unpacking)
    h = tl.load(h_ptr + b[:, None] * BLOCK_K + k[None, :])
    z = tl.zeros((M, BLOCK_B), tl.float32)
    for _ in range(T):
        for n in tl.static_range(CHUNKS):
            z = tl.dot(w_chunks[n % HELD], tl.trans(h), z, input_precision=INPUT_PRECISION)
    tl.store(z_ptr + tl.program_id(0) * M * BLOCK_B + m[:, None] * BLOCK_B + b[None, :], z)


@triton.jit(do_not_specialize=["T"])
def loop_kernel(
    out_ptr,  # (programs, LANES) float32: T / 2 where factor is 1 and summand 1/2
    T, factor, summand,
    LANES: tl.constexpr,
):  # fmt: skip
    """Grid: (programs,). A loop whose step is one dependent multiply-add."""
    lanes = tl.arange(0, LANES)
    value = tl.zeros((LANES,), tl.float32)
    for _ in range(T):
        value = value * factor + summand
    tl.store(out_ptr + tl.program_id(0) * LANES + lanes, value)
