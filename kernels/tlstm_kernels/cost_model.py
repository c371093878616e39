"""What a launch plan needs of a program's registers and shared memory, and how long one time step takes by its model.

The memory figures are those of compiled code. The times only rank plans: a table of measured plans overrules them
(`plan_choice.MEASURED`). One step of one program group takes, in microseconds,

    hop         the last program's store is seen by the others (L2 round trip); nothing for a single program
    broadcast   every program reads the group's whole h (backward: the gradients of its gates) from the L2; twice, with
                another trip to the L2, if what was waited for is loaded again
    weights     streamed regime only: the weights are read from the L2, or from memory where they do not fit there
    shared      what is received is stored to shared memory; it and the weights' slice are read from there, 128 bytes
                per clock: once by an asynchronous matrix instruction, else once by each warp that needs them
    matrix      the chain of matrix instructions along K, each waiting for the one before, or their number; with split_k
                chains run side by side and are summed. Asynchronous instructions read while they multiply: only what
                they take longer than the reading counts
    gates       gate arithmetic and the barriers of one step

The terms follow one another within a step, so they are added. Sources: 0.56 us per hop and 3942 bytes per clock of L2
are published measurements of an H100, as are the latencies of `mma.sync` (33 clocks) and of a load from the L2 (263);
the clocks of the gates, and which operands are read how often, were counted in compiled code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .gpu import GPU, KIB

if TYPE_CHECKING:
    from .launch_plan import LaunchPlan

ITEM_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
MATRIX_LATENCY = 33  # clocks from one matrix instruction to the next one that adds to the same accumulator
ASYNCHRONOUS_LATENCY = 18  # the same for wgmma, whose accumulators follow one another without a wait
L2_LATENCY = 263  # clocks of a load
PER_STEP_US = 25.0  # a product and a cell launched from Python for one time step


@dataclass(frozen=True)
class StepCost:
    """Microseconds of one time step, term by term."""

    hop: float
    broadcast: float
    weights: float
    shared: float
    matrix: float
    gates: float

    @property
    def total(self) -> float:
        return self.hop + self.broadcast + self.weights + self.shared + self.matrix + self.gates

    def __str__(self) -> str:
        terms = ("hop", "broadcast", "weights", "shared", "matrix", "gates")
        named = [f"{name} {getattr(self, name):.2f}" for name in terms if getattr(self, name) >= 0.005]
        return f"{self.total:.2f} us = {' + '.join(named)}"


def shared_memory_bytes(plan: LaunchPlan) -> int:
    """Shared memory of one program, from above: the weights, one chunk of what they meet, gates between two layouts."""
    size = ITEM_SIZE[plan.dtype] * (2 if plan.dtype == "float32" and plan.precision == "tf32x3" else 1)
    outputs = 4 * plan.units if plan.kernel == "forward" else plan.units
    weights, operand = plan.block_k * outputs * size, plan.block_k * plan.rows * size
    moved = max(4 * plan.units, plan.split_k * plan.units) * plan.rows * 4
    if plan.regime == "streamed":
        return 2 * (weights + operand) + moved + KIB
    return plan.chunks * weights + operand + moved + KIB


def fits_registers(plan: LaunchPlan, gpu: GPU) -> bool:
    """Whether the compiler keeps everything in registers, 255 for each thread.

    Rules read off the code that it makes for four targets (benchmarks/results/compiled); no formula for the number
    of registers held over tiles that are multiplied by different instructions.
    """
    threads = 32 * plan.num_warps
    exact = plan.dtype == "float32" and plan.precision != "tf32" and not gpu.is_amd  # no matrix unit takes it
    if plan.rows * plan.units / threads > (8 if plan.num_warps == 8 else 4):
        return False  # elements of one gate in one thread
    if plan.regime == "single":
        return plan.rows <= (8 if exact else 32)
    pairs = ITEM_SIZE[plan.dtype] == 2 and plan.H % 2 == 0  # two 16-bit elements travel in one register
    kept = plan.keep_tile * plan.rows * plan.chunks * plan.block_k / (threads * (2 if pairs else 1))
    # Pointers and masks of products that are unrolled over the chunks; streamed ones are a loop.
    unrolled = 0 if plan.regime == "streamed" else plan.rows * plan.chunks / plan.num_warps
    if plan.rows > gpu.smallest_rows and (exact or plan.H % 16):
        return False  # rows that are not aligned are loaded in more and smaller pieces
    if gpu.is_amd and plan.rows > 16:
        return False
    if gpu.is_amd and plan.dtype == "float32" and unrolled * plan.num_warps * plan.block_k > 8192:
        return False
    if plan.kernel == "backward":
        largest, tile = (16, 1 << 17) if plan.H <= 1024 else (gpu.smallest_rows, 1 << 16)
        if gpu.is_amd and plan.regime == "streamed":
            tile = 1 << 15
        small = plan.rows <= largest and plan.units * plan.rows * plan.block_k <= tile
        return small and plan.num_warps == 8 and kept <= (96 if plan.H <= 1024 else 64) and unrolled <= 64
    if (plan.H % 16 and plan.units > 16) or (plan.H > 1024 and plan.block_k > 128):
        return False
    small = plan.rows <= 64 and plan.rows * plan.block_k / threads <= 32 and not (plan.units == 16 and plan.rows > 32)
    if gpu.arch == "sm_100" and plan.units >= 16 and not exact:
        # Results come from a memory of their own there, in tiles of 16 or more.
        small = small and 16 <= plan.rows <= (16 if plan.regime == "streamed" else 64) and plan.block_k <= 256
    if exact:
        small = small and plan.block_k <= 64 and plan.num_warps == 8 and 4 < plan.units <= 32
    return small and kept <= (64 if plan.block_k <= 128 else 48) and unrolled <= 64


def step_cost(plan: LaunchPlan, gpu: GPU) -> StepCost:
    """The model's time of one step, all groups and directions of the launch running side by side."""
    size = ITEM_SIZE[plan.dtype]
    K = plan.chunks * plan.block_k
    columns = 4 * plan.units if plan.kernel == "forward" else plan.units
    programs = plan.programs * plan.groups * plan.directions * plan.heads

    read = plan.rows * plan.contraction * size
    alone = plan.programs == 1
    broadcast = 0.0 if alone else gpu.us(max(programs * read / gpu.l2_bytes_per_clock, read / 64))
    if not plan.keep_tile:
        broadcast += broadcast + gpu.us(L2_LATENCY)

    weight_slice = K * columns * size
    streamed = 0.0
    if plan.regime == "streamed":
        all_weights = 4 * plan.H * plan.H * size * plan.directions * plan.heads
        streamed = gpu.us(max(programs * weight_slice / gpu.l2_bytes_per_clock, weight_slice / 64))
        if all_weights > gpu.l2_bytes:
            streamed = max(streamed, all_weights / (gpu.memory_gb_per_s * 1e3))

    of_weights, of_rows = _readers(plan, gpu, columns)
    shared = gpu.us((of_weights * weight_slice + (1 + of_rows) * plan.rows * K * size) / 128)
    matrix = _matrix_us(plan, gpu, K, columns)
    if _is_asynchronous(plan, gpu, columns):
        matrix = max(0.0, matrix - shared)
    matrix += gpu.us(60 * plan.chunks)  # each chunk is stored, waited for and multiplied: the barriers of that
    gates = gpu.us(350 + 60 * plan.rows * plan.units / (plan.num_warps * gpu.warp_size))
    return StepCost(0.1 if alone else gpu.hop_us, broadcast, streamed, shared, matrix, gates)


