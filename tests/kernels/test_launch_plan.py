"""Launch plans for every size, dtype and GPU: within capacity, complete, explained, and as pinned."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tlstm_kernels import launch_plan, plan_choice
from tlstm_kernels.cost_model import fits_registers, shared_memory_bytes, step_cost
from tlstm_kernels.gpu import KNOWN_GPUS
from tlstm_kernels.launch_options import current_options, launch_options, parse_pins
from tlstm_kernels.launch_plan import LaunchPlan, PlanError
from tlstm_kernels.plan_choice import choose_plan

H100 = KNOWN_GPUS["H100"]
gpus = st.sampled_from(sorted(KNOWN_GPUS)).map(KNOWN_GPUS.get)
sizes = st.one_of(st.integers(1, 4096), st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 650, 1150, 2048, 4096]))
calls = st.tuples(
    st.sampled_from(launch_plan.KERNELS),
    sizes,  # H
    sizes,  # B
    st.sampled_from(["float16", "bfloat16", "float32"]),
    gpus,
    st.integers(1, 2),  # directions
    st.sampled_from(["ieee", "tf32"]),
)


@given(calls, st.sampled_from([2, 3, 4, 8, 16]))
@settings(max_examples=200)
def test_the_heads_of_a_direction_run_side_by_side(call, heads):
    _, H, B, _, gpu, D, _ = call
    plan = choose_plan(*call, heads=heads)
    if plan.regime == "per_step":
        # Only where programs of 16 units, which fit on every GPU, are too many; 4,000 units are not.
        assert -(-H // 16) * heads > gpu.multiprocessors
        assert H * heads > 4000
        return
    programs, groups, directions_and_heads = plan.grid
    assert programs * groups * directions_and_heads <= gpu.multiprocessors
    assert directions_and_heads % heads == 0
    assert Counter(d for part in plan.direction_slices() for d in part) == Counter(range(D))
    assert Counter(row for part in plan.batch_slices() for row in part) == Counter(range(B))
    assert f"in each of {heads} heads" in plan.describe()
    assert shared_memory_bytes(plan) <= gpu.shared_memory


@given(calls)
@settings(max_examples=400)
def test_every_plan_can_run_and_covers_everything_once(call):
    kernel, H, B, dtype, gpu, D, _ = call
    plan = choose_plan(*call)
    assert (plan.kernel, plan.H, plan.B, plan.dtype, plan.D) == (kernel, H, B, dtype, D)
    assert plan.regime in ("single", "persistent", "streamed")  # nothing of these sizes has to be run step by step

    programs, groups, directions = plan.grid
    assert programs * groups * directions <= gpu.multiprocessors
    assert shared_memory_bytes(plan) <= gpu.shared_memory
    if plan.regime != "streamed":
        weights = 4 * H * H * (2 if dtype != "float32" else 4)
        assert programs * shared_memory_bytes(plan) >= weights

    assert Counter(unit for part in plan.unit_slices() for unit in part) == Counter(range(H))
    assert len(list(plan.unit_slices())) == programs
    assert Counter(row for part in plan.batch_slices() for row in part) == Counter(range(B))
    assert Counter(d for part in plan.direction_slices() for d in part) == Counter(range(D))
    assert all(-(-len(part) // plan.rows) <= groups for part in plan.batch_slices())
    assert len(list(plan.batch_slices())) * len(list(plan.direction_slices())) == plan.launches

    for size in (plan.units, plan.rows, plan.block_k, plan.num_warps):
        assert size.bit_count() == 1  # tiles are powers of two
    # What a matrix instruction takes: 16 rows of weights, 16 along the sum for each part, 8 rows of the batch.
    assert (plan.units if kernel == "backward" else 4 * plan.units) >= 16
    assert plan.block_k >= 16 * plan.split_k
    assert plan.rows >= (16 if gpu.is_amd else 8)
    assert (programs == 1) == (plan.regime == "single")
    if plan.regime == "single":
        assert plan.block_k == plan.units >= H


@given(calls)
@settings(max_examples=50)
def test_the_same_call_gives_the_same_plan_and_a_description(call):
    plan = choose_plan(*call)
    plan_choice._choose.cache_clear()
    assert choose_plan(*call) == plan
    text = plan.describe()
    for part in (plan.regime, f"H={plan.H}", f"B={plan.B}", plan.dtype, call[4].name, f"{plan.units} units"):
        assert part in text


@given(calls)
@settings(max_examples=50)
def test_no_pinned_plan_is_better_by_the_model(call):
    """The choice is the best one: pinning any single field never gives less time."""
    gpu, plan = call[4], choose_plan(*call)
    for name in ("units", "rows", "num_warps", "regime"):
        for value in plan_choice._PINNABLE[name]:
            try:
                other = choose_plan(*call, {name: value})
            except PlanError:
                continue
            if other.regime != "per_step" and fits_registers(other, gpu) == fits_registers(plan, gpu):
                assert getattr(other, name) == value
                best = step_cost(plan, gpu).total * plan.launches
                assert step_cost(other, gpu).total * other.launches >= best * (1 - 1e-9)


@pytest.mark.parametrize("gpu", KNOWN_GPUS.values(), ids=str)
@pytest.mark.parametrize("kernel", launch_plan.KERNELS)
def test_regimes_follow_the_size(gpu, kernel):
    """One program while W_hh fits in one, many while it fits on the chip, and reads from the L2 beyond."""
    order = ["single", "persistent", "streamed"]
    chip = gpu.multiprocessors * gpu.shared_memory
    assert choose_plan(kernel, 16, 16, "bfloat16", gpu).regime == "single"
    for H in (256, 512, 768, 1024, 2048, 4096):
        regime = choose_plan(kernel, H, 16, "bfloat16", gpu).regime
        assert regime in order[1:]
        if chip < 8 * H * H:
            assert regime == "streamed"
        if chip / 4 > 8 * H * H and kernel == "forward":
            assert regime == "persistent"


def test_what_has_no_kernel_is_run_step_by_step():
    assert choose_plan("forward", 512, 16, "float64", H100).regime == "per_step"
    assert choose_plan("forward", 10**5, 16, "bfloat16", H100).regime == "per_step"
    assert "launched for every time step" in choose_plan("forward", 512, 16, "float64", H100).describe()
    tiny = replace(H100, shared_memory=1024)
    assert choose_plan("backward", 512, 16, "bfloat16", tiny).regime == "per_step"


def test_excluded_plans_are_passed_over_until_none_is_left():
    gpu, excluded = replace(H100, multiprocessors=2), frozenset()
    seen = []
    while (plan := choose_plan("forward", 16, 1, "bfloat16", gpu, excluded=excluded)).regime != "per_step":
        assert plan not in seen
        seen.append(plan)
        excluded |= {plan}
    costs = [step_cost(plan, gpu).total for plan in seen]
    assert costs == sorted(costs)
    assert len(seen) > 2


def test_a_pinned_plan_is_what_was_asked_for():
    pins = {"regime": "persistent", "units": 16, "rows": 32, "block_k": 128, "num_warps": 4, "groups": 1}
    plan = choose_plan("forward", 650, 64, "bfloat16", H100, pinned=pins)
    assert {name: getattr(plan, name) for name in pins} == pins
    assert plan.source == "pinned"
    assert plan.launches == 2
    assert plan.grid == (41, 1, 1)
    assert choose_plan("forward", 650, 64, "bfloat16", H100, pinned={"regime": "per_step"}).regime == "per_step"


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"unit": 16}, "expected fields among regime, units.*received 'unit'"),
        ({"units": 24}, r"expected units to be one of \(4, 8.*received 24"),
        ({"regime": "fast"}, "expected regime to be one of.*received 'fast'"),
        ({"groups": 0}, "expected groups to be a positive whole number; received 0"),
        ({"units": 4, "groups": 2}, "choices that H100 can run.*H=1024.*received groups=2, units=4"),
        (
            {
                "regime": "persistent",
                "units": 32,
                "rows": 16,
                "block_k": 128,
                "num_warps": 8,
                "keep_tile": 1,
                "split_k": 1,
            },
            r"it needs \d+ bytes of shared memory per program and H100 has 232448.*Pin fewer fields",
        ),
        (
            {"regime": "single", "units": 32, "rows": 16, "block_k": 32, "num_warps": 8, "keep_tile": 1, "split_k": 1},
            "'single' is for units = block_k >= H",
        ),
    ],
)
def test_a_pinned_plan_that_cannot_run_is_refused(pins, message):
    with pytest.raises(PlanError, match=message):
        choose_plan("forward", 1024, 16, "bfloat16", H100, pinned=pins)


def test_measured_plans_overrule_the_model(monkeypatch):
    model = choose_plan("forward", 768, 16, "bfloat16", H100)
    choice = {"units": 32 if model.units != 32 else 16, "num_warps": 4}
    key = ("sm_90", 132, "forward", "bfloat16", 768)
    monkeypatch.setattr(plan_choice, "MEASURED", {(*key, 16): choice, (*key, 64): {"units": 64}})
    plan_choice._choose.cache_clear()
    try:
        measured = choose_plan("forward", 768, 16, "bfloat16", H100)
        assert (measured.units, measured.num_warps, measured.source) == (choice["units"], 4, "measured")
        assert choose_plan("forward", 768, 7, "bfloat16", KNOWN_GPUS["H200"]).units == measured.units
        assert choose_plan("forward", 768, 17, "bfloat16", H100).units == 64
        for other in (("forward", 768, 128), ("backward", 768, 16), ("forward", 640, 16)):
            assert choose_plan(*other, "bfloat16", H100).source == "model"
        assert choose_plan("forward", 768, 16, "bfloat16", H100, pinned={"units": model.units}).source == "pinned"
    finally:
        plan_choice._choose.cache_clear()


def test_every_measured_entry_can_run():
    by_chip = {(gpu.arch, gpu.multiprocessors): gpu for gpu in KNOWN_GPUS.values()}
    for (arch, multiprocessors, kernel, dtype, H, B), choice in plan_choice.MEASURED.items():
        plan = choose_plan(kernel, H, B, dtype, by_chip[arch, multiprocessors])
        assert {name: getattr(plan, name) for name in choice} == choice


def test_options_hold_in_their_context_only():
    outside = current_options()
    with launch_options(forward={"units": 8}, max_spins=3) as options:
        assert current_options() is options
        with launch_options(backward={"rows": 16}):
            assert current_options().pins("forward") == {"units": 8}
            assert current_options().pins("backward") == {"rows": 16}
            assert current_options().max_spins == 3
        assert current_options().pins("backward") == outside.pins("backward")
    assert current_options() == outside


def test_pins_of_the_environment():
    assert parse_pins("") == {"forward": {}, "backward": {}}
    assert parse_pins("forward: units=8 regime=persistent; backward: rows=32") == {
        "forward": {"units": 8, "regime": "persistent"},
        "backward": {"rows": 32},
    }
    for wrong in ("units=8", "forward units=8", "sideways: units=8", "forward: units"):
        with pytest.raises(ValueError, match="TLSTM_PLAN: expected 'forward: name=value"):
            parse_pins(wrong)


def test_the_model_knows_what_makes_a_step_long():
    """Not figures but directions: what must cost more does."""
    plan = choose_plan("forward", 768, 16, "bfloat16", H100, pinned={"regime": "persistent", "units": 8, "rows": 16})
    wider = choose_plan("forward", 768, 16, "bfloat16", H100, pinned={"regime": "persistent", "units": 16, "rows": 16})
    assert step_cost(wider, H100).broadcast < step_cost(plan, H100).broadcast
    # Its 64 rows of weights make wgmma, which reads either operand once; those of twice the units are twice as many.
    assert step_cost(wider, H100).shared < step_cost(plan, H100).shared
    widest = choose_plan("forward", 768, 16, "bfloat16", H100, pinned={"regime": "persistent", "units": 32, "rows": 16})
    assert step_cost(widest, H100).shared > step_cost(wider, H100).shared
    # 98 KB of weights and 24 KB of h read, and h stored before: 128 bytes per clock.
    bytes_moved = 64 * 768 * 2 + 2 * 16 * 768 * 2
    assert step_cost(wider, H100).shared == pytest.approx(H100.us(bytes_moved / 128))
    again = choose_plan("forward", 768, 16, "bfloat16", H100, pinned={"units": 16, "rows": 16, "keep_tile": 0})
    assert step_cost(again, H100).broadcast > 2 * step_cost(wider, H100).broadcast
    streamed = choose_plan("forward", 768, 16, "bfloat16", H100, pinned={"regime": "streamed"})
    assert streamed.cost.total > plan.cost.total
    assert streamed.cost.weights > 0 == plan.cost.weights
    single = choose_plan("forward", 64, 16, "bfloat16", H100, pinned={"regime": "single"})
    assert single.cost.broadcast == 0
    assert single.cost.hop < plan.cost.hop
    exact, tf32 = (choose_plan("forward", 768, 64, "float32", H100, 1, p) for p in ("ieee", "tf32"))
    assert exact.cost.matrix > tf32.cost.matrix
    assert isinstance(plan, LaunchPlan)
