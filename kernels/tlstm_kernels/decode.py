"""A whole language model that generates: one persistent kernel makes many tokens for many streams, no host in the loop.

For each token: gather the embedding, run all layers, run the head, choose the next token. The embedding comes from a
table of `embedding @ W_ih^T + b` of the first layer, so that layer has no input product. Program (p, q) of the grid
owns of every layer UNITS hidden units (their four gates' rows of W_ih and W_hh, and their slice of c), and of the head
every P-th block of the vocabulary; and BLOCK_B streams, those of group q. Groups never meet.

What programs exchange, in this order for each token, every element by the protocol of `exchange.py` (the data is its
own flag; one slot per step, stored once, never the sentinel):

    h of layer 0, ..., h of layer L - 1     (steps, B, STRIDE), a row holding all layers side by side
    the choice, in one of three ways:
    "reduce"     each program sends the key (score, token id) of its best token; all take the largest. One trip; for
                 greedy choice and for sampling without a filter
    "everyone"   each program sends its logits, and all filter and draw, each for itself. One trip; for very few streams
    "owner"      each program sends its logits; for each stream one program filters, draws, and sends the key of its
                 draw. Two trips. A row of logits that is too long for a program's registers is sent with its noise, too

A key is one word of 64 bits, read and written whole. All programs of a group compute from the same words who has ended,
so that nobody waits for a row that nobody writes. A stream that has ended is neither computed on nor waited for: its
state stays.

Off the critical path: h_t of a layer is waited for once and used twice, first by W_ih of the layer above, then, while
the others wait for what that gave, by the layer's own W_hh for the next token. So from one token to the next there are
L + 1 trips through the L2 cache, L products of W_ih (the first of them a table row) and the head.

With streams' limits, ends and random numbers as data, a finished stream's slot can be given to another text between two
launches. What a launch leaves (h, c, streams) is what the next one begins with.
"""

# The body of a kernel is Triton, not Python, and has no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .cell import activate, split_gates, tanh
from .decode_exchange import receive_keys
from .decode_layers import (
    added,
    chunks_of,
    first_product,
    gate_rows,
    head_logits,
    load_field,
    load_head,
    load_table,
    load_weights,
    product,
    product_loaded_again,
    receive_and_multiply,
    store_streams,
)
from .decode_long_rows import choose_long_row
from .decode_sampling import (
    choose_row,
    gumbel_noise,
    has_finite_score,
    only,
    pack_keys,
    processed_logits,
    token_of_key,
)
from .exchange import publish, receive

# Rows of the (8, B) int64 tensors that say where the streams stand.
STREAM_FIELDS = ("seed", "return_index", "position", "made", "limit", "least", "token", "active")


