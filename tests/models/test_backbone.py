"""LSTMModel against a stack put together from torch's own modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tlstm import LSTMConfig, LSTMModel, LSTMState
from tlstm.models.padding import Padding

VARIANTS = {
    "plain": {"hidden_size": 13},
    "widths": {"layer_sizes": [17, 23, 9], "embedding_size": 5},
    "residual": {"hidden_size": 13, "num_layers": 3, "residual": True, "embedding_size": 7},
    "projected": {"hidden_size": 19, "proj_size": 7, "residual": True},
    "narrow output": {"layer_sizes": [17, 11], "embedding_size": 5, "output_projection": True},
    "no bias": {"hidden_size": 13, "bias": False, "initializer": "orthogonal"},
}


def make_model(dtype=torch.float64, **fields) -> LSTMModel:
    torch.manual_seed(7)
    return LSTMModel(LSTMConfig(vocab_size=31, **fields)).to(dtype).eval()


def torch_stack(model: LSTMModel, ids: torch.Tensor) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The same network out of `torch.nn` modules, batch first, sharing the weights."""
    config = model.config
    x = torch.nn.functional.embedding(ids, model.embedding.weight)
    states = []
    for index, layer in enumerate(model.layers):
        twin = nn.LSTM(
            layer.input_size, layer.hidden_size, bias=config.bias, proj_size=config.proj_size, batch_first=True
        ).to(x.dtype)
        twin.load_state_dict(layer.state_dict())
        y, state = twin(x)
        states.append(state)
        x = x + y if config.residual and index and x.shape == y.shape else y
    return model.projection(x), states


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_the_same_stack_of_torch_modules(fields):
    model = make_model(**fields)
    ids = torch.randint(31, (5, 11))
    with torch.no_grad():
        output = model(ids)
        expected, states = torch_stack(model, ids)
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=0, atol=1e-14)
    for index, (h_n, c_n) in enumerate(states):
        torch.testing.assert_close(output.state.h[index], h_n[0], rtol=0, atol=1e-14)
        torch.testing.assert_close(output.state.c[index], c_n[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_carried_state_continues_the_sequence(fields):
    model = make_model(**fields)
    ids = torch.randint(31, (3, 13))
    with torch.no_grad():
        whole = model(ids)
        head = model(ids[:, :5])
        tail = model(ids[:, 5:], state=head.state)
    joined = torch.cat([head.last_hidden_state, tail.last_hidden_state], dim=1)
    torch.testing.assert_close(joined, whole.last_hidden_state, rtol=0, atol=1e-14)
    torch.testing.assert_close(tail.state.c[-1], whole.state.c[-1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_never_reaches_the_state(side):
    model = make_model(layer_sizes=[17, 11])
    lengths, width = [7, 1, 4, 0, 10], 10
    ids = torch.randint(31, (len(lengths), width))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        first = {"left": width - length, "right": 0, "both": (width - length) // 2}[side]
        mask[row, first : first + length] = 1
    start = LSTMState(
        h=tuple(torch.randn(5, w, dtype=torch.float64).tanh() for w in (17, 11)),
        c=tuple(torch.randn(5, w, dtype=torch.float64) for w in (17, 11)),
    )
    output = model(ids, mask, start)
    assert output.last_hidden_state[mask == 0].abs().sum() == 0
    for row, length in enumerate(lengths):
        alone_start = start.select(torch.tensor([row]))
        if length == 0:
            for got, kept in zip(output.state.tensors().values(), start.tensors().values(), strict=True):
                assert torch.equal(got[row], kept[row])
            continue
        real = mask[row].bool()
        alone = model(ids[row, real][None], state=alone_start)
        torch.testing.assert_close(output.last_hidden_state[row, real], alone.last_hidden_state[0], rtol=0, atol=1e-14)
        for got, want in zip(output.state.tensors().values(), alone.state.tensors().values(), strict=True):
            torch.testing.assert_close(got[row], want[0], rtol=0, atol=1e-14)


def test_gradients_flow_through_padding_as_through_single_rows():
    model = make_model(hidden_size=9)
    ids = torch.randint(31, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    model(ids, mask).last_hidden_state.square().sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (model(ids[:1, 2:]).last_hidden_state.square().sum() + model(ids[1:]).last_hidden_state.square().sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-12, atol=1e-13)


def test_a_mask_of_ones_is_no_mask():
    assert Padding.from_mask(torch.ones(3, 5), torch.zeros(3, 5, dtype=torch.long)) is None


def test_locked_dropout_keeps_its_mask_over_time():
    model = make_model(hidden_size=64, output_dropout=0.5).train()
    y = model._locked_dropout(torch.ones(9, 4, 64, dtype=torch.float64), 0.5)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(y, y[:1].expand_as(y))
    assert not torch.equal(y[0, 0], y[0, 1])


def test_embedding_dropout_removes_whole_word_types():
    model = make_model(hidden_size=13, embedding_dropout=0.5).train()
    ids = torch.arange(31).repeat(2)[:, None]  # every type twice
    embedded = model._embed(ids)
    assert torch.equal(embedded[:31], embedded[31:])
    gone = embedded[:31, 0].abs().sum(dim=1) == 0
    assert 0 < gone.sum() < 31
    torch.testing.assert_close(embedded[:31, 0][~gone], 2 * model.embedding.weight[~gone])


@pytest.mark.parametrize(
    "name", ["embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_dropout"]
)
def test_every_dropout_acts_in_training_only(name):
    model = make_model(hidden_size=13, **{name: 0.5})
    ids = torch.randint(31, (2, 5))
    assert torch.equal(model(ids).last_hidden_state, make_model(hidden_size=13)(ids).last_hidden_state)
    model.train()
    torch.manual_seed(1)
    first = model(ids).last_hidden_state
    torch.manual_seed(1)
    assert torch.equal(first, model(ids).last_hidden_state)
    assert not torch.equal(first, model(ids).last_hidden_state)


def test_initialisation_follows_the_config():
    model = make_model(hidden_size=13, initializer="orthogonal", forget_bias=1.0, initializer_range=0.25)
    layer = model.layers[1]
    for gate in layer.weight_hh_l0.chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(13, dtype=torch.float64), rtol=0, atol=1e-6)
    i, f, g, o = (layer.bias_ih_l0 + layer.bias_hh_l0).chunk(4)
    assert torch.equal(f, torch.ones_like(f))
    assert i.abs().sum() == g.abs().sum() == o.abs().sum() == 0
    assert 0.2 < model.embedding.weight.abs().max() <= 0.25


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"input_ids": [[1, 2]]}, "got list"),
        ({"input_ids": torch.zeros(2, 3)}, r"got torch\.float32"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"ids\[None\]"),
        ({"input_ids": torch.tensor([[3, 31]])}, r"got \[31\]"),
        ({"input_ids": torch.tensor([[-1]])}, r"got \[-1\]"),
        (
            {"input_ids": torch.zeros(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 2)},
            "shape of input_ids",
        ),
        (
            {"input_ids": torch.zeros(1, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 0, 1]])},
            "contiguous run",
        ),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long), "state": (1, 2)}, "got tuple"),
        (
            {"input_ids": torch.zeros(1, 3, dtype=torch.long), "state": LSTMState.zeros([5], [5], 1)},
            "another model",
        ),
        (
            {
                "input_ids": torch.zeros(1, 3, dtype=torch.long),
                "state": LSTMState.zeros([13, 13], [13, 13], 2, dtype=torch.float64),
            },
            "repeat_interleave",
        ),
    ],
)
def test_bad_input_is_explained(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_model(hidden_size=13)(**arguments)
