"""Cell states on request, and the mode that computes the gates again, against torch.nn.LSTM one step at a time."""

from __future__ import annotations

import pytest
import torch
from test_layer_properties import FLOOR, error
from tlstm_kernels.layer_op import lstm_layer, lstm_layer_op
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tlstm.functional import available_backends
from tlstm.layer import LSTM

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
both_backends = pytest.mark.parametrize("backend", available_backends())
T, B, I, H, L = 6, 3, 5, 7, 2


def one_direction(module, layer, suffix):
    """A torch.nn.LSTM of one layer and direction with these weights."""
    size = module.get_parameter(f"weight_ih_l{layer}").shape[1]
    single = torch.nn.LSTM(size, H, proj_size=module.proj_size, dtype=module.weight_ih_l0.dtype)
    names = [name for name, _ in single.named_parameters()]
    return single, {n: module.get_parameter(n.replace("_l0", f"_l{layer}{suffix}")) for n in names}


def step_by_step(module, x, state, lengths):
    """y, and c of every layer after every step, from torch.nn.LSTM called for one step of one row at a time."""
    cells = []
    for layer in range(module.num_layers):
        outputs, own_cells = [], []
        for k, suffix in enumerate(("", "_reverse")[: 1 + module.bidirectional]):
            single, weights = one_direction(module, layer, suffix)
            index = layer * (1 + module.bidirectional) + k
            rows = []
            for row, length in enumerate(lengths):
                h, c = state[0][index, row][None, None], state[1][index, row][None, None]
                width = h.shape[-1]
                steps = [x.new_zeros(width + H)] * T
                for t in reversed(range(length)) if k else range(length):
                    _, (h, c) = torch.func.functional_call(single, weights, (x[t, row][None, None], (h, c)))
                    steps[t] = torch.cat((h[0, 0], c[0, 0]))
                rows.append(torch.stack(steps))
            both = torch.stack(rows, 1)
            outputs.append(both[..., :width])
            own_cells.append(both[..., width:])
        x = torch.cat(outputs, -1)
        cells.append(torch.cat(own_cells, -1))
    return x, cells


