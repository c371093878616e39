"""Choosing a launch plan from sizes, dtype and GPU: every plan that can run, ranked by the cost model; pure Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

from .cost_model import ITEM_SIZE, fits_registers, shared_memory_bytes, step_cost
from .gpu import GPU
from .launch_plan import REGIMES, LaunchPlan, PlanError
from .plan_table import plans_of_gpu

UNITS = (4, 8, 16, 32, 64, 128)
ROWS = (8, 16, 32, 64, 128)
BLOCK_K = (16, 32, 64, 128, 256, 512, 1024)
SMALLEST_BLOCK_K = 64  # of several chunks: shorter ones cost more barriers than they save padding
NUM_WARPS = (4, 8)
SPLIT_K = (1, 2, 4, 8)
KEEP_TILE = (1, 0)
MAX_CHUNKS = 64  # on the chip: products are unrolled over the chunks

# Measured plans, which overrule the model: (arch, multiprocessors, kernel, dtype, H, largest B) -> the fastest choices.
MEASURED: dict[tuple[str, int, str, str, int, int], dict[str, int | str]] = {}


def choose_plan(
    kernel: str,
    H: int,
    B: int,
    dtype: str,
    gpu: GPU,
    D: int = 1,
    precision: str = "ieee",
    pinned: Mapping[str, int | str] | None = None,
    excluded: frozenset[LaunchPlan] = frozenset(),
    heads: int = 1,
) -> LaunchPlan:
    """The plan of one kernel ("forward" or "backward") for a layer of H units and D directions, and B batch rows.

    Args:
        heads: blocks of a block-diagonal W_hh, of H units each, which exchange nothing with one another.
        dtype: "float16", "bfloat16" or "float32"; others (float64) are run step by step.
        precision: of float32 products.
        pinned: fields of the plan (regime, units, rows, block_k, num_warps, groups) that must have the given values.
        excluded: plans that turned out not to fit.

    Raises:
        PlanError: no plan with the pinned values can run on this GPU.
    """
    return _choose(kernel, H, B, dtype, gpu, D, precision, tuple(sorted((pinned or {}).items())), excluded, heads)


@lru_cache(maxsize=4096)
def _choose(
    kernel: str,
    H: int,
    B: int,
    dtype: str,
    gpu: GPU,
    D: int,
    precision: str,
    pins: tuple[tuple[str, int | str], ...],
    excluded: frozenset[LaunchPlan],
    heads: int,
) -> LaunchPlan:
    pinned, source = dict(pins), "pinned" if pins else "model"
    _check_pins(pinned)
    fallback = LaunchPlan(kernel, "per_step", H, B, D, heads, dtype, precision, gpu=gpu.name, source=source)
    if dtype not in ITEM_SIZE or pinned.get("regime") == "per_step":
        return fallback
    if not pinned:
        pinned = dict(_measured(kernel, H, B, dtype, gpu))
        source = "measured" if pinned else source
        _check_pins(pinned)
    common: dict[str, Any] = {"kernel": kernel, "H": H, "B": max(B, 1), "D": D, "heads": heads, "dtype": dtype}
    common["precision"] = precision
    plans = _runnable(common, gpu, pinned, excluded)
    if not plans and source == "measured":
        source, plans = "model", _runnable(common, gpu, {}, excluded)
    if not plans and source == "pinned":
        raise PlanError(_no_plan(common, gpu, pinned))
    if not plans:
        return fallback

    def time(plan: LaunchPlan) -> tuple[float, ...]:
        cost = step_cost(plan, gpu).total * plan.launches
        return cost, plan.programs, plan.rows, plan.num_warps, plan.block_k

    best = min(plans, key=time)
    return replace(best, source=source, cost=step_cost(best, gpu))


def _runnable(
    common: dict[str, Any], gpu: GPU, pinned: Mapping[str, int | str], excluded: frozenset[LaunchPlan]
) -> list[LaunchPlan]:
    """The candidates that keep out of spills; where there are none, those that are slow and right."""
    possible = [plan for plan in _candidates(common, gpu, pinned) if plan not in excluded]
    return [plan for plan in possible if fits_registers(plan, gpu)] or possible


def _candidates(common: dict[str, Any], gpu: GPU, pinned: Mapping[str, int | str]) -> Iterator[LaunchPlan]:
    """Every plan whose tiles make sense, and that the GPU can run as far as the estimates say."""
    choices = (REGIMES[:3], UNITS, ROWS, BLOCK_K, NUM_WARPS, SPLIT_K, KEEP_TILE)
    names = ("regime", "units", "rows", "block_k", "num_warps", "split_k", "keep_tile")
    narrowed = [[pinned[n]] if n in pinned else c for n, c in zip(names, choices, strict=True)]
    for values in product(*narrowed):
        tiles: dict[str, Any] = dict(zip(names, values, strict=True))
        if _makes_sense(common["kernel"], common["H"], max(common["B"], gpu.smallest_rows), **tiles):
            plan = _with_groups(LaunchPlan(**common, **tiles, gpu=gpu.name), gpu, pinned)
            if why_impossible(plan, gpu) is None:
                yield plan


def _makes_sense(
    kernel: str,
    H: int,
    B: int,
    regime: str,
    units: int,
    rows: int,
    block_k: int,
    num_warps: int,
    split_k: int,
    keep_tile: int,
) -> bool:
    if rows >= 2 * B:
        return False  # a tile of twice what it covers gains nothing
    if kernel == "backward" and units < 16:
        return False  # the units are the rows of a matrix instruction, which has 16
    if regime == "single":
        # One chunk as long as the units, and no shorter than a matrix instruction is deep.
        return units >= H and block_k == units and units < 2 * max(H, 16) and split_k == 1 and keep_tile == 1
    chunks = -(-H * (1 if kernel == "forward" else 4) // block_k)
    if units >= H or block_k < SMALLEST_BLOCK_K or (block_k >= 2 * H and block_k > SMALLEST_BLOCK_K):
        return False
    if regime == "streamed":
        return split_k == 1 and keep_tile == 0
    if kernel == "forward":
        return split_k == 1 and chunks <= MAX_CHUNKS
    return split_k <= num_warps and 16 * split_k <= block_k and chunks <= MAX_CHUNKS


def _with_groups(plan: LaunchPlan, gpu: GPU, pinned: Mapping[str, int | str]) -> LaunchPlan:
    """The plan with as many batch tiles and directions side by side as fit, evenly spread over the launches.

    The heads of a direction are never taken apart: theirs are few programs, because their weights are few.
    """
    most = gpu.multiprocessors // (plan.programs * plan.heads)
    directions = plan.D if most >= plan.D else 1
    most = max(1, most // directions)
    launches = -(-plan.tiles // most)
    groups = int(pinned.get("groups", -(-plan.tiles // launches)))
    return replace(plan, groups=groups, directions=directions)


def why_impossible(plan: LaunchPlan, gpu: GPU) -> str | None:
    """What a plan needs more of than the GPU has; None for a plan that can run."""
    programs = plan.programs * plan.groups * plan.directions * plan.heads
    needs = {
        "programs at the same time": (programs, gpu.multiprocessors),
        "bytes of shared memory per program": (shared_memory_bytes(plan), gpu.shared_memory),
    }
    for what, (needed, available) in needs.items():
        if needed > available:
            return f"it needs {needed} {what} and {gpu.name} has {available}"
    if plan.rows < gpu.smallest_rows:
        return f"{gpu.name} multiplies {gpu.smallest_rows} rows or more at once and it has tiles of {plan.rows}"
    return None


def _measured(kernel: str, H: int, B: int, dtype: str, gpu: GPU) -> Mapping[str, int | str]:
    """The entry of the smallest measured batch that covers B."""
    same = (gpu.arch, gpu.multiprocessors, kernel, dtype, H)
    for table in (plans_of_gpu(gpu.arch, gpu.multiprocessors), MEASURED):  # a user's own comes first
        covering = [key for key in table if key[:5] == same and key[5] >= B]
        if covering:
            return table[min(covering, key=lambda key: key[5])]
    return {}


_PINNABLE: dict[str, tuple[int | str, ...] | None] = {
    "regime": REGIMES,
    "units": UNITS,
    "rows": ROWS,
    "block_k": BLOCK_K,
    "num_warps": NUM_WARPS,
    "split_k": SPLIT_K,
    "keep_tile": KEEP_TILE,
    "groups": None,  # any positive number
}


def _check_pins(pinned: Mapping[str, int | str]) -> None:
    for name, value in pinned.items():
        if name not in _PINNABLE:
            raise PlanError(f"plan: expected fields among {', '.join(_PINNABLE)}; received {name!r}.")
        choices = _PINNABLE[name]
        if choices is not None and value not in choices:
            raise PlanError(f"plan: expected {name} to be one of {choices}; received {value!r}.")
        if choices is None and (not isinstance(value, int) or value < 1):
            raise PlanError(f"plan: expected {name} to be a positive whole number; received {value!r}.")


def _no_plan(common: dict[str, Any], gpu: GPU, pinned: Mapping[str, int | str]) -> str:
    asked = ", ".join(f"{name}={value}" for name, value in pinned.items())
    text = (
        f"plan: expected choices that {gpu.name} can run for {common['kernel']}, H={common['H']}, B={common['B']}, "
        f"{common['dtype']}; received {asked}"
    )
    tiles: dict[str, Any] = {name: value for name, value in pinned.items() if name != "groups"}
    if _PINNABLE.keys() - {"groups"} == tiles.keys():
        tried = _with_groups(LaunchPlan(**common, **tiles), gpu, pinned)
        reason = why_impossible(tried, gpu)
        text += f": {reason}" if reason else ": 'single' is for units = block_k >= H, the other regimes for fewer units"
    return text + ". Pin fewer fields, or use regime='streamed' or 'per_step', which need less of the chip."
