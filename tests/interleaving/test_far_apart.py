"""Offsets past 2**31: steps that lie so far apart in memory that 32 bits do not hold where they are."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from tlstm_kernels import persistent_backward, persistent_forward, steps

from .grid import run_interleaved
from .launches import Case, backward, check, forward, make_problem

APART = 2**25 + 3  # rows from one step to the next


@pytest.fixture
def sparse():
    """Sequences whose steps are APART rows from one another, in memory of which few pages are ever touched."""

    def spread(rows: torch.Tensor, T: int) -> torch.Tensor:
        """(T * B, N) rows of a sequence, far apart."""
        B = len(rows) // T
        bits = {2: np.int16, 4: np.int32}[rows.element_size()]
        try:
            memory = np.zeros(((T - 1) * APART + B, rows.shape[1]), bits)
        except MemoryError:
            pytest.skip("this system grants no 100 GB of address space, few pages of which would be touched")
        found = torch.from_numpy(memory).view(rows.dtype)
        for t in range(T):
            found[t * APART : t * APART + B] = rows[t * B : (t + 1) * B]
        return found

    def gather(rows: torch.Tensor, T: int, B: int) -> torch.Tensor:
        return torch.cat([rows[t * APART : t * APART + B] for t in range(T)])

    def launch(kernel, grid, seed, T, B, **arguments):
        names = [name for name, a in arguments.items() if name in SEQUENCES and a is not None]
        far = {name: spread(arguments[name], T) for name in names}
        assert max(tensor.numel() for tensor in far.values()) > 2**31
        run_interleaved(kernel, grid, seed, **{**arguments, **far, "T": T, "B": B, "stride_t": APART, "stride_b": 1})
        for name in names:
            arguments[name].copy_(gather(far[name], T, B))

    return launch


SEQUENCES = ("x_proj_ptr", "x_proj_1_ptr", "y_ptr", "gates_ptr", "cells_ptr", "d_y_ptr", "d_gates_ptr")
CASES = {
    "two programs": Case(T=3, B=2, H=8, units=4),
    "both directions, tile loaded again": Case(T=3, B=2, H=8, units=4, directions=2, keep_tile=False),
    "one program": Case(T=3, B=2, H=8, units=8),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_may_be_far_apart(sparse, name):
    case = CASES[name]
    problem = make_problem(case)
    launch = partial(sparse, seed=1)
    check(case, problem, backward(case, problem, forward(case, problem, launch), launch))


@triton.jit
def rows_in_32_bits(step, rows, T, backwards, stride_t, stride_b):
    t = tl.where(backwards == 1, T - 1 - step, step)
    return t * stride_t + rows * stride_b


def test_offsets_of_32_bits_are_noticed(sparse, monkeypatch):
    for module in (steps, persistent_forward, persistent_backward):
        monkeypatch.setattr(module, "rows_of_step", rows_in_32_bits)
    case = CASES["two programs"]
    with pytest.raises((AssertionError, ValueError, OverflowError)):
        forward(case, make_problem(case), partial(sparse, seed=1))
