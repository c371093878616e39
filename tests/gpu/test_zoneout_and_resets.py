"""Zoneout and resets on a GPU: the kernels against the equations in float64, with the same masks; bits that repeat."""

from __future__ import annotations

import pytest
import torch
from tlstm_kernels.launch_options import launch_options

from tlstm.layer import LSTM

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
T, B, I = 17, 19, 24
REGIMES = {"single": 13, "persistent": 200, "streamed": 200}  # name: H


def problem(H, dtype, **options):
    """The layer in `dtype` on the kernels, in float64 on the equations, its input and all that a call may be given."""
    torch.manual_seed(0)
    layer = LSTM(I, H, 2, bidirectional=True, backend="triton", dtype=dtype, device="cuda", **options)
    exact = LSTM(I, H, 2, bidirectional=True, backend="reference", dtype=torch.float64, device="cuda", **options)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, I, device="cuda").to(dtype)
    lengths = torch.randint(0, T + 1, (B,), device="cuda")
    resets = torch.rand(T, B, device="cuda") < 0.2
    state = tuple(torch.randn(4, B, H, device="cuda").to(dtype) for _ in range(2))
    return layer, exact, x, {"lengths": lengths, "resets": resets, "reset_state": state, "dropout_seed": 2**40 + 3}


def results(module, x, call):
    """Output, states and all gradients."""
    dtype = next(module.parameters()).dtype
    x = x.to(dtype).requires_grad_()
    call = call | {"reset_state": tuple(s.to(dtype).requires_grad_() for s in call["reset_state"])}
    y, (h_n, c_n) = module(x, **call)
    inputs = [x, *call["reset_state"], *module.parameters()]
    return [y, h_n, c_n, *torch.autograd.grad(y.square().sum() + h_n.sum() + c_n.sum(), inputs)]


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
def test_equals_the_equations(regime, training, recompute, dtype):
    layer, exact, x, call = problem(REGIMES[regime], dtype, zoneout=(0.3, 0.2), recompute=recompute)
    layer.train(training), exact.train(training)
    pins = {"regime": regime}
    with launch_options(pins, pins):
        ours = results(layer, x, call)
    for actual, truth in zip(ours, results(exact, x, call), strict=True):
        # Rounded at each of up to T steps in each of 2 layers, which adds up to no more than the number of roundings.
        assert (actual.double() - truth).norm() <= 2 * T * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_resets_equal_the_equations(regime, dtype):
    layer, exact, x, call = problem(REGIMES[regime], dtype)
    pins = {"regime": regime}
    with launch_options(pins, pins):
        ours = results(layer, x, call)
    for actual, truth in zip(ours, results(exact, x, call), strict=True):
        assert (actual.double() - truth).norm() <= 2 * T * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("plan", [{"units": 16, "rows": 8}, {"units": 32, "rows": 16}, {"units": 16, "groups": 1}])
def test_the_masks_do_not_depend_on_the_plan(plan):
    """With every unit of c kept or not, c_n is one of the values that went in: equal masks, equal bits."""
    torch.manual_seed(0)
    layer = LSTM(I, 200, backend="triton", device="cuda", zoneout=(0.5, 0.5))
    x, seed = torch.randn(1, B, I, device="cuda"), 9
    c_0 = torch.full((1, B, 200), 1e6, device="cuda")
    state = torch.zeros(1, B, 200, device="cuda"), c_0
    kept = layer(x, state, dropout_seed=seed)[1][1] == c_0
    with launch_options(plan, plan):
        assert torch.equal(layer(x, state, dropout_seed=seed)[1][1] == c_0, kept)
    assert 0.4 < kept.float().mean() < 0.6
    on_cpu = LSTM(I, 200, backend="reference", zoneout=(0.5, 0.5))
    on_cpu.load_state_dict({name: w.cpu() for name, w in layer.state_dict().items()})
    assert torch.equal((on_cpu(x.cpu(), tuple(s.cpu() for s in state), dropout_seed=seed)[1][1] == 1e6), kept.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_seed_gives_the_same_bits(dtype):
    layer, _, x, call = problem(200, dtype, zoneout=(0.3, 0.2))
    first = results(layer, x, call)
    for _ in range(5):
        for a, b in zip(first, results(layer, x, call), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(results(layer, x, call | {"dropout_seed": 4})[0], first[0])


def test_a_cuda_graph_draws_new_masks_at_every_replay():
    layer, _, x, _ = problem(200, torch.float32, zoneout=(0.5, 0.5))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y, _ = layer(x)
    outputs = []
    for _ in range(2):
        graph.replay()
        outputs.append(y.clone())
    assert not torch.equal(*outputs)


def test_nothing_waits_for_the_gpu():
    layer, _, x, call = problem(200, torch.bfloat16, zoneout=(0.5, 0.5))
    call.pop("dropout_seed")
    layer(x, **call)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, **call)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
