"""Broken protocols must be caught: each test breaks the exchange in one way and some schedule must show it."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from tlstm_kernels import exchange, persistent_backward, persistent_forward

from .grid import DeadlockError, run_interleaved
from .launches import Case, backward, check, forward, make_problem

CASE = Case(T=4, B=2, H=13, units=8, block_b=2, block_k=8)  # two programs, two chunks
SCHEDULES = 20


def outcome(case: Case, seed: int, kernel: str) -> str:
    """What comes of one schedule: "right", "wrong" or "deadlock"."""
    problem = make_problem(case, seed)
    launch = partial(run_interleaved, seed=seed)
    try:
        results = forward(case, problem, launch)
        if kernel == "backward":
            results = backward(case, problem, results, launch)
        check(case, problem, results)
    except DeadlockError:
        return "deadlock"
    except AssertionError:
        return "wrong"
    return "right"


def outcomes(kernel: str, schedules: int = SCHEDULES) -> set[str]:
    """Everything that comes of the mutation, until a schedule goes wrong."""
    seen = set()
    for seed in range(schedules):
        seen.add(outcome(CASE, seed, kernel))
        if seen - {"right"}:
            break
    return seen


@triton.jit
def never_unwritten(words, DTYPE: tl.constexpr):
    return tl.zeros(words.shape, tl.int32)


@triton.jit
def only_the_first_column(words, DTYPE: tl.constexpr):
    return ((words == -1) & (tl.arange(0, words.shape[1]) == 0)[None, :]).to(tl.int32)


@triton.jit
def publish_twice(pointers, values, mask):
    tl.store(pointers, (values * 0.5).to(pointers.dtype.element_ty), mask=mask)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def publish_nan_as_sentinel(pointers, values, mask):
    values = values.to(pointers.dtype.element_ty)
    bits = tl.where(values == values, values.to(tl.int32, bitcast=True), -1)
    tl.store(pointers, bits.to(values.dtype, bitcast=True), mask=mask)


@triton.jit
def publish_nothing(pointers, values, mask):
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask & (tl.program_id(0) != 1))


def mutate(monkeypatch: pytest.MonkeyPatch, kernel: str, name: str, function) -> None:
    """Put `function` in place of `name`, in the kernel under test only where the kernel calls it itself."""
    module = {"forward": persistent_forward, "backward": persistent_backward}[kernel]
    monkeypatch.setattr(module if hasattr(module, name) else exchange, name, function)


KERNELS = pytest.mark.parametrize("kernel", ["forward", "backward"])


def test_unbroken():
    assert outcomes("backward", schedules=4) == {"right"}


@KERNELS
@pytest.mark.parametrize("check", [never_unwritten, only_the_first_column])
def test_a_missing_or_partial_sentinel_check_gives_wrong_results(monkeypatch, kernel, check):
    mutate(monkeypatch, kernel, "sentinel_bits", check)
    assert "wrong" in outcomes(kernel)


@KERNELS
def test_an_element_stored_twice_gives_wrong_results(monkeypatch, kernel):
    mutate(monkeypatch, kernel, "publish", publish_twice)
    assert "wrong" in outcomes(kernel)


@KERNELS
def test_a_reused_buffer_gives_wrong_results(monkeypatch, kernel):
    """Slots that still hold another launch's values."""
    seen = set()
    for seed in range(SCHEDULES):
        launch = partial(run_interleaved, seed=seed)
        earlier, problem = make_problem(CASE, seed + 1000), make_problem(CASE, seed)
        old = backward(CASE, earlier, forward(CASE, earlier))
        results = forward(CASE, problem, launch)
        try:
            if kernel == "forward":
                y = old.y.flatten(0, 1).clone()
                results = forward(CASE, problem, launch, y_ptr=y)
                results.y = y.view_as(results.y)
            else:
                d_gates = old.d_gates.flatten(0, 1).clone()
                results = backward(CASE, problem, results, launch, d_gates_ptr=d_gates)
                results.d_gates = d_gates.view_as(results.d_gates)
            check(CASE, problem, results)
        except AssertionError:
            seen.add("wrong")
            break
    assert seen == {"wrong"}


@KERNELS
def test_a_nan_stored_as_the_sentinel_is_a_deadlock(monkeypatch, kernel):
    mutate(monkeypatch, kernel, "publish", publish_nan_as_sentinel)
    problem = make_problem(CASE)
    (problem.x if kernel == "forward" else problem.d_y)[1, 0, 5] = torch.nan
    with pytest.raises(DeadlockError, match=r"waits for (y|d_gates)_ptr\["):
        backward(CASE, problem, forward(CASE, problem))


@KERNELS
def test_a_store_that_never_comes_is_a_deadlock_that_names_it(monkeypatch, kernel):
    problem = make_problem(CASE)
    results = forward(CASE, problem)
    mutate(monkeypatch, kernel, "publish", publish_nothing)
    with pytest.raises(DeadlockError) as error:
        forward(CASE, problem) if kernel == "forward" else backward(CASE, problem, results)
    waits = re.search(r"program \(0, 0, 0\) waits for (\w+)_ptr\[(\d+), (\d+)\]", str(error.value))
    buffer, row, column = waits.groups()
    assert buffer == {"forward": "y", "backward": "d_gates"}[kernel]
    assert int(row) // CASE.B == {"forward": 0, "backward": CASE.T - 1}[kernel]
    assert int(column) % CASE.H >= CASE.units  # a unit of program 1


@KERNELS
def test_a_bounded_wait_ends_and_reports(monkeypatch, kernel):
    """Program 1 publishes nothing: program 0 gives up at the first step that needs it, and says so."""
    case = replace(CASE, max_spins=3, batch_first=True)
    problem = make_problem(case)
    results = forward(case, problem)
    mutate(monkeypatch, kernel, "publish", publish_nothing)
    errors = torch.zeros(2, 4, dtype=torch.int32)
    launch = partial(run_interleaved, patience=100)
    if kernel == "forward":
        forward(case, problem, launch, error_ptr=errors)
    else:
        backward(case, problem, results, launch, error_ptr=errors)
    step = 1 if kernel == "forward" else 0  # the forward's step t waits for t - 1, the backward's for its own
    assert errors[0].tolist() == [step + 1, 0, 8, 0]  # row 0 of the tile, column 8: the first unit of program 1


@KERNELS
def test_loads_from_a_cache_are_a_deadlock(monkeypatch, kernel, tmp_path):
    """Without `volatile` a program may see for ever what its own cache held at first."""
    source = inspect.getsource(exchange)
    assert source.count("mask=mask, other=0, volatile=True)") == 1
    source = source.replace("mask=mask, other=0, volatile=True)", "mask=mask, other=0)")
    path = tmp_path / "cached_exchange.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("cached_exchange", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cached_exchange", module)
    spec.loader.exec_module(module)
    mutate(monkeypatch, kernel, "receive", module.receive)
    assert "deadlock" in outcomes(kernel)
