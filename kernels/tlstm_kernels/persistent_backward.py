"""The backward recurrence as one persistent kernel, last step first: W_hh stays on chip for all T steps.

    d_h_t = d_y_t + d_gates_{t+1} W_hh
    d_c_t = d_c_t + d_h_t * o * (1 - tanh(c_t)^2),    then for the step before    d_c_{t-1} = d_c_t * f
    d_gates_t = gradients of the four pre-activations (cell.cell_backward)

Program (p, q, r) of the grid owns UNITS hidden units: their columns of W_hh and their slices of d_h and d_c; BLOCK_B
rows of the batch; and one head of one direction. At each step it needs the d_gates of all units, which the programs of
its group exchange through the d_gates tensor itself, the one that the products for d_W and d_x read afterwards.
Nothing is accumulated across programs, so the result is the same bit for bit at every run.
"""

# The body of a kernel is Triton, not Python, and has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .cell import activate, cell_backward
from .exchange import as_elements, load_chunk, publish, receive
from .steps import load_gates, load_units, rows_of_step
from .zoneout_kernel import kept_units, split_gradient


@triton.jit(do_not_specialize=["T", "B", "stride_t", "stride_b", "zoneout_h", "zoneout_c", "first_row"])
def persistent_backward_kernel(
    d_y_ptr,  # (rows, D * N * H), or None: zero
    d_h_n_ptr, d_c_n_ptr,  # (D, B, N * H) contiguous, or None: zero
    d_cells_ptr,  # (rows, D * N * H), or None: gradient of the cell-state sequence
    w_hh_ptr, w_hh_1_ptr,  # (4 * N * H, H) contiguous, torch's, of each direction (None if D == 1); d_gates' dtype
    gates_ptr,  # (rows, D * 4 * N * H): gates after their activation, or before it
    cells_ptr,  # (rows, D * N * H): c after each step
    c_0_ptr,  # (D, B, N * H) contiguous
    d_gates_ptr,  # (rows, D * 4 * N * H) out, filled with the sentinel (all bits one): of the pre-activations
    d_h_0_ptr, d_c_0_ptr,  # (D, B, N * H) contiguous, out
    lengths_ptr,  # (B,) integer 0..T, or None
    resets_ptr,  # (T, B) contiguous, integer, or None: not zero where the state was replaced between t - 1 and t
    c_reset_ptr,  # (D, B, N * H) contiguous, or None: the cell state that replaced it; None means zero
    d_h_reset_ptr, d_c_reset_ptr,  # (D, B, N * H) contiguous float32, out, or None
    error_ptr,  # (programs, 4) int32, zero, or None without MAX_SPINS: see exchange.report
    T, B,
    stride_t, stride_b,  # in rows: (t, b) is row t * stride_t + b * stride_b of every (rows, ...) tensor
    zoneout_seed_ptr,  # () int64, or None: units keep their state in part, not at random
    zoneout_h, zoneout_c,  # probabilities that a unit keeps its h and its c, in units of 2**-24, or None: it never does
    first_row,  # of this launch in the whole batch, which the masks count from, or None without zoneout
    H: tl.constexpr,  # units of one head
    N: tl.constexpr,  # heads: blocks of a block-diagonal W_hh, 1 for the usual LSTM
    D: tl.constexpr,  # directions, 1 or 2
    REVERSE: tl.constexpr,  # 1 if direction 0 of the forward pass read backwards in time; as in the forward
    UNITS: tl.constexpr,  # power of two; UNITS >= H: one program per group, and d_gates are not waited for
    BLOCK_B: tl.constexpr,  # power of two >= 8
    BLOCK_K: tl.constexpr,  # power of two >= 16 * SPLIT_K; UNITS where UNITS >= H
    PRE_ACTIVATION: tl.constexpr,  # 1: gates_ptr holds x_proj + h_prev W_hh^T (recompute), 0: what the forward saved
    SPLIT_K: tl.constexpr,  # power of two: the warps share the columns of a chunk in so many parts; 1 where UNITS >= H
    WEIGHTS_ON_CHIP: tl.constexpr,  # 0: stream W_hh from the L2 cache at every step (UNITS < H, KEEP_TILE = 0)
    KEEP_TILE: tl.constexpr,  # 1: d_gates stay in registers between wait and product; 0: load them again
    INPUT_PRECISION: tl.constexpr,  # of float32 products: "ieee", "tf32x3", "tf32"
    MAX_SPINS: tl.constexpr,  # 0: wait for ever
):  # fmt: skip
    """Grid: (ceil(H / UNITS), ceil(B / BLOCK_B), D * N), all of it resident at once (launch_cooperative_grid).

    Every (rows, ...) tensor is dense and row-major. d_gates is zero past a row's length, whatever d_y, gates and cells
    hold there. T, B and the strides never cause a recompilation.
    """
    ALONE: tl.constexpr = UNITS >= H
    GATE_K: tl.constexpr = BLOCK_K if ALONE else H  # rows of W_hh from one gate to the next as the chunks count them
    K: tl.constexpr = 4 * GATE_K
    NUM_CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    WIDTH: tl.constexpr = N * H  # of one direction's h
    DTYPE: tl.constexpr = d_gates_ptr.dtype.element_ty
    direction = tl.program_id(2) // N
    head = tl.program_id(2) % N
    backwards = 1 - (direction + REVERSE) % 2  # in time, while this kernel runs: against the forward pass

    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)  # (BLOCK_B,)
    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)  # (UNITS,)
    row_mask = rows < B
    unit_mask = units < H
    mask = unit_mask[:, None] & row_mask[None, :]
    h_columns = direction * WIDTH + head * H + units
    gate_columns = direction * 4 * WIDTH + head * H + units  # of gate i; the others follow at distance WIDTH
    state_rows = (direction.to(tl.int64) * B + rows) * WIDTH + head * H  # (BLOCK_B,) in the (D, B, N * H) tensors
    state = state_rows[None, :] + units[:, None]
    lengths = tl.full((BLOCK_B,), 0, tl.int32) + T
    if lengths_ptr is not None:
        lengths = tl.load(lengths_ptr + rows, mask=row_mask, other=0).to(tl.int32)
    if error_ptr is not None:
        program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        error_ptr += program * 4

    # This program's columns of W_hh, transposed, as chunks (UNITS, BLOCK_K).
    if D == 2:
        w_hh_ptr = tl.where(direction == 1, w_hh_1_ptr, w_hh_ptr)
    w_ptr = w_hh_ptr + head.to(tl.int64) * H * H
    w_chunks = ()
    if WEIGHTS_ON_CHIP:
        for n in tl.static_range(NUM_CHUNKS):
            w_chunks = w_chunks + (load_w_columns(w_ptr, n, units, H, WIDTH, GATE_K, BLOCK_K, SPLIT_K),)  # noqa: RUF005

    d_h = tl.zeros((UNITS, BLOCK_B), tl.float32)
    d_c = tl.zeros((UNITS, BLOCK_B), tl.float32)
    d_h_reset = tl.zeros((UNITS, BLOCK_B), tl.float32)
    d_c_reset = tl.zeros((UNITS, BLOCK_B), tl.float32)
    c_reset = tl.zeros((UNITS, BLOCK_B), tl.float32)
    c_0 = tl.load(c_0_ptr + state, mask=mask, other=0.0).to(tl.float32)
    if d_h_n_ptr is not None:
        d_h += tl.load(d_h_n_ptr + state, mask=mask, other=0.0)
    if d_c_n_ptr is not None:
        d_c += tl.load(d_c_n_ptr + state, mask=mask, other=0.0)
    if c_reset_ptr is not None:
        c_reset += tl.load(c_reset_ptr + state, mask=mask, other=0.0)

    # The inputs of a step are asked for one step ahead; c_{t-1} is the c of the kernel's next step.
    g_i, g_f, g_g, g_o = load_gates(gates_ptr, 0, rows, T, backwards, stride_t, stride_b, gate_columns, mask, WIDTH, D)
    c = load_units(cells_ptr, 0, rows, T, backwards, stride_t, stride_b, h_columns, mask, D * WIDTH)
    c_before = load_units(cells_ptr, 1, rows, T, backwards, stride_t, stride_b, h_columns, mask, D * WIDTH)
    d_y = tl.zeros((UNITS, BLOCK_B), tl.float32)
    d_cells = tl.zeros((UNITS, BLOCK_B), tl.float32)
    if d_y_ptr is not None:
        d_y = load_units(d_y_ptr, 0, rows, T, backwards, stride_t, stride_b, h_columns, mask, D * WIDTH)
    if d_cells_ptr is not None:
        d_cells = load_units(d_cells_ptr, 0, rows, T, backwards, stride_t, stride_b, h_columns, mask, D * WIDTH)
    for step in range(T):
        t = tl.where(backwards == 1, T - 1 - step, step)
        row = rows_of_step(step, rows, T, backwards, stride_t, stride_b)  # (BLOCK_B,) in the (rows, ...) tensors
        valid = t < lengths
        first = t == tl.where(backwards == 1, 0, lengths - 1)  # the step that read the initial state
        reset = tl.zeros((BLOCK_B,), tl.int1)
        if resets_ptr is not None:
            cut = t + 1 - backwards  # as the forward pass crossed it
            reset = tl.load(resets_ptr + cut.to(tl.int64) * B + rows, mask=row_mask & (cut < lengths), other=0) != 0

        i, f, g, o = g_i.to(tl.float32), g_f.to(tl.float32), g_g.to(tl.float32), g_o.to(tl.float32)
        if PRE_ACTIVATION:
            i, f, g, o = activate(i, f, g, o)
        c_prev = tl.where(first[None, :], c_0, c_before.to(tl.float32))
        c_prev = tl.where(reset[None, :], c_reset, c_prev)

        # A step past the row's length hands on what comes in and takes nothing for itself.
        if zoneout_h is not None:
            kept_h, kept_c = kept_units(
                zoneout_seed_ptr, zoneout_h, zoneout_c, t, first_row + rows, head * H + units, 1 - backwards
            )
            d_h_kept, d_h_new = split_gradient(kept_h, d_h + d_y, zoneout_seed_ptr is not None)
            d_c_kept, d_c_new = split_gradient(kept_c, d_c + d_cells, zoneout_seed_ptr is not None)
            # What h was computed from is not the c that was saved, but the one before part of it was kept.
            d_i, d_f, d_g, d_o, d_c_prev = cell_backward(i, f, g, o, f * c_prev + i * g, c_prev, d_h_new, d_c_new)
            d_c_prev += d_c_kept
        else:
            d_h_kept = 0
            d_i, d_f, d_g, d_o, d_c_prev = cell_backward(i, f, g, o, c.to(tl.float32), c_prev, d_h + d_y, d_c + d_cells)
        d_i = tl.where(valid[None, :], d_i, 0)
        d_f = tl.where(valid[None, :], d_f, 0)
        d_g = tl.where(valid[None, :], d_g, 0)
        d_o = tl.where(valid[None, :], d_o, 0)
        d_c = tl.where(valid[None, :], d_c_prev, d_c)
        d_h = tl.where(valid[None, :], d_h_kept, d_h)

        d_gates = d_gates_ptr + (row * (D * 4 * WIDTH))[None, :] + gate_columns[:, None]
        publish(d_gates, d_i, mask)
        publish(d_gates + WIDTH, d_f, mask)
        publish(d_gates + 2 * WIDTH, d_g, mask)
        publish(d_gates + 3 * WIDTH, d_o, mask)

        # Asked for before the wait, so that it is here when the next step begins.
        c = c_before
        c_before = load_units(cells_ptr, step + 2, rows, T, backwards, stride_t, stride_b, h_columns, mask, D * WIDTH)
        g_i, g_f, g_g, g_o = load_gates(
            gates_ptr, step + 1, rows, T, backwards, stride_t, stride_b, gate_columns, mask, WIDTH, D
        )
        if d_y_ptr is not None:
            d_y = load_units(d_y_ptr, step + 1, rows, T, backwards, stride_t, stride_b, h_columns, mask, D * WIDTH)
        if d_cells_ptr is not None:
            d_cells = load_units(
                d_cells_ptr, step + 1, rows, T, backwards, stride_t, stride_b, h_columns, mask, D * WIDTH
            )

        # d_h_{t-1}^T = W_hh^T d_gates_t^T
        product = tl.zeros((UNITS, BLOCK_B) if SPLIT_K == 1 else (SPLIT_K, UNITS, BLOCK_B), tl.float32)
        if ALONE:
            product = tl.dot(w_chunks[0], d_i.to(DTYPE), product, input_precision=INPUT_PRECISION)
            product = tl.dot(w_chunks[1], d_f.to(DTYPE), product, input_precision=INPUT_PRECISION)
            product = tl.dot(w_chunks[2], d_g.to(DTYPE), product, input_precision=INPUT_PRECISION)
            product = tl.dot(w_chunks[3], d_o.to(DTYPE), product, input_precision=INPUT_PRECISION)
        else:
            tile = d_gates_ptr + row * (D * 4 * WIDTH) + direction * 4 * WIDTH + head * H
            there = row_mask & valid
            words = receive(tile, there, there, error_ptr, step, K, H, WIDTH, BLOCK_K, KEEP_TILE, MAX_SPINS)
            if WEIGHTS_ON_CHIP:
                for n in tl.static_range(NUM_CHUNKS):
                    if KEEP_TILE:
                        chunk = as_elements(words[n], DTYPE)
                    else:
                        chunk = load_chunk(tile, there, n, K, H, WIDTH, BLOCK_K)
                    chunk = split_columns(chunk, SPLIT_K)
                    product = tl.dot(w_chunks[n], chunk, product, input_precision=INPUT_PRECISION)
            else:
                for n in range(NUM_CHUNKS):
                    w_chunk = load_w_columns(w_ptr, n, units, H, WIDTH, GATE_K, BLOCK_K, SPLIT_K)
                    chunk = split_columns(load_chunk(tile, there, n, K, H, WIDTH, BLOCK_K), SPLIT_K)
                    product = tl.dot(w_chunk, chunk, product, input_precision=INPUT_PRECISION)
            if SPLIT_K > 1:
                product = tl.sum(product, axis=0)
        d_h += product
        if resets_ptr is not None:
            # Before this step stood another state: it takes the gradient, the step before takes none.
            d_h_reset += tl.where(reset[None, :], d_h, 0)
            d_c_reset += tl.where(reset[None, :], d_c, 0)
            d_h = tl.where(reset[None, :], 0, d_h)
            d_c = tl.where(reset[None, :], 0, d_c)

    tl.store(d_h_0_ptr + state, d_h, mask=mask)
    tl.store(d_c_0_ptr + state, d_c, mask=mask)
    if d_h_reset_ptr is not None:
        tl.store(d_h_reset_ptr + state, d_h_reset, mask=mask)
        tl.store(d_c_reset_ptr + state, d_c_reset, mask=mask)


