"""The two persistent kernels as functions of tensors: allocate, fill with the sentinel, launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch_options import current_options
from .launch_plan import LaunchPlan, PlanError
from .layouts import batch_rows, from_row, is_batch_first, new_sequence
from .persistent_backward import persistent_backward_kernel
from .persistent_forward import persistent_forward_kernel
from .plan_at_hand import SpillsError, is_known_to_spill
from .zoneout import Zoneout


class ExchangeError(RuntimeError):
    """With `max_spins`: a program waited too long for another one; the message says which one, and for what."""


class Launch(NamedTuple):
    """One launch of a plan: some rows of the batch."""

    rows: slice
    grid: tuple[int, int, int]
    options: dict[str, Any]


def forward_kernel(
    plan: LaunchPlan,
    x_proj: Sequence[Tensor],  # (T, B, 4H) of each of D directions, in one of the two `layouts`, which y takes too
    w_hh: Sequence[Tensor],  # (4H, H / N) contiguous, of each of D directions
    h_0: Tensor,  # (D, B, H) contiguous
    c_0: Tensor,  # (D, B, H) contiguous
    lengths: Tensor | None,  # (B,) contiguous
    keep: str,  # "gates", "states" or "nothing"
    reverse: bool,  # whether the first direction reads from the end
    resets: Tensor | None = None,  # (T, B) int8 contiguous
    h_reset: Tensor | None = None,  # (D, B, H) contiguous
    c_reset: Tensor | None = None,  # (D, B, H) contiguous
    zoneout: Zoneout | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y (T, B, D*H), h_n, c_n (D, B, H), gates (T, B, D, 4H) and cells (T, B, D, H); empty where not kept."""
    (T, B, _), (D, _, H) = x_proj[0].shape, c_0.shape
    batch_first = is_batch_first(x_proj[0])
    y = _exchanged((T, B, D * H), x_proj[0], plan, batch_first)
    gates, cells = y.new_empty(0), y.new_empty(0, dtype=torch.float32)
    if keep == "gates":
        gates = new_sequence(y, (T, B, D, 4 * H), batch_first)
    if keep != "nothing":
        cells = new_sequence(y, (T, B, D, H), batch_first, torch.float32)
    h_n, c_n, strides = [], [], (1, T) if batch_first else (B, 1)
    for launch in _launches(plan, B, D, reverse):
        rows, whole = launch.rows, launch.rows.stop - launch.rows.start == B
        states = [state if whole else state[:, rows].contiguous() for state in (h_0, c_0)]
        outs = [torch.empty_like(state) for state in states]
        errors = _errors(launch, y)
        _run(
            persistent_forward_kernel, plan, launch, errors,
            *_both([from_row(part, rows) for part in x_proj]), *_both(w_hh), *states, from_row(y, rows), *outs,
            from_row(gates, rows) if keep == "gates" else None, from_row(cells, rows) if keep != "nothing" else None,
            None if lengths is None else lengths[rows],
            *(batch_rows(tensor, rows, whole) for tensor in (resets, h_reset, c_reset)), errors, T,
            rows.stop - rows.start, *strides, *_zoneout_arguments(zoneout, rows), plan.H, plan.heads, D,
        )  # fmt: skip
        h_n.append(outs[0])
        c_n.append(outs[1])
    return y, _joined(h_n), _joined(c_n), gates, cells


def backward_kernel(
    plan: LaunchPlan,
    d_y: Tensor | None,  # (T, B, D*H); all sequences are in the layout of cells, the rest contiguous; None is zero
    d_h_n: Tensor | None,  # (D, B, H)
    d_c_n: Tensor | None,  # (D, B, H)
    d_cells: Tensor | None,  # (T, B, D, H)
    w_hh: Sequence[Tensor],  # (4H, H / N), of each of D directions
    gates: Tensor,  # (T, B, D, 4H)
    cells: Tensor,  # (T, B, D, H)
    c_0: Tensor,  # (D, B, H)
    lengths: Tensor | None,  # (B,)
    pre_activation: bool,  # what gates holds: before (True) or after the activation
    reverse: bool,  # whether the first direction read from the end
    resets: Tensor | None = None,  # (T, B) int8
    c_reset: Tensor | None = None,  # (D, B, H)
    zoneout: Zoneout | None = None,
) -> list[Tensor]:
    """Returns d_gates (T, B, D*4H) of the pre-activations, and d_h_0, d_c_0 and, if c_reset is given, d_h_reset and
    d_c_reset (D, B, H).
    """
    T, B, D, H = cells.shape
    batch_first = is_batch_first(cells)
    strides = (1, T) if batch_first else (B, 1)
    d_gates = _exchanged((T, B, D * 4 * H), gates, plan, batch_first)
    d_states: list[list[Tensor]] = []
    for launch in _launches(plan, B, D, reverse):
        rows, whole = launch.rows, launch.rows.stop - launch.rows.start == B
        shape = (D, rows.stop - rows.start, H)
        outs = [c_0.new_empty(shape) for _ in range(2)]
        # Sums over all resets, and therefore in float32.
        outs += [c_0.new_empty(shape, dtype=torch.float32) for _ in range(0 if c_reset is None else 2)]
        errors = _errors(launch, c_0)
        _run(
            persistent_backward_kernel, plan, launch, errors,
            None if d_y is None else from_row(d_y, rows),
            *(batch_rows(state, rows, whole) for state in (d_h_n, d_c_n)),
            None if d_cells is None else from_row(d_cells, rows),
            *_both(w_hh), from_row(gates, rows), from_row(cells, rows), batch_rows(c_0, rows, whole),
            from_row(d_gates, rows), *outs[:2], None if lengths is None else lengths[rows],
            batch_rows(resets, rows, whole), batch_rows(c_reset, rows, whole), *(outs[2:] or (None, None)), errors, T,
            rows.stop - rows.start, *strides, *_zoneout_arguments(zoneout, rows), plan.H, plan.heads, D,
            PRE_ACTIVATION=int(pre_activation),
        )  # fmt: skip
        d_states.append(outs)
    return [d_gates, *(_joined(list(parts)).to(c_0.dtype) for parts in zip(*d_states, strict=True))]


