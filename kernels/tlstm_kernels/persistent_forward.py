"""The forward recurrence as one persistent kernel: W_hh stays on chip for all T steps.

    [i f g o]_t = act( x_proj_t + h_{t-1} W_hh^T )       act: sigmoid, sigmoid, tanh, sigmoid
    c_t = f_t * c_{t-1} + i_t * g_t
    h_t = o_t * tanh(c_t)

Program (p, q, r) of the grid owns UNITS hidden units: their four gates' rows of W_hh and their slice of c; BLOCK_B rows
of the batch; and one head of one direction. At each step it needs all of h_{t-1}, which the programs of its group
exchange through the output y itself. Gates, sums and c are float32 whatever the storage dtype.
"""

# The body of a kernel is Triton, not Python, and has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .cell import activate, split_gates, tanh
from .exchange import as_elements, load_chunk, publish, receive
from .steps import load_gates, rows_of_step
from .zoneout_kernel import kept_units, zoned_out


@triton.jit(do_not_specialize=["T", "B", "stride_t", "stride_b", "zoneout_h", "zoneout_c", "first_row"])
def persistent_forward_kernel(
    x_proj_ptr, x_proj_1_ptr,  # (rows, 4 * N * H) of each direction (None if D == 1): x W_ih^T + b_ih + b_hh
    w_hh_ptr, w_hh_1_ptr,  # (4 * N * H, H) contiguous, torch's, of each direction (None if D == 1); y's dtype
    h_0_ptr, c_0_ptr,  # (D, B, N * H) contiguous; h_0 in y's dtype
    y_ptr,  # (rows, D * N * H) out, filled with the sentinel (all bits one)
    h_n_ptr, c_n_ptr,  # (D, B, N * H) contiguous, out
    gates_ptr,  # (rows, D * 4 * N * H) out, or None: the gates after their activation
    cells_ptr,  # (rows, D * N * H) out, or None: c after each step
    lengths_ptr,  # (B,) integer 0..T, or None
    resets_ptr,  # (T, B) contiguous, integer, or None: not zero where the state is replaced between t - 1 and t
    h_reset_ptr, c_reset_ptr,  # (D, B, N * H) contiguous, or None: by what, h in y's dtype; None means by zero
    error_ptr,  # (programs, 4) int32, zero, or None without MAX_SPINS: see exchange.report
    T, B,
    stride_t, stride_b,  # in rows: (t, b) is row t * stride_t + b * stride_b of every (rows, ...) tensor
    zoneout_seed_ptr,  # () int64, or None: units keep their state in part, not at random
    zoneout_h, zoneout_c,  # probabilities that a unit keeps its h and its c, in units of 2**-24, or None: it never does
    first_row,  # of this launch in the whole batch, which the masks count from, or None without zoneout
    H: tl.constexpr,  # units of one head
    N: tl.constexpr,  # heads: blocks of a block-diagonal W_hh, 1 for the usual LSTM
    D: tl.constexpr,  # directions, 1 or 2
    REVERSE: tl.constexpr,  # 1 if direction 0 reads backwards in time; direction 1 reads the other way
    UNITS: tl.constexpr,  # power of two; UNITS >= H: one program per group, and h never leaves it
    BLOCK_B: tl.constexpr,  # power of two >= 8
    BLOCK_K: tl.constexpr,  # power of two >= 16; UNITS where UNITS >= H
    WEIGHTS_ON_CHIP: tl.constexpr,  # 0: stream W_hh from the L2 cache at every step (UNITS < H, KEEP_TILE = 0)
    KEEP_TILE: tl.constexpr,  # 1: h stays in registers between wait and product; 0: load it again, for large tiles
    INPUT_PRECISION: tl.constexpr,  # of float32 products: "ieee", "tf32x3", "tf32"
    MAX_SPINS: tl.constexpr,  # 0: wait for ever
):  # fmt: skip
    """Grid: (ceil(H / UNITS), ceil(B / BLOCK_B), D * N), all of it resident at once (launch_cooperative_grid).

    Every (rows, ...) tensor is dense and row-major. Rows of the batch past their length keep their state, have zero
    output, and take nothing from x; in reverse they start at their last valid step. A reset counts where its step is
    valid. What gates and cells hold past a length is unspecified. T, B and the strides never cause a recompilation.
    """
    ALONE: tl.constexpr = UNITS >= H
    NUM_CHUNKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    WIDTH: tl.constexpr = N * H  # of one direction's h
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    direction = tl.program_id(2) // N
    head = tl.program_id(2) % N
    backwards = (direction + REVERSE) % 2

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

    if D == 2:
        x_proj_ptr = tl.where(direction == 1, x_proj_1_ptr, x_proj_ptr)
        w_hh_ptr = tl.where(direction == 1, w_hh_1_ptr, w_hh_ptr)

    # This program's rows of W_hh, ordered (gate, unit), as chunks (4 * UNITS, BLOCK_K).
    w_rows = tl.arange(0, 4 * UNITS)
    w_units = tl.program_id(0) * UNITS + w_rows % UNITS
    w_ptr = w_hh_ptr + (head.to(tl.int64) * H + (w_rows // UNITS) * WIDTH + w_units) * H
    w_chunks = ()
    if WEIGHTS_ON_CHIP:
        for n in tl.static_range(NUM_CHUNKS):
            w_chunks = w_chunks + (load_w_rows(w_ptr, w_units, n, H, BLOCK_K),)  # noqa: RUF005

    h = tl.load(h_0_ptr + state, mask=mask, other=0.0)  # (UNITS, BLOCK_B) of this program's own units
    c = tl.load(c_0_ptr + state, mask=mask, other=0.0).to(tl.float32)
    h_reset = tl.zeros((UNITS, BLOCK_B), DTYPE)
    c_reset = tl.zeros((UNITS, BLOCK_B), tl.float32)
    if h_reset_ptr is not None:
        h_reset = tl.load(h_reset_ptr + state, mask=mask, other=0.0)
        c_reset = tl.load(c_reset_ptr + state, mask=mask, other=0.0).to(tl.float32)

    x_columns = head * H + units
    x_i, x_f, x_g, x_o = load_gates(x_proj_ptr, 0, rows, T, backwards, stride_t, stride_b, x_columns, mask, WIDTH, 1)
    for step in range(T):
        t = tl.where(backwards == 1, T - 1 - step, step)
        row = rows_of_step(step, rows, T, backwards, stride_t, stride_b)  # (BLOCK_B,) in the (rows, ...) tensors
        valid = t < lengths
        first = t == tl.where(backwards == 1, lengths - 1, 0)
        reset = tl.zeros((BLOCK_B,), tl.int1)
        if resets_ptr is not None:
            # A reset at t cuts between t - 1 and t: backwards, it is crossed on the way from t to t - 1.
            cut = t + backwards
            reset = tl.load(resets_ptr + cut.to(tl.int64) * B + rows, mask=row_mask & (cut < lengths), other=0) != 0
            h = tl.where(reset[None, :], h_reset, h)
            c = tl.where(reset[None, :], c_reset, c)

        if zoneout_h is not None:  # drawn before the wait, which hides it
            kept_h, kept_c = kept_units(
                zoneout_seed_ptr, zoneout_h, zoneout_c, t, first_row + rows, head * H + units, backwards
            )

        # Asked for before the wait, so that it is here when the next step begins.
        next_x_i, next_x_f, next_x_g, next_x_o = load_gates(
            x_proj_ptr, step + 1, rows, T, backwards, stride_t, stride_b, x_columns, mask, WIDTH, 1
        )

        # z^T = W_hh h_{t-1}^T: the weights are the left operand, which matrix instructions want 64 rows or more of.
        z = tl.zeros((4 * UNITS, BLOCK_B), tl.float32)
        if ALONE:
            z = tl.dot(w_chunks[0], h, z, input_precision=INPUT_PRECISION)
        else:
            # Where each row's h_{t-1} is: in the slot of the step before, or in a state that has always been there.
            row_before = row + (2 * backwards - 1) * stride_t
            h_rows = y_ptr + row_before * (D * WIDTH) + direction * WIDTH + head * H
            h_rows = tl.where(first, h_0_ptr + state_rows, h_rows)
            has_h = row_mask & valid
            if h_reset_ptr is not None:
                h_rows = tl.where(reset, h_reset_ptr + state_rows, h_rows)
            elif resets_ptr is not None:
                has_h &= reset == 0
            if H % 16 == 0:
                h_rows = tl.multiple_of(h_rows, 16)  # bytes; the compiler cannot see it through the choice of a pointer
            exchanged = has_h & (first == 0) & (reset == 0)
            h_words = receive(h_rows, has_h, exchanged, error_ptr, step, H, H, H, BLOCK_K, KEEP_TILE, MAX_SPINS)
            if WEIGHTS_ON_CHIP:
                for n in tl.static_range(NUM_CHUNKS):
                    if KEEP_TILE:
                        h_chunk = as_elements(h_words[n], DTYPE)
                    else:
                        h_chunk = load_chunk(h_rows, has_h, n, H, H, H, BLOCK_K)
                    z = tl.dot(w_chunks[n], tl.trans(h_chunk), z, input_precision=INPUT_PRECISION)
            else:
                for n in range(NUM_CHUNKS):
                    w_chunk = load_w_rows(w_ptr, w_units, n, H, BLOCK_K)
                    h_chunk = load_chunk(h_rows, has_h, n, H, H, H, BLOCK_K)
                    z = tl.dot(w_chunk, tl.trans(h_chunk), z, input_precision=INPUT_PRECISION)

        z_i, z_f, z_g, z_o = split_gates(z)
        i, f, g, o = activate(z_i + x_i, z_f + x_f, z_g + x_g, z_o + x_o)
        c_new = f * c + i * g
        if zoneout_h is not None:
            h_new = zoned_out(kept_h, h.to(tl.float32), o * tanh(c_new), zoneout_seed_ptr is not None).to(DTYPE)
            c_new = zoned_out(kept_c, c, c_new, zoneout_seed_ptr is not None)
        else:
            h_new = (o * tanh(c_new)).to(DTYPE)
        c = tl.where(valid[None, :], c_new, c)
        h = tl.where(valid[None, :], h_new, h)
        publish(y_ptr + (row * (D * WIDTH))[None, :] + h_columns[:, None], tl.where(valid[None, :], h_new, 0), mask)
        if gates_ptr is not None:
            gates = gates_ptr + (row * (D * 4 * WIDTH))[None, :] + gate_columns[:, None]
            tl.store(gates, i, mask=mask)
            tl.store(gates + WIDTH, f, mask=mask)
            tl.store(gates + 2 * WIDTH, g, mask=mask)
            tl.store(gates + 3 * WIDTH, o, mask=mask)
        if cells_ptr is not None:
            tl.store(cells_ptr + (row * (D * WIDTH))[None, :] + h_columns[:, None], c, mask=mask)
        x_i, x_f, x_g, x_o = next_x_i, next_x_f, next_x_g, next_x_o

    tl.store(h_n_ptr + state, h, mask=mask)
    tl.store(c_n_ptr + state, c, mask=mask)


@triton.jit
def load_w_rows(w_ptr, w_units, n, H: tl.constexpr, BLOCK_K: tl.constexpr):
    """Chunk n of this program's rows of W_hh: (4 * UNITS, BLOCK_K)."""
    k = n * BLOCK_K + tl.arange(0, BLOCK_K)
    return tl.load(w_ptr[:, None] + k[None, :], mask=(w_units < H)[:, None] & (k < H)[None, :], other=0.0)
