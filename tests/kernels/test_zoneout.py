"""Zoneout in the reference: against torch's own cell step by step, finite differences, and the masks' definition."""

from __future__ import annotations

import math

import pytest
import torch
from philox_answers import philox_in_python
from reset_cases import LENGTHS, cell_of_gates, gradients, make_inputs
from tlstm_kernels import lstm, lstm_backward, lstm_forward, zoneout
from tlstm_kernels.zoneout import Zoneout, kept_units, zoneout_of
from torch.autograd import gradcheck, gradgradcheck

SEED = torch.tensor(-0x123456789ABCDEF)
RANDOM, EXPECTED = Zoneout(0.5, 0.25, SEED), Zoneout(0.5, 0.25)
both_kinds = pytest.mark.parametrize("kind", [RANDOM, EXPECTED], ids=["random", "expected"])
both_readings = pytest.mark.parametrize("reverse", [False, True])


def shares_in_python(kind, t, row, unit, reverse):
    """How much of a unit's h and c a step keeps."""
    if kind.seed is None:
        return kind.h, kind.c
    seed = int(kind.seed)
    words = philox_in_python([unit, t, row, 2 if reverse else 1], [seed % 2**32, seed >> 32 & 0xFFFFFFFF])
    return float(words[0] < kind.h * 2**32), float(words[1] < kind.c * 2**32)


def row_by_row(kind, x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, reverse, resets, h_reset, c_reset):
    """Each row alone through torch's LSTM cell, one step after another, unit by unit kept or not."""
    T, B, _ = x.shape
    H, ys, h_n, c_n = c_0.shape[1], [], [], []
    for row in range(B):
        length = T if lengths is None else int(lengths[row])
        h, c = h_0[row], c_0[row]
        y = [torch.zeros_like(h)] * T
        for t in reversed(range(length)) if reverse else range(length):
            if t + reverse < length and resets[t + reverse, row]:
                h = torch.zeros_like(h) if h_reset is None else h_reset[row]
                c = torch.zeros_like(c) if c_reset is None else c_reset[row]
            gates = x[t, row] @ w_ih.T + b_ih + b_hh + h @ w_hh.T
            h_new, c_new = cell_of_gates(gates[None], c[None], torch.eye(4 * H, dtype=x.dtype))
            h_new = h_new[0] if w_hr is None else h_new[0] @ w_hr.T
            shares = torch.tensor([shares_in_python(kind, t, row, unit, reverse) for unit in range(H)]).to(x)
            keep_h, keep_c = shares[: len(h), 0], shares[:, 1]
            h, c = keep_h * h + (1 - keep_h) * h_new, keep_c * c + (1 - keep_c) * c_new[0]
            y[t] = h
        ys.append(torch.stack(y))
        h_n.append(h)
        c_n.append(c)
    return torch.stack(ys, 1), torch.stack(h_n), torch.stack(c_n)


@both_kinds
@both_readings
@pytest.mark.parametrize("to_a_state", [False, True])
@pytest.mark.parametrize("P", [None, 5])
def test_equals_a_loop_over_torchs_cell(kind, P, to_a_state, reverse):
    inputs = make_inputs(P, to_a_state, LENGTHS, reverse)
    expected, actual = row_by_row(kind, *inputs), lstm(*inputs, kind)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)
    # The same sums in another order: a few roundings of float64 on sums of up to T * B = 20 terms.
    expected_d = gradients(expected, inputs)
    torch.testing.assert_close(gradients(actual, inputs), expected_d, rtol=1e-12, atol=1e-12)
    # The written gradients are those of the written equations, taken by autograd.
    *outputs, steps = lstm_forward(*inputs, kind)
    torch.testing.assert_close(gradients(outputs, inputs), expected_d, rtol=1e-12, atol=1e-12)
    outer = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view_as(o) for o in outputs]
    d = lstm_backward(*outer, *inputs[:8], steps, *inputs[8:], kind)
    torch.testing.assert_close(d.x, expected_d[0], rtol=1e-12, atol=1e-12)


@both_kinds
@both_readings
@pytest.mark.parametrize("P", [None, 2])
def test_gradients_equal_finite_differences(kind, P, reverse):
    inputs = make_inputs(P, True, (3, 0, 2), reverse, size=(3, 3, 2, 3))
    assert gradcheck(lambda *inputs: lstm(*inputs, kind), inputs)
    assert gradgradcheck(lambda *inputs: lstm(*inputs, kind), inputs, fast_mode=True)


def test_nothing_kept_changes_no_bit_and_everything_kept_moves_nothing():
    inputs = make_inputs()[:10]
    for kind in (zoneout_of(0.0, 0.0, SEED), Zoneout(0.0, 0.0, SEED), Zoneout(0.0, 0.0)):
        for actual, expected in zip(lstm(*inputs, zoneout=kind), lstm(*inputs), strict=True):
            assert torch.equal(actual, expected)
    _, h_0, c_0, *_ = inputs
    for kind in (Zoneout(1.0, 1.0, SEED), Zoneout(1.0, 1.0)):
        y, h_n, c_n = lstm(*inputs, zoneout=kind)
        assert torch.equal(y, h_0.expand_as(y))
        assert torch.equal(h_n, h_0)
        assert torch.equal(c_n, c_0)


