"""Resets in the reference against a loop over torch.nn.LSTMCell, finite differences, and cut sequences."""

from __future__ import annotations

import pytest
import torch
from reset_cases import LENGTHS, MASK, B, T, cell_of_gates, gradients, make_inputs
from tlstm_kernels import lstm, lstm_backward, lstm_forward
from torch.autograd import gradcheck, gradgradcheck


def row_by_row(x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, reverse, resets, h_reset, c_reset):
    """Each row alone through torch's LSTM cell, one step after another."""
    ys, h_n, c_n = [], [], []
    for row in range(x.shape[1]):
        length = x.shape[0] if lengths is None else int(lengths[row])
        h, c = h_0[row], c_0[row]
        y = [torch.zeros_like(h)] * x.shape[0]
        for t in reversed(range(length)) if reverse else range(length):
            if t + reverse < length and resets[t + reverse, row]:
                h = torch.zeros_like(h) if h_reset is None else h_reset[row]
                c = torch.zeros_like(c) if c_reset is None else c_reset[row]
            if w_hr is None:
                h, c = torch.lstm_cell(x[t, row][None], (h[None], c[None]), w_ih, w_hh, b_ih, b_hh)
            else:
                # The cell has no projection: give it the product h W_hh^T, which it multiplies by the identity.
                product, eye = h @ w_hh.T, torch.eye(w_hh.shape[0], dtype=x.dtype)
                gates = x[t, row] @ w_ih.T + b_ih + b_hh + product
                h, c = cell_of_gates(gates[None], c[None], eye)
                h = h @ w_hr.T
            h, c = h[0], c[0]
            y[t] = h
        ys.append(torch.stack(y))
        h_n.append(h)
        c_n.append(c)
    return torch.stack(ys, 1), torch.stack(h_n), torch.stack(c_n)


both_readings = pytest.mark.parametrize("reverse", [False, True])
both_states = pytest.mark.parametrize("to_a_state", [False, True])
every_length = pytest.mark.parametrize("lengths", [None, LENGTHS])


@both_readings
@both_states
@every_length
@pytest.mark.parametrize("P", [None, 5])
def test_equals_a_loop_over_torchs_cell(P, lengths, to_a_state, reverse):
    inputs = make_inputs(P, to_a_state, lengths, reverse)
    expected = row_by_row(*inputs)
    actual = lstm(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)
    expected_d, actual_d = gradients(expected, inputs), gradients(actual, inputs)
    assert len(expected_d) == 7 + (P is not None) + 2 * to_a_state
    # The same sums in another order: a few roundings of float64 on sums of up to T * B = 20 terms.
    torch.testing.assert_close(actual_d, expected_d, rtol=1e-12, atol=1e-12)

    # The written gradients are those of the written equations, taken by autograd.
    *outputs, steps = lstm_forward(*inputs)
    torch.testing.assert_close(gradients(outputs, inputs), expected_d, rtol=1e-12, atol=1e-12)
    outer = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view_as(o) for o in outputs]
    d = lstm_backward(*outer, *inputs[:8], steps, *inputs[8:])
    assert (d.h_reset is None) == (d.c_reset is None) == (not to_a_state)


@both_readings
@both_states
@pytest.mark.parametrize("P", [None, 2])
def test_gradients_equal_finite_differences(P, to_a_state, reverse):
    inputs = make_inputs(P, to_a_state, (3, 0, 2), reverse, size=(3, 3, 2, 3))
    assert gradcheck(lstm, inputs)
    assert gradgradcheck(lstm, inputs, fast_mode=True)


@both_readings
def test_nothing_crosses_a_reset(reverse):
    """What stands on the far side of a reset is not read, not even NaN, and takes no gradient from here."""
    inputs = list(make_inputs(to_a_state=True, reverse=reverse))
    inputs[10] = torch.zeros(T, B, dtype=torch.bool)
    inputs[10][2, 1] = True
    clean = lstm(*inputs)
    poisoned = [t.detach().clone().requires_grad_() if torch.is_tensor(t) and t.requires_grad else t for t in inputs]
    before, after = (slice(2, T), slice(0, 2)) if reverse else (slice(0, 2), slice(2, T))
    with torch.no_grad():
        poisoned[0][before, 1] = torch.nan
        poisoned[1][1], poisoned[2][1] = torch.nan, torch.inf
    y, h_n, c_n = lstm(*poisoned)
    assert y[before, 1].isnan().all()
    assert torch.equal(y[after, 1], clean[0][after, 1])
    assert torch.equal(torch.stack((h_n, c_n)), torch.stack(clean[1:]))

    d = torch.autograd.grad(clean[0][after, 1].sum() + clean[2][1].sum(), [inputs[n] for n in (0, 1, 2, 11, 12)])
    assert not d[0][before].any()
    assert not d[1].any()
    assert not d[2].any()
    assert d[3][1].all()
    assert d[4][1].all()


def test_no_reset_changes_no_bit():
    inputs = make_inputs(to_a_state=True)
    none = torch.zeros_like(MASK)
    for actual, expected in zip(lstm(*inputs[:10], none, *inputs[11:]), lstm(*inputs[:10]), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_reset_to_a_half_state(dtype):
    inputs = make_inputs(5, True, LENGTHS, dtype=dtype)
    exact = [t.detach().double().requires_grad_() if torch.is_tensor(t) and t.requires_grad else t for t in inputs]
    results = []
    for arguments in (inputs, exact):
        outputs = lstm(*arguments)
        results.append([*outputs, *gradients(outputs, arguments)])
    for actual, truth in zip(*results, strict=True):
        assert actual.dtype == dtype
        # h is rounded at each of 5 steps, and the gradient once more.
        assert (actual.double() - truth).norm() <= 6 * torch.finfo(dtype).eps * truth.norm()


def test_function_transforms():
    inputs = make_inputs(to_a_state=True, lengths=LENGTHS)
    inputs = [t.detach() if torch.is_tensor(t) else t for t in inputs]
    many = torch.stack((MASK, 1 - MASK.clamp(0, 1)))

    def y_of(resets):
        return lstm(*inputs[:10], resets, *inputs[11:])[0]

    torch.testing.assert_close(torch.func.vmap(y_of)(many), torch.stack([y_of(resets) for resets in many]))
    jacobian = torch.func.jacrev(lambda c_reset: lstm(*inputs[:12], c_reset)[0])(inputs[12])
    expected = torch.autograd.functional.jacobian(lambda c_reset: lstm_forward(*inputs[:12], c_reset)[0], inputs[12])
    torch.testing.assert_close(jacobian, expected, rtol=1e-12, atol=1e-14)
