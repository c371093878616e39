"""Both kernels under many random schedules and a weak memory, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from .grid import run_interleaved
from .launches import Case, Problem, backward, check, forward, make_problem

HALF = torch.float16
SMALL = Case(T=3, B=2, H=7, units=4, block_b=2)  # two programs
CASES = {
    "two programs": SMALL,
    "two programs, half precision": replace(SMALL, dtype=HALF),
    "pairs of elements in a word": replace(SMALL, H=10, units=8, dtype=HALF),
    "three programs, several chunks": replace(SMALL, H=13, units=8, block_k=8),
    "four programs": replace(SMALL, H=13, T=2),
    "batch tiles": replace(SMALL, B=5, T=2),
    "batch of one, long": replace(SMALL, B=1, block_b=1, T=5),
    "reverse": replace(SMALL, reverse=True),
    "lengths": replace(SMALL, B=3, block_b=4, lengths=(3, 0, 2)),
    "lengths, reverse": replace(SMALL, B=3, block_b=4, lengths=(1, 3, 0), reverse=True),
    "both directions": replace(SMALL, T=2, directions=2),
    "both directions, lengths, half precision": replace(
        SMALL, B=3, block_b=4, T=3, lengths=(1, 3, 2), directions=2, dtype=HALF
    ),
    "resets to zero": replace(SMALL, B=3, block_b=4, T=4, resets="zero"),
    "resets to a state": replace(SMALL, B=3, block_b=4, T=4, resets="given"),
    "resets, lengths, both directions": replace(SMALL, B=3, block_b=4, lengths=(3, 1, 2), directions=2, resets="given"),
    "batch first": replace(SMALL, B=3, block_b=4, batch_first=True),
    "heads": replace(SMALL, H=5, heads=2),
    "recomputed gates": replace(SMALL, pre_activation=True),
    "weights streamed": replace(SMALL, H=13, units=8, on_chip=False),
    "tile loaded again": replace(SMALL, H=10, units=8, dtype=HALF, keep_tile=False),
    "zoneout": replace(SMALL, zoneout=(0.5, 0.3)),
    "zoneout, half precision, split columns": replace(
        SMALL, H=13, units=8, block_k=16, split_k=2, zoneout=(0.3, 0.5), dtype=HALF
    ),
    "zoneout, lengths, resets, both directions, tiles": replace(
        SMALL, B=3, lengths=(3, 1, 2), directions=2, resets="given", zoneout=(0.4, 0.6)
    ),
    "zoneout, heads, recomputed gates, reverse": replace(
        SMALL, H=5, heads=2, pre_activation=True, reverse=True, zoneout=(0.5, 0.5)
    ),
    "zoneout, weights streamed": replace(SMALL, H=13, units=8, on_chip=False, zoneout=(0.2, 0.8)),
    "zoneout expected": replace(SMALL, B=3, block_b=4, lengths=(3, 0, 2), zoneout=(0.5, 0.3), random=False),
    "columns split over warps": replace(SMALL, H=13, units=8, block_k=16, split_k=2),
}
# One program per group: nothing to interleave, the same equations.
ALONE = {
    "one program": replace(SMALL, units=8),
    "one program, half precision": replace(SMALL, units=8, dtype=HALF),
    "one program per batch tile, lengths, resets, both directions": replace(
        SMALL, B=3, T=4, units=8, lengths=(4, 0, 3), resets="given", directions=2
    ),
    "one program, zoneout, lengths, resets, both directions": replace(
        SMALL, B=3, T=4, units=8, lengths=(4, 0, 3), resets="given", directions=2, zoneout=(0.5, 0.5)
    ),
    "one program, zoneout expected, batch first": replace(
        SMALL, B=3, units=8, batch_first=True, zoneout=(0.5, 0.1), random=False
    ),
    "everything kept": replace(SMALL, zoneout=(1.0, 1.0)),
    "one unit": replace(SMALL, H=1, units=1),
    "no steps": replace(SMALL, T=0),
    "no steps, both directions": replace(SMALL, T=0, directions=2, units=8),
    "one step": replace(SMALL, T=1),
}


def run(case: Case, seed: int) -> None:
    """One schedule of the forward and one of the backward kernel on one problem."""
    problem = make_problem(case, seed)
    launch = partial(run_interleaved, seed=seed)
    check(case, problem, backward(case, problem, forward(case, problem, launch), launch))


@pytest.mark.parametrize("name", CASES)
def test_random_schedules(name):
    for seed in range(4):
        run(CASES[name], seed)


@pytest.mark.parametrize("name", ALONE)
def test_without_an_exchange(name):
    run(ALONE[name], 0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
def test_many_random_schedules(name):
    for seed in range(1000, 1120):
        run(CASES[name], seed)


@pytest.mark.slow
@pytest.mark.parametrize("units", [4, 8, 16])
@pytest.mark.parametrize("H", [7, 13, 40])
@pytest.mark.parametrize("B", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_sizes(H, B, units, dtype):
    for T in (1, 2, 5):
        run(Case(T=T, B=B, H=H, units=units, block_b=4, block_k=16, dtype=dtype), seed=T)


def test_results_are_the_same_bit_for_bit_under_every_schedule():
    problem = make_problem(SMALL)
    launches = [partial(run_interleaved, seed=seed) for seed in range(4)]
    results = [backward(SMALL, problem, forward(SMALL, problem, launch), launch) for launch in launches]
    for other in results[1:]:
        for name in ("y", "h_n", "c_n", "d_gates", "d_h_0", "d_c_0"):
            assert torch.equal(getattr(other, name), getattr(results[0], name))


def plain_torch(p: Problem, d_cells: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The recurrence of one direction in float64 as torch's own operations and autograd have it.

    With `d_cells` (T, B, H) the gradients are those of the cell-state sequence, and of nothing else.
    """
    x, w_hh, h_0, c_0 = (t.double().requires_grad_() for t in (p.x, p.w_hh, p.h_0, p.c_0))
    h, c, y, cells = h_0[0], c_0[0], [], []
    for x_t in x:
        i, f, g, o = (x_t + h @ w_hh[0].T).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        y.append(h)
        cells.append(c)
    outputs = {"y": torch.stack(y), "h_n": h[None], "c_n": c[None]}
    seeds = list(zip(outputs.values(), (p.d_y, p.d_h_n, p.d_c_n), strict=True))
    if d_cells is not None:
        seeds = [(torch.stack(cells), d_cells)]
    d = torch.autograd.grad([o for o, _ in seeds], (x, h_0, c_0), [s.double() for _, s in seeds])
    return {**outputs, "d_gates": d[0], "d_h_0": d[1], "d_c_0": d[2]}


