"""One problem for the kernels, its answer from the reference, and the launches of both kernels on a CPU.

The input projection is the input itself (W_ih is the identity), so that the gradient of x is d_gates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from tlstm_kernels import lstm
from tlstm_kernels.persistent_backward import persistent_backward_kernel
from tlstm_kernels.persistent_forward import persistent_forward_kernel
from tlstm_kernels.zoneout import Zoneout
from torch import Tensor

from .grid import run_interleaved

Launch = Callable[..., None]  # run_interleaved, or one with its schedule fixed


@dataclass
class Case:
    """A problem's sizes and options, and the tiles to cut it into."""

    T: int = 3
    B: int = 3
    H: int = 13  # per head
    units: int = 4
    heads: int = 1
    directions: int = 1
    reverse: bool = False
    lengths: tuple[int, ...] | None = None
    resets: str | None = None  # None, "zero" or "given"
    dtype: torch.dtype = torch.float32
    batch_first: bool = False
    block_b: int = 2
    block_k: int = 8
    on_chip: bool = True
    keep_tile: bool = True
    split_k: int = 1  # backward only
    pre_activation: bool = False
    zoneout: tuple[float, float] | None = None  # of h and c
    random: bool = True  # masks; False: every unit keeps its share
    max_spins: int = 0

    @property
    def programs(self) -> tuple[int, int, int]:
        def split(n: int, block: int) -> int:
            return -(-n // block)

        return split(self.H, self.units), split(self.B, self.block_b), self.directions * self.heads

    @property
    def tiles(self) -> dict[str, Any]:
        alone = self.units >= self.H
        return {
            "H": self.H,
            "N": self.heads,
            "D": self.directions,
            "REVERSE": int(self.reverse),
            "UNITS": self.units,
            "BLOCK_B": self.block_b,
            "BLOCK_K": self.units if alone else self.block_k,
            "WEIGHTS_ON_CHIP": int(self.on_chip),
            "KEEP_TILE": int(self.keep_tile and self.on_chip),
            "INPUT_PRECISION": "ieee",
            "MAX_SPINS": self.max_spins,
        }


@dataclass
class Problem:
    """Tensors in torch's layouts; N heads, D directions."""

    x: Tensor  # (T, B, D * 4 * N * H)
    w_hh: Tensor  # (D * N, 4H, H)
    h_0: Tensor  # (D, B, N * H)
    c_0: Tensor
    h_reset: Tensor
    c_reset: Tensor
    d_y: Tensor  # (T, B, D * N * H)
    d_h_n: Tensor  # (D, B, N * H)
    d_c_n: Tensor
    lengths: Tensor | None = None  # (B,)
    resets: Tensor | None = None  # (T, B) int8
    seed: Tensor | None = None  # () int64 of zoneout


@dataclass
class Results:
    """What a layer gives; also the gradients that it takes."""

    y: Tensor
    h_n: Tensor
    c_n: Tensor
    d_gates: Tensor | None = None
    d_h_0: Tensor | None = None
    d_c_0: Tensor | None = None
    d_h_reset: Tensor | None = None
    d_c_reset: Tensor | None = None
    saved: dict[str, Any] = field(default_factory=dict)


def make_problem(case: Case, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(case.dtype)

    T, B, H, D, width = case.T, case.B, case.H, case.directions, case.heads * case.H
    states = [draw(D, B, width) for _ in range(6)]
    resets = None
    if case.resets is not None:
        resets = (torch.rand(T, B, generator=generator) < 0.4).to(torch.int8)
    return Problem(
        draw(T, B, D * 4 * width),
        draw(D * case.heads, 4 * H, H, scale=H**-0.5),
        *states[:4],
        draw(T, B, D * width),
        *states[4:],
        None if case.lengths is None else torch.tensor(case.lengths, dtype=torch.int32),
        resets,
        torch.tensor(seed * 0x123456789ABCD),
    )


def expected(case: Case, problem: Problem, dtype: torch.dtype) -> Results:
    """The reference in `dtype`, direction by direction, with autograd."""
    values = {f.name: getattr(problem, f.name) for f in fields(problem)}
    leaf = ("x", "w_hh", "h_0", "c_0", "h_reset", "c_reset")
    for name, v in values.items():
        if isinstance(v, Tensor) and v.is_floating_point():
            values[name] = v.to(dtype).detach().requires_grad_(name in leaf)
    p = Problem(**values)
    width = case.heads * case.H
    h_reset, c_reset = (p.h_reset, p.c_reset) if case.resets == "given" else (0 * p.h_reset, 0 * p.c_reset)
    results = []
    for d in range(case.directions):
        x = p.x[..., d * 4 * width : (d + 1) * 4 * width]
        options = (p.lengths, case.reverse != (d == 1), p.resets)
        given = (None, None) if case.resets is None else (h_reset[d], c_reset[d])
        w_ih, w_hh = torch.eye(4 * width, dtype=dtype), block_diagonal(case, p.w_hh, d)
        results.append(
            lstm(x, p.h_0[d], p.c_0[d], w_ih, w_hh, None, None, None, *options, *given, zoneout_of(case, p.seed))
        )
    y = torch.cat([result[0] for result in results], -1)
    h_n, c_n = (torch.stack([result[n] for result in results]) for n in (1, 2))
    outputs, d_outputs = (y, h_n, c_n), (p.d_y, p.d_h_n, p.d_c_n)
    gradients = torch.autograd.grad(
        outputs, (p.x, p.h_0, p.c_0, p.h_reset, p.c_reset), d_outputs, allow_unused=True, materialize_grads=True
    )
    return Results(*(o.detach() for o in outputs), *gradients)


def block_diagonal(case: Case, w_hh: Tensor, direction: int) -> Tensor:
    """(4 N H, N H): the recurrent weights (D * N, 4H, H) of one direction as one matrix over all heads."""
    own = w_hh.unflatten(0, (case.directions, case.heads))[direction].unflatten(1, (4, case.H))  # (N, 4, H, H)
    return torch.cat([torch.block_diag(*own[:, gate]) for gate in range(4)])


def zoneout_of(case: Case, seed: Tensor) -> Zoneout | None:
    if case.zoneout is None:
        return None
    return Zoneout(*case.zoneout, seed if case.random else None)


def sentinel_filled(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    return torch.full((rows, width), -1, dtype=bits).view(dtype)


def forward(case: Case, p: Problem, launch: Launch = run_interleaved, **overrides: Any) -> Results:
    """Launch the forward kernel."""
    T, B, D, width = case.T, case.B, case.directions, case.heads * case.H
    y = sentinel_filled(T * B, D * width, case.dtype)
    gates = torch.full((T * B, D * 4 * width), torch.nan, dtype=torch.float32)
    cells = torch.full((T * B, D * width), torch.nan, dtype=torch.float32)
    h_n, c_n = torch.full_like(p.h_0, torch.nan), torch.full(p.c_0.shape, torch.nan, dtype=torch.float32)
    given = case.resets == "given"
    launch(
        persistent_forward_kernel,
        case.programs,
        **{
            **input_projections(case, p),
            **recurrent_weights(case, p),
            "h_0_ptr": p.h_0,
            "c_0_ptr": p.c_0,
            "y_ptr": y,
            "h_n_ptr": h_n,
            "c_n_ptr": c_n,
            "gates_ptr": gates,
            "cells_ptr": cells,
            **shared_arguments(case, p),
            "h_reset_ptr": p.h_reset if given else None,
            "c_reset_ptr": p.c_reset if given else None,
            **case.tiles,
            **overrides,
        },
    )
    return Results(from_rows(case, y), h_n, c_n, saved={"gates": gates, "cells": cells})


def backward(case: Case, p: Problem, done: Results, launch: Launch = run_interleaved, **overrides: Any) -> Results:
    """Launch the backward kernel on what the forward saved; returns `done` with the gradients."""
    T, B, D, width = case.T, case.B, case.directions, case.heads * case.H
    d_gates = sentinel_filled(T * B, D * 4 * width, case.dtype)
    gates = done.saved["gates"]
    if case.pre_activation:
        i, f, g, o = gates.unflatten(-1, (D, 4, width)).unbind(-2)
        gates = torch.stack((i.logit(), f.logit(), g.atanh(), o.logit()), -2).flatten(-3)
    state = {"dtype": torch.float32}
    d_h_0, d_c_0, d_h_reset, d_c_reset = (torch.full(p.h_0.shape, torch.nan, **state) for _ in range(4))
    given = case.resets == "given"
    launch(
        persistent_backward_kernel,
        case.programs,
        **{
            "d_y_ptr": to_rows(case, p.d_y),
            "d_h_n_ptr": p.d_h_n,
            "d_c_n_ptr": p.d_c_n,
            "d_cells_ptr": None,
            **recurrent_weights(case, p),
            "gates_ptr": gates,
            "cells_ptr": done.saved["cells"],
            "c_0_ptr": p.c_0,
            "d_gates_ptr": d_gates,
            "d_h_0_ptr": d_h_0,
            "d_c_0_ptr": d_c_0,
            **shared_arguments(case, p),
            "c_reset_ptr": p.c_reset if given else None,
            "d_h_reset_ptr": d_h_reset if given else None,
            "d_c_reset_ptr": d_c_reset if given else None,
            "PRE_ACTIVATION": int(case.pre_activation),
            "SPLIT_K": case.split_k,
            **case.tiles,
            **overrides,
        },
    )
    resets = (d_h_reset, d_c_reset) if given else (None, None)
    return replace(
        done, d_gates=from_rows(case, d_gates), d_h_0=d_h_0, d_c_0=d_c_0, d_h_reset=resets[0], d_c_reset=resets[1]
    )


def input_projections(case: Case, p: Problem) -> dict[str, Any]:
    first, *second = (to_rows(case, part) for part in p.x.chunk(case.directions, -1))
    return {"x_proj_ptr": first, "x_proj_1_ptr": second[0] if second else None}


def recurrent_weights(case: Case, p: Problem) -> dict[str, Any]:
    """W_hh of each direction as torch has it: the rows of all heads, gate by gate."""
    own = p.w_hh.unflatten(0, (case.directions, case.heads)).unflatten(2, (4, case.H))  # (D, N, 4, H, H)
    first, *second = own.transpose(1, 2).reshape(case.directions, -1, case.H)
    return {"w_hh_ptr": first, "w_hh_1_ptr": second[0].clone() if second else None}


def shared_arguments(case: Case, p: Problem) -> dict[str, Any]:
    stride_t, stride_b = (1, case.T) if case.batch_first else (case.B, 1)
    programs = case.programs[0] * case.programs[1] * case.programs[2]
    zoneout = zoneout_of(case, p.seed)
    limit_h, limit_c = (None, None) if zoneout is None else zoneout.limits
    return {
        "zoneout_seed_ptr": None if zoneout is None else zoneout.seed,
        "zoneout_h": limit_h,
        "zoneout_c": limit_c,
        "first_row": None if zoneout is None else 0,
        "lengths_ptr": p.lengths,
        "resets_ptr": p.resets,
        "error_ptr": torch.zeros(programs, 4, dtype=torch.int32) if case.max_spins else None,
        "T": case.T,
        "B": case.B,
        "stride_t": stride_t,
        "stride_b": stride_b,
    }


def to_rows(case: Case, tensor: Tensor) -> Tensor:
    """(T, B, N) to (rows, N)."""
    return (tensor.transpose(0, 1) if case.batch_first else tensor).flatten(0, 1).contiguous()


def from_rows(case: Case, rows: Tensor) -> Tensor:
    """(rows, N) to (T, B, N)."""
    first, second = (case.B, case.T) if case.batch_first else (case.T, case.B)
    tensor = rows.reshape(first, second, rows.shape[-1])
    return tensor.transpose(0, 1) if case.batch_first else tensor


def check(case: Case, problem: Problem, results: Results) -> None:
    """Every result is as close to float64 as the reference in the same dtype is, within a factor of 2.

    In half precision a value may also be rounded once more: by the kernel to the storage dtype. A gradient is a sum of
    4H products with d_gates whose terms may cancel, so its rounding goes by the size of those, not by its own.
    """
    exact = expected(case, problem, torch.float64)
    same = expected(case, problem, case.dtype)
    for name in ("y", "h_n", "c_n", "d_gates", "d_h_0", "d_c_0", "d_h_reset", "d_c_reset"):
        actual = getattr(results, name)
        if actual is None or actual.numel() == 0:
            continue
        want = getattr(exact, name)
        assert not actual.isnan().any(), f"{name} has NaN"
        size = want.abs().max()
        if name.startswith("d_") and exact.d_gates.numel():
            size = torch.maximum(size, exact.d_gates.abs().max())
        error = (actual.double() - want).abs().max()
        allowed = 2 * (getattr(same, name).double() - want).abs().max() + 2 * torch.finfo(case.dtype).eps * size
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, values up to {size:.3g}"
