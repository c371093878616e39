"""The launch plans by which the kernels run a problem on a GPU, for a table and for the floor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from tlstm.benchmark.problem import Problem

if TYPE_CHECKING:
    from tlstm_kernels.launch_plan import LaunchPlan

Pins = Mapping[str, Mapping[str, int | str]]  # kernel -> fields of its plan
KERNELS_OF_MODE = {"backward": ("backward",), "train": ("forward", "backward")}


def plans_of(problem: Problem, pins: Pins) -> dict[str, LaunchPlan]:
    """Kernel -> the plan of the first layer, for the kernels that the problem's mode times.

    To be asked after a launch: plans that turned out not to fit are known then.
    """
    from tlstm_kernels.launch_options import launch_options
    from tlstm_kernels.layer_weights import split_weights
    from tlstm_kernels.plan_at_hand import plan_for

    w = problem.workload
    first = [tensor for group in problem.weights[: w.directions] for tensor in group]
    weights = split_weights(first, w.directions)[0]
    x = torch.empty(1, w.B, w.I, dtype=problem.dtype, device=problem.device)
    c_0 = torch.empty(w.directions, w.B, w.H, device=problem.device)
    with launch_options(pins.get("forward"), pins.get("backward")), problem.precision():
        return {k: plan_for(k, x, c_0, weights.heads) for k in KERNELS_OF_MODE.get(problem.mode, ("forward",))}


def describe_plans(problem: Problem, pins: Pins) -> str:
    """The plans in the notation of TLSTM_PLAN."""
    fields = ("regime", "units", "rows", "block_k", "num_warps", "split_k", "keep_tile", "groups")
    plans = plans_of(problem, pins).items()
    return "; ".join(f"{k}: {' '.join(f'{name}={getattr(plan, name)}' for name in fields)}" for k, plan in plans)
