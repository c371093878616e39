"""Zoneout in `tlstm.LSTM`: seeds, training and evaluation, every form of input, and the model that is built from it."""

from __future__ import annotations

import copy

import pytest
import torch
from tlstm_kernels import ArgumentError, Zoneout
from tlstm_kernels import lstm as reference_lstm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tlstm.functional.dropout import layer_seed
from tlstm.layer import LSTM

T, B, I, H = 7, 5, 6, 13
LENGTHS = torch.tensor((7, 5, 3, 2, 1))


def make_layer(backend="native", zoneout=(0.5, 0.3), **options):
    torch.manual_seed(3)
    return LSTM(I, H, 2, zoneout=zoneout, backend=backend, dtype=torch.float64, **options)


def one_by_one(module, x, seed):
    """The layers of a bidirectional module as calls of the reference, from zero states; the output."""
    weights = list(module.parameters())
    for layer in range(2):
        own_seed = layer_seed(seed, layer, x.device) if module.training else None
        zoneout = Zoneout(*module.zoneout, own_seed)
        zero = x.new_zeros(B, H)
        parts = []
        for direction in range(2):
            start = 8 * layer + 4 * direction
            options = {"lengths": LENGTHS, "reverse": direction == 1, "zoneout": zoneout}
            parts.append(reference_lstm(x, zero, zero, *weights[start : start + 4], **options)[0])
        x = torch.cat(parts, -1)
    return x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["native", "reference", "auto"])
def test_equals_the_reference_layer_by_layer(backend, training):
    module = make_layer(backend, bidirectional=True).train(training)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    seed = 2**63 + 11
    y, _ = module(x, lengths=LENGTHS, dropout_seed=seed)
    expected = one_by_one(module, x, torch.tensor(seed - 2**64))
    assert torch.equal(y, expected)
    inputs = [x, *module.parameters()]
    for a, b in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_seeds_come_from_torchs_generator_or_from_the_call():
    module, x = make_layer(), torch.randn(T, B, I, dtype=torch.float64)

    def y_after(manual_seed, **given):
        torch.manual_seed(manual_seed)
        return module(x, **given)[0]

    assert torch.equal(y_after(5), y_after(5))
    assert not torch.equal(y_after(5), y_after(6))
    assert torch.equal(y_after(5, dropout_seed=9), y_after(6, dropout_seed=9))
    assert not torch.equal(y_after(5, dropout_seed=9), y_after(5, dropout_seed=10))
    twice = y_after(5), module(x)[0]
    assert not torch.equal(*twice)  # each call draws anew
    seeds = [layer_seed(torch.tensor(9), layer, x.device) for layer in range(2)]
    assert seeds[0] != seeds[1]  # and so do the layers


def test_evaluation_takes_the_expectation_and_no_random_number():
    module, x = make_layer(), torch.randn(T, B, I, dtype=torch.float64)
    module.eval()
    state = torch.get_rng_state()
    y = module(x)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(y, module(x, dropout_seed=4)[0])
    plain = copy.deepcopy(module)
    plain.zoneout = (0.0, 0.0)
    assert not torch.allclose(y, plain(x)[0])
    # The first h of a layer from zero states: half of what the step gives.
    torch.testing.assert_close(y[0].abs().max() < 0.5, torch.tensor(True))


def test_a_row_is_masked_alike_in_every_batch():
    module, x = make_layer(), torch.randn(T, B, I, dtype=torch.float64)
    y = module(x, dropout_seed=1)[0]
    torch.testing.assert_close(module(x[:, :2], dropout_seed=1)[0], y[:, :2], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(module(x[:4], dropout_seed=1)[0], y[:4], rtol=1e-13, atol=1e-14)


def test_packed_input_equals_padded_input():
    module, x = make_layer(bidirectional=True), torch.randn(T, B, I, dtype=torch.float64)
    packed, state = module(pack_padded_sequence(x, LENGTHS), dropout_seed=1)
    y, expected = module(x, lengths=LENGTHS, dropout_seed=1)
    torch.testing.assert_close(pad_packed_sequence(packed)[0], y)
    torch.testing.assert_close(state, expected)


def test_nothing_kept_is_the_usual_layer_on_the_usual_backend():
    module, x = make_layer(zoneout=(0.0, 0.0)), torch.randn(T, B, I, dtype=torch.float64)
    usual = torch.nn.LSTM(I, H, 2, dtype=torch.float64)
    usual.load_state_dict(module.state_dict())
    assert torch.equal(module(x)[0], usual(x)[0])
    assert "zoneout" not in repr(module)
    assert "zoneout=(0.5, 0.3)" in repr(make_layer())


def test_compiled_without_graph_breaks():
    module, x = make_layer("reference").eval(), torch.randn(T, B, I, dtype=torch.float64)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(lambda x: module(x, dropout_seed=3)[0], fullgraph=True, backend="aot_eager")
        for training in (False, True):
            module.train(training)
            torch.testing.assert_close(compiled(x), module(x, dropout_seed=3)[0])


@pytest.mark.parametrize("wrong", [0.5, (0.5,), (0.5, 1.5), (-0.1, 0.0), ("a", 0.0)])
def test_wrong_probabilities(wrong):
    with pytest.raises(ArgumentError, match="zoneout"):
        LSTM(I, H, zoneout=wrong)


def test_models_take_it_from_their_configuration():
    from tlstm import LSTMConfig, LSTMForCausalLM

    config = LSTMConfig(vocab_size=11, hidden_size=7, num_layers=2, zoneout_h=0.25, zoneout_c=0.5)
    assert LSTMConfig.from_dict(config.to_dict()) == config
    model = LSTMForCausalLM(config)
    assert all(layer.zoneout == (0.25, 0.5) for layer in model.modules() if isinstance(layer, LSTM))
    ids = torch.randint(11, (3, 5))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match=r"zoneout_c: expected a probability in \[0, 1\)"):
        LSTMConfig(vocab_size=11, zoneout_c=1.0)
