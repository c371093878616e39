"""One workload, all its providers: verified, then timed in turns; one row each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tlstm.benchmark.cudnn_rule import select_algorithm
from tlstm.benchmark.decode import DecodeProblem, DecodeTruth, decode_registry
from tlstm.benchmark.environment import gpu_clocks
from tlstm.benchmark.input_product import input_product
from tlstm.benchmark.memory import memory_of
from tlstm.benchmark.problem import Problem
from tlstm.benchmark.providers import Built, Provider, provider
from tlstm.benchmark.results import FAILED, OK, UNAVAILABLE, WRONG, Row
from tlstm.benchmark.statistics import speedup, spread
from tlstm.benchmark.timing import Call, Clock, interleave
from tlstm.benchmark.verification import Truth, Verdict, WrongResultError
from tlstm.benchmark.workload import Workload

if TYPE_CHECKING:
    import numpy as np

    from tlstm.benchmark.floor import FloorMeter

INPUT = "(input product)"
MAX_SPINS = 5_000_000  # while verifying: a lost wake-up ends as an error, not as a hang
Lookup = Callable[[str], Provider]


def lookup_for(mode: str) -> Lookup:
    """Providers by name, of that mode.

    Raises:
        ValueError: from the function returned, for an unknown name.
    """
    if mode != "decode":
        return provider
    known = decode_registry()

    def find(name: str) -> Provider:
        if name not in known:
            raise ValueError(f"provider: expected one of {', '.join(known)} in decode mode; received {name!r}.")
        return known[name]

    return find


def make_problem(workload: Workload, mode: str, dtype: str, device: str) -> Problem:
    if mode == "decode":
        return DecodeProblem(workload, dtype, device)
    return Problem(workload, mode, dtype, device)


def measure(
    workload: Workload,
    mode: str,
    dtype: str,
    names: Sequence[str],
    device: str,
    seconds: float,
    floor: FloorMeter | None = None,
    lookup: Lookup | None = None,
) -> list[Row]:
    """Verify and time the named providers on one workload.

    Args:
        seconds: wall time for the turns of all of them; verification and warm-up come on top.
        floor: measures the floor, on a GPU.

    Returns:
        One row for each name, in that order, without the columns of the set and the machine.
    """
    find = lookup or lookup_for(mode)
    rows: dict[str, Row] = {
        name: {"mode": mode, "dtype": dtype, **workload.to_row(), "provider": name} for name in names
    }
    built: dict[str, Built] = {}
    try:
        problem = make_problem(workload, mode, dtype, device)
        truth = DecodeTruth(problem) if isinstance(problem, DecodeProblem) else Truth(problem)
    except (RuntimeError, MemoryError) as error:  # too large for this machine, or a dtype that torch lacks here
        for row in rows.values():
            row |= {"status": FAILED, "error": _one_line(error)}
        return list(rows.values())
    for name, row in rows.items():
        row["cudnn_algorithm"] = _algorithm(problem) if name.startswith("torch") and mode != "decode" else ""
        found = find(name)
        reason = found.why_not(problem)
        if reason is not None:
            row |= {"status": UNAVAILABLE, "error": reason}
            continue
        try:
            candidate = found.build(problem)
            verdict = _verified(truth, candidate, problem)
            built[name] = candidate
            row |= {"error_share": verdict.share, "error_where": verdict.where, "plan": candidate.plan()}
            row |= memory_of(candidate, problem)
        except WrongResultError as error:
            row |= {"status": WRONG, "error": str(error)}
        except Exception as error:  # of whatever package: its row says what happened, the others are still measured
            row |= {"status": FAILED, "error": _one_line(error)}

    clock = Clock(device)
    with problem.precision():
        calls, broken = _warmed({name: call_of(each, problem) for name, each in built.items()}, clock)
        for name, why in broken.items():
            rows[name] |= {"status": FAILED, "error": _one_line(why)}
        if mode != "decode" and calls:
            calls[INPUT] = input_product(problem)
        times = interleave(calls, clock, seconds, len(problem.xs))
        least = floor.of_problem(problem) if floor is not None and calls else None
    _fill(rows, times, workload, mode, least)
    for name in times:
        if name != INPUT:
            rows[name] |= {"clock": clock.name, "clock_mhz": _clock_mhz(problem.device)}
    del problem, truth, built, calls
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return list(rows.values())


def call_of(built: Built, problem: Problem) -> Call:
    """What is timed in the problem's mode: forward without gradients, the gradients alone, or both."""
    run, xs, d_ys = built.run, problem.xs, getattr(problem, "d_ys", [])
    leaves = list(built.parameters.values())
    if problem.mode in ("forward", "decode"):

        def forward(n: int) -> None:
            with torch.no_grad():
                run(xs[n])

        return Call(forward)
    outputs: dict[int, torch.Tensor] = {}

    def prepare(n: int) -> None:
        outputs[n] = run(xs[n])

    def backward(n: int) -> None:
        torch.autograd.grad(outputs.pop(n), [xs[n], *leaves], d_ys[n])

    def train(n: int) -> None:
        torch.autograd.grad(run(xs[n]), [xs[n], *leaves], d_ys[n])

    return Call(backward, prepare) if problem.mode == "backward" else Call(train)


