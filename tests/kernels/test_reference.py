"""The reference against finite differences, torch.nn.LSTM, torch.nn.LSTMCell and the article's form."""

from __future__ import annotations

import pytest
import torch
from tlstm_kernels import ArticleWeights, article_forward, lstm, lstm_backward, lstm_forward
from torch.autograd import gradcheck, gradgradcheck

# name: (T, B, I, H), P, bias, lengths, reverse
CASES = {
    "plain": ((3, 2, 2, 3), None, True, None, False),
    "no bias": ((3, 2, 2, 3), None, False, None, False),
    "reverse": ((3, 2, 2, 3), None, True, None, True),
    "projection": ((3, 2, 2, 3), 2, True, None, False),
    "lengths": ((3, 3, 2, 2), None, True, (3, 0, 2), False),
    "lengths, reverse, projection": ((3, 3, 2, 3), 2, True, (1, 3, 0), True),
    "one of everything": ((1, 1, 1, 1), None, True, None, False),
    "no steps": ((0, 2, 2, 3), None, True, None, False),
    "no rows": ((2, 0, 2, 3), None, True, None, False),
}


def make_inputs(case, dtype=torch.float64, requires_grad=True, seed=0):
    """The tensor arguments of `lstm` in order, then lengths and reverse."""
    (T, B, I, H), P, bias, lengths, reverse = case
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)

    width = P or H
    biases = (draw(4 * H), draw(4 * H)) if bias else (None, None)
    tensors = (draw(T, B, I), draw(B, width), draw(B, H), draw(4 * H, I), draw(4 * H, width), *biases)
    w_hr = draw(P, H) if P else None
    return *tensors, w_hr, None if lengths is None else torch.tensor(lengths), reverse


def torch_lstm(inputs):
    """torch.nn.LSTM with the weights of `inputs` (one direction, no lengths), and its results for their x and state."""
    x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr, _, _ = inputs
    H = w_hh.shape[0] // 4
    module = torch.nn.LSTM(
        x.shape[-1], H, bias=b_ih is not None, proj_size=0 if w_hr is None else w_hr.shape[0], dtype=x.dtype
    )
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh, w_hr) if w is not None]
    with torch.no_grad():
        for parameter, w in zip(module.parameters(), weights, strict=True):
            parameter.copy_(w)
    return module, module(x, (h_0[None], c_0[None]))


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_finite_differences(name):
    inputs = make_inputs(CASES[name])
    assert all(output.requires_grad for output in lstm(*inputs))  # gradcheck leaves out those that do not
    assert gradcheck(lstm, inputs)
    assert gradgradcheck(lstm, inputs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, (5, 0, 3, 1, 5, 4, 2)])
