"""Recurrent heads: tlstm.LSTM(num_heads=N) against a torch.nn.LSTM whose W_hh is block-diagonal."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_layer_properties import FLOOR, error
from tlstm_kernels import ArgumentError
from tlstm_kernels.layer_op import lstm_layer, lstm_layer_op
from tlstm_kernels.layer_weights import dense_recurrent, diagonal_blocks
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence

from tlstm.config import LSTMConfig
from tlstm.functional import available_backends
from tlstm.layer import LSTM
from tlstm.models import LSTMForCausalLM

both_backends = pytest.mark.parametrize("backend", available_backends())
N, WIDTH = 3, 5  # heads, units of each
H = N * WIDTH


def written_out(w_hh):
    """The block-diagonal matrix, gate by gate, by torch.block_diag."""
    gates = w_hh.detach().chunk(4)
    return torch.cat([torch.block_diag(*gate.chunk(N)) for gate in gates])


def dense_twin(module: LSTM, dtype=torch.float32) -> torch.nn.LSTM:
    """torch.nn.LSTM with the same map."""
    dense = torch.nn.LSTM(4, H, module.num_layers, module.bias, bidirectional=module.bidirectional)
    state = {n: written_out(p) if "weight_hh" in n else p.detach() for n, p in module.named_parameters()}
    dense.load_state_dict(state)
    return dense.to(dtype)


def results(module, x, state, *, lengths=None):
    """Outputs, states, and gradients; those of a dense W_hh as its blocks."""
    dtype = module.weight_hh_l0.dtype
    inputs = [t.detach().to(dtype).requires_grad_() for t in (x, *state)]
    if lengths is None or isinstance(module, LSTM):
        y, (h_n, c_n) = module(inputs[0], tuple(inputs[1:]), **({} if lengths is None else {"lengths": lengths}))
    else:
        packed = pack_padded_sequence(inputs[0], lengths, enforce_sorted=False)
        packed, (h_n, c_n) = module(packed, tuple(inputs[1:]))
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, total_length=x.shape[0])
    loss = sum((o * torch.linspace(-1, 2, o.numel(), dtype=dtype).view_as(o)).sum() for o in (y, h_n, c_n))
    gradients = list(torch.autograd.grad(loss, [*inputs, *module.parameters()]))
    gradients = [diagonal_blocks(g, N) if g.shape == (4 * H, H) else g for g in gradients]
    return [t.detach() for t in (y, h_n, c_n, *gradients)]


@both_backends
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"bias": False}])
@pytest.mark.parametrize("lengths", [None, (6, 2, 5)])
def test_equals_a_dense_lstm_with_zeros_between_the_blocks(backend, options, lengths):
    module = LSTM(4, H, 2, num_heads=N, backend=backend, **options)
    assert module.weight_hh_l1.shape == (4 * H, WIDTH)
    rows = 2 * (1 + module.bidirectional)
    x, state = torch.randn(6, 3, 4), (torch.randn(rows, 3, H), torch.randn(rows, 3, H))
    lengths = None if lengths is None else torch.tensor(lengths)
    exact = results(dense_twin(module, torch.float64), x, state, lengths=lengths)
    theirs = results(dense_twin(module), x, state, lengths=lengths)
    ours = results(module, x, state, lengths=lengths)
    for a, t, e in zip(ours, theirs, exact, strict=True):
        floor = FLOOR * torch.finfo(torch.float32).eps * max(1.0, e.abs().max().item())
        assert error(a, e) <= 2 * error(t, e) + floor


def test_blocks_and_dense_matrix_are_inverses():
    w = torch.randn(4 * H, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.equal(dense_recurrent(w), written_out(w))
    assert torch.equal(diagonal_blocks(dense_recurrent(w), N), w)
    assert torch.equal(dense_recurrent(w.detach().T.contiguous().T), written_out(w))
    assert gradcheck(dense_recurrent, w)
    broken = torch.full_like(w, torch.inf)
    assert dense_recurrent(broken).isinf().sum() == w.numel()  # no NaN between the blocks
    square = torch.randn(8, 2)
    assert dense_recurrent(square) is square


@both_backends
def test_one_head_does_not_see_the_others(backend):
    module = LSTM(4, H, num_heads=N, backend=backend)
    x, state = torch.randn(6, 3, 4), [torch.randn(1, 3, H) for _ in range(2)]
    y, _ = module(x, state)
    state[0][..., WIDTH : 2 * WIDTH] += 1
    z, _ = module(x, state)
    changed = (y != z).any(0).any(0).view(N, WIDTH)
    assert changed.any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("keep", ["gates", "states"])
def test_operator_checks_and_derivatives(keep):
    x, h_0, c_0 = torch.randn(2, 3, 4), torch.randn(2, 3, H), torch.randn(2, 3, H)
    weights = [torch.randn(s) for _ in range(2) for s in ((4 * H, 4), (4 * H, WIDTH), (4 * H,), (4 * H,))]
    for tensor in (x, h_0, c_0, *weights):
        tensor.requires_grad_()
    torch.library.opcheck(
        lstm_layer_op, (x, h_0, c_0, weights, None, "reference", keep, None, None, None, False, 0.0, 0.0, None)
    )
    double = [t.detach().double().requires_grad_() for t in (x, h_0, c_0, *weights)]

    def function(x, h_0, c_0, *weights):
        return lstm_layer_op(
            x, h_0, c_0, list(weights), None, "reference", keep, None, None, None, False, 0.0, 0.0, None
        )[:3]

    assert gradcheck(function, double, fast_mode=True)
    assert gradgradcheck(function, double, fast_mode=True)


def test_operator_refuses_a_width_that_is_no_divisor():
    x, state = torch.randn(2, 3, 4), torch.randn(1, 3, H)
    for width in (4, 0, 2 * H):
        weights = [torch.randn(4 * H, 4), torch.randn(4 * H, width)]
        with pytest.raises(ArgumentError, match=rf"weights\[1\]: expected .* shape \({4 * H}, {H}\)"):
            lstm_layer(x, state, state, weights, backend="reference")


@both_backends
def test_copies_dtypes_and_description(backend):
    module = LSTM(4, H, num_heads=N, backend=backend)
    x = torch.randn(6, 3, 4)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.num_heads == N
        assert torch.equal(other(x)[0], module(x)[0])
    assert f"num_heads={N}" in repr(module)
    y, _ = module.double()(x.double())
    assert y.dtype == torch.float64
    module.flatten_parameters()
    with torch.autocast("cpu", torch.bfloat16):
        assert module.float()(x)[0].dtype == torch.bfloat16
    assert LSTM(4, H, num_heads=1).state_dict().keys() == torch.nn.LSTM(4, H).state_dict().keys()


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")
@both_backends
def test_export(backend):
    module, x = LSTM(4, H, num_heads=N, backend=backend).eval(), torch.randn(6, 3, 4)
    program = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(program(2 * x), module(2 * x))


@pytest.mark.parametrize("wrong", [0, 2, -1, 1.0, True, None])
def test_wrong_number_of_heads(wrong):
    with pytest.raises(ValueError, match=rf"num_heads: expected a whole number that divides hidden_size = {H}"):
        LSTM(4, H, num_heads=wrong)
    if wrong is not True:
        with pytest.raises(ValueError, match="num_heads"):
            LSTMConfig(vocab_size=7, hidden_size=H, num_heads=wrong)


def test_heads_beside_a_projection():
    with pytest.raises(ValueError, match="num_heads: expected 1 with a projection"):
        LSTM(4, H, proj_size=N, num_heads=N)
    with pytest.raises(ValueError, match=r"num_heads: expected a divisor .* and 1 beside a projection"):
        LSTMConfig(vocab_size=7, hidden_size=H, proj_size=N, num_heads=N)


def test_models_have_heads(tmp_path):
    config = LSTMConfig(
        vocab_size=7, hidden_size=H, num_layers=2, num_heads=N, recompute=True, initializer="orthogonal"
    )
    model = LSTMForCausalLM(config).eval()
    weight = dict(model.named_parameters())["model.layers.1.weight_hh_l0"]
    assert weight.shape == (4 * H, WIDTH)
    for block in weight.chunk(4 * N):
        torch.testing.assert_close(block @ block.T, torch.eye(WIDTH), rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded, ids = LSTMForCausalLM.from_pretrained(tmp_path), torch.randint(7, (2, 9))
    assert loaded.config.num_heads == N
    assert loaded.model.layers[0].recompute
    assert torch.equal(loaded(ids).logits, model(ids).logits)
