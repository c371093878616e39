"""Choosing how a decode kernel is cut over a GPU, and how long a token of every stream takes by a model; pure Python.

All the programs of a plan run at the same time, so they are never more than the multiprocessors. Which matrices stay on
the chip is decided greedily, in two orders: first those that somebody waits for (W_ih, the head), or the head last; the
others are streamed from the L2 cache, or from memory where they do not fit there. One step takes, in microseconds,

    hop         L + 1 trips through the L2 cache, one more in mode "owner"; products of W_hh hide behind them
    broadcast   every program reads its streams' h of every layer, and what chooses the token
    weights     matrices that are streamed
    shared      matrices on the chip, read from shared memory, 128 bytes per clock
    matrix      the chain of matrix instructions along each contraction
    gates       gate arithmetic, barriers, noise and filters

and these follow one another. No time of this model was measured: it ranks plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product

from .cost_model import ITEM_SIZE, MATRIX_LATENCY, StepCost
from .decode_shape import MOST_FILTERED, Choice, DecodePlan, DecodeShape, next_power_of_two
from .gpu import GPU, KIB

UNITS = (4, 8, 16, 32, 64)
ROWS = (8, 16, 32, 64)
BLOCK_K = (64, 128)
MOST_LAYERS = 8  # the kernel's text grows with the layers and the chunks of their matrices
MOST_CHUNKS = 16
LONG_ROW_BLOCK = 16  # token ids of a longer row that one thread holds at a time
L2_BYTES_PER_PROGRAM = 64  # that one multiprocessor reads from the L2 cache in a clock
WAIT_CLOCKS = 500  # until a chunk has come from the L2 cache and all warps know that it is whole
NEXT_CLOCKS = 150  # the same for a chunk that was asked for before the last one was used
SUM_CLOCKS = 40  # to add one warp's part of a split contraction, through shared memory
MOST_SPLIT_ROWS = 16  # the parts of a sum of more rows take too much of the shared memory
MOST_BY_EVERYONE = 2  # streams that every program filters for itself, one after another, to save a trip


def refusal(shape: DecodeShape, choice: Choice, streams: int, gpu: GPU) -> str | None:
    """Why the kernel cannot do this on this GPU, or None."""
    if gpu.is_amd:
        return "programs on AMD GPUs share no coherent L2 cache"
    if shape.dtype not in ITEM_SIZE:
        return f"the decode kernel has no {shape.dtype}"
    if shape.layers > MOST_LAYERS:
        return f"the model has {shape.layers} layers and the decode kernel at most {MOST_LAYERS}"
    if choose_decode_plan(shape, choice, streams, gpu) is None:
        return f"no plan for layers of {shape.widths} units and {streams} streams fits on {gpu.name}"
    return None


@lru_cache(maxsize=256)
def choose_decode_plan(
    shape: DecodeShape,
    choice: Choice,
    streams: int,
    gpu: GPU,
    excluded: frozenset[DecodePlan] = frozenset(),
) -> DecodePlan | None:
    """The fastest plan by the model; None where nothing fits. `excluded` turned out not to."""
    plans = [plan for plan in _candidates(shape, choice, streams, gpu) if plan not in excluded]
    if not plans:
        return None
    best = min(plans, key=lambda plan: (token_cost(plan, gpu).total, plan.programs, plan.rows, plan.block_k))
    return replace(best, cost=token_cost(best, gpu))


def _candidates(shape: DecodeShape, choice: Choice, streams: int, gpu: GPU) -> Iterator[DecodePlan]:
    widest = max(shape.widths)
    for units, rows, block_k, num_warps, keep_tile, split in product(UNITS, ROWS, BLOCK_K, (4, 8), (1, 0), (1, 0)):
        programs = -(-widest // units)
        if rows >= 2 * max(streams, gpu.smallest_rows) or rows < gpu.smallest_rows or units >= 2 * widest:
            continue
        if programs * -(-streams // rows) > gpu.multiprocessors or widest > MOST_CHUNKS * block_k:
            continue
        if split and (rows > MOST_SPLIT_ROWS or block_k < 16 * num_warps):
            continue
        block_v = min(64, max(16, next_power_of_two(-(-shape.vocab_size // programs))))
        mode = "reduce"
        if choice.filters:
            mode = "everyone" if streams <= MOST_BY_EVERYONE and shape.vocab_size <= MOST_FILTERED else "owner"
        matrices = 2 * shape.layers
        split_k = num_warps if split else 1
        filter_block = MOST_FILTERED if shape.vocab_size <= MOST_FILTERED else 32 * num_warps * LONG_ROW_BLOCK
        plan = DecodePlan(
            shape, choice, streams, programs, rows, block_k, block_v, num_warps, keep_tile, (False,) * matrices, mode,
            split_k, filter_block, gpu.name,
        )  # fmt: skip
        if fits_registers(plan) and shared_memory_bytes(plan) <= gpu.shared_memory:
            yield _filled(plan, gpu, [*range(1, matrices, 2), *range(0, matrices, 2)])
            yield _filled(plan, gpu, [*range(matrices)])


def _filled(plan: DecodePlan, gpu: GPU, order: list[int]) -> DecodePlan:
    """The plan with as many matrices on the chip as fit, tried in this order."""
    for m in order:
        if m == len(plan.on_chip) - 1 and plan.head_blocks > 1:
            continue
        larger = replace(plan, on_chip=tuple(here or k == m for k, here in enumerate(plan.on_chip)))
        if shared_memory_bytes(larger) <= gpu.shared_memory:
            plan = larger
    return plan


def matrix_bytes(plan: DecodePlan, matrix: int) -> int:
    """One program's part of a matrix: all of it that stays on the chip, or one block of the head."""
    last = matrix == len(plan.on_chip) - 1
    outputs = plan.block_v if last else 4 * plan.units[(matrix + 1) // 2]
    size = ITEM_SIZE[plan.shape.dtype] * (2 if plan.shape.precision == "tf32x3" else 1)
    return outputs * plan.padded(matrix) * size


def shared_memory_bytes(plan: DecodePlan) -> int:
    """Shared memory of one program, from above, as compiled plans have it."""
    size = ITEM_SIZE[plan.shape.dtype]
    kept = sum(matrix_bytes(plan, m) for m, here in enumerate(plan.on_chip) if here)
    streamed = [matrix_bytes(plan, m) // (plan.padded(m) // plan.block_k) for m, h in enumerate(plan.on_chip) if not h]
    widest = max(plan.padded(m) for m in range(len(plan.on_chip)))
    tile = plan.rows * (widest if plan.keep_tile else 2 * plan.block_k) * size
    moved = 4 * max(*plan.units, plan.block_v // 4) * plan.rows * 4 * plan.split_k
    return kept + tile + max(streamed, default=0) + moved + 4 * KIB


def fits_registers(plan: DecodePlan) -> bool:
    """Whether a thread can hold its part of the tiles; read off benchmarks/results/compiled_decode.csv."""
    threads = 32 * plan.num_warps
    widest = max(plan.padded(m) for m in range(len(plan.on_chip)))
    words = plan.rows * widest * ITEM_SIZE[plan.shape.dtype] / 4 / threads
    if plan.keep_tile and (words > 32 or plan.rows > 8):
        return False
    if not plan.keep_tile and plan.rows * plan.block_k * ITEM_SIZE[plan.shape.dtype] / 4 / threads > 8:
        return False  # words of the chunk that is used, and as many of the next one
    exact = plan.shape.dtype == "float32" and plan.shape.precision != "tf32"
    if exact and (plan.keep_tile or plan.block_k > 64):
        return False  # no matrix unit takes these products: a thread holds all operands of a chunk
    states = sum(units * plan.rows for units in plan.units) / threads
    return states <= 8 and plan.block_v * plan.rows / threads <= 16


def token_cost(plan: DecodePlan, gpu: GPU) -> StepCost:
    """The model's time of one token of every stream."""
    shape, size = plan.shape, ITEM_SIZE[plan.shape.dtype]
    programs = plan.programs * plan.groups
    reads = 2 if plan.keep_tile else 1
    read = plan.rows * sum(shape.widths) * size * reads
    if plan.mode == "reduce":
        read += plan.rows * plan.keys * 8
    elif plan.mode == "everyone":
        read += plan.streams * shape.vocab_size * 4
    else:
        read += -(-plan.rows // plan.programs) * shape.vocab_size * 4 * (2 if plan.long_rows else 1)
    broadcast = gpu.us(max(programs * read / gpu.l2_bytes_per_clock, read / L2_BYTES_PER_PROGRAM))

    times = [1] * (len(plan.on_chip) - 1) + [plan.head_blocks]
    parts = [matrix_bytes(plan, m) * n for m, n in enumerate(times)]
    readers = [plan.programs] * (len(parts) - 1) + [min(plan.programs, plan.vocabulary_blocks)]
    streams = [(part, n) for part, n, here in zip(parts, readers, plan.on_chip, strict=True) if not here]
    streamed = sum(part * n for part, n in streams)
    weights = gpu.us(
        max(plan.groups * streamed / gpu.l2_bytes_per_clock, sum(part for part, _ in streams) / L2_BYTES_PER_PROGRAM)
    )
    if streamed > gpu.l2_bytes:
        weights = max(weights, streamed / (gpu.memory_gb_per_s * 1e3))
    shared = gpu.us(sum(parts) / 128)

    depth = {2: 16, 4: 8}[size]
    sums = SUM_CLOCKS * (plan.split_k - 1)
    chains = [(plan.padded(m) / depth / plan.split_k * MATRIX_LATENCY + sums) * n for m, n in enumerate(times)]
    rate = 128 if shape.dtype == "float32" and shape.precision == "ieee" else gpu.matrix_macs_per_clock
    products = [max(chain, part / size * plan.rows / rate) for chain, part in zip(chains, parts, strict=True)]
    matrix = gpu.us(sum(products))

    # Chunk by chunk, a layer's first one is a trip through the L2 cache of its own.
    chunks = sum(plan.padded(2 * layer) // plan.block_k for layer in range(shape.layers))
    waits = 0 if plan.keep_tile else WAIT_CLOCKS * shape.layers + NEXT_CLOCKS * (chunks - shape.layers)
    per_layer = 350 + 60 * max(plan.units) * plan.rows / (32 * plan.num_warps)
    choosing = 400.0 + 300 * plan.block_v * plan.rows * plan.head_blocks / (32 * plan.num_warps) * plan.choice.sample
    if plan.choice.filters:
        rows = plan.streams if plan.mode == "everyone" else -(-plan.rows // plan.programs)
        choosing += rows * (long_row_clocks(plan) if plan.long_rows else short_row_clocks(plan))
    hops = gpu.hop_us * (shape.layers + 1 + (plan.mode == "owner"))
    if plan.keep_tile:
        hops -= min(gpu.hop_us * shape.layers, gpu.us(sum(products[0::2])))
    return StepCost(hops, broadcast, weights, shared, matrix, gpu.us(per_layer * shape.layers + choosing + waits))


def short_row_clocks(plan: DecodePlan) -> float:
    """To filter a row that is held in registers, and to make its noise."""
    elements = next_power_of_two(plan.shape.vocab_size) / (32 * plan.num_warps)
    passes = 32 * (plan.choice.top_k + plan.choice.top_p)
    return passes * (120 + 3 * elements) + 200 * elements


def long_row_clocks(plan: DecodePlan) -> float:
    """To filter a row that is read again in every pass: 5 instructions for each element's place in the order, 2 for
    each of 3 candidates, 4 more to weigh it, for 128 elements in a clock; and at least as long as the reading.
    """
    elements = plan.shape.vocab_size / 128
    read = plan.shape.vocab_size * 4 / L2_BYTES_PER_PROGRAM
    count, weigh = max(read, 11 * elements), max(read, 15 * elements)
    waits = WAIT_CLOCKS + 3 * 120
    passes = 3 + 16 * plan.choice.top_k + 17 * plan.choice.top_p
    return 16 * plan.choice.top_k * count + 17 * plan.choice.top_p * weigh + 3 * read + passes * waits
