"""The floor under one time step on the GPU at hand, measured part by part with the geometry of a launch plan.

    hop        from a store of one program to its sight by another: two programs, a small tile
    exchange   hop and broadcast: all programs of the plan, each receiving the whole h (backward: the gates' gradients)
    chain      the plan's matrix instructions of one step, weights on chip, each waiting for the sum of the last
    loop       an empty persistent loop

floor = exchange + chain for every launch, layer after layer. It leaves out what a better kernel might hide: gate
arithmetic, traffic of shared memory, the input. No step can be faster with that plan; another plan has another floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from tlstm.benchmark.plans import plans_of
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
    chunks: int  # of that slice, one product each
    held: int  # of these on chip
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
        chunks=plan.chunks,
        held=1 if plan.regime == "streamed" else plan.chunks,
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
    """Measures each geometry once; NaN, and a line in `errors`, where that fails.

    `measure(part, geometry)` gives the microseconds per step of "exchange", "chain", "hop" or "loop".
    """

    def __init__(self, measure: Callable[[str, Geometry], float]) -> None:
        self._measure = measure
        self.known: dict[tuple[str, Geometry], float] = {}
        self.errors: list[str] = []

    def part(self, name: str, geometry: Geometry) -> float:
        key = (name, geometry)
        if key not in self.known:
            try:
                self.known[key] = self._measure(name, geometry)
            except Exception as error:  # what does not fit or compile has no floor, and the run goes on without
                self.known[key] = math.nan
                self.errors.append(f"{name}: {type(error).__name__}: {error}"[:300])
        return self.known[key]

    def of_plan(self, plan: LaunchPlan) -> StepFloor | None:
        """The floor of one step with this plan, all its launches; None for a plan without a persistent kernel, or where
        a part could not be measured."""
        if plan.regime == "per_step":
            return None
        geometry = geometry_of(plan)
        exchange = self.part("exchange", geometry) if plan.programs > 1 else self.part("loop", geometry)
        chain = self.part("chain", geometry)
        return None if math.isnan(exchange + chain) else StepFloor(exchange * plan.launches, chain * plan.launches)

    def of_problem(self, problem: Problem) -> float | None:
        """Microseconds per time step that the problem takes at least, with the plans that the library chooses."""
        w, mode = problem.workload, problem.mode
        floors = []
        for plan in plans_of(problem, {}).values():
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
            clock.time(call, [0])  # compiled now
            seconds = sorted(clock.time(call, [0]) for _ in range(RUNS))
        return 1e6 * seconds[RUNS // 2] / STEPS

    return FloorMeter(measure)


def exchange_constants(g: Geometry) -> dict[str, int]:
    """The compile-time arguments of the exchange."""
    sent = max(g.sent, 1 << (-(-g.columns // g.programs) - 1).bit_length())
    return {
        "K": g.columns, "COLUMNS": sent, "BLOCK_B": g.rows, "BLOCK_K": g.block_k, "KEEP_TILE": g.keep_tile,
        "MAX_SPINS": 0,
    }  # fmt: skip


def chain_constants(g: Geometry) -> dict[str, int | str]:
    """The compile-time arguments of the chain."""
    return {
        "K": g.columns, "M": g.products, "CHUNKS": g.chunks, "HELD": g.held, "BLOCK_B": g.rows, "BLOCK_K": g.block_k,
        "INPUT_PRECISION": g.precision,
    }  # fmt: skip


def _exchange_call(g: Geometry, device: str) -> Call:
    from tlstm.benchmark.floor_kernels import exchange_kernel

    dtype = getattr(torch, g.dtype)
    words = torch.int16 if dtype.itemsize == 2 else torch.int32
    rows = g.rows * g.groups
    buffer = torch.empty(STEPS, rows, g.columns, dtype=dtype, device=device)
    options: dict[str, Any] = {"num_warps": g.num_warps, "num_stages": 1, "launch_cooperative_grid": g.programs > 1}

    def empty(_: int) -> None:
        buffer.view(words).fill_(-1)

    def run(_: int) -> None:
        exchange_kernel[(g.programs, g.groups)](buffer, None, STEPS, rows, **exchange_constants(g), **options)

    return Call(run, empty)


def hop_geometry(g: Geometry) -> Geometry:
    """Two programs that send 16 columns each."""
    return replace(
        g, columns=HOP_COLUMNS, sent=HOP_COLUMNS // 2, rows=8, block_k=HOP_COLUMNS, num_warps=4, keep_tile=1,
        programs=2, groups=1,
    )  # fmt: skip


def _hop_call(g: Geometry, device: str) -> Call:
    return _exchange_call(hop_geometry(g), device)


def _chain_call(g: Geometry, device: str) -> Call:
    from tlstm.benchmark.floor_kernels import chain_kernel

    dtype = getattr(torch, g.dtype)
    w = torch.randn(g.products, g.columns, device=device).to(dtype)
    h = torch.randn(g.rows, g.block_k, device=device).to(dtype)
    programs = g.programs * g.groups
    z = torch.empty(programs, g.products, g.rows, device=device)

    def run(_: int) -> None:
        chain_kernel[(programs,)](w, h, z, STEPS, **chain_constants(g), num_warps=g.num_warps, num_stages=1)

    return Call(run)


def _loop_call(g: Geometry, device: str) -> Call:
    from tlstm.benchmark.floor_kernels import loop_kernel

    programs = g.programs * g.groups
    out = torch.empty(programs, 32 * g.num_warps, device=device)

    def run(_: int) -> None:
        loop_kernel[(programs,)](out, STEPS, 1.0, 0.5, LANES=out.shape[1], num_warps=g.num_warps)

    return Call(run)


_CALLS: dict[str, Callable[[Geometry, str], Call]] = {
    "exchange": _exchange_call,
    "hop": _hop_call,
    "chain": _chain_call,
    "loop": _loop_call,
}
