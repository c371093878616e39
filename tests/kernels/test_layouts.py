"""A batch-first layer on the kernels: the same numbers, in memory as its input lies there, with nothing copied over."""

from __future__ import annotations

import pytest
import torch
from tlstm_kernels import kernel_calls, launch, layer_op, layer_reference
from tlstm_kernels.launch_options import launch_options
from tlstm_kernels.layer_op import lstm_layer, lstm_layer_op
from tlstm_kernels.layouts import is_batch_first, joined, laid_out, new_sequence, rows_of, sequence_of
from torch._subclasses.fake_tensor import FakeTensorMode

T, B, I, H = 3, 5, 4, 21
SMALL = {"units": 8, "rows": 8, "block_k": 64}, {"units": 16, "rows": 8, "block_k": 64}
# name: directions, heads, lengths, pins
CASES = {
    "one direction": (1, 1, None, SMALL),
    "both directions, lengths": (2, 1, (3, 0, 2, 1, 3), SMALL),
    "batch in several launches": (1, 1, None, [pins | {"groups": 1} for pins in SMALL]),
    "heads, directions one by one": (2, 3, None, SMALL),
    "step by step": (2, 1, None, [{"regime": "per_step"}] * 2),
}


def draw(name, rows=B):
    D, heads, lengths, _ = CASES[name]
    units = H * heads
    shapes = [(4 * units, I), (4 * units, H), (4 * units,), (4 * units,)]
    weights = [torch.randn(s) * s[-1] ** -0.5 for _ in range(D) for s in shapes]
    x, state = torch.randn(T, rows, I), (torch.randn(D, rows, units), torch.randn(D, rows, units))
    outer = [torch.randn(T, rows, D * units), *torch.randn(2, D, rows, units), torch.randn(T, rows, D, units)]
    return x, state, weights, None if lengths is None else torch.tensor(lengths), outer


def turned(tensor):
    """The same values, batch first in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def run(module, x, state, weights, lengths, outer, keep, resets=None):
    *outputs, gates, cells = module.forward(x, *state, weights, lengths, keep, resets)
    saved = (x, *state, weights, outputs[0], gates, cells, lengths, True, True, resets, None, None, outer[3])
    return [*outputs, *module.backward(*outer[:3], *saved)], (gates, cells)


@pytest.mark.parametrize("keep", ["gates", "states"])
@pytest.mark.parametrize("name", CASES)
def test_batch_first_memory_gives_the_same_and_stays_so(gpu, name, keep):
    rows = 19 if "several" in name else B
    x, state, weights, lengths, outer = draw(name, rows)
    resets = torch.rand(T, rows) < 0.3
    expected, _ = run(layer_reference, x, state, weights, lengths, outer, keep, resets)
    with launch_options(*CASES[name][3]):
        actual, kept = run(launch, turned(x), state, weights, lengths, outer, keep, resets)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=5e-6)  # float32 sums of up to T * B = 57 terms of size 1
    for sequence in (actual[0], *(s for s in kept if s.numel())):
        assert is_batch_first(sequence)
    assert name == "step by step" or is_batch_first(actual[3])  # the gradient of x


def test_the_kernels_read_and_write_it_in_place(gpu, monkeypatch):
    """The input projection is one product over x as it lies, and what the kernel writes is what the caller gets."""
    seen = []
    original = kernel_calls._run
    monkeypatch.setattr(kernel_calls, "_run", lambda *a, **k: (seen.append(a[4:]), original(*a, **k))[1])
    x, state, weights, lengths, _ = draw("one direction")
    x = turned(x)
    with launch_options(*SMALL):
        y, *_ = launch.forward(x, *state, weights, lengths, "nothing")
    (arguments,) = seen
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    assert tensors[0].stride() == (4 * H, T * 4 * H, 1)
    assert any(t.data_ptr() == y.data_ptr() for t in tensors)
    assert rows_of(x, True).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("keep", ["gates", "states", "nothing"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_operator_foretells_its_strides(gpu, name, keep, batch_first):
    x, state, weights, lengths, _ = draw(name)
    x = turned(x) if batch_first else x
    arguments = (x, *state, weights, lengths, "triton", keep, None, None, None, False, 0.0, 0.0, None)
    with launch_options(*CASES[name][3]):
        real = lstm_layer_op(*arguments)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        fake[3] = [mode.from_tensor(w) for w in weights]
        foretold = lstm_layer_op(*fake)
    for a, b in zip(real, foretold, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_a_batch_first_projected_layer(gpu, monkeypatch):
    monkeypatch.setattr(layer_op, "check_layer", lambda *_: None)  # which wants tensors on a GPU
    shapes = [(4 * 13, I), (4 * 13, 7), (4 * 13,), (4 * 13,), (7, 13)]
    weights = [torch.randn(s) * s[-1] ** -0.5 for s in shapes]
    x, h_0, c_0 = torch.randn(T, B, I), torch.randn(1, B, 7), torch.randn(1, B, 13)
    with launch_options(*SMALL):
        actual = lstm_layer(turned(x), h_0, c_0, weights, backend="triton")
    torch.testing.assert_close(actual, lstm_layer(x, h_0, c_0, weights, backend="reference"), rtol=1e-5, atol=5e-6)
    assert is_batch_first(actual[0])


def test_layouts():
    x = torch.arange(2.0 * 3 * 5).view(2, 3, 5)
    for batch_first in (False, True):
        y = laid_out(x, batch_first)
        assert torch.equal(y, x)
        assert is_batch_first(y) == batch_first
        rows = rows_of(y, batch_first)
        assert rows.data_ptr() == y.data_ptr()
        assert torch.equal(sequence_of(rows, 2, batch_first), x)
        assert torch.equal(joined([y, y], 2, batch_first), torch.cat((x, x), 2))
        assert is_batch_first(joined([y, y], 2, batch_first)) == batch_first
        assert is_batch_first(new_sequence(x, (2, 3, 4, 5), batch_first)) == batch_first
    assert not is_batch_first(torch.randn(2, 3, 10)[..., ::2])
    assert not is_batch_first(torch.randn(1, 3, 5).transpose(0, 1))  # one step or one row is time first as well