def results(module, run, dtype, lengths, rows):
    """Output, cells, and the gradients of a loss on both; the same draw in every dtype."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    x, state = draw(T, B, I), (draw(rows, B, module.proj_size or H), draw(rows, B, H))
    y, cells = run(module, x, state, lengths)
    outer = [torch.randn(t.shape, generator=generator).to(dtype) for t in (y, *cells)]
    loss = sum((t * d).sum() for t, d in zip((y, *cells), outer, strict=True))
    return [t.detach() for t in (y, *cells, *torch.autograd.grad(loss, [x, *state, *module.parameters()]))]


def ours(module, x, state, lengths):
    y, (h_n, c_n), cells = module(x, state, lengths=torch.tensor(lengths), return_cell_states=True)
    assert isinstance(cells, tuple)
    for layer, own in enumerate(cells):  # the last one of each row is c_n
        last = own[torch.tensor(lengths) - 1, torch.arange(B)][:, :H]
        assert torch.equal(last, c_n[layer * (1 + module.bidirectional)])
    assert (y.requires_grad, h_n.requires_grad) == (True, True)
    return y, cells


@both_backends
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj_size": 3}])
def test_cell_states_equal_torch_one_step_at_a_time(backend, recompute, options):
    module = LSTM(I, H, L, backend=backend, recompute=recompute, **options)
    rows, lengths = L * (1 + module.bidirectional), (6, 2, 5)
    actual = results(module, ours, torch.float32, lengths, rows)
    theirs = results(module, step_by_step, torch.float32, lengths, rows)
    exact = results(module.double(), step_by_step, torch.float64, lengths, rows)
    for a, t, e in zip(actual, theirs, exact, strict=True):
        assert a.dtype == torch.float32
        floor = FLOOR * torch.finfo(torch.float32).eps * max(1.0, e.abs().max().item())
        assert error(a, e) <= 2 * error(t, e) + floor


@both_backends
def test_cell_states_have_the_form_of_the_output(backend):
    module = LSTM(I, H, L, bidirectional=True, backend=backend)
    x, lengths = torch.randn(T, B, I), torch.tensor((2, 6, 0))
    y, state, cells = module(x, lengths=lengths, return_cell_states=True)
    assert [c.shape for c in cells] == [(T, B, 2 * H)] * L
    assert not cells[1][2:, 0].any()
    assert not cells[0][:, 2].any()

    module.batch_first = True
    _, _, turned = module(x.transpose(0, 1), lengths=lengths, return_cell_states=True)
    assert all(torch.equal(a.transpose(0, 1), b) for a, b in zip(turned, cells, strict=True))
    _, _, alone = module(x[:2, 0], return_cell_states=True)
    assert all(torch.allclose(a, b[:2, 0], atol=1e-6) for a, b in zip(alone, cells, strict=True))

    some = torch.tensor((2, 6, 3))
    packed = pack_padded_sequence(x, some, enforce_sorted=False)
    _, _, of_packed = module(packed, return_cell_states=True)
    _, _, padded = module(x.transpose(0, 1), lengths=some, return_cell_states=True)
    for a, b in zip(of_packed, padded, strict=True):
        torch.testing.assert_close(pad_packed_sequence(a, batch_first=True)[0], b)

    y, (h_n, c_n), nothing = module(x.transpose(0, 1)[:, :0], state, return_cell_states=True)
    assert [c.shape for c in (y, *nothing)] == [(B, 0, 2 * H)] * (1 + L)
    assert torch.equal(torch.stack((h_n, c_n)), torch.stack(state))


@pytest.mark.parametrize("keep", ["gates", "states", "nothing"])
@pytest.mark.parametrize("lengths", [None, (2, 0, 1)])
def test_operator_checks_and_second_derivatives(keep, lengths):
    weights = [torch.randn(s) for _ in range(2) for s in ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))]
    tensors = [torch.randn(2, B, I), torch.randn(2, B, H), torch.randn(2, B, H), *weights]
    lengths = None if lengths is None else torch.tensor(lengths)
    grad = [t.clone().requires_grad_(keep != "nothing") for t in tensors]
    torch.library.opcheck(
        lstm_layer_op, (*grad[:3], grad[3:], lengths, "reference", keep, None, None, None, True, 0.0, 0.0, None)
    )
    if keep == "nothing":
        return

    def function(x, h_0, c_0, *weights):
        options = {"backend": "reference", "recompute": keep == "states", "with_cells": True}
        return lstm_layer(x, h_0, c_0, list(weights), lengths, **options)

    double = [t.double().requires_grad_() for t in tensors]
    assert gradcheck(function, double, fast_mode=True)
    assert gradgradcheck(function, double, fast_mode=True)


@pytest.mark.parametrize("backend", available_backends())
def test_cell_states_alone_give_gradients_and_autocast_casts_them(backend):
    module, x = LSTM(I, H, L, backend=backend), torch.randn(T, B, I)
    *_, cells = module(x, return_cell_states=True)
    cells[0].sum().backward()
    assert module.weight_hh_l0.grad.abs().sum() > 0
    assert module.weight_hh_l1.grad is None
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y, _, half = module(x, return_cell_states=True)
    assert y.dtype == half[0].dtype == torch.bfloat16
    # c is rounded once, h and the weights and inputs before it once each, at each of 6 steps.
    assert (half[0].float() - cells[0]).norm() <= 8 * torch.finfo(torch.bfloat16).eps * cells[0].norm()


def saved_bytes(module, x):
    """What the graph of one call holds, apart from its parameters and input."""
    own = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    held = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = module(x)
    return sum(held.values()), y


@both_backends
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recompute_holds_less_and_gives_the_same(backend, dropout):
    module = LSTM(I, 65, L, dropout=dropout, backend=backend)
    x, gradients, held = torch.randn(9, B, I, requires_grad=True), [], []
    for module.recompute in (False, True):
        torch.manual_seed(1)
        size, y = saved_bytes(module, x)
        held.append(size)
        gradients.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
    assert held[1] < 0.6 * held[0]
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert "recompute=True" in repr(module)


@both_backends
def test_recompute_with_resets_lengths_and_packed_rows(backend):
    module, x = LSTM(I, H, L, backend=backend), torch.randn(T, B, I)
    packed = pack_padded_sequence(x, torch.tensor((2, 6, 3)), enforce_sorted=False)
    some = {"lengths": torch.tensor((2, 6, 0)), "resets": torch.rand(T, B) < 0.4}
    results = []
    for module.recompute in (False, True):
        y, z = module(x, **some)[0], module(packed)[0].data
        results.append([y, z, *torch.autograd.grad(y.sum() + z.square().sum(), list(module.parameters()))])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