@pytest.mark.parametrize("P", [None, 5])
def test_handwritten_backward_equals_autograd_of_the_forward(reverse, lengths, P):
    inputs = make_inputs(((5, 7, 6, 13), P, True, lengths, reverse))
    y, h_n, c_n, steps = lstm_forward(*inputs)
    d_outputs = [torch.randn_like(output) for output in (y, h_n, c_n)]
    tensors = [tensor for tensor in inputs[:8] if tensor is not None]
    expected = torch.autograd.grad((y, h_n, c_n), tensors, d_outputs)
    d = lstm_backward(*d_outputs, *inputs[:8], steps, *inputs[8:])
    actual = [g for g in (d.x, d.h_0, d.c_0, d.w_ih, d.w_hh, d.b_ih, d.b_hh, d.w_hr) if g is not None]
    # The same sums in another order: a few roundings of float64 on sums of up to T * B = 35 terms.
    torch.testing.assert_close(actual, list(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("P", [None, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch_in_float64(P, bias):
    inputs = make_inputs(((9, 7, 6, 13), P, bias, None, False))
    module, (y, (h_n, c_n)) = torch_lstm(inputs)
    actual = lstm(*inputs)
    torch.testing.assert_close(actual, (y, h_n[0], c_n[0]), rtol=1e-13, atol=1e-14)
    (y.square().sum() + (h_n * c_n[..., : h_n.shape[-1]]).sum()).backward()
    expected = [parameter.grad for parameter in module.parameters()]
    weights = [w for w in inputs[3:8] if w is not None]
    loss = actual[0].square().sum() + (actual[1] * actual[2][..., : h_n.shape[-1]]).sum()
    torch.testing.assert_close(list(torch.autograd.grad(loss, weights)), expected, rtol=1e-12, atol=1e-12)


def test_every_step_is_returned():
    inputs = make_inputs(((6, 3, 4, 7), None, True, None, False), requires_grad=False)
    x, h, c, w_ih, w_hh, b_ih, b_hh, *_ = inputs
    steps = lstm_forward(*inputs)[-1]
    cell = torch.nn.LSTMCell(4, 7, dtype=torch.float64)
    with torch.no_grad():
        for parameter, w in zip(cell.parameters(), (w_ih, w_hh, b_ih, b_hh), strict=True):
            parameter.copy_(w)
    for t in range(6):
        h_before, c_before = h, c
        h, c = cell(x[t], (h_before, c_before))
        torch.testing.assert_close((steps.h[t], steps.c[t]), (h, c), rtol=1e-13, atol=1e-14)
        z = x[t] @ w_ih.T + b_ih + h_before @ w_hh.T + b_hh
        gates = (torch.sigmoid(z[:, :7]), torch.sigmoid(z[:, 7:14]), torch.tanh(z[:, 14:21]), torch.sigmoid(z[:, 21:]))
        torch.testing.assert_close((steps.i[t], steps.f[t], steps.g[t], steps.o[t]), gates, rtol=1e-13, atol=1e-14)


def test_steps_past_a_length_hold_the_frozen_state():
    inputs = make_inputs(((4, 3, 2, 5), None, True, (2, 0, 4), False), requires_grad=False)
    y, h_n, c_n, steps = lstm_forward(*inputs)
    for row, length in enumerate((2, 0, 4)):
        h, c = (steps.h[length - 1, row], steps.c[length - 1, row]) if length else (inputs[1][row], inputs[2][row])
        assert torch.equal(h_n[row], h)
        assert torch.equal(c_n[row], c)
        assert torch.equal(steps.c[length:, row], c.expand(4 - length, -1))
        assert not y[length:, row].any()


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_never_read(reverse):
    case = ((4, 3, 2, 5), None, True, (2, 0, 4), reverse)
    clean, poisoned = make_inputs(case), make_inputs(case)
    with torch.no_grad():
        poisoned[0][2:, 0] = torch.nan
        poisoned[0][:, 1] = torch.inf
    results = []
    for inputs in (clean, poisoned):
        outputs = lstm(*inputs)
        sum(output.sum() for output in outputs).backward()
        results.append([*outputs, *(tensor.grad for tensor in inputs[:7])])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_at_least_as_exact_as_torch(dtype):
    inputs = make_inputs(((13, 7, 6, 16), None, True, None, False), dtype, requires_grad=False)
    with torch.no_grad():
        truth = lstm(*(tensor.double() if torch.is_tensor(tensor) else tensor for tensor in inputs))
        _, (y, (h_n, c_n)) = torch_lstm(inputs)
        *outputs, steps = lstm_forward(*inputs)
    assert steps.c.dtype == steps.i.dtype == torch.float32
    for actual, torch_own, exact in zip(outputs, (y, h_n[0], c_n[0]), truth, strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - exact).abs().max() <= 2 * (torch_own.double() - exact).abs().max()


def test_half_type_gradients_come_back_in_their_own_dtype():
    inputs = make_inputs(((5, 7, 6, 13), 5, True, (5, 0, 3, 1, 5, 4, 2), True), torch.bfloat16)
    exact = [
        t.detach().double().requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs
    ]
    for arguments in (inputs, exact):
        sum(output.double().square().sum() for output in lstm(*arguments)).backward()
    for tensor, other in zip(inputs[:8], exact[:8], strict=True):
        assert tensor.grad.dtype == torch.bfloat16
        # h is rounded to 8 bits at each of 5 steps, and the gradient once more.
        error = (tensor.grad.double() - other.grad).norm() / other.grad.norm()
        assert error <= 6 * torch.finfo(torch.bfloat16).eps


def test_function_transforms():
    inputs = make_inputs(((3, 2, 2, 3), None, True, (3, 1), False), requires_grad=False)
    x, rest = inputs[0], inputs[1:]
    jacobian = torch.func.jacrev(lambda x: lstm(x, *rest)[0])(x)
    expected = torch.autograd.functional.jacobian(lambda x: lstm_forward(x, *rest)[0], x)
    torch.testing.assert_close(jacobian, expected, rtol=1e-12, atol=1e-14)
    many = torch.stack((x, 2 * x))
    torch.testing.assert_close(
        torch.func.vmap(lambda x: lstm(x, *rest)[0])(many), torch.stack([lstm(x, *rest)[0] for x in many])
    )


@pytest.mark.parametrize("T", [0, 1, 9])
def test_articles_form_is_the_same_map(T):
    inputs = make_inputs(((T, 7, 6, 13), None, True, None, False))
    x, h_0, c_0, *weights = inputs[:7]
    tensors = [x, h_0, c_0, *weights]
    article = article_forward(x, h_0, c_0, ArticleWeights.from_torch(*weights))
    stacked = lstm(*inputs)
    torch.testing.assert_close(article, stacked, rtol=1e-13, atol=1e-14)
    gradients = [
        torch.autograd.grad(sum(o.square().sum() for o in outputs), tensors, materialize_grads=True)
        for outputs in (article, stacked)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


def test_articles_form_to_torch_and_back():
    T, B, I, H = 5, 3, 4, 7
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(H, H + I, generator=generator, dtype=torch.float64) for _ in range(4)]
    biases = [torch.randn(H, generator=generator, dtype=torch.float64) for _ in range(4)]
    article = ArticleWeights(*matrices, *biases)
    w_ih, w_hh, b_ih, b_hh = article.to_torch()
    assert not b_hh.any()
    back = ArticleWeights.from_torch(w_ih, w_hh, b_ih, b_hh)
    for name in ("w_f", "w_i", "w_c", "w_o", "b_f", "b_i", "b_c", "b_o"):
        assert torch.equal(getattr(back, name), getattr(article, name)), name

    x = torch.randn(T, B, I, generator=generator, dtype=torch.float64)
    h_0, c_0 = torch.randn(2, B, H, generator=generator, dtype=torch.float64)
    _, (y, (h_n, c_n)) = torch_lstm((x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, None, None, False))
    torch.testing.assert_close(article_forward(x, h_0, c_0, article), (y, h_n[0], c_n[0]), rtol=1e-13, atol=1e-14)


def test_articles_form_adds_the_two_biases_and_takes_none():
    w_ih, w_hh, b_ih, b_hh = make_inputs(((1, 1, 2, 3), None, True, None, False), requires_grad=False)[3:7]
    both = ArticleWeights.from_torch(w_ih, w_hh, b_ih, b_hh)
    assert torch.equal(both.to_torch()[2], b_ih + b_hh)
    assert not ArticleWeights.from_torch(w_ih, w_hh).b_f.any()
