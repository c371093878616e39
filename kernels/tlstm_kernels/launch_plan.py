"""How a layer's recurrence is cut over the programs of a GPU: one frozen record, which explains itself; pure Python.

    single       one program per tile of the batch holds all of W_hh; nothing is exchanged (small H)
    persistent   many programs hold a slice of W_hh each and exchange h (backward: the gates' gradients) every step
    streamed     the same programs read their slice from the L2 in every step (W_hh is more than the chip holds)
    per_step     one product and one cell per step, launched one after another: what no plan above can run

A plan never asks for more programs than can run at the same time: programs that wait for one another must all be there.
Batches that need more are run in several launches, one after another. `plan_choice.choose_plan` makes plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .cost_model import PER_STEP_US, StepCost, shared_memory_bytes
from .gpu import KIB

KERNELS = ("forward", "backward")
REGIMES = ("single", "persistent", "streamed", "per_step")


class PlanError(ValueError):
    """A plan that was asked for cannot run; the message says what was expected, what came and what to do."""


@dataclass(frozen=True)
class LaunchPlan:
    """How one kernel is launched for one layer. `units`, `rows`, `block_k` and `num_warps` fix everything else."""

    kernel: str  # "forward" or "backward"
    regime: str
    H: int
    B: int
    D: int  # directions of the layer, 1 or 2
    heads: int  # blocks of a block-diagonal W_hh, of H units each; 1 for the usual LSTM
    dtype: str
    precision: str  # of float32 products: "ieee", "tf32" or "tf32x3"; half types ignore it
    units: int = 0  # hidden units of one program: a power of two
    rows: int = 0  # batch rows of one program: a power of two, 16 or more for the matrix units
    block_k: int = 0  # how much of the contraction one chunk of weights covers
    num_warps: int = 0
    split_k: int = 1  # backward: parts of a chunk that the warps multiply side by side
    keep_tile: int = 1  # 1: what is received stays in registers until it is multiplied; 0: it is loaded again
    groups: int = 0  # tiles of the batch that run at the same time
    directions: int = 0  # directions that run at the same time
    gpu: str = ""
    source: str = "model"  # "model", "measured" or "pinned"
    cost: StepCost | None = field(default=None, compare=False)

    @property
    def contraction(self) -> int:
        """Length of the sum behind one element: over h in the forward kernel, over all four gates in the backward."""
        return self.H if self.kernel == "forward" else 4 * self.H

    @property
    def chunks(self) -> int:
        """Chunks of block_k that cover the contraction; a program alone has one for each gate in the backward."""
        if self.regime == "single":
            return 1 if self.kernel == "forward" else 4
        return -(-self.contraction // self.block_k)

    @property
    def programs(self) -> int:
        """Programs of one group; the last one may own fewer units than the others."""
        return -(-self.H // self.units)

    @property
    def tiles(self) -> int:
        return -(-self.B // self.rows)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs of a full launch: units, batch tiles, heads of all directions."""
        return self.programs, self.groups, self.directions * self.heads

    @property
    def launches(self) -> int:
        return -(-self.tiles // self.groups) * -(-self.D // self.directions)

    def unit_slices(self) -> Iterator[range]:
        """The hidden units of each program of a group."""
        for start in range(0, self.H, self.units):
            yield range(start, min(start + self.units, self.H))

    def batch_slices(self) -> Iterator[range]:
        """The batch rows of each launch."""
        step = self.rows * self.groups
        for start in range(0, self.B, step):
            yield range(start, min(start + step, self.B))

    def direction_slices(self) -> Iterator[range]:
        """The directions of each launch."""
        for start in range(0, self.D, self.directions):
            yield range(start, min(start + self.directions, self.D))

    def describe(self) -> str:
        """The plan in words and numbers."""
        heads = f" in each of {self.heads} heads" if self.heads > 1 else ""
        directions = ", both directions" if self.D == 2 else ""
        sizes = f"{self.kernel}, H={self.H}{heads}, B={self.B}, {self.dtype}{directions}"
        if self.regime == "per_step":
            return f"{sizes}: per_step, one product and one cell launched for every time step (about {PER_STEP_US} us)."
        where = {
            "single": "all recurrent weights on the chip in one program per batch tile, nothing exchanged",
            "persistent": "recurrent weights on the chip, sliced over the programs of a group, which exchange "
            + ("h" if self.kernel == "forward" else "the gates' gradients"),
            "streamed": "recurrent weights sliced over the programs of a group and read from the L2 in every step",
        }[self.regime]
        launches = "one launch" if self.launches == 1 else f"{self.launches} launches, one after another"
        parts = f" in {self.split_k} parts" if self.split_k > 1 else ""
        rounding = f" {self.precision}" if self.dtype == "float32" else ""
        return (
            f"{sizes}: {self.regime}, {where}. {launches} of {self.programs} programs x {self.groups} batch groups x "
            f"{self.directions} directions{f' x {self.heads} heads' if self.heads > 1 else ''} on {self.gpu}; "
            f"{self.units} units and {self.rows} rows per program, {self.chunks} chunks of {self.block_k} along the "
            f"contraction ({self.contraction}), {self.num_warps} warps"
            f"{parts}{rounding}, about {shared_memory_bytes(self) / KIB:.0f} KiB of shared memory. "
            f"Chosen by: {self.source}. Model, per step: {self.cost}."
        )