@triton.jit
def load_w_columns(
    w_ptr, n, units,
    H: tl.constexpr, WIDTH: tl.constexpr, GATE_K: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Chunk n of this program's columns of its head's W_hh, each gate's H rows padded to GATE_K: (UNITS, BLOCK_K).

    With SPLIT_K > 1: (SPLIT_K, UNITS, BLOCK_K / SPLIT_K).
    """
    k = n * BLOCK_K + tl.arange(0, BLOCK_K)
    in_gate = k % GATE_K
    mask = (units < H)[:, None] & ((in_gate < H) & (k < 4 * GATE_K))[None, :]
    w = tl.load(w_ptr + units[:, None] + ((k // GATE_K * WIDTH + in_gate) * H)[None, :], mask=mask, other=0.0)
    if SPLIT_K > 1:
        w = tl.permute(tl.reshape(w, (units.shape[0], SPLIT_K, BLOCK_K // SPLIT_K)), (1, 0, 2))
    return w


@triton.jit
def split_columns(chunk, SPLIT_K: tl.constexpr):
    """(BLOCK_B, BLOCK_K) -> (BLOCK_K, BLOCK_B), or (SPLIT_K, BLOCK_K / SPLIT_K, BLOCK_B)."""
    if SPLIT_K == 1:
        columns = tl.trans(chunk)
    else:
        columns = tl.permute(tl.reshape(chunk, (chunk.shape[0], SPLIT_K, chunk.shape[1] // SPLIT_K)), (1, 2, 0))
    return columns
