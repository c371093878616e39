"""torch.compile(fullgraph=True) on layers and on models of layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tlstm.config import LSTMConfig
from tlstm.layer import LSTM
from tlstm.models import LSTMForCausalLM

T, B, I, H = 6, 3, 5, 7
OPTIONS = {
    "plain": {},
    "bidirectional, batch first": {"bidirectional": True, "batch_first": True},
    "heads, recompute": {"num_heads": 7, "recompute": True},
    "projection": {"proj_size": 3},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def graphs(seen):
    """A compiler that notes the graphs it is given."""

    def compiler(graph_module, _):
        seen.append(graph_module)
        return graph_module.forward

    return compiler


@pytest.mark.parametrize("name", OPTIONS)
def test_a_layer_compiles_itself_without_graph_breaks(name):
    module = LSTM(I, H, 2, backend="reference", **OPTIONS[name])
    x, expected, seen = torch.randn(T, B, I, requires_grad=True), [], []
    for compiled in (False, True):
        if compiled:
            module.compile(fullgraph=True, backend=graphs(seen))
        y, (h_n, c_n) = module(x)
        expected.append([y, h_n, c_n, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
    for a, e in zip(*expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1
    assert sum("lstm_layer" in str(node.target) for node in seen[0].graph.nodes) == 2  # one for each layer
    assert not torch._dynamo.config.allow_rnn  # told for the call only


def test_arguments_of_a_compiled_layer():
    module = LSTM(I, H, 2, bidirectional=True, backend="reference")
    x, state = torch.randn(T, B, I), (torch.randn(4, B, H), torch.randn(4, B, H))
    call = {"resets": torch.rand(T, B) < 0.3, "reset_state": (torch.randn(4, H), torch.randn(4, H))}
    call |= {"lengths": torch.tensor((6, 0, 4)), "return_cell_states": True}
    expected = module(x, state, **call)
    module.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(module(x, state, **call), expected)


def test_without_being_told_the_compiler_refuses():
    """Why `compile` is overridden: should this fail one day, the override can go."""
    module = LSTM(I, H, backend="reference")
    compiled = torch.compile(lambda x: module(x)[0], fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        compiled(torch.randn(T, B, I))


def test_copies_of_a_compiled_layer_are_not_compiled():
    module, x = LSTM(I, H, backend="reference"), torch.randn(T, B, I)
    module.compile(fullgraph=True, backend="eager")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other._compiled_call_impl is None
        torch.testing.assert_close(other(x), module(x))


def test_a_model_in_one_graph_as_the_documentation_says():
    model = LSTMForCausalLM(LSTMConfig(vocab_size=7, hidden_size=13, num_layers=2)).eval()
    for layer in model.model.layers:
        layer.backend = "reference"
    ids, seen = torch.randint(7, (2, 9)), []
    compiled = torch._dynamo.config.patch(allow_rnn=True)(
        torch.compile(lambda ids: model(ids).logits, fullgraph=True, backend=graphs(seen))
    )
    torch.testing.assert_close(compiled(ids), model(ids).logits)
    assert len(seen) == 1