def test_a_kept_unit_takes_nothing_from_the_step():
    inputs = make_inputs()[:10]
    poisoned = [t.detach().clone() if torch.is_tensor(t) else t for t in inputs]
    poisoned[0][2] = torch.nan
    assert not lstm(*poisoned, zoneout=Zoneout(1.0, 1.0, SEED))[0].isnan().any()
    y, h_n, c_n = lstm(*inputs, zoneout=Zoneout(1.0, 1.0, SEED))
    (y.sum() + h_n.sum() + c_n.sum()).backward()
    assert torch.equal(inputs[1].grad, torch.full_like(h_n, len(y) + 1))
    assert torch.equal(inputs[2].grad, torch.ones_like(c_n))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_masks_have_the_given_share_and_are_independent(p):
    """Every pair of masks that could be mixed up: of h and c, of steps, rows, units, directions and seeds."""
    T, B, H = 40, 16, 96
    kept_h, kept_c = kept_units(Zoneout(p, p, SEED), (T, B, H), H, reverse=False)
    back_h, _ = kept_units(Zoneout(p, p, SEED), (T, B, H), H, reverse=True)
    other_h, _ = kept_units(Zoneout(p, p, SEED + 1), (T, B, H), H, reverse=False)
    sigma = math.sqrt(p * (1 - p) / kept_h.numel())
    for mask in (kept_h, kept_c, back_h, other_h):
        assert abs(mask.double().mean() - p) < 5 * sigma
    pairs = {
        "h and c": (kept_h, kept_c),
        "directions": (kept_h, back_h),
        "seeds": (kept_h, other_h),
        "steps": (kept_h[1:], kept_h[:-1]),
        "rows": (kept_h[:, 1:], kept_h[:, :-1]),
        "units": (kept_h[..., 1:], kept_h[..., :-1]),
    }
    for what, (a, b) in pairs.items():
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())).double())[0, 1]
        assert abs(correlation) < 5 / math.sqrt(a.numel()), what


def test_masks_are_those_of_the_definition_however_many_steps_are_drawn_at_once(monkeypatch):
    kind, shape = Zoneout(0.3, 0.7, SEED), (7, 3, 5)
    whole = kept_units(kind, shape, 4, reverse=True)
    monkeypatch.setattr(zoneout, "_NUMBERS", 2 * 3 * 5)
    for mask, again in zip(whole, kept_units(kind, shape, 4, reverse=True), strict=True):
        assert torch.equal(mask, again)
    for t, row, unit in ((0, 0, 0), (6, 2, 3), (3, 1, 2)):
        expected = shares_in_python(kind, t, row, unit, reverse=True)
        assert (float(whole[0][t, row, unit]), float(whole[1][t, row, unit])) == expected


def test_no_steps_and_no_rows():
    for size in ((0, 3, 2, 3), (2, 0, 2, 3)):
        inputs = make_inputs(size=size)[:10]
        y, h_n, c_n = lstm(*inputs, zoneout=RANDOM)
        assert y.shape == (size[0], size[1], 3)
        (y.sum() + h_n.sum() + c_n.sum()).backward()
        assert inputs[1].grad.shape == h_n.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@both_kinds
def test_half_types(kind, dtype):
    inputs = make_inputs(5, True, LENGTHS, dtype=dtype)
    exact = [t.detach().double().requires_grad_() if torch.is_tensor(t) and t.requires_grad else t for t in inputs]
    results = []
    for arguments in (inputs, exact):
        outputs = lstm(*arguments, kind)
        results.append([*outputs, *gradients(outputs, arguments)])
    for actual, truth in zip(*results, strict=True):
        assert actual.dtype == dtype
        # h is rounded at each of 5 steps, and the gradient once more.
        assert (actual.double() - truth).norm() <= 6 * torch.finfo(dtype).eps * truth.norm()


def test_function_transforms():
    inputs = [t.detach() if torch.is_tensor(t) else t for t in make_inputs(lengths=LENGTHS)]
    seeds = torch.tensor((3, 4, 2**40))

    def y_of(x, seed):
        return lstm(x, *inputs[1:], Zoneout(0.5, 0.5, seed))[0]

    many = torch.stack((inputs[0], -inputs[0], 2 * inputs[0]))
    actual = torch.func.vmap(y_of)(many, seeds)
    torch.testing.assert_close(actual, torch.stack([y_of(*pair) for pair in zip(many, seeds, strict=True)]))
    assert not torch.equal(y_of(many[0], seeds[0]), y_of(many[0], seeds[1]))
