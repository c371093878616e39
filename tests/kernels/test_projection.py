"""A projected layer as one without projection: against the equations with it, and how the composed weight rounds."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tlstm_kernels import layer_op
from tlstm_kernels.launch_options import launch_options
from tlstm_kernels.layer_op import lstm_layer
from tlstm_kernels.projection import projected_layer
from torch.autograd import gradcheck, gradgradcheck

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
T, B, I, H, P = 5, 4, 3, 13, 7
# name: D, bias, lengths, resets to, whether h_0 is known to be zero
CASES = {
    "plain": (1, True, None, None, False),
    "from zero": (1, True, None, None, True),
    "both directions": (2, True, None, None, False),
    "both directions, lengths": (2, False, (5, 0, 2, 1), None, False),
    "lengths, from zero": (2, True, (3, 5, 0, 1), None, True),
    "resets": (2, True, (5, 0, 2, 4), "zero", False),
    "resets to a state": (2, True, (5, 0, 2, 4), "state", False),
    "resets to a state, from zero": (2, True, None, "state", True),
}


def make_layer(name, dtype=torch.float64, steps=T, sizes=(B, I, H, P), state_scale=1.0):
    """The tensors of `lstm_layer`."""
    D, bias, lengths, kind, from_zero = CASES[name]
    rows, features, units, width = sizes

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape)).to(dtype).requires_grad_()

    shapes = [(4 * units, features), (4 * units, width), *[(4 * units,)] * (2 * bias), (width, units)]
    weights = [draw(*shape, scale=shape[-1] ** -0.5) for _ in range(D) for shape in shapes]
    lengths = None if lengths is None else torch.tensor(lengths).clamp(max=steps)
    resets = None if kind is None else torch.rand(steps, rows) < 0.4
    anew = (draw(D, rows, width), draw(D, rows, units)) if kind == "state" else (None, None)
    h_0 = torch.zeros(D, rows, width, dtype=dtype) if from_zero else draw(D, rows, width, scale=state_scale)
    return draw(steps, rows, features), h_0, draw(D, rows, units), weights, lengths, resets, *anew


def results(way, layer, cells=False):
    """Outputs and the gradients of a loss on all of them."""
    outputs = [o for o in way(*layer) if o is not None]
    outer = [torch.linspace(-1, 2, o.numel(), dtype=torch.float64).view_as(o) for o in outputs]
    x, h_0, c_0, weights, _, _, *anew = layer
    tensors = [t for t in (x, h_0, c_0, *anew, *weights) if t is not None and t.requires_grad]
    loss = sum((o.double() * d).sum() for o, d in zip(outputs, outer, strict=True))
    return [o.detach() for o in outputs] + list(torch.autograd.grad(loss, tensors, materialize_grads=True))


def composed(from_zero, with_cells, *layer):
    run = partial(lstm_layer, backend="reference", with_cells=with_cells)
    return projected_layer(run, *layer, from_zero)


@pytest.mark.parametrize("steps", [0, 1, T])
@pytest.mark.parametrize("with_cells", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_layer_with_its_projection(name, with_cells, steps):
    layer = make_layer(name, steps=steps)
    expected = results(partial(lstm_layer, backend="reference", with_cells=with_cells), layer)
    actual = results(partial(composed, CASES[name][4], with_cells), layer)
    for a, e in zip(actual, expected, strict=True):
        # The same sums in another order: a few roundings of float64.
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["both directions, lengths", "resets to a state"])
def test_first_and_second_derivatives(name):
    layer = make_layer(name, steps=2, sizes=(4, 2, 3, 2))
    x, h_0, c_0, weights, lengths, resets, *anew = layer
    n, tensors = len(weights), (x, h_0, c_0, *weights, *(s for s in anew if s is not None))

    def function(x, h_0, c_0, *rest):
        layer = (x, h_0, c_0, list(rest[:n]), lengths, resets, *(rest[n:] or (None, None)))
        return composed(False, False, *layer)[:3]

    assert gradcheck(function, tensors, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


def test_nothing_of_a_row_without_steps_is_read():
    layer = make_layer("both directions, lengths")
    with torch.no_grad():
        layer[0][:, 1], layer[1][:, 1] = torch.nan, torch.nan
        layer[0][2:, 2] = torch.nan
    y, h_n, *gradients = results(partial(composed, False, False), layer)
    assert not y.isnan().any()
    assert h_n[:, 1].isnan().all()  # its initial state, passed through
    assert all(g.isfinite().all() for g in gradients[4:])  # of the weights


def torchs_layer(D, *layer):
    x, h_0, c_0, weights, *_ = layer
    module = torch.nn.LSTM(x.shape[-1], c_0.shape[-1], proj_size=h_0.shape[-1], bidirectional=D == 2, dtype=x.dtype)
    named = dict(zip([name for name, _ in module.named_parameters()], weights, strict=True))
    y, (h_n, c_n) = torch.func.functional_call(module, named, (x, (h_0, c_0)))
    return y, h_n, c_n


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "sizes"), [("plain", (3, 33, 65, 31)), ("both directions", (4, 5, 13, 7))])
@pytest.mark.parametrize("seed", range(3))
def test_rounds_no_worse_than_twice_torch(dtype, name, sizes, seed):
    torch.manual_seed(seed)
    layer = make_layer(name, dtype, 40, sizes)
    D = CASES[name][0]
    x, h_0, c_0, weights, *_ = layer
    double = [t.detach().double().requires_grad_() for t in (x, h_0, c_0, *weights)]
    exact_layer = (*double[:3], double[3:], *layer[4:])
    exact = results(partial(torchs_layer, D), exact_layer)
    theirs, ours = results(partial(torchs_layer, D), layer), results(partial(composed, False, False), layer)
    for a, t, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        floor = 4 * torch.finfo(dtype).eps * max(1.0, e.abs().max().item())
        assert (a.double() - e).abs().max() <= 2 * (t.double() - e).abs().max() + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cancelling", [False, True])
def test_a_step_rounds_as_derived(dtype, cancelling):
    """|z - W_hh W_hr m| <= u |W_hh W_hr| |m| for a given m, u being half the distance from 1 to the next number.

    The P + H additions of the two sums round in float32. A projection that nearly cancels m, which makes h and
    its rounding small, is where a composed weight has most to lose: there its own entries are rounded, not h.
    """
    generator = torch.Generator().manual_seed(1)
    w_hh, w_hr, m = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((4 * H, P), (P, H), (H, 9)))
    if cancelling:  # all of m lies in the kernel of W_hr, up to its rounding
        m = torch.linalg.svd(w_hr).Vh[P:].T @ m[: H - P]
    w_hh, w_hr, m = w_hh.to(dtype), w_hr.to(dtype), (m / m.abs().max()).to(dtype)
    z = (w_hh @ w_hr).float() @ m.float()
    exact = w_hh.double() @ (w_hr.double() @ m.double())
    u = torch.finfo(dtype).eps / 2
    sums = (P + H) * torch.finfo(torch.float32).eps / 2
    size = w_hh.double().abs() @ w_hr.double().abs() @ m.double().abs()
    own = (w_hh.double() @ w_hr.double()).abs() @ m.double().abs()
    assert ((z.double() - exact).abs() <= 1.01 * (u * own + (sums + u * u) * size)).all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_run_it(gpu, monkeypatch, name, recompute):
    monkeypatch.setattr(layer_op, "check_layer", lambda *_: None)  # which wants tensors on a GPU
    layer = make_layer(name, torch.float32, steps=3)
    ways = [partial(lstm_layer, backend=b, with_cells=True) for b in ("triton", "reference")]
    small = {"units": 8, "rows": 8, "block_k": 64}, {"regime": "single", "units": 16, "block_k": 16, "rows": 8}
    with launch_options(*small):
        way = partial(ways[0], recompute=recompute, zero_h_0=CASES[name][4])
        actual = results(way, layer)
    D = CASES[name][0]
    assert gpu == [(2, 1, D), (1, 1, D)]  # both directions in one launch, forward and backward
    for a, e in zip(actual, results(ways[1], layer), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=5e-6)  # float32 sums of up to T * B = 15 terms


def test_no_steps_launch_nothing(gpu, monkeypatch):
    monkeypatch.setattr(layer_op, "check_layer", lambda *_: None)
    layer = make_layer("both directions", torch.float32, steps=0)
    y, h_n, c_n, _ = lstm_layer(*layer, backend="triton")
    assert gpu == []
    assert y.shape == (0, B, 2 * P)
    assert torch.equal(h_n, layer[1])
    assert torch.equal(c_n, layer[2])


def test_float64_keeps_its_projection(gpu, monkeypatch):
    """The kernels have no float64: step by step, the equations need no composed weight."""
    monkeypatch.setattr(layer_op, "check_layer", lambda *_: None)
    layer = make_layer("plain")
    torch.testing.assert_close(lstm_layer(*layer, backend="triton"), lstm_layer(*layer, backend="reference"))
    assert gpu == []


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize(("kept", "grids"), [({"zoneout_c": 0.3}, [(1, 1, 2)] * 2), ({"zoneout_h": 0.3}, [])])
def test_zoneout_beside_a_projection(gpu, monkeypatch, kept, grids, seeded):
    """That of c is the kernels'; that of h, which is projected, is done step by step."""
    monkeypatch.setattr(layer_op, "check_layer", lambda *_: None)
    layer = make_layer("both directions", torch.float32, steps=3)
    kept = kept | {"zoneout_seed": torch.tensor(7) if seeded else None}
    actual, expected = (results(partial(lstm_layer, backend=b, **kept), layer) for b in ("triton", "reference"))
    assert gpu == grids
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=5e-6)  # as above
