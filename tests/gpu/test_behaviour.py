"""What a layer on a GPU must also do: end, repeat itself bit for bit, and work with streams, graphs and threads."""

from __future__ import annotations

import threading

import pytest
import torch
from tlstm_kernels.launch_options import launch_options
from torch.nn.utils.rnn import pack_padded_sequence

from tlstm.functional import explain_backends, resolve_backend
from tlstm.layer import LSTM
from tlstm.trials import trial_refusal

from .layers import Problem, Shape

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def training_step(module, x):
    """y and all gradients, x's first."""
    x = x.detach().requires_grad_()
    y, (h_n, c_n) = module(x)
    loss = y.float().square().sum() + h_n.float().sum() + c_n.float().sum()
    return [y, *torch.autograd.grad(loss, [x, *module.parameters()])]


def layer(H=200, I=24, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    return LSTM(I, H, dtype=dtype, device="cuda", backend="triton", **options)


def test_triton_can_run_here():
    assert explain_backends("cuda")["triton"] is None
    assert resolve_backend("triton", "cuda") == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_pass_their_trials_and_are_the_default(dtype):
    assert trial_refusal("layer", 0, str(dtype).removeprefix("torch.")) is None
    assert trial_refusal("decode", 0, str(dtype).removeprefix("torch.")) is None
    assert resolve_backend("auto", "cuda", dtype) == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["x", "h_0", "weight", "infinite x", "gradient"])
@pytest.mark.timeout(60)
def test_nan_and_infinity_end(where, dtype):
    """They go where torch lets them go, and nobody waits for an element that looks unwritten."""
    module = layer(dtype=dtype, num_layers=2)
    x = torch.randn(9, 5, 24, dtype=dtype, device="cuda")
    h_0 = torch.zeros(2, 5, 200, dtype=dtype, device="cuda")
    d_y = torch.ones(9, 5, 200, dtype=dtype, device="cuda")
    if where in ("x", "infinite x"):
        x[3, 2, 1] = torch.nan if where == "x" else torch.inf
    elif where == "h_0":
        h_0[0, 1] = torch.nan
    elif where == "weight":
        with torch.no_grad():
            module.weight_hh_l0[7, 11] = torch.nan
    else:
        d_y[4, 3, 2] = torch.nan
    # The very bits that mark an element as unwritten are a NaN too.
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    h_0.view(bits)[0, 4, :] = -1
    x.requires_grad_()
    y, _ = module(x, (h_0, torch.zeros_like(h_0)))
    y.backward(d_y)
    torch.cuda.synchronize()
    assert y[:, 4].isnan().all()
    if where == "x":
        assert not y[:3, :4].isnan().any()
        assert y[3:, 2].isnan().all()
    assert x.grad[:, 4].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_at_every_run(dtype):
    module, x = layer(dtype=dtype, bidirectional=True), torch.randn(65, 33, 24, dtype=dtype, device="cuda")
    first = training_step(module, x)
    for _ in range(10):
        for a, b in zip(first, training_step(module, x), strict=True):
            assert torch.equal(a, b)


def test_inputs_need_not_be_contiguous():
    module = layer()
    wide = torch.randn(12, 11, 48, dtype=torch.bfloat16, device="cuda").transpose(0, 1)[..., ::2]
    for a, b in zip(training_step(module, wide), training_step(module, wide.contiguous()), strict=True):
        assert torch.equal(a, b)
    d_y = torch.randn(200, 11, 12, dtype=torch.bfloat16, device="cuda").permute(1, 2, 0)
    gradients = []
    for gradient in (d_y, d_y.contiguous()):
        y, _ = module(wide)
        gradients.append(torch.autograd.grad(y, list(module.parameters()), gradient))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_lengths_on_the_gpu_do_not_wait_for_it():
    module, x = layer(), torch.randn(13, 4, 24, dtype=torch.bfloat16, device="cuda")
    lengths = torch.tensor((13, 0, 5, 99), device="cuda")  # past the end means the end
    module(x, lengths=lengths)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, _ = module(x, lengths=lengths)
        y.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(y, module(x, lengths=lengths.clamp(max=13))[0])
    assert not y[5:, 2].any()


def test_packed_sequences():
    problem = Problem(Shape(T=13, B=5, I=24, H=100, dtype=torch.float32, options={"bidirectional": True}))
    packed = pack_padded_sequence(problem.x, torch.tensor((5, 13, 1, 7, 13)), enforce_sorted=False)
    ours, theirs = (
        problem.module(packed, problem.state),
        problem.exact_module(packed.to(torch.float64), tuple(s.double() for s in problem.state)),
    )
    assert torch.equal(ours[0].batch_sizes, theirs[0].batch_sizes)
    torch.testing.assert_close(ours[0].data.double(), theirs[0].data, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1][0].double(), theirs[1][0], rtol=1e-5, atol=1e-5)