def constants(plan: LaunchPlan) -> dict[str, Any]:
    """The compile-time arguments that a plan fixes, by their names in the kernel."""
    fixed = {
        "UNITS": plan.units,
        "BLOCK_B": plan.rows,
        "BLOCK_K": plan.block_k,
        "WEIGHTS_ON_CHIP": int(plan.regime != "streamed"),
        "KEEP_TILE": plan.keep_tile,
        "INPUT_PRECISION": plan.precision,
    }
    return fixed if plan.kernel == "forward" else fixed | {"SPLIT_K": plan.split_k}


def compile_options(plan: LaunchPlan, is_amd: bool = False) -> dict[str, Any]:
    """The options of Triton's compiler that a plan fixes. A grid that waits for itself is launched as a whole.

    That a product and a sum may be one instruction is said, because Triton's own default for it is about to change.
    """
    # One program runs on each multiprocessor, so that its threads may have all the registers there are. With 8 warps
    # NVIDIA's assembler would rather spill a few than pass 128, which allows for a second program; with 4 it does well.
    registers = {"maxnreg": 255} if plan.num_warps == 8 and not is_amd else {}
    return {
        "num_warps": plan.num_warps,
        "num_stages": 2 if plan.regime == "streamed" else 1,
        "launch_cooperative_grid": plan.programs > 1,
        "enable_fp_fusion": True,
        **registers,
    }


def _launches(plan: LaunchPlan, B: int, D: int, reverse: bool) -> Iterator[Launch]:
    options = {**constants(plan), **compile_options(plan, torch.version.hip is not None), "REVERSE": int(reverse)}
    options["MAX_SPINS"] = current_options().max_spins
    for rows in plan.batch_slices():
        tiles = -(-len(rows) // plan.rows)
        yield Launch(slice(rows.start, rows.stop), (plan.programs, tiles, D * plan.heads), options)


def _run(
    kernel: Any, plan: LaunchPlan, launch: Launch, errors: Tensor | None, *arguments: Any, **constants: Any
) -> None:
    try:
        compiled = kernel[launch.grid](*arguments, **launch.options, **constants)
    except RuntimeError as error:
        if "cooperative" not in str(error):
            raise
        raise PlanError(
            f"plan: expected {launch.grid} programs to fit on the GPU at the same time; received the driver's refusal: "
            f"{error}. Is the GPU shared or partitioned? Pin a smaller plan. {plan.describe()}"
        ) from error
    if errors is not None:
        _raise_if_stuck(errors, launch, plan)
    if compiled.n_spills and plan.source == "model" and not is_known_to_spill(plan):
        raise SpillsError


def _exchanged(shape: tuple[int, ...], like: Tensor, plan: LaunchPlan, batch_first: bool) -> Tensor:
    """A sequence that programs exchange: every element is the sentinel, all bits one, until it is written."""
    sequence = new_sequence(like, shape, batch_first)
    if plan.programs > 1:
        sequence.view(torch.int16 if like.element_size() == 2 else torch.int32).fill_(-1)
    return sequence


def _zoneout_arguments(zoneout: Zoneout | None, rows: slice) -> tuple[Any, ...]:
    """The kernel's seed, limits and first row; None where there is no zoneout, which leaves its code out."""
    return (None,) * 4 if zoneout is None else (zoneout.seed, *zoneout.limits, rows.start)


def _errors(launch: Launch, like: Tensor) -> Tensor | None:
    if not launch.options["MAX_SPINS"]:
        return None
    x, y, z = launch.grid
    return like.new_zeros(x * y * z, 4, dtype=torch.int32)


def _raise_if_stuck(errors: Tensor, launch: Launch, plan: LaunchPlan) -> None:
    stuck = errors[:, 0].nonzero().flatten().tolist()
    if not stuck:
        return
    units, tiles, _ = launch.grid
    first = min(stuck, key=lambda program: int(errors[program, 0]))
    step, row, column = (int(value) for value in errors[first, :3])
    raise ExchangeError(
        f"{len(stuck)} of {len(errors)} programs gave up waiting after {launch.options['MAX_SPINS']} loads. The first: "
        f"program (unit slice {first % units}, batch tile {first // units % tiles}, "
        f"direction {first // units // tiles // plan.heads}) could not start step {step - 1}: row {row} of its tile, "
        f"column {column} of the exchanged tensor, which unit slice {column % plan.H // plan.units} owns, was never "
        f"written. {plan.describe()}"
    )


def _both(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """What a kernel takes by one pointer for each direction, so that nothing is copied together."""
    return tensors[0], tensors[1] if len(tensors) == 2 else None


def _joined(states: list[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states, 1)
