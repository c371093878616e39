"""tlstm.LSTM as a module: lengths, weight dropout, copies, export, autocast, parametrizations."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from tlstm.functional import available_backends
from tlstm.layer import LSTM

both_backends = pytest.mark.parametrize("backend", available_backends())
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
# Two implementations in float32 differ by roundings: eps = 1.2e-7 on sums of at most 65 terms of size 1.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def pair(backend="auto", **options):
    """torch.nn.LSTM and tlstm.LSTM with the same weights."""
    expected = torch.nn.LSTM(5, 7, **options)
    actual = LSTM(5, 7, **options, backend=backend)
    actual.load_state_dict(expected.state_dict(), strict=True)
    return expected, actual


def test_is_a_torch_lstm_with_the_same_initial_values():
    torch.manual_seed(3)
    expected = torch.nn.LSTM(5, 7, 2, bidirectional=True, proj_size=3)
    torch.manual_seed(3)
    actual = LSTM(5, 7, 2, bidirectional=True, proj_size=3)
    assert isinstance(actual, torch.nn.LSTM)
    assert [name for name, _ in actual.named_parameters()] == [name for name, _ in expected.named_parameters()]
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, actual.get_parameter(name)), name


def test_state_dict_goes_both_ways():
    source = LSTM(5, 7, 2, bidirectional=True)
    target = torch.nn.LSTM(5, 7, 2, bidirectional=True)
    target.load_state_dict(source.state_dict(), strict=True)
    back = LSTM(5, 7, 2, bidirectional=True)
    back.load_state_dict(target.state_dict(), strict=True)
    x = torch.randn(6, 3, 5)
    assert torch.equal(source(x)[0], target(x)[0])
    assert torch.equal(source(x)[0], back(x)[0])


@pytest.mark.parametrize("form", ["dense", "unbatched", "packed"])
def test_native_is_torch_bit_for_bit(form):
    expected, actual = pair(num_layers=2, dropout=0.4)
    x = torch.randn(6, 5) if form == "unbatched" else torch.randn(6, 3, 5)
    if form == "packed":
        x = pack_padded_sequence(x, torch.tensor([2, 6, 3]), enforce_sorted=False)
    results = []
    for module in (expected, actual):
        torch.manual_seed(1)  # for the dropout masks
        y, (h_n, c_n) = module(x)
        results.append([y.data, h_n, c_n])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


@both_backends
def test_pack_sequence_keeps_its_order(backend):
    expected, actual = pair(backend, num_layers=2, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 5) for n in (3, 1, 6)], enforce_sorted=False)
    state = torch.randn(4, 3, 7), torch.randn(4, 3, 7)
    y, (h_n, c_n) = expected(packed, state)
    z, (h, c) = actual(packed, state)
    assert torch.equal(y.sorted_indices, z.sorted_indices)
    assert torch.equal(y.unsorted_indices, z.unsorted_indices)
    torch.testing.assert_close((z.data, h, c), (y.data, h_n, c_n), **CLOSE)
    in_order = pack_sequence([torch.randn(n, 5) for n in (6, 3, 1)])
    torch.testing.assert_close(actual(in_order)[0].data, expected(in_order)[0].data, **CLOSE)


@both_backends
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("proj_size", [0, 3])
def test_lengths_give_what_each_sequence_gives_alone(backend, batch_first, proj_size):
    _, module = pair(backend, num_layers=2, bidirectional=True, batch_first=batch_first, proj_size=proj_size)
    lengths = torch.tensor([4, 0, 6, 1, 0, 3], dtype=torch.int32)
    x = torch.randn(6, 6, 5)  # B = T: batch_first only transposes
    h_0, c_0 = torch.randn(4, 6, proj_size or 7), torch.randn(4, 6, 7)
    y, (h_n, c_n) = module(x.transpose(0, 1) if batch_first else x, (h_0, c_0), lengths=lengths)
    y = y.transpose(0, 1) if batch_first else y
    for row, length in enumerate(lengths.tolist()):
        alone, (h, c) = module(x[:length, row], (h_0[:, row], c_0[:, row]))
        torch.testing.assert_close((y[:length, row], h_n[:, row], c_n[:, row]), (alone, h, c), **CLOSE)
        assert not y[length:, row].any()
    assert torch.equal(h_n[:, 1], h_0[:, 1])
    assert torch.equal(c_n[:, 4], c_0[:, 4])


@both_backends
def test_lengths_leave_padding_unread_and_gradients_clean(backend):
    _, module = pair(backend)
    x = torch.randn(4, 3, 5)
    x[2:, 0], x[:, 1] = torch.nan, torch.nan
    h_0, c_0 = torch.randn(1, 3, 7, requires_grad=True), torch.randn(1, 3, 7, requires_grad=True)
    x.requires_grad_()
    y, (h_n, c_n) = module(x, (h_0, c_0), lengths=torch.tensor([2, 0, 4]))
    (y.sum() + 3 * h_n.sum() + 5 * c_n.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    assert not x.grad[2:, 0].any()
    assert not x.grad[:, 1].any()
    assert torch.equal(h_0.grad[:, 1], torch.full((1, 7), 3.0))
    assert torch.equal(c_0.grad[:, 1], torch.full((1, 7), 5.0))


@both_backends
def test_all_lengths_zero_and_no_time_steps_keep_the_state(backend):
    _, module = pair(backend, num_layers=2)
    h_0, c_0 = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    y, (h_n, c_n) = module(torch.randn(4, 3, 5), (h_0, c_0), lengths=torch.zeros(3, dtype=torch.long))
    assert y.shape == (4, 3, 7)
    assert not y.any()
    assert torch.equal(h_n, h_0)
    assert torch.equal(c_n, c_0)
    y, (h_n, c_n) = module(torch.randn(0, 3, 5), (h_0, c_0))
    assert y.shape == (0, 3, 7)
    assert torch.equal(h_n, h_0)
    assert torch.equal(c_n, c_0)
    assert module(torch.randn(4, 0, 5))[0].shape == (4, 0, 7)


@both_backends
def test_inputs_need_not_be_contiguous(backend):
    expected, module = pair(backend)
    x = torch.randn(3, 12, 10).transpose(0, 1)[::2, :, 1::2]
    h_0 = torch.randn(7, 3, 1).permute(2, 1, 0)
    c_0 = torch.randn(3, 1, 14).transpose(0, 1)[..., ::2]
    torch.testing.assert_close(module(x, (h_0, c_0)), expected(x, (h_0, c_0)), **CLOSE)


@both_backends
def test_weight_dropout_drops_recurrent_weights(backend):
    expected, _ = pair(num_layers=2, bidirectional=True)
    module = LSTM(5, 7, 2, bidirectional=True, backend=backend, weight_dropout=0.5)
    module.load_state_dict(expected.state_dict())
    x = torch.randn(6, 3, 5)
    torch.testing.assert_close(module.eval()(x), expected(x), **CLOSE)

    torch.manual_seed(11)
    y = module.train()(x)[0]
    assert not torch.equal(y, module(x)[0])  # another mask
    masks = {}
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if "weight_hh" in name:
                masks[name] = torch.nn.functional.dropout(torch.ones_like(parameter), 0.5)
                parameter *= masks[name]
    assert {float(value) for mask in masks.values() for value in mask.unique()} == {0.0, 2.0}
    torch.testing.assert_close(y, expected(x)[0], **CLOSE)
    y.sum().backward()
    for name, mask in masks.items():
        assert not module.get_parameter(name).grad[mask == 0].any()
        assert module.get_parameter(name).grad[mask != 0].all()


@both_backends
def test_dropout_acts_between_layers_in_training_only(backend):
    expected, module = pair(backend, num_layers=2, dropout=1.0)
    x = torch.randn(6, 3, 5)
    torch.testing.assert_close(module(x), expected(x), **CLOSE)
    torch.testing.assert_close(module.eval()(x), expected.eval()(x), **CLOSE)
    assert not torch.allclose(module.train()(x)[0], module.eval()(x)[0])


@both_backends
def test_copies_and_pickles(backend):
    module = LSTM(5, 7, 2, backend=backend, weight_dropout=0.25).eval()
    x = torch.randn(6, 3, 5)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(stream, weights_only=False)]
    for other in copies:
        assert (other.backend, other.weight_dropout) == (backend, 0.25)
        assert torch.equal(other(x)[0], module(x)[0])
        with torch.no_grad():
            other.weight_hh_l0.zero_()
        assert not torch.equal(other(x)[0], module(x)[0])


@both_backends
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")
def test_export_round_trip(backend, strict):
    module = LSTM(5, 7, 2, batch_first=True, backend=backend).eval()
    x, state = torch.randn(3, 4, 5), (torch.randn(2, 3, 7), torch.randn(2, 3, 7))
    stream = io.BytesIO()
    torch.export.save(torch.export.export(module, (x, state), strict=strict), stream)
    stream.seek(0)
    other = torch.randn(3, 4, 5)
    torch.testing.assert_close(torch.export.load(stream).module()(other, state), module(other, state), **CLOSE)


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")
def test_export_with_lengths_runs_for_other_lengths():
    module = LSTM(5, 7, backend="reference").eval()
    x = torch.randn(4, 3, 5)
    program = torch.export.export(module, (x,), {"lengths": torch.tensor([4, 2, 1])}).module()
    lengths = torch.tensor([0, 4, 3])
    torch.testing.assert_close(program(x, lengths=lengths), module(x, lengths=lengths), **CLOSE)


def test_compiled_model_does_not_unroll_time():
    sizes = []

    def count_nodes(graph_module, _):
        sizes.append(len(graph_module.graph.nodes))
        return graph_module.forward

    model = torch.nn.ModuleList([torch.nn.Linear(5, 5), LSTM(5, 7)])

    def forward(x):
        return model[1](torch.tanh(model[0](x)))[0].square().sum()

    x = torch.randn(65, 3, 5)
    compiled = torch.compile(forward, backend=count_nodes)
    torch.testing.assert_close(compiled(x), forward(x))
    assert sum(sizes) < 65


def test_autocast_keeps_torchs_fast_path():
    expected, module = pair(num_layers=2)
    x = torch.randn(6, 3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = expected(x)[0], module(x)[0]
        reference = LSTM(5, 7, 2, backend="reference")
        reference.load_state_dict(module.state_dict())
        w = reference(x)[0]
        carried = module(x, module(x)[1])[0]
    assert y.dtype == z.dtype == w.dtype == carried.dtype == torch.bfloat16
    assert torch.equal(y, z)
    assert z.grad_fn.name() == y.grad_fn.name()
    # h is rounded to bfloat16 (eps = 2^-7) at 6 steps of 2 layers.
    torch.testing.assert_close(w, y, rtol=0, atol=12 * 2**-8)
    w.float().sum().backward()
    assert reference.weight_hh_l0.grad.dtype == torch.float32


@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moves_to_another_dtype(backend, dtype):
    module = LSTM(5, 7, backend=backend).to(dtype)
    y, (h_n, c_n) = module(torch.randn(6, 3, 5, dtype=dtype))
    assert y.dtype == h_n.dtype == c_n.dtype == dtype
    module.flatten_parameters()
    y.sum().backward()
    assert module.weight_hh_l0.grad.dtype == dtype


@both_backends
def test_parametrizations_and_functional_calls_are_seen(backend):
    expected, module = pair(backend)
    x = torch.randn(6, 3, 5)
    doubled = {name: 2 * parameter.detach() for name, parameter in expected.named_parameters()}
    called = torch.func.functional_call(module, doubled, (x,))
    parametrizations.weight_norm(module, "weight_hh_l0")
    y = module(x)
    torch.testing.assert_close(y, expected(x), **CLOSE)
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0 *= 2  # the rows' norms
        expected.weight_hh_l0 *= 2
    torch.testing.assert_close(module(x), expected(x), **CLOSE)
    expected.load_state_dict(doubled)
    torch.testing.assert_close(called, expected(x), **CLOSE)


def test_trains_like_torch():
    expected, actual = pair(num_layers=2)
    x, target = torch.randn(6, 3, 5), torch.randn(6, 3, 7)
    losses = []
    for module in (expected, actual):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(5):
            loss = (module(x)[0] - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:5] == losses[5:]
    assert losses[4] < losses[0]


def test_description_names_what_differs_from_the_defaults():
    assert repr(LSTM(5, 7)) == "LSTM(5, 7)"
    module = LSTM(5, 7, num_layers=2, backend="reference", weight_dropout=0.5)
    assert repr(module) == "LSTM(5, 7, num_layers=2, backend=reference, weight_dropout=0.5)"