def test_gradient_of_the_cell_sequence_with_no_other():
    problem = make_problem(SMALL)
    d_cells = torch.randn(SMALL.T * SMALL.B, SMALL.H)
    absent = {"d_y_ptr": None, "d_h_n_ptr": None, "d_c_n_ptr": None}
    results = backward(SMALL, problem, forward(SMALL, problem), d_cells_ptr=d_cells, **absent)
    want = plain_torch(problem, d_cells.view(SMALL.T, SMALL.B, SMALL.H))
    for name in ("d_gates", "d_h_0", "d_c_0"):
        torch.testing.assert_close(getattr(results, name).double(), want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changed", [{"zoneout_h": 1 << 22}, {"zoneout_c": 1 << 22}, {"first_row": 1}, {"seed": 1}])
def test_masks_other_than_the_forwards_would_be_seen(changed):
    case = replace(SMALL, zoneout=(0.5, 0.5))
    problem = make_problem(case)
    done = forward(case, problem)
    check(case, problem, backward(case, problem, done))
    if "seed" in changed:
        changed = {"zoneout_seed_ptr": problem.seed + 1}
    with pytest.raises(AssertionError, match="error"):
        check(case, problem, backward(case, problem, done, **changed))


def test_nothing_saved():
    problem = make_problem(SMALL)
    bare, full = forward(SMALL, problem, gates_ptr=None, cells_ptr=None), forward(SMALL, problem)
    assert all(torch.equal(getattr(bare, name), getattr(full, name)) for name in ("y", "h_n", "c_n"))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["x", "w_hh", "h_0", "c_0", "d_y"])
def test_nan_and_infinity_flow_as_in_torch_and_never_stall(value, where, dtype):
    case = replace(SMALL, dtype=dtype)
    problem = make_problem(case)
    getattr(problem, where).view(-1)[3] = value
    results = backward(case, problem, forward(case, problem))
    for name, exact in plain_torch(problem).items():
        actual, finite = getattr(results, name).double(), exact.isfinite()
        assert torch.equal(actual.isnan(), exact.isnan()), name
        assert torch.equal(actual.isfinite(), finite), name
        tolerance = {"rtol": 2e-2, "atol": 2e-3} if dtype == HALF else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(actual[finite], exact[finite], **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_nan_with_the_sentinel_pattern_never_stalls(dtype):
    """All bits one in every tensor that a caller gives."""
    for where in ("x", "w_hh", "h_0", "c_0", "d_y"):
        case = replace(SMALL, dtype=dtype)
        problem = make_problem(case)
        tensor = getattr(problem, where)
        tensor.view(torch.int16 if dtype == HALF else torch.int32).view(-1)[3] = -1
        results = backward(case, problem, forward(case, problem))
        assert results.d_gates.isnan().any()


def test_what_a_padded_position_holds_is_never_read():
    case = replace(SMALL, B=3, block_b=4, lengths=(2, 0, 3), directions=2)
    clean = make_problem(case)
    dirty = make_problem(case)
    for row, length in enumerate(case.lengths):
        for tensor in (dirty.x, dirty.d_y):
            tensor[length:, row] = torch.nan
    results = [backward(case, p, forward(case, p)) for p in (clean, dirty)]
    for name in ("y", "h_n", "c_n", "d_gates", "d_h_0", "d_c_0"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name