@triton.jit(do_not_specialize=["steps", "B", "top_k", "penalty", "temperature", "tail", "log_min_p"])
def decode_kernel(
    w_ptr,  # the packed recurrent and input weights, W_hh of layer 0, then W_ih and W_hh of each further layer
    bias_ptr,  # float32, packed alike: (P, 4 * UNITS[l]) for each layer from the second on
    table_ptr,  # (V, P, 4 * UNITS[0]): what token v adds to the first layer's gates, W_ih and biases included
    head_ptr, head_bias_ptr,  # (V, WIDTHS[-1]), (V,) or None
    h_in_ptr, c_in_ptr, h_out_ptr, c_out_ptr,  # (B, STRIDE)
    streams_in_ptr, streams_out_ptr,  # (8, B) int64: STREAM_FIELDS
    flags_ptr,  # (V,) int8 or None: see processed_logits
    seen_ptr,  # (B, V) int8 or None, kept up to date
    h_ptr,  # (steps, B, STRIDE), filled with the sentinel
    c_ptr,  # (steps, B, STRIDE) out, or None: c after each step
    logits_ptr,  # (steps, B, ROW_STRIDE) float32, filled with the sentinel; None in mode "reduce"
    scores_ptr,  # the same with noise, or None where rows fit into registers, and whoever draws makes the noise
    keys_ptr,  # (steps, B, KEYS) int64, filled with the sentinel; None in mode "everyone"
    results_ptr,  # (steps, B) int64 out: the key of each chosen token, -1 where the stream had ended
    error_ptr,  # (programs, 4) int32, zero, or None without MAX_SPINS
    steps, B,
    penalty, temperature, top_k, tail, log_min_p,  # tail: 1 - top_p
    L: tl.constexpr,
    V: tl.constexpr,
    WIDTHS: tl.constexpr, UNITS: tl.constexpr,  # per layer: hidden units; of one program, powers of two
    COLUMNS: tl.constexpr, STRIDE: tl.constexpr,  # where each layer begins in a row of h or c; length of such a row
    SUM_FROM: tl.constexpr,  # per layer: what is handed upwards is the sum of h from that layer to this one (residual)
    OFFSETS: tl.constexpr, BIAS_OFFSETS: tl.constexpr,  # where each matrix begins in w_ptr, each bias in bias_ptr
    KEPT: tl.constexpr,  # per matrix, the head last: the number of its first chunk on the chip, or -1: streamed
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,  # BLOCK_V: vocabulary of a program at a time
    HEAD_BLOCKS: tl.constexpr,  # blocks of the vocabulary of one program
    KEYS: tl.constexpr, BLOCK_KEYS: tl.constexpr,  # programs that send keys in mode "reduce", and the power of two
    ROW_STRIDE: tl.constexpr,  # from one row of logits to the next
    ROW_V: tl.constexpr,  # token ids of a row that are filtered at a time: a power of two, >= V without scores_ptr
    KEEP_TILE: tl.constexpr,  # 1: h stays in registers from wait to both products; 0: a chunk at a time, for many rows
    SPLIT_K: tl.constexpr,  # power of two: the warps share the columns of a chunk in so many parts
    MODE: tl.constexpr,
    SAMPLE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, MAX_SPINS: tl.constexpr,
):  # fmt: skip
    """Grid: (P, ceil(B / BLOCK_B)), all of it resident at once (launch_cooperative_grid). See the module's text."""
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    NO_KEY: tl.constexpr = -0x8000000000000000
    program = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)  # (BLOCK_B,)
    row_mask = rows < B
    if error_ptr is not None:
        error_ptr += (tl.program_id(1) * tl.num_programs(0) + program) * 4

    position = load_field(streams_in_ptr, 2, rows, B).to(tl.int32)
    made = load_field(streams_in_ptr, 3, rows, B).to(tl.int32)
    limit = load_field(streams_in_ptr, 4, rows, B).to(tl.int32)
    least = load_field(streams_in_ptr, 5, rows, B).to(tl.int32)
    token = load_field(streams_in_ptr, 6, rows, B).to(tl.int32)
    active = load_field(streams_in_ptr, 7, rows, B) != 0

    # Of each layer: this program's slice of h and c, and W_hh h for the first token.
    hs, cs, recurrent = (), (), ()
    for layer in tl.static_range(L):
        units = program * UNITS[layer] + tl.arange(0, UNITS[layer])
        own = rows.to(tl.int64)[None, :] * STRIDE + COLUMNS[layer] + units[:, None]
        mask = (units < WIDTHS[layer])[:, None] & row_mask[None, :]
        hs = hs + (tl.load(h_in_ptr + own, mask=mask, other=0.0),)  # noqa: RUF005
        cs = cs + (tl.load(c_in_ptr + own, mask=mask, other=0.0).to(tl.float32),)  # noqa: RUF005
        h_rows = h_in_ptr + rows.to(tl.int64) * STRIDE + COLUMNS[layer]
        r = first_product(
            w_ptr + OFFSETS[2 * layer], h_rows, active, steps,
            4 * UNITS[layer], WIDTHS[layer], BLOCK_K, INPUT_PRECISION,
        )  # fmt: skip
        recurrent = recurrent + (r,)  # noqa: RUF005

    # Weights that stay on the chip, as chunks: the matrices in order, the head last.
    kept = ()
    for m in tl.static_range(2 * L - 1):
        if KEPT[m] >= 0:
            for n in tl.static_range((WIDTHS[m // 2] + BLOCK_K - 1) // BLOCK_K):
                w = load_weights(w_ptr + OFFSETS[m], n, 4 * UNITS[(m + 1) // 2], WIDTHS[m // 2], BLOCK_K, SPLIT_K)
                kept = kept + (w,)  # noqa: RUF005  (the compiler has no unpacking)
    if KEPT[2 * L - 1] >= 0:
        for n in tl.static_range((WIDTHS[L - 1] + BLOCK_K - 1) // BLOCK_K):
            ids = program * BLOCK_V + tl.arange(0, BLOCK_V)
            kept = kept + (load_head(head_ptr, ids, n, V, WIDTHS[L - 1], BLOCK_K, SPLIT_K),)  # noqa: RUF005

    for step in range(steps):
        slot = (step * B + rows).to(tl.int64)  # (BLOCK_B,) rows of the (steps, B, ...) tensors
        h_rows = h_ptr + slot * STRIDE
        new_hs, new_cs, new_recurrent = (), (), ()
        xs, above_ptr = (), w_ptr
        z = recurrent[0] + load_table(table_ptr, token, active, 4 * UNITS[0])
        for layer in tl.static_range(L):
            # 1. The gates, this program's slice of c and h, and h to the others.
            z_i, z_f, z_g, z_o = split_gates(z)
            i, f, g, o = activate(z_i, z_f, z_g, z_o)
            c = f * cs[layer] + i * g
            h = (o * tanh(c)).to(DTYPE)
            units = program * UNITS[layer] + tl.arange(0, UNITS[layer])
            own = slot[None, :] * STRIDE + COLUMNS[layer] + units[:, None]
            mask = (units < WIDTHS[layer])[:, None] & active[None, :]
            publish(h_ptr + own, h, mask)
            # Between two tokens a state is kept in the model's dtype, as a call of the model for one token returns it.
            c = tl.where(active[None, :], c.to(DTYPE).to(tl.float32), cs[layer])
            if c_ptr is not None:
                tl.store(c_ptr + own, c.to(DTYPE), mask=mask)
            new_hs = new_hs + (tl.where(active[None, :], h, hs[layer]),)  # noqa: RUF005
            new_cs = new_cs + (c,)  # noqa: RUF005

            # 2. Nobody waits for this any more: W_hh of the layer below, whose h this program still has.
            if KEEP_TILE and layer > 0:
                r = product_loaded_again(
                    kept, KEPT[2 * layer - 2], w_ptr + OFFSETS[2 * layer - 2], h_rows + COLUMNS[layer - 1], active,
                    4 * UNITS[layer - 1], WIDTHS[layer - 1], BLOCK_K, SPLIT_K, INPUT_PRECISION,
                )  # fmt: skip
                new_recurrent = new_recurrent + (r,)  # noqa: RUF005

            # 3. All of this layer's h, and what the layer above makes of it.
            stage = step * (L + 1) + layer
            if layer + 1 < L:
                bias = tl.load(bias_ptr + BIAS_OFFSETS[layer + 1] + gate_rows(4 * UNITS[layer + 1]))
                z = recurrent[layer + 1] + bias[:, None]
                above_ptr = w_ptr + OFFSETS[2 * layer + 1]
            if KEEP_TILE:
                words = receive(
                    h_rows + COLUMNS[layer], active, active, error_ptr, stage,
                    WIDTHS[layer], WIDTHS[layer], WIDTHS[layer], BLOCK_K, 1, MAX_SPINS,
                )  # fmt: skip
                tile = chunks_of(words, DTYPE, (WIDTHS[layer] + BLOCK_K - 1) // BLOCK_K)
                if SUM_FROM[layer] < layer:
                    xs = added(xs, tile, (WIDTHS[layer] + BLOCK_K - 1) // BLOCK_K)
                else:
                    xs = tile
                if layer + 1 < L:
                    z += product(
                        kept, KEPT[2 * layer + 1], above_ptr, xs,
                        4 * UNITS[layer + 1], WIDTHS[layer], BLOCK_K, SPLIT_K, INPUT_PRECISION,
                    )  # fmt: skip
            else:
                z, r = receive_and_multiply(
                    z, kept, KEPT[2 * layer + 1], above_ptr, KEPT[2 * layer], w_ptr + OFFSETS[2 * layer],
                    h_rows, active, error_ptr, stage, layer, SUM_FROM[layer], layer + 1 < L, 4 * UNITS[layer],
                    COLUMNS, WIDTHS[layer], BLOCK_K, SPLIT_K, INPUT_PRECISION, MAX_SPINS,
                )  # fmt: skip
                new_recurrent = new_recurrent + (r,)  # noqa: RUF005

        # 4. The head, and what this program sends of it. Seeds are loaded in every step: held from step to step, the
        # compiler would hold all that follows from them as well, the keys of every round.
        seeds = load_field(streams_in_ptr, 0, rows, B)
        return_index = load_field(streams_in_ptr, 1, rows, B).to(tl.int32)
        best = tl.full((BLOCK_B,), NO_KEY, tl.int64)
        for block in range(HEAD_BLOCKS):
            first = (block * tl.num_programs(0) + program) * BLOCK_V
            ids = first + tl.arange(0, BLOCK_V)
            logits = head_logits(
                kept, KEPT[2 * L - 1], head_ptr, head_bias_ptr, ids, xs, h_rows, active, KEEP_TILE,
                L - 1, SUM_FROM[L - 1], COLUMNS, V, WIDTHS[L - 1], BLOCK_B, BLOCK_K, SPLIT_K, INPUT_PRECISION,
            )  # fmt: skip
            logits = processed_logits(
                logits, ids, token, made >= least, active, rows, flags_ptr, seen_ptr, penalty, temperature, V, SAMPLE
            )
            if MODE == "reduce":
                if SAMPLE:
                    logits += gumbel_noise(first, BLOCK_V, position, return_index, seeds)
                keys = tl.where((ids < V)[:, None], pack_keys(logits, ids[:, None]), NO_KEY)
                best = tl.maximum(best, tl.max(keys, axis=0))
            else:
                places = slot[None, :] * ROW_STRIDE + ids[:, None]
                sent = (ids < V)[:, None] & active[None, :]
                publish(logits_ptr + places, logits, sent)
                if scores_ptr is not None:
                    noise = gumbel_noise(first, BLOCK_V, position, return_index, seeds)
                    publish(scores_ptr + places, logits + noise, sent)
        if MODE == "reduce":
            tl.store(keys_ptr + slot * KEYS + program, best, mask=active & (program < KEYS))
        if KEEP_TILE:
            r = product_loaded_again(
                kept, KEPT[2 * L - 2], w_ptr + OFFSETS[2 * L - 2], h_rows + COLUMNS[L - 1], active,
                4 * UNITS[L - 1], WIDTHS[L - 1], BLOCK_K, SPLIT_K, INPUT_PRECISION,
            )  # fmt: skip
            new_recurrent = new_recurrent + (r,)  # noqa: RUF005

        # 5. The choice.
        stage = step * (L + 1) + L
        if MODE != "reduce":
            # Row by row: lane, lane + 1, ... by everyone, or each by its owner.
            first = program if MODE == "owner" else 0
            stride = tl.num_programs(0) if MODE == "owner" else 1
            for lane in range(first, BLOCK_B, stride):
                mine = tl.arange(0, BLOCK_B) == lane
                if tl.sum((active & mine).to(tl.int32), axis=0) != 0:
                    row = only(slot, mine) * ROW_STRIDE
                    if scores_ptr is not None:
                        key = choose_long_row(
                            logits_ptr + row, scores_ptr + row, error_ptr, stage,
                            top_k, tail, log_min_p, V, ROW_V, TOP_K, TOP_P, MIN_P, MAX_SPINS,
                        )  # fmt: skip
                    else:
                        key = choose_row(
                            logits_ptr + row,
                            only(position, mine), only(return_index, mine), only(seeds, mine), error_ptr, stage,
                            top_k, tail, log_min_p, V, ROW_V, TOP_K, TOP_P, MIN_P, MAX_SPINS,
                        )  # fmt: skip
                    if MODE == "owner":
                        tl.store(keys_ptr + only(slot, mine), key)
                    else:
                        best = tl.where(mine, key, best)
        if MODE != "everyone":
            columns = tl.arange(0, BLOCK_KEYS)
            keys = receive_keys(
                keys_ptr + slot[:, None] * KEYS + columns[None, :],
                active[:, None] & (columns < KEYS)[None, :], error_ptr, stage, MAX_SPINS,
            )  # fmt: skip
            best = tl.max(keys, axis=1)

        # 6. Who goes on.
        if program == 0:
            tl.store(results_ptr + slot, tl.where(active, best, -1), mask=row_mask)
        token = tl.where(active, token_of_key(best), token)
        made += active.to(tl.int32)
        position += active.to(tl.int32)
        goes_on = has_finite_score(best) & (made < limit)
        if flags_ptr is not None:
            goes_on &= (tl.load(flags_ptr + token, mask=active, other=0) & 2) == 0
        active &= goes_on
        hs, cs, recurrent = new_hs, new_cs, new_recurrent

    for layer in tl.static_range(L):
        units = program * UNITS[layer] + tl.arange(0, UNITS[layer])
        own = rows.to(tl.int64)[None, :] * STRIDE + COLUMNS[layer] + units[:, None]
        mask = (units < WIDTHS[layer])[:, None] & row_mask[None, :]
        tl.store(h_out_ptr + own, hs[layer], mask=mask)
        tl.store(c_out_ptr + own, cs[layer].to(DTYPE), mask=mask)
    if program == 0:
        store_streams(streams_out_ptr, streams_in_ptr, rows, B, position, made, limit, least, token, active)