def _verified(truth: Truth | DecodeTruth, built: Built, problem: Problem) -> Verdict:
    with bounded_waits(problem):
        return truth.check(built)


@contextmanager
def bounded_waits(problem: Problem) -> Iterator[None]:
    if problem.device.type != "cuda":
        yield
        return
    from tlstm_kernels.launch_options import launch_options

    with launch_options(max_spins=MAX_SPINS):
        yield


def _warmed(calls: dict[str, Call], clock: Clock) -> tuple[dict[str, Call], dict[str, Exception]]:
    """The calls that run, and why the others do not: what verification has not met, such as a second input."""
    good: dict[str, Call] = {}
    broken: dict[str, Exception] = {}
    for name, call in calls.items():
        try:
            clock.time(call, [0, 1])
            good[name] = call
        except Exception as error:  # told in the provider's row
            broken[name] = error
    return good, broken


def _fill(
    rows: dict[str, Row], times: dict[str, np.ndarray], workload: Workload, mode: str, least: float | None
) -> None:
    """Times, ratios and shares of the floor."""
    T, B = workload.T, workload.B
    apart = times.get(INPUT)
    base_name = next((name for name in ("torch", "tlstm:native") if name in times), None)
    base = times.get(base_name) if base_name else None
    for name, seconds in times.items():
        if name == INPUT:
            continue
        ms = spread(1e3 * seconds)
        row: dict[str, Any] = {"status": OK, "turns": len(seconds), "us_per_step": 1e3 * ms.p50 / T}
        row |= {"ms_p20": ms.p20, "ms_p50": ms.p50, "ms_p80": ms.p80}
        if apart is not None:
            input_ms = 1e3 * spread(apart).p50
            row |= {"input_ms": input_ms, "us_per_step_without_input": 1e3 * (ms.p50 - input_ms) / T}
        if base is not None:
            ratio = speedup(base, seconds)
            row |= {"speedup_p20": ratio.p20, "speedup_p50": ratio.p50, "speedup_p80": ratio.p80, "baseline": base_name}
            if apart is not None:
                left, base_left = ms.p50 - input_ms, 1e3 * spread(base).p50 - input_ms
                row["speedup_without_input"] = base_left / left if left > 0 and base_left > 0 else ""
        if mode == "decode":
            row["tokens_per_s"] = 1e3 * B * T / ms.p50
        if least:
            row |= {"floor_us_per_step": least, "times_floor": row["us_per_step"] / least}
        rows[name] |= row


def _algorithm(problem: Problem) -> str:
    """cuDNN's algorithm by PyTorch's rule: of the forward pass, which knows no training, and of the backward pass."""
    if problem.device.type != "cuda":
        return ""
    w, props = problem.workload, torch.cuda.get_device_properties(problem.device)
    forward, backward = (
        select_algorithm(
            w.T, w.B, w.I, w.H, dtype=problem.dtype_name, layers=w.layers, bidirectional=w.bidirectional,
            proj_size=w.proj_size, backward=in_backward, capability=(props.major, props.minor),
            multiprocessors=props.multi_processor_count,
        )
        for in_backward in (False, True)
    )  # fmt: skip
    if problem.mode == "train" and forward != backward:
        return f"forward: {forward}; backward: {backward}"
    return str(backward if problem.mode == "backward" else forward)


def _clock_mhz(device: torch.device) -> str:
    return gpu_clocks(device.index or 0).get("clocks_sm", "") if device.type == "cuda" else ""


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
