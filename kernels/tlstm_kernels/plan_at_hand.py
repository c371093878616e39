"""The plan for the GPU at hand: chosen by sizes, and given up once its compiled kernel turns out too large or slow."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import TypeVar

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .gpu import GPU
from .launch_options import current_options
from .launch_plan import KERNELS, LaunchPlan, PlanError
from .layer_weights import DirectionWeights
from .plan_choice import choose_plan

Result = TypeVar("Result")
# Plans whose compiled kernel turned out to need more than the GPU has: the estimates they were chosen by were too low.
_too_large: dict[GPU, frozenset[LaunchPlan]] = {}
# Plans that this compiler gives too few registers, so that some go to memory at every step: right, but slow.
_spilling: dict[GPU, frozenset[LaunchPlan]] = {}


class SpillsError(Exception):
    """A kernel that was launched for the first time spills registers."""


@cache
def gpu_of(index: int) -> GPU:
    """What the driver says of a GPU."""
    props = torch.cuda.get_device_properties(index)
    amd = torch.version.hip is not None
    arch = props.gcnArchName.partition(":")[0] if amd else f"sm_{props.major}{props.minor}"
    return GPU(
        name=props.name,
        arch=arch,
        multiprocessors=props.multi_processor_count,
        shared_memory=getattr(props, "shared_memory_per_block_optin", 0) or props.shared_memory_per_block,
        clock_mhz=getattr(props, "clock_rate", 0) // 1000 or 1700,
        l2_bytes=props.L2_cache_size,
        memory_gb_per_s=2000,
        registers=getattr(props, "regs_per_multiprocessor", 65536),
        max_threads=props.max_threads_per_multi_processor,
    )


def precision_of(dtype: torch.dtype) -> str:
    """Of a layer's products: float32 follows torch's setting for its own."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def plan_for(kernel: str, x: Tensor, c_0: Tensor, heads: int = 1, per_step: bool = False) -> LaunchPlan:
    """The plan of "forward" or "backward" for a layer's input (T, B, I) and initial cell state (D, B, H).

    A layer with a projection has that of the layer without one that it is run as (`projection`).
    """
    (T, B, _), (D, _, H) = x.shape, c_0.shape
    pinned = dict(current_options().pins(kernel))
    if per_step or not T * B * H:
        pinned = {"regime": "per_step"}
    dtype, index = str(x.dtype).removeprefix("torch."), x.device.index
    sizes = (kernel, H // heads, B, dtype, index, D, precision_of(x.dtype), heads)
    return _plan(*sizes, tuple(pinned.items())) if pinned else _usual_plan(*sizes)


def _plan(
    kernel: str,
    H: int,
    B: int,
    dtype: str,
    index: int,
    D: int,
    precision: str,
    heads: int,
    pinned: tuple[tuple[str, int | str], ...] = (),
) -> LaunchPlan:
    gpu = gpu_of(index)
    sizes, excluded = (kernel, H, B, dtype, gpu, D, precision, dict(pinned)), _too_large.get(gpu, frozenset())
    if not pinned and gpu in _spilling:
        plan = choose_plan(*sizes, excluded | _spilling[gpu], heads)
        if plan.regime != "per_step":
            return plan
    return choose_plan(*sizes, excluded, heads)


# Without pins, what a call of a known size has to look up; cleared when another plan turns out not to fit.
_usual_plan = lru_cache(maxsize=4096)(_plan)


def stays_on_chip(H: int, B: int, D: int, with_gradients: bool, dtype: str, precision: str, index: int) -> bool:
    """Whether the plans of a layer keep its recurrent weights on the chip and take the whole batch in one launch.

    So they are where the kernels were made to be ahead of a product for each step. Elsewhere weights are read in every
    step, once for each group of rows, or launches follow one another.
    """
    kernels = KERNELS if with_gradients else KERNELS[:1]
    plans = [_usual_plan(kernel, H, B, dtype, index, D, precision, 1) for kernel in kernels]
    return all(plan.regime in ("single", "persistent") and plan.launches == 1 for plan in plans)


def with_plan(
    kernel: str, x: Tensor, c_0: Tensor, weights: DirectionWeights, run: Callable[[LaunchPlan], Result]
) -> Result:
    """`run(plan)` with the best plan that the GPU can run.

    A kernel that turns out to be too large is not launched; one that turns out to spill is launched once, and the next
    best plan gives this call's results, too.
    """
    while True:
        plan = plan_for(kernel, x, c_0, weights.heads, per_step=weights.w_hr is not None)
        try:
            return run(plan)
        except SpillsError:
            gpu = gpu_of(x.device.index)
            _spilling[gpu] = _spilling.get(gpu, frozenset()) | {plan}
            _usual_plan.cache_clear()
        except OutOfResources as error:
            if plan.source == "pinned":
                raise PlanError(f"plan: the compiled kernel does not fit: {error}. {plan.describe()}") from error
            gpu = gpu_of(x.device.index)
            _too_large[gpu] = _too_large.get(gpu, frozenset()) | {plan}
            _usual_plan.cache_clear()


def is_known_to_spill(plan: LaunchPlan) -> bool:
    """Whether `plan` spilled before: nothing better was left, and it runs as it is."""
    return any(plan in known for known in _spilling.values())
