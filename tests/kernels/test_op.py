"""The layer as one operator: its two ways (eager, compiled) against the reference, and everything torch asks of it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tlstm_kernels import ArgumentError
from tlstm_kernels.layer_autograd import LayerFunction, run_eagerly
from tlstm_kernels.layer_op import lstm_layer, lstm_layer_op
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from tlstm.functional import LSTMOptions, lstm
from tlstm.layer import LSTM

T, B, I, H = 5, 3, 4, 7
# name: D, P, bias, lengths, resets to, and h, c and seed of zoneout
CASES = {
    "plain": (1, None, True, None, None),
    "no bias": (1, None, False, None, None),
    "both directions, lengths": (2, None, True, (5, 0, 2), None),
    "projection": (1, 3, True, None, None),
    "projection, no bias, both directions, lengths": (2, 3, False, (1, 5, 0), None),
    "resets to zero": (1, None, True, None, "zero"),
    "resets to a state, projection, both directions, lengths": (2, 3, True, (5, 0, 2), "state"),
    "zoneout, resets to a state, both directions, lengths": (
        *(2, None, True, (5, 0, 2), "state"),
        *(0.5, 0.3, torch.tensor(-7)),
    ),
    "zoneout expected, projection": (1, 3, True, None, None, 0.5, 0.3, None),
}
NO_ZONEOUT = (0.0, 0.0, None)


def make_layer(case, dtype=torch.float32, steps=T):
    """x, h_0, c_0, the flat weights, lengths, the mask, h and c of resets, and the settings of zoneout."""
    D, P, bias, lengths, kind, *zoneout = case
    width = P or H
    shapes = [(4 * H, I), (4 * H, width)] + [(4 * H,)] * (2 * bias) + [(P, H)] * (P is not None)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    weights = [draw(*shape) for _ in range(D) for shape in shapes]
    lengths = None if lengths is None else torch.tensor(lengths).clamp(max=steps)
    resets = None if kind is None else torch.rand(steps, B) < 0.5
    given = (draw(D, B, width), draw(D, B, H)) if kind == "state" else (None, None)
    options = (lengths, resets, *given, *(zoneout or NO_ZONEOUT))
    return draw(steps, B, I), draw(D, B, width), draw(D, B, H), weights, *options


def eager(keep, x, h_0, c_0, weights, lengths, *options):
    options = (*options[:3], False, *(options[3:] or NO_ZONEOUT))
    return run_eagerly(x, h_0, c_0, lengths, "reference", keep, *options, *weights)[:3]


def compiled(keep, *layer):
    return lstm_layer_op(*arguments(layer, keep))[:3]


def arguments(layer, keep):
    """Those of the operator."""
    return *layer[:5], "reference", keep, *layer[5:8], False, *(layer[8:] or NO_ZONEOUT)


def directions(*layer):
    """The same layer, one direction after another through `reference_function.lstm`."""
    kept = dict(zip(("zoneout_h", "zoneout_c", "zoneout_seed"), layer[8:], strict=True))
    return lstm_layer(*layer[:8], backend="reference", **kept)[:3]


def loss_of(outputs):
    return sum((output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum() for output in outputs)


def results(way, layer):
    outputs = way(*layer)
    x, h_0, c_0, weights, _, _, *given = layer[:8]
    tensors = [t for t in (x, h_0, c_0, *weights, *given) if t is not None]
    return [*outputs, *torch.autograd.grad(loss_of(outputs), tensors)]


both_ways = pytest.mark.parametrize("way", [eager, compiled])
both_keeps = pytest.mark.parametrize("keep", ["gates", "states"])


@both_ways
@both_keeps
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(way, keep, name):
    layer = make_layer(CASES[name])
    for actual, expected in zip(results(partial(way, keep), layer), results(directions, layer), strict=True):
        assert torch.equal(actual, expected)


@both_keeps
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [0, T])
def test_operator_checks(name, keep, steps):
    layer = make_layer(CASES[name], steps=steps)
    torch.library.opcheck(lstm_layer_op, arguments(layer, keep))


@pytest.mark.parametrize("name", [name for name in CASES if "both directions" in name])
def test_operator_checks_of_inference_and_of_the_gradient(name):
    layer = [t.detach() if torch.is_tensor(t) else t for t in make_layer(CASES[name])]
    layer[3] = [w.detach() for w in layer[3]]
    torch.library.opcheck(lstm_layer_op, arguments(layer, "nothing"))
    x, h_0, c_0, weights, lengths, *resets = layer[:8]
    y, h_n, c_n, gates, cells = lstm_layer_op(*arguments(layer, "gates"))
    for outer in ((y, h_n, c_n), (y, None, None), (None, None, c_n)):
        for needs in ((True, True), (False, True), (True, False)):
            inputs = (*outer, x, h_0, c_0, weights, y, gates, cells, lengths, "reference", *needs, *resets, None)
            inputs = (*inputs, *layer[8:])
            torch.library.opcheck(torch.ops.tlstm.lstm_layer_backward.default, inputs)


@both_ways
@pytest.mark.parametrize("name", [name for name in CASES if "lengths" in name or name == "projection"])
def test_first_and_second_derivatives(way, name):
    x, h_0, c_0, weights, lengths, resets, *given = make_layer(CASES[name], torch.float64, steps=2)
    given, zoneout, n = given[:2], given[2:], len(weights)

    def function(x, h_0, c_0, *rest):
        return way("gates", x, h_0, c_0, list(rest[:n]), lengths, resets, *(rest[n:] or (None, None)), *zoneout)

    tensors = (x, h_0, c_0, *weights, *(state for state in given if state is not None))
    assert gradcheck(function, tensors, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


@both_ways
def test_gradients_that_nobody_asked_for_are_not_computed(way):
    x, h_0, c_0, weights, *_ = make_layer(CASES["plain"])
    y, _, _ = way("gates", x.detach(), h_0.detach(), c_0.detach(), weights, None, None, None, None)
    y.sum().backward()
    assert all(w.grad is not None for w in weights)
    frozen = [w.detach() for w in weights]
    _, h_n, _ = way("gates", x, h_0.detach(), c_0, frozen, None, None, None, None)
    h_n.sum().backward()
    assert x.grad is not None
    assert h_0.grad is None


@both_ways
@both_keeps
def test_the_same_bits_at_every_run(way, keep):
    layer = make_layer(CASES["both directions, lengths"])
    first, second = (results(partial(way, keep), layer) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_vmap_over_the_resets_of_the_eager_way():
    x, h_0, c_0, weights, _, resets, *_ = make_layer(CASES["resets to zero"])
    many = torch.stack((resets, ~resets, torch.ones_like(resets)))

    def y_of(resets):
        return eager("gates", x, h_0, c_0, weights, None, resets, None, None)[0]

    torch.testing.assert_close(torch.func.vmap(y_of)(many), torch.stack([y_of(mask) for mask in many]))


def test_the_eager_way_takes_every_short_cut_and_none_where_something_would_be_lost():
    """Without gradients, under torch.func, and in forward mode, which the layer has not and must not ignore."""
    x, h_0, c_0, weights, *_ = make_layer(CASES["plain"])
    plain = [t.detach() for t in (x, h_0, c_0, *weights)]

    def y_of(x):
        return run_eagerly(x, *plain[1:3], None, "reference", "nothing", *[None] * 3, False, *NO_ZONEOUT, *plain[3:])[0]

    expected = LayerFunction.apply(
        *plain[:3], None, "reference", "nothing", None, None, None, False, *NO_ZONEOUT, *plain[3:]
    )[0]
    assert torch.equal(y_of(plain[0]), expected)
    many = torch.stack((plain[0], -plain[0]))
    torch.testing.assert_close(torch.func.vmap(y_of)(many), torch.stack([y_of(one) for one in many]))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode AD"):
        y_of(forward_ad.make_dual(plain[0], torch.ones_like(plain[0])))


def test_vmap_and_jacobians_of_the_eager_way():
    x, h_0, c_0, weights, *_ = make_layer(CASES["plain"])
    weights = [w.detach() for w in weights]
    many = torch.stack((x, 2 * x, -x)).detach()

    def y_of(x):
        return LayerFunction.apply(
            x, h_0.detach(), c_0.detach(), None, "reference", "gates", None, None, None, False, *NO_ZONEOUT, *weights
        )[0]

    torch.testing.assert_close(torch.func.vmap(y_of)(many), torch.stack([y_of(x) for x in many]))
    expected = torch.autograd.functional.jacobian(y_of, many[0])
    torch.testing.assert_close(torch.func.jacrev(y_of)(many[0]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_state_after_a_reset(dtype):
    x, h_0, c_0, weights, _, resets, *given = make_layer(
        CASES["resets to a state, projection, both directions, lengths"]
    )[:8]
    with torch.autocast("cpu", dtype):
        outputs = lstm_layer(x, h_0, c_0, weights, None, resets, *given, backend="reference")[:3]
    x, h_0, c_0, h_reset, c_reset, *weights = (t.to(dtype) for t in (x, h_0, c_0, *given, *weights))
    expected = lstm_layer(x, h_0, c_0, weights, None, resets, h_reset, c_reset, backend="reference")[:3]
    for actual, e in zip(outputs, expected, strict=True):
        assert torch.equal(actual, e)
    outputs[0].float().sum().backward()
    assert all(state.grad.dtype == torch.float32 for state in given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_and_gives_gradients_in_the_weights_dtype(dtype):
    x, h_0, c_0, weights, *_ = make_layer(CASES["plain"])
    with torch.autocast("cpu", dtype):
        outputs = lstm_layer(x, h_0, c_0, weights, backend="reference")[:3]
    half = [[t.to(dtype) for t in group] for group in ((x, h_0, c_0), weights)]
    expected = lstm_layer(*half[0], half[1], backend="reference")[:3]
    for actual, e in zip(outputs, expected, strict=True):
        assert actual.dtype == dtype
        assert torch.equal(actual, e)
    outputs[0].float().sum().backward()
    assert all(w.grad.dtype == torch.float32 for w in weights)
    double = [t.detach().double() for t in (x, h_0, c_0)]
    with torch.autocast("cpu", dtype):
        assert lstm_layer(*double, [w.double() for w in weights], backend="reference")[0].dtype == torch.float64


def count_and_run(sizes):
    """A compiler that notes how many nodes each graph has."""
    from torch._dynamo.backends.common import aot_autograd

    def note(graph_module, _):
        sizes.append(len(graph_module.graph.nodes))
        return graph_module.forward

    return aot_autograd(fw_compiler=note, bw_compiler=note)


def test_compiled_function_is_one_small_graph():
    weights = list(torch.nn.LSTM(I, H, 2, bidirectional=True).parameters())
    x = torch.randn(65, B, I, requires_grad=True)
    state = torch.randn(4, B, H), torch.randn(4, B, H)
    options, sizes = LSTMOptions(num_layers=2, bidirectional=True), []

    def function(x):
        return lstm(torch.tanh(x), state, weights, options, backend="reference")[0].square().sum()

    compiled_function = torch.compile(function, fullgraph=True, backend=count_and_run(sizes))
    expected, actual = function(x), compiled_function(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, x), torch.autograd.grad(expected, x))
    assert len(sizes) == 2  # forward and backward
    assert max(sizes) < 3 * 65


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_module_without_graph_breaks(backend):
    module = LSTM(I, H, 2, batch_first=True, dropout=0.0, backend="reference")
    x, lengths = torch.randn(B, T, I, requires_grad=True), torch.tensor((5, 0, 2))

    def function(x, lengths):
        return module(torch.tanh(x), lengths=lengths)[0].square()

    # torch.compile leaves out every torch.nn.LSTM, and with it this subclass, unless told otherwise.
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled_function = torch.compile(function, fullgraph=True, backend=backend)
        for steps in (T, 9):
            longer = torch.randn(B, steps, I, requires_grad=True)
            actual, expected = compiled_function(longer, lengths), function(longer, lengths)
            torch.testing.assert_close(actual, expected)
            parameters = [longer, *module.parameters()]
            torch.testing.assert_close(
                torch.autograd.grad(actual.sum(), parameters), torch.autograd.grad(expected.sum(), parameters)
            )
        with torch.no_grad():
            torch.testing.assert_close(compiled_function(x, lengths), function(x, lengths))


BAD_CALLS = {
    "triton on a CPU": ({"backend": "triton"}, "expected tensors on a GPU; received them on cpu"),
    "unknown backend": ({"backend": "native"}, "expected one of 'triton', 'reference'; received 'native'"),
    "too few weights": ({"weights": lambda w: w[:1]}, r"2 to 5 weights.*and 1 weights"),
    "wrong weight": ({"weights": lambda w: [w[0], w[0], *w[2:]]}, r"weights\[1\]: expected .* shape \(28, 7\)"),
    "wrong state": ({"h_0": lambda h: h[..., :6]}, r"h_0: expected .* shape \(1, 3, 7\).*\(1, 3, 6\)"),
    "wrong dtype": ({"c_0": lambda c: c.double()}, r"c_0: expected torch.float32.*received torch.float64"),
    "wrong lengths": ({"lengths": torch.tensor((5, 2))}, r"lengths: expected shape \(3,\).*received shape \(2,\)"),
    "wrong resets": ({"resets": torch.ones(3, 5).bool()}, r"resets: expected shape \(5, 3\).*received \(3, 5\)"),
    "resets that are no mask": ({"resets": torch.ones(5, 3)}, r"resets: expected a bool or integer.*resets != 0"),
    "half a reset state": (
        {"resets": torch.ones(5, 3).bool(), "h_reset": torch.ones(1, 3, 7)},
        "expected both or none of them.*received resets and h_reset only",
    ),
    "a reset state without resets": (
        {"h_reset": torch.ones(1, 3, 7), "c_reset": torch.ones(1, 3, 7)},
        "expected both or none of them, and the resets.*received h_reset and c_reset only",
    ),
    "wrong reset state": (
        {"resets": torch.ones(5, 3).bool(), "h_reset": torch.ones(3, 7), "c_reset": torch.ones(1, 3, 7)},
        r"h_reset: expected .* shape \(1, 3, 7\).*\(3, 7\)",
    ),
    "zoneout that is no probability": ({"zoneout_c": 1.5}, r"zoneout_c: expected a number in \[0, 1\]; received 1.5"),
    "zoneout with a number for a seed": (
        {"zoneout_h": 0.5, "zoneout_seed": 7},
        r"zoneout_seed: expected an int64 tensor of shape \(\) on cpu.*received int. Make one: torch.tensor",
    ),
    "no batch": ({"x": lambda x: x[:, 0]}, r"expected x \(T, B, I\).*received shapes \(5, 4\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_wrong_arguments(name):
    changes, message = BAD_CALLS[name]
    x, h_0, c_0, weights, *_ = make_layer(CASES["plain"])
    call = {"x": x, "h_0": h_0, "c_0": c_0, "weights": weights, "lengths": None, "backend": "reference"}
    call |= {key: value(call[key]) if callable(value) else value for key, value in changes.items()}
    with pytest.raises(ArgumentError, match=message):
        lstm_layer(**call)


def test_gradient_of_an_operator_that_kept_nothing_is_still_right():
    layer = make_layer(CASES["plain"])
    for actual, expected in zip(results(partial(compiled, "nothing"), layer), results(directions, layer), strict=True):
        assert torch.equal(actual, expected)
