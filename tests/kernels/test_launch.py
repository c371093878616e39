"""`launch` on a CPU: its kernels run in Triton's interpreter, programs interleaved, against the reference.

Everything around the kernels is the code that runs on a GPU: plans, allocation, batch slices, directions one by one or
together, lengths, the products outside the recurrence, saved and recomputed gates.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tlstm_kernels import layer_reference
from tlstm_kernels.launch_options import launch_options
from tlstm_kernels.launch_plan import PlanError
from tlstm_kernels.zoneout import Zoneout

kernel_calls = pytest.importorskip("tlstm_kernels.kernel_calls", reason="needs triton")
plan_at_hand = pytest.importorskip("tlstm_kernels.plan_at_hand", reason="needs triton")
pytest.importorskip("greenlet", reason="the interleaved interpreter needs greenlet")

from tlstm_kernels import launch  # noqa: E402

# Small tiles, so that small layers have several programs: pins of the forward and of the backward plan.
SMALL = {"units": 8, "rows": 8, "block_k": 64}, {"units": 16, "rows": 8, "block_k": 64}
STREAMED = tuple(pins | {"regime": "streamed"} for pins in SMALL)
SINGLE = ({"regime": "single", "units": 16, "block_k": 16, "rows": 8},) * 2
TILE_BY_TILE = [tuple(pins | {"groups": 1} for pins in both) for both in (SMALL, SINGLE)]


# name: (T, B, I, H, D), lengths, bias, pins, grids of forward and backward
CASES = {
    "single": ((3, 5, 4, 7, 1), None, True, SINGLE, [(1, 1, 1)] * 2),
    "persistent": ((3, 5, 4, 21, 1), None, True, SMALL, [(3, 1, 1), (2, 1, 1)]),
    "streamed": ((2, 3, 4, 21, 1), None, True, STREAMED, [(3, 1, 1), (2, 1, 1)]),
    "no bias": ((2, 3, 4, 21, 1), None, False, SMALL, [(3, 1, 1), (2, 1, 1)]),
    "both directions in one launch": ((3, 5, 4, 21, 2), None, True, SMALL, [(3, 1, 2), (2, 1, 2)]),
    "directions one by one": ((2, 3, 4, 69, 2), None, True, SMALL, [(9, 1, 1)] * 2 + [(5, 1, 1)] * 2),
    "lengths": ((4, 5, 3, 21, 2), (4, 0, 2, 1, 3), True, SMALL, [(3, 1, 2), (2, 1, 2)]),
    "batch in several launches": ((2, 19, 3, 21, 1), None, True, TILE_BY_TILE[0], [(3, 1, 1)] * 3 + [(2, 1, 1)] * 3),
    "launches with lengths": ((3, 19, 3, 7, 2), (3, 0, 2) * 6 + (1,), True, TILE_BY_TILE[1], [(1, 1, 2)] * 6),
    "one of everything": ((1, 1, 1, 1, 1), None, True, SINGLE, [(1, 1, 1)] * 2),
    "heads": ((3, 5, 4, 3 * 21, 1), None, True, SMALL, [(3, 1, 3), (2, 1, 3)]),
    "heads alone, both directions": ((3, 5, 4, 3 * 7, 2), (3, 0, 2, 1, 3), True, SINGLE, [(1, 1, 6)] * 2),
    "heads, directions one by one": ((2, 3, 4, 3 * 21, 2), None, False, SMALL, [(3, 1, 3)] * 2 + [(2, 1, 3)] * 2),
    "no steps": ((0, 2, 3, 7, 1), None, True, ({}, {}), []),
    "no rows": ((2, 0, 3, 7, 1), None, True, ({}, {}), []),
}  # fmt: skip


def draw(case, dtype=torch.float32, heads=1):
    (T, B, I, H, D), lengths, bias, *_ = case
    shapes = [(4 * H, I), (4 * H, H)] + [(4 * H,)] * (2 * bias)
    weights = [torch.randn(shape, dtype=dtype) * shape[-1] ** -0.5 for _ in range(D) for shape in shapes]
    weights = [w[:, : H // heads].clone() if w.shape == (4 * H, H) else w for w in weights]
    inputs = (torch.randn(T, B, I, dtype=dtype), torch.randn(D, B, H, dtype=dtype), torch.randn(D, B, H, dtype=dtype))
    outer = (torch.randn(T, B, D * H), torch.randn(D, B, H), torch.randn(D, B, H))
    return inputs, weights, None if lengths is None else torch.tensor(lengths), [d.to(dtype) for d in outer]


def run(module, inputs, weights, lengths, outer, keep, resets=(None, None, None), zoneout=None):
    *outputs, gates, cells = module.forward(*inputs, weights, lengths, keep, *resets, zoneout)
    saved = (outputs[0], gates, cells, lengths)
    # The gradient of the cell states is the fourth, where there is one.
    d_cells = outer[3] if len(outer) == 4 else None
    return outputs + module.backward(*outer[:3], *inputs, weights, *saved, True, True, *resets, d_cells, zoneout)


def draw_resets(case, to_a_state):
    """A mask, over the padding too, with a row that resets at every step and one that never does; and the state."""
    (T, B, _, H, D), *_ = case
    mask = torch.randint(0, 2, (T, B)) * 3
    mask[:, 0], mask[:, -1] = 1, 0
    return mask, *((torch.randn(D, B, H), torch.randn(D, B, H)) if to_a_state else (None, None))


@pytest.mark.parametrize("keep", ["gates", "states"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(gpu, name, keep):
    *_, pins, grids = CASES[name]
    inputs, weights, lengths, outer = draw(CASES[name], heads=3 if "heads" in name else 1)
    with launch_options(*pins):
        actual = run(launch, inputs, weights, lengths, outer, keep)
    assert gpu == grids
    expected = run(layer_reference, inputs, weights, lengths, outer, keep)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        # float32 sums of up to T * B = 57 terms of size 1 in another order
        torch.testing.assert_close(a, e, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("keep", ["gates", "states"])
@pytest.mark.parametrize("to_a_state", [False, True])
@pytest.mark.parametrize(
    "name",
    ["single", "streamed", "directions one by one", "lengths", "launches with lengths", "heads alone, both directions"],
)
def test_resets_equal_the_reference(gpu, name, to_a_state, keep):
    inputs, weights, lengths, outer = draw(CASES[name], heads=3 if "heads" in name else 1)
    mask, *state = draw_resets(CASES[name], to_a_state)
    expected = run(layer_reference, inputs, weights, lengths, outer, keep, (mask, *state))
    *_, pins, grids = CASES[name]
    with launch_options(*pins):
        for resets in (mask, mask != 0, (mask != 0).t().contiguous().t()):
            gpu.clear()
            actual = run(launch, inputs, weights, lengths, outer, keep, (resets, *state))
            assert gpu == grids
            assert len(actual) == len(expected) == 6 + len(weights) + 2 * to_a_state
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-5, atol=5e-6)  # as above
            if name != "lengths":
                break  # the forms of a mask once


@pytest.mark.parametrize("keep", ["gates", "states"])
@pytest.mark.parametrize("name", ["launches with lengths", "directions one by one", "heads alone, both directions"])
def test_gradients_of_the_cell_states_equal_the_reference(gpu, name, keep):
    inputs, weights, lengths, outer = draw(CASES[name], heads=3 if "heads" in name else 1)
    (T, B, _, H, D), _, _, pins, grids = CASES[name]
    outer = [*outer, torch.randn(T, B, D, H)]
    with launch_options(*pins):
        actual = run(launch, inputs, weights, lengths, outer, keep)
    assert gpu == grids
    expected = run(layer_reference, inputs, weights, lengths, outer, keep)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=5e-6)  # as above


@pytest.mark.parametrize("keep", ["gates", "states"])
@pytest.mark.parametrize("seed", [None, 2**40 + 5])
@pytest.mark.parametrize(
    "name",
    [
        *("single", "streamed", "directions one by one", "batch in several launches", "launches with lengths"),
        "heads alone, both directions",
    ],
)
def test_zoneout_equals_the_reference(gpu, name, seed, keep):
    """The same masks, also where a launch has some rows of the batch, or the second direction alone."""
    inputs, weights, lengths, outer = draw(CASES[name], heads=3 if "heads" in name else 1)
    zoneout = Zoneout(0.5, 0.3, None if seed is None else torch.tensor(seed))
    (T, B, _, H, D), _, _, pins, grids = CASES[name]
    outer = [*outer, torch.randn(T, B, D, H)]
    with launch_options(*pins):
        actual = run(launch, inputs, weights, lengths, outer, keep, zoneout=zoneout)
    assert gpu == grids
    expected = run(layer_reference, inputs, weights, lengths, outer, keep, zoneout=zoneout)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=5e-6)  # as above


def test_zoneout_step_by_step(gpu):
    inputs, weights, lengths, outer = draw(CASES["lengths"])
    zoneout = Zoneout(0.5, 0.3, torch.tensor(3))
    with launch_options({"regime": "per_step"}, {"regime": "per_step"}):
        actual = run(launch, inputs, weights, lengths, outer, "gates", zoneout=zoneout)
    assert gpu == []
    expected = run(layer_reference, inputs, weights, lengths, outer, "gates", zoneout=zoneout)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_half_types_keep_half_gates(gpu):
    case = CASES["both directions in one launch"]
    inputs, weights, lengths, outer = draw(case, torch.float16)
    with launch_options(*SMALL):
        y, h_n, c_n, gates, cells = launch.forward(*inputs, weights, lengths, "gates")
        actual = run(launch, inputs, weights, lengths, outer, "gates")
    assert y.dtype == h_n.dtype == c_n.dtype == gates.dtype == torch.float16
    assert cells.dtype == torch.float32
    exact = [[t.double() for t in group] for group in (inputs, weights, outer)]
    expected = run(layer_reference, exact[0], exact[1], lengths, exact[2], "gates")
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float16
        # Rounded to 11 bits: x_proj, h and the gates at each of 3 steps, and the result.
        assert (a.double() - e).norm() <= 8 * torch.finfo(torch.float16).eps * e.norm()


def test_half_types_reset_to_a_half_state(gpu):
    dtype = torch.float16
    inputs, weights, lengths, outer = draw(CASES["both directions in one launch"], dtype)
    mask, *state = draw_resets(CASES["both directions in one launch"], to_a_state=True)
    state = [s.to(dtype) for s in state]
    with launch_options(*SMALL):
        actual = run(launch, inputs, weights, lengths, outer, "gates", (mask, *state))
    exact = [[t.double() for t in group] for group in (inputs, weights, outer, state)]
    expected = run(layer_reference, exact[0], exact[1], lengths, exact[2], "gates", (mask, *exact[3]))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        # As above: rounded at each of 3 steps, x_proj, h and the gates, and the result.
        assert (a.double() - e).norm() <= 8 * torch.finfo(dtype).eps * e.norm()


def test_nothing_crosses_a_reset(gpu):
    """NaN before a reset reaches neither what comes after it nor the gradients from there."""
    inputs, weights, lengths, outer = draw(CASES["persistent"])
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 2] = True
    dirty = [t.clone() for t in inputs]
    dirty[0][0, 2], dirty[1][:, 2] = torch.nan, torch.nan
    with launch_options(*SMALL):
        for keep in ("gates", "states"):
            clean = run(launch, inputs, weights, lengths, outer, keep, (mask, None, None))
            y, h_n, c_n, d_x, *_ = run(launch, dirty, weights, lengths, outer, keep, (mask, None, None))
            assert y[0, 2].isnan().all()
            assert torch.equal(y[1:], clean[0][1:])
            assert torch.equal(h_n, clean[1])
            assert torch.equal(c_n, clean[2])
            assert torch.equal(d_x[1:], clean[3][1:])


def test_padding_is_never_read(gpu):
    inputs, weights, lengths, outer = draw(CASES["lengths"])
    poisoned = inputs[0].clone()
    poisoned[2:, 2], poisoned[:, 1] = torch.nan, torch.inf
    with launch_options(*SMALL):
        for keep in ("gates", "states"):
            clean = run(launch, inputs, weights, lengths, outer, keep)
            dirty = run(launch, (poisoned, *inputs[1:]), weights, lengths, outer, keep)
            for a, b in zip(clean, dirty, strict=True):
                assert torch.equal(a, b)


def test_lengths_past_the_end_mean_the_end(gpu):
    inputs, weights, lengths, outer = draw(CASES["lengths"])
    with launch_options(*SMALL):
        actual = run(launch, inputs, weights, torch.tensor((9, -1, 2, 1, 3)), outer, "gates")
        for a, e in zip(actual, run(launch, inputs, weights, lengths, outer, "gates"), strict=True):
            assert torch.equal(a, e)


def test_nan_input_gives_nan_and_ends(gpu):
    inputs, weights, lengths, outer = draw(CASES["persistent"])
    inputs[0][1, 2, 3] = torch.nan
    with launch_options(*SMALL):
        y, *_ = run(launch, inputs, weights, lengths, outer, "gates")
    assert y[1:, 2].isnan().all()
    assert not y[0].isnan().any()
    assert not y[:, [0, 1, 3, 4]].isnan().any()


def test_what_no_kernel_covers_goes_through_the_equations(gpu):
    inputs, weights, lengths, outer = draw(CASES["persistent"], torch.float64)
    actual = run(launch, inputs, weights, lengths, outer, "gates")
    expected = run(layer_reference, inputs, weights, lengths, outer, "gates")
    assert gpu == []
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, e)


def test_a_plan_that_does_not_fit_after_all_is_replaced(gpu, monkeypatch):
    """The estimate of registers and shared memory is not the compiler: its refusal leads to the next best plan."""
    forward_kernel, refused = kernel_calls.persistent_forward_kernel, []

    class Refusing:
        def __getitem__(self, grid):
            def run(*arguments, **options):
                if len(refused) < 2:
                    refused.append((grid, options["BLOCK_K"], options["num_warps"]))
                    raise plan_at_hand.OutOfResources(300000, 232448, "shared memory")
                return forward_kernel[grid](*arguments, **options)

            return run

    monkeypatch.setattr(kernel_calls, "persistent_forward_kernel", Refusing())
    monkeypatch.setattr(plan_at_hand, "_too_large", {})
    inputs, weights, lengths, _ = draw(CASES["persistent"])
    y, *_ = launch.forward(*inputs, weights, lengths, "nothing")
    assert len(set(refused)) == 2
    torch.testing.assert_close(y, layer_reference.forward(*inputs, weights, lengths, "nothing")[0])
    refused.clear()
    with launch_options(*SMALL), pytest.raises(PlanError, match=r"compiled kernel does not fit.*H=21"):
        launch.forward(*inputs, weights, lengths, "nothing")


def test_a_plan_that_spills_is_launched_once_and_then_passed_over(gpu, monkeypatch):
    """Its results are right, but the next best plan gives those of the call, so that every call has the same bits."""
    forward_kernel, launched = kernel_calls.persistent_forward_kernel, []

    class Spilling:
        def __getitem__(self, grid):
            def run(*arguments, **options):
                forward_kernel[grid](*arguments, **options)
                launched.append((grid, options["BLOCK_K"], options["num_warps"], options["KEEP_TILE"]))
                return SimpleNamespace(n_spills=8 if len(launched) <= spilling else 0)

            return run

    monkeypatch.setattr(kernel_calls, "persistent_forward_kernel", Spilling())
    monkeypatch.setattr(plan_at_hand, "_spilling", {})
    inputs, weights, lengths, _ = draw(CASES["persistent"])
    spilling = 2
    first, second = (launch.forward(*inputs, weights, lengths, "nothing")[0] for _ in range(2))
    assert len(launched) == 4  # two that spill, the third one, and that again
    assert len(set(launched)) == 3
    assert torch.equal(first, second)
    torch.testing.assert_close(first, layer_reference.forward(*inputs, weights, lengths, "nothing")[0])
    # A plan that was asked for, and the best one where all of them spill, are run as they are.
    spilling = 10**6
    with launch_options(*SMALL):
        launched.clear()
        launch.forward(*inputs, weights, lengths, "nothing")
        assert len(launched) == 1


def test_a_lost_program_is_reported_instead_of_waited_for(gpu, monkeypatch):
    """A grid in which one program never runs: with a bound on waiting, the error says who waited for what."""
    forward_kernel = kernel_calls.persistent_forward_kernel

    class WithoutTheLast:
        def __getitem__(self, grid):
            return forward_kernel[(grid[0] - 1, *grid[1:])]

    monkeypatch.setattr(kernel_calls, "persistent_forward_kernel", WithoutTheLast())
    inputs, weights, lengths, _ = draw(((3, 5, 4, 21, 1), None, True))
    message = r"2 of 3 programs gave up waiting after 1 loads.*could not start step 1: row 0.*unit slice [12] owns"
    with launch_options(*SMALL, max_spins=1), pytest.raises(kernel_calls.ExchangeError, match=message):
        launch.forward(*inputs, weights, lengths, "nothing")