def _is_asynchronous(plan: LaunchPlan, gpu: GPU, columns: int) -> bool:
    """Whether the products become wgmma or tcgen05, which take 64 rows of weights and read both operands themselves."""
    exact = plan.dtype == "float32" and plan.precision == "ieee"
    # 16 rows of the batch: of 8, Triton 3.9 makes wgmma and Triton 3.6 does not.
    return gpu.arch in ("sm_90", "sm_100") and columns >= 64 and plan.rows >= 16 and plan.split_k == 1 and not exact


def _readers(plan: LaunchPlan, gpu: GPU, columns: int) -> tuple[int, int]:
    """How often the weights' slice and the received rows are read from shared memory for one product."""
    if _is_asynchronous(plan, gpu, columns):
        # Each 64 rows of weights meet all of the batch rows. wgmma is the work of four warps: where there are more of
        # them than weights to share, they share the batch rows and read the same weights.
        alike = max(1, plan.num_warps // 4 // (columns // 64)) if gpu.arch == "sm_90" else 1
        return alike, columns // 64
    # The warps of one part of K share the tile of the result, along the weights as far as those have 16 rows for each.
    # Beyond the tile they repeat one another.
    warps = plan.num_warps // plan.split_k
    along_weights = min(warps, max(1, columns // 16))
    along_rows = warps // along_weights
    return along_rows, along_weights * max(1, along_rows // max(1, plan.rows // 8))


def _matrix_us(plan: LaunchPlan, gpu: GPU, K: int, columns: int) -> float:
    multiplies = plan.rows * columns * K
    if plan.dtype == "float32" and plan.precision == "ieee":
        return gpu.us(multiplies / 128)  # no matrix unit: one multiply-add per lane and clock
    depth = 16 if plan.dtype != "float32" else 8
    rate = gpu.matrix_macs_per_clock / (1 if plan.dtype != "float32" else 2)
    latency = ASYNCHRONOUS_LATENCY if _is_asynchronous(plan, gpu, columns) else MATRIX_LATENCY
    return gpu.us(max(multiplies / rate, K / depth / plan.split_k * latency) + 40 * (plan.split_k - 1))
