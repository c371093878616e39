"""What a launch plan needs to know of a GPU: its capacities, and the rates that the cost model divides by.

Pure Python: a plan for any GPU can be made, tested and compiled on a machine that has none.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class GPU:
    """Capacities of one GPU, as its driver reports them, and four rates of the cost model.

    The capacities are limits: a plan that passes one would fail at launch. The rates only rank plans. `hop_us` and
    `l2_bytes_per_clock` were published for the H100 (0.56 us from a store on one multiprocessor to its sight on
    another; 3942 bytes per clock over 132 multiprocessors); for other chips they are scaled by multiprocessors and are
    estimates.
    """

    name: str
    arch: str  # "sm_90", "gfx942"
    multiprocessors: int
    shared_memory: int  # bytes that one program may use
    clock_mhz: int
    l2_bytes: int
    memory_gb_per_s: int
    registers: int = 65536  # of 4 bytes, on one multiprocessor
    max_threads: int = 2048  # on one multiprocessor

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def warp_size(self) -> int:
        return 64 if self.is_amd else 32

    @property
    def smallest_rows(self) -> int:
        """Batch rows that one matrix instruction takes at least."""
        return 16 if self.is_amd else 8

    @property
    def hop_us(self) -> float:
        """Microseconds from one program's store to another program's sight of it."""
        # The L2 of an AMD chiplet is not shared with the others, so a hop goes to the memory-side cache behind it.
        return 1.1 if self.is_amd else 0.56

    @property
    def l2_bytes_per_clock(self) -> float:
        """Bytes per clock that all multiprocessors together read from the L2."""
        return 3942 / 132 * self.multiprocessors

    @property
    def matrix_macs_per_clock(self) -> int:
        """Multiply-adds per clock of one multiprocessor's matrix units on 16-bit operands, as `mma.sync` reaches."""
        generation = int(self.arch.removeprefix("sm_").rstrip("af")) if not self.is_amd else 90
        return {8: 1024, 9: 1300}.get(generation // 10, 1300) if generation not in (86, 89) else 512

    def us(self, clocks: float) -> float:
        """Microseconds that so many clocks take."""
        return clocks / self.clock_mhz


# The GPUs that plans are tested and compiled for without having one; figures of the vendors' data sheets.
KNOWN_GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100", "sm_80", 108, 163 * KIB, 1410, 40 << 20, 1555),
        GPU("H100", "sm_90", 132, 227 * KIB, 1755, 50 << 20, 3350),
        GPU("H200", "sm_90", 132, 227 * KIB, 1755, 50 << 20, 4800),
        GPU("B200", "sm_100", 148, 227 * KIB, 1850, 126 << 20, 8000),
        GPU("RTX 4090", "sm_89", 128, 99 * KIB, 2520, 72 << 20, 1008, max_threads=1536),
        GPU("MI300X", "gfx942", 304, 64 * KIB, 2100, 4 << 20, 5300, registers=131072),
    )
}