def test_empty_sequences_and_batches():
    module = layer(bidirectional=True)
    state = tuple(torch.randn(2, 3, 200, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    y, (h_n, c_n) = module(torch.randn(0, 3, 24, dtype=torch.bfloat16, device="cuda"), state)
    assert y.shape == (0, 3, 400)
    assert torch.equal(h_n, state[0])
    assert torch.equal(c_n, state[1])
    assert module(torch.randn(4, 0, 24, dtype=torch.bfloat16, device="cuda"))[0].shape == (4, 0, 400)


@pytest.mark.parametrize("training", [False, True])
def test_capture_in_a_cuda_graph(training):
    module = layer(num_layers=2, bidirectional=True)
    x = torch.randn(17, 9, 24, dtype=torch.bfloat16, device="cuda")

    def step():
        if training:
            return training_step(module, x)
        with torch.no_grad():
            return [module(x)[0]]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        x.normal_()
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)


def test_the_current_stream_is_used():
    """Work queued on a stream is seen by the kernels of that stream, although the stream is far behind the host."""
    module = layer()
    x, later = (torch.randn(17, 9, 24, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    expected = module(later)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(200_000_000)
        x.copy_(later)
        y = module(x)[0]
    stream.synchronize()
    assert torch.equal(y, expected)


def test_threads_do_not_disturb_one_another():
    modules = [layer(H=H) for H in (64, 130, 200, 520)]
    x = torch.randn(33, 8, 24, dtype=torch.bfloat16, device="cuda")
    expected = [training_step(module, x) for module in modules]
    torch.cuda.synchronize()
    wrong: list[str] = []

    def work(n: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                for a, b in zip(training_step(modules[n], x), expected[n], strict=True):
                    if not torch.equal(a, b):
                        wrong.append(f"thread {n}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.timeout(300)
def test_compiles_without_graph_breaks():
    module = layer(num_layers=2, bidirectional=True)
    x = torch.randn(17, 9, 24, dtype=torch.bfloat16, device="cuda")

    def function(x):
        return module(torch.tanh(x))[0]

    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(function, fullgraph=True)
        torch.testing.assert_close(compiled(x), function(x))
        actual = torch.autograd.grad(compiled(x).float().sum(), list(module.parameters()))
    expected = torch.autograd.grad(function(x).float().sum(), list(module.parameters()))
    torch.testing.assert_close(actual, expected)


def test_autocast():
    module = layer(dtype=torch.float32)
    x = torch.randn(17, 9, 24, device="cuda")
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype):
            y, _ = module(x)
        assert y.dtype == dtype
        y.float().sum().backward()
        assert module.weight_hh_l0.grad.dtype == torch.float32


def test_second_derivatives():
    module = layer(H=5, I=3, dtype=torch.float64)  # float64 goes through the equations
    x = torch.randn(3, 2, 3, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,))
    single = layer(H=33, dtype=torch.float32)
    x = torch.randn(4, 2, 24, device="cuda", requires_grad=True)
    (gradient,) = torch.autograd.grad(single(x)[0].square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert single.weight_hh_l0.grad.isfinite().all()


def test_recomputed_gates_give_the_same_gradients():
    from tlstm_kernels.layer_op import lstm_layer

    module = layer(dtype=torch.float32, bidirectional=True)
    x = torch.randn(17, 9, 24, device="cuda")
    state = torch.zeros(2, 9, 200, device="cuda")
    lengths = torch.tensor((17, 0, 3, 17, 9, 1, 2, 16, 5), device="cuda")
    results = []
    for recompute in (False, True):
        y, *_ = lstm_layer(x, state, state, list(module.parameters()), lengths, recompute=recompute)
        results.append(torch.autograd.grad(y.square().sum(), list(module.parameters())))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.timeout(60)
def test_a_bounded_wait_reports_nothing_when_all_is_well():
    module, x = layer(), torch.randn(17, 9, 24, dtype=torch.bfloat16, device="cuda")
    expected = module(x)[0]
    with launch_options(max_spins=100_000_000):
        assert torch.equal(module(x)[0], expected)


@pytest.mark.timeout(300)
def test_new_lengths_and_batches_do_not_recompile():
    import triton.knobs

    module, compiled = layer(), []
    x = torch.randn(40, 16, 24, dtype=torch.bfloat16, device="cuda")
    training_step(module, x)
    training_step(module, x[:39, :15])
    triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: compiled.append(fn.name)
    try:
        for T in (1, 2, 17, 33, 40):
            for B in (9, 11, 14, 16):
                training_step(module, x[:T, :B])
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert not compiled
