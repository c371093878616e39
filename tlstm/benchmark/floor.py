"""The floor under one time step on the GPU at hand, measured part by part with the geometry of a launch plan.

    hop        from a store of one program to its sight by another: two programs, a small tile
    exchange   hop and broadcast: all programs of the plan, each receiving the whole h (backward: the gates' gradients)
    chain      the plan's matrix instructions of one step, weights on chip, each waiting for the sum of the last
    loop       an empty persistent loop

floor = exchange + chain for every launch, layer after layer. It leaves out what a better kernel might hide: gate
arithmetic, traffic of shared memory, the input. No step can be faster with that plan; another plan has another floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tlstm.benchmark.timing import Call, Clock

if TYPE_CHECKING:
    from tlstm_kernels.launch_plan import LaunchPlan

    from tlstm.benchmark.problem import Problem

STEPS = 1024
RUNS = 7
HOP_COLUMNS = 32  # of two programs with 16 each


@dataclass(frozen=True)
class Geometry:
    """What the parts of the floor depend on."""

    columns: int  # K: what every program receives
    sent: int  # by one program
    products: int  # M: rows of a program's slice of weights
    rows: int
    block_k: int
    num_warps: int
    keep_tile: int
    programs: int  # of one group
    groups: int  # batch groups and directions side by side
    dtype: str
    precision: str


@dataclass(frozen=True)
class StepFloor:
    """Microseconds of one step."""

    exchange: float
    chain: float

    @property
    def total(self) -> float:
        return self.exchange + self.chain


def geometry_of(plan: LaunchPlan) -> Geometry:
    forward = plan.kernel == "forward"
    return Geometry(
        columns=plan.contraction,
        sent=plan.units if forward else 4 * plan.units,
        products=4 * plan.units if forward else plan.units,
        rows=plan.rows,
        block_k=plan.block_k,
        num_warps=plan.num_warps,
        keep_tile=plan.keep_tile,
        programs=plan.programs,
        groups=plan.groups * plan.directions,
        dtype=plan.dtype,
        precision=plan.precision,
    )


class FloorMeter:
    """Measures each geometry once. `measure(part, geometry)` gives the microseconds per step of "exchange", "chain",
    "hop" or "loop"."""

    def __init__(self, measure: Callable[[str, Geometry], float]) -> None:
        self._measure = measure
        self.known: dict[tuple[str, Geometry], float] = {}

    def part(self, name: str, geometry: Geometry) -> float:
        key = (name, geometry)
        if key not in self.known:
            self.known[key] = self._measure(name, geometry)
        return self.known[key]

    def of_plan(self, plan: LaunchPlan) -> StepFloor | None:
        """The floor of one step with this plan, all its launches; None for a plan without a persistent kernel."""
        if plan.regime == "per_step":
            return None
        geometry = geometry_of(plan)
        exchange = self.part("exchange", geometry) if plan.programs > 1 else self.part("loop", geometry)
        return StepFloor(exchange * plan.launches, self.part("chain", geometry) * plan.launches)

    def of_problem(self, problem: Problem) -> float | None:
        """Microseconds per time step that the problem takes at least, with the plans that the library chooses."""
        from tlstm_kernels.kernel_calls import plan_for

        w, mode = problem.workload, problem.mode
        x = torch.empty(1, w.B, w.I, dtype=problem.dtype, device=problem.device)
        c_0 = torch.empty(w.directions, w.B, w.H, device=problem.device)
        kernels = {"forward": ("forward",), "backward": ("backward",), "train": ("forward", "backward")}
        floors = []
        for kernel in kernels.get(mode, ("forward",)):
            plan = plan_for(kernel, x, c_0)
            step = self.of_plan(plan)
            if step is None:
                return None
            if mode == "decode":
                # Every layer waits for h; all but the first, whose input is a table, have two products; then the head.
                hop = self.part("hop", geometry_of(plan))
                return w.layers * step.exchange + (2 * w.layers - 1) * step.chain + hop
            floors.append(w.layers * step.total)
        return sum(floors)


def gpu_floor(device: str) -> FloorMeter:
    """A meter for the GPU at hand."""
    clock = Clock(device)

    def measure(part: str, geometry: Geometry) -> float:
        with torch.cuda.device(device):
            call = _CALLS[part](geometry, device)
            seconds = sorted(clock.time(call, [0]) for _ in range(RUNS + 2))
        return 1e6 * seconds[RUNS // 2] / STEPS

    return FloorMeter(measure)


def _exchange_call(geometry: Geometry, device: str) -> Call:
    from tlstm.benchmark.floor_kernels import exchange_kernel

    g = geometry
    dtype = getattr(torch, g.dtype)
    words = torch.int16 if dtype.itemsize == 2 else torch.int32
    rows = g.rows * g.groups
    buffer = torch.empty(STEPS, rows, g.columns, dtype=dtype, device=device)
    options: dict[str, Any] = {"num_warps": g.num_warps, "num_stages": 1, "launch_cooperative_grid": g.programs > 1}

    def empty(_: int) -> None:
        buffer.view(words).fill_(-1)

    def run(_: int) -> None:
        exchange_kernel[(g.programs, g.groups)](
            buffer, None, STEPS, rows, K=g.columns, COLUMNS=_power_of_two(-(-g.columns // g.programs), g.sent),
            BLOCK_B=g.rows, BLOCK_K=g.block_k, KEEP_TILE=g.keep_tile, MAX_SPINS=0, **options,
        )  # fmt: skip

    return Call(run, empty)


def _hop_call(geometry: Geometry, device: str) -> Call:
    small = Geometry(HOP_COLUMNS, 16, 0, 8, HOP_COLUMNS, 4, 1, 2, 1, geometry.dtype, geometry.precision)
    return _exchange_call(small, device)


def _chain_call(geometry: Geometry, device: str) -> Call:
    from tlstm.benchmark.floor_kernels import chain_kernel

    g = geometry
    dtype = getattr(torch, g.dtype)
    w = torch.randn(g.products, g.columns, device=device).to(dtype)
    h = torch.randn(g.rows, g.block_k, device=device).to(dtype)
    programs = g.programs * g.groups
    z = torch.empty(programs, g.products, g.rows, device=device)

    def run(_: int) -> None:
        chain_kernel[(programs,)](
            w, h, z, STEPS, K=g.columns, M=g.products, BLOCK_B=g.rows, BLOCK_K=g.block_k, INPUT_PRECISION=g.precision,
            num_warps=g.num_warps, num_stages=1,
        )  # fmt: skip

    return Call(run)


def _loop_call(geometry: Geometry, device: str) -> Call:
    from tlstm.benchmark.floor_kernels import loop_kernel

    programs = geometry.programs * geometry.groups
    out = torch.empty(programs, 32 * geometry.num_warps, device=device)

    def run(_: int) -> None:
        loop_kernel[(programs,)](out, STEPS, 1.0, 0.5, LANES=out.shape[1], num_warps=geometry.num_warps)

    return Call(run)


_CALLS: dict[str, Callable[[Geometry, str], Call]] = {
    "exchange": _exchange_call,
    "hop": _hop_call,
    "chain": _chain_call,
    "loop": _loop_call,
}


def _power_of_two(least: int, usual: int) -> int:
    """Columns that one program sends: the plan's, or the next power of two where programs have to send more."""
    return max(usual, 1 << (least - 1).bit_length())
