"""tlstm.LSTM with resets against torch.nn.LSTM called for each episode of each row alone, within torch's own error."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layer_properties import FLOOR, error, layer_options
from tlstm_kernels import ArgumentError
from torch.nn.utils.rnn import pack_sequence

from tlstm.functional import BackendUnavailableError, LSTMOptions, available_backends, lstm
from tlstm.layer import LSTM

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
both_backends = pytest.mark.parametrize("backend", available_backends())


@dataclass(frozen=True)
class Case:
    options: dict
    T: int
    B: int
    lengths: tuple[int, ...] | None
    reset_rate: float
    dtype: torch.dtype  # of the mask
    reset_to: str
    with_state: bool
    seed: int


@st.composite
def cases(draw) -> Case:
    options = draw(layer_options())
    T, B = draw(st.integers(1, 11)), draw(st.integers(1, 7))
    some = st.lists(st.integers(0, T), min_size=B, max_size=B).filter(any)  # no steps at all have a test of their own
    lengths = tuple(draw(some)) if draw(st.booleans()) else None
    rate = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    dtype = draw(st.sampled_from([torch.bool, torch.uint8, torch.int64]))
    to = draw(st.sampled_from(["zero", "one for all", "one for each"]))
    return Case(options, T, B, lengths, rate, dtype, to, draw(st.booleans()), draw(st.integers(0, 2**32 - 1)))


def piece_by_piece(module: torch.nn.LSTM, x, state, lengths, resets, anew):
    """Each episode of each row alone, started from the state after a reset except where hx is; x is time first."""
    D = 1 + module.bidirectional
    forwards = torch.arange(state[0].shape[0]) % D == 0
    ys, finals = [], []
    for row, length in enumerate(lengths):
        starts = [0, *(t for t in range(1, length) if resets[t, row])] if length else []
        final = tuple(s[:, row] for s in state)
        pieces = []
        for start, stop in zip(starts, [*starts[1:], length], strict=False):
            # Forwards, hx belongs to the first episode, if that does not reset; in reverse to the last one.
            from_hx = torch.where(forwards, start == 0 and not resets[0, row], stop == length)[:, None]
            first = [torch.where(from_hx, s[:, row], a[:, row]) for s, a in zip(state, anew, strict=True)]
            y, after = module(x[start:stop, row, None], tuple(s[:, None] for s in first))
            pieces.append(y[:, 0])
            is_final = torch.where(forwards, stop == length, start == 0)[:, None]
            final = [torch.where(is_final, a[:, 0], f) for a, f in zip(after, final, strict=True)]
        pieces.append(x.new_zeros(x.shape[0] - length, D * final[0].shape[-1]))
        ys.append(torch.cat(pieces))
        finals.append(final)
    h_n, c_n = (torch.stack(parts, 1) for parts in zip(*finals, strict=True))
    return torch.stack(ys, 1), h_n, c_n


def run(module: torch.nn.LSTM, case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Outputs, states and gradients of a loss with random weights; the same draw for every module and dtype."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows, H = case.options["num_layers"] * (1 + case.options["bidirectional"]), case.options["hidden_size"]
    P = case.options["proj_size"] or H
    x, state = draw(case.T, case.B, case.options["input_size"]), (draw(rows, case.B, P), draw(rows, case.B, H))
    resets = (torch.rand(case.T, case.B, generator=generator) < case.reset_rate).to(case.dtype)
    reset_state = {
        "zero": None,
        "one for all": (draw(rows, P), draw(rows, H)),
        "one for each": (draw(rows, case.B, P), draw(rows, case.B, H)),
    }[case.reset_to]
    inputs = {"x": x}
    if case.with_state:
        inputs |= {"h_0": state[0], "c_0": state[1]}
    if reset_state is not None:
        inputs |= {"h_reset": reset_state[0], "c_reset": reset_state[1]}
    for tensor in inputs.values():
        tensor.requires_grad_()

    if isinstance(module, LSTM):
        lengths = None if case.lengths is None else torch.tensor(case.lengths)
        first = module.batch_first
        options = {"lengths": lengths, "resets": resets.T if first else resets, "reset_state": reset_state}
        y, (h_n, c_n) = module(x.transpose(0, 1) if first else x, state if case.with_state else None, **options)
        y = y.transpose(0, 1) if first else y
    else:
        state = state if case.with_state else tuple(torch.zeros_like(s) for s in state)
        anew = tuple(torch.zeros_like(s) for s in state)
        if reset_state is not None:
            anew = tuple(
                (r[:, None] if r.dim() == 2 else r).expand_as(s) for r, s in zip(reset_state, state, strict=True)
            )
        y, h_n, c_n = piece_by_piece(module, x, state, case.lengths or (case.T,) * case.B, resets, anew)
    loss = sum((output * draw(*output.shape)).sum() for output in (y, h_n, c_n))
    names = [*inputs, *(name for name, _ in module.named_parameters())]
    gradients = torch.autograd.grad(loss, [*inputs.values(), *module.parameters()], materialize_grads=True)
    results = {"output": y, "h_n": h_n, "c_n": c_n} | {f"d_{n}": g for n, g in zip(names, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in results.items()}


@both_backends
@given(case=cases())
@settings(max_examples=40)
def test_equals_torch_on_each_episode_alone(backend: str, case: Case):
    torch.manual_seed(case.seed)
    apart = case.options | {"batch_first": False}
    single = torch.nn.LSTM(**apart)
    double = torch.nn.LSTM(**apart, dtype=torch.float64)
    double.load_state_dict(single.state_dict())
    module = LSTM(**case.options, backend=backend)
    module.load_state_dict(single.state_dict())
    truth, torch_single = run(double, case, torch.float64), run(single, case, torch.float32)
    results = run(module, case, torch.float32)
    assert list(results) == list(truth)
    for name, exact in truth.items():
        assert results[name].dtype == torch.float32
        assert results[name].shape == exact.shape
        floor = FLOOR * torch.finfo(torch.float32).eps * max(1.0, exact.abs().max().item())
        assert error(results[name], exact) <= 2 * error(torch_single[name], exact) + floor, name


@both_backends
def test_nothing_crosses_a_reset(backend):
    """One direction: neither values, NaN included, nor gradients."""
    module = LSTM(5, 7, 2, backend=backend)
    x, resets = torch.randn(6, 3, 5), torch.zeros(6, 3, dtype=torch.bool)
    resets[2, 1] = True
    clean, (h_n, c_n) = module(x.requires_grad_(), resets=resets)
    (d_x,) = torch.autograd.grad(h_n[:, 1].sum(), x)
    assert not d_x[:2].any()
    assert d_x[2:, 1].all()
    x = x.detach().clone()
    x[:2, 1] = torch.nan
    state = torch.randn(2, 3, 7).index_fill(1, torch.tensor(1), torch.nan)
    y, (h, c) = module(x, (state, state), resets=resets)
    assert y[:2, 1].isnan().all()
    assert torch.equal(y[2:, 1], clean[2:, 1])
    assert torch.equal(h[:, 1], h_n[:, 1])
    assert torch.equal(c[:, 1], c_n[:, 1])


@both_backends
def test_nothing_crosses_a_reset_in_either_direction(backend):
    module = LSTM(5, 7, 2, bidirectional=True, backend=backend)
    x, resets = torch.randn(6, 3, 5), torch.zeros(6, 3, dtype=torch.bool)
    resets[2, 1] = True
    clean, _ = module(x.requires_grad_(), resets=resets)
    for episode, other in ((slice(0, 2), slice(2, 6)), (slice(2, 6), slice(0, 2))):
        (d_x,) = torch.autograd.grad(clean[episode, 1].sum(), x, retain_graph=True)
        assert d_x[episode, 1].all()
        assert not d_x[other, 1].any()
        poisoned = x.detach().clone()
        poisoned[other, 1] = torch.nan
        y, _ = module(poisoned, resets=resets)
        assert torch.equal(y[episode, 1], clean[episode, 1])
        assert y[other, 1].isnan().all()


@both_backends
def test_no_reset_changes_no_bit(backend):
    module, x = LSTM(5, 7, 2, backend=backend), torch.randn(6, 3, 5)
    never = torch.zeros(6, 3, dtype=torch.bool)
    for lengths in (None, torch.tensor([6, 0, 3])):
        (y, (h, c)), (z, (h_n, c_n)) = module(x, lengths=lengths), module(x, lengths=lengths, resets=never)
        for a, b in ((y, z), (h, h_n), (c, c_n)):
            assert torch.equal(a, b)


@both_backends
def test_resets_of_empty_batches(backend):
    module = LSTM(5, 7, backend=backend)
    state = torch.randn(1, 3, 7), torch.randn(1, 3, 7)
    for steps, lengths in ((0, None), (4, torch.zeros(3, dtype=torch.int64))):
        mask = torch.ones(steps, 3, dtype=torch.bool)
        y, (h, c) = module(torch.randn(steps, 3, 5), state, lengths=lengths, resets=mask)
        assert y.shape == (steps, 3, 7)
        assert not y.any()
        assert torch.equal(h, state[0])
        assert torch.equal(c, state[1])


@both_backends
def test_resets_under_autocast(backend):
    module, x = LSTM(5, 7, 2, backend=backend), torch.randn(6, 3, 5)
    resets = torch.rand(6, 3) < 0.4
    exact, _ = module(x, resets=resets)
    with torch.autocast("cpu", torch.bfloat16):
        plain, _ = module(x, lengths=torch.tensor((6, 5, 6)))  # torch packs these rows, too
        y, (h, c) = module(x, resets=resets)
        assert y.dtype == h.dtype == c.dtype == plain.dtype
    # Weights, x and, at each of 6 steps, h are rounded to 8 bits, twice through two layers.
    assert (y.float() - exact).norm() <= 8 * torch.finfo(torch.bfloat16).eps * exact.norm()


@both_backends
@pytest.mark.parametrize("allow_rnn", [False, True])
def test_resets_under_compile(backend, allow_rnn):
    module = LSTM(5, 7, 2, batch_first=True, backend=backend)
    x, resets, lengths = torch.randn(3, 6, 5), torch.rand(3, 6) < 0.4, torch.tensor((6, 0, 4))

    def function(x, resets):
        return module(torch.tanh(x), lengths=lengths, resets=resets)[0].square()

    with torch._dynamo.config.patch(allow_rnn=allow_rnn):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=allow_rnn and backend == "reference")
        parameters = list(module.parameters())
        actual, expected = compiled(x, resets), function(x, resets)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.sum(), parameters), torch.autograd.grad(expected.sum(), parameters)
        )


def test_export_keeps_the_resets_an_input():
    x, mask = torch.randn(6, 3, 5), torch.rand(6, 3) < 0.4

    class Wrapped(torch.nn.Module):
        def __init__(self, backend):
            super().__init__()
            self.lstm = LSTM(5, 7, backend=backend)

        def forward(self, x, resets):
            return self.lstm(x, resets=resets)[0]

    module = Wrapped("reference")
    program = torch.export.export(module, (x, mask))
    for resets in (mask, ~mask):
        torch.testing.assert_close(program.module()(x, resets), module(x, resets))
    with pytest.raises(BackendUnavailableError, match=r"cannot be exported with resets.*backend='reference'"):
        torch.export.export(Wrapped("native"), (x, mask))


WRONG = {
    "shape": ((6, 3, 5), torch.ones(3, 6).bool(), {}, r"shape \(6, 3\), \(time, batch\).*received \(3, 6\)"),
    "batch first": (
        (3, 6, 5), torch.ones(6, 3).bool(), {"batch_first": True}, r"shape \(3, 6\), \(batch, time\).*\(6, 3\)"
    ),
    "dtype": ((6, 3, 5), torch.ones(6, 3), {}, r"bool or integer tensor; received torch.float32.*resets != 0"),
    "no tensor": ((6, 3, 5), [[1]], {}, r"bool or integer tensor of shape \(6, 3\); received a list of 1"),
    "unbatched": ((6, 5), torch.ones(6).bool(), {}, r"expected None for an unbatched input.*unsqueeze\(1\)"),
}  # fmt: skip


@both_backends
@pytest.mark.parametrize("name", WRONG)
def test_wrong_resets(backend, name):
    shape, resets, options, message = WRONG[name]
    with pytest.raises(ArgumentError, match=f"resets: .*{message}"):
        LSTM(5, 7, **options, backend=backend)(torch.randn(shape), resets=resets)


@both_backends
@pytest.mark.parametrize(
    ("resets", "state", "message"),
    [
        (None, (torch.zeros(1, 3, 7),) * 2, "reset_state: expected resets that put it in place; received none"),
        (torch.ones(6, 3).bool(), torch.zeros(1, 3, 7), r"reset_state: expected a tuple of two tensors \(h, c\)"),
        (
            torch.ones(6, 3).bool(),
            (torch.zeros(1, 3, 7), None),
            r"reset_state c: expected a tensor of shape \(1, 3, 7\)",
        ),
        (torch.ones(6, 3).bool(), (torch.zeros(1, 6),) * 2, r"reset_state h: expected shape \(1, 3, 7\).*\(1, 3, 6\)"),
    ],
)
def test_wrong_reset_states(backend, resets, state, message):
    with pytest.raises(ArgumentError, match=message):
        LSTM(5, 7, backend=backend)(torch.randn(6, 3, 5), resets=resets, reset_state=state)


@both_backends
def test_packed_sequences_have_no_resets(backend):
    packed = pack_sequence([torch.randn(3, 5), torch.randn(2, 5)])
    with pytest.raises(ArgumentError, match=r"resets: expected None with a PackedSequence.*pad_packed_sequence"):
        LSTM(5, 7, backend=backend)(packed, resets=torch.ones(3, 2).bool())


@both_backends
def test_the_function_refuses_what_the_layer_does(backend):
    module = torch.nn.LSTM(5, 7)
    state, x = (torch.zeros(1, 3, 7), torch.zeros(1, 3, 7)), torch.randn(6, 3, 5)
    weights, mask = list(module.parameters()), torch.ones(3, 6).bool()
    with pytest.raises(ArgumentError, match=r"resets: .*shape \(6, 3\)"):
        lstm(x, state, weights, LSTMOptions(), backend=backend, resets=mask)
    with pytest.raises(ArgumentError, match=r"reset_state h: expected shape \(1, 3, 7\)"):
        lstm(x, state, weights, LSTMOptions(), backend=backend, resets=mask.T, reset_state=(state[0][0], state[1]))
