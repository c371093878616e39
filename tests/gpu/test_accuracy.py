"""The kernels against float64: at most twice the error that torch.nn.LSTM has in the same dtype."""

from __future__ import annotations

import pytest
import torch
from tlstm_kernels.launch_options import launch_options

from .layers import Problem, Shape

HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALF]


@pytest.fixture(autouse=True)
def exact_float32():
    """torch's own LSTM uses tf32 in float32 unless told not to; here both are exact."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "H", [1, 2, 7, 13, 16, 31, 32, 64, 65, 127, 128, 256, 509, 512, 650, 768, 1024, 1150, 1536, 2048]
)
def test_every_width(H, dtype):
    Problem(Shape(T=23, B=7, I=13, H=H, dtype=dtype)).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [1, 2, 7, 8, 16, 17, 31, 64, 65, 128, 257])
def test_every_batch(B, dtype):
    Problem(Shape(T=11, B=B, I=32, H=131, dtype=dtype)).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 64, 1000])
def test_every_length_of_time(T, dtype):
    Problem(Shape(T=T, B=5, I=17, H=96, dtype=dtype)).check()


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed):
    generator = torch.Generator().manual_seed(seed)

    def choose(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    primes = (1, 2, 3, 5, 7, 11, 13, 17, 29, 37, 61, 67, 97, 127, 131, 193, 257, 383, 521)
    options = {"num_layers": choose(1, 2, 3), "bidirectional": choose(False, True), "bias": choose(False, True)}
    B, T = choose(*primes[:12]), choose(*primes[:12])
    lengths = None
    if choose(False, True):
        lengths = tuple(int(n) for n in torch.randint(1, T + 1, (B,), generator=generator))
    Problem(Shape(T, B, choose(*primes), choose(*primes), choose(*DTYPES), options, lengths), seed).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"num_layers": 3}, {"bidirectional": True}, {"proj_size": 24}], ids=str)
def test_options(options, dtype):
    Problem(Shape(T=19, B=6, I=40, H=72, dtype=dtype, options=options)).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths(bidirectional, dtype):
    lengths = (13, 1, 7, 13, 2, 5, 11)
    Problem(Shape(13, 7, 24, 200, dtype, {"bidirectional": bidirectional}, lengths)).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", ["persistent", "streamed"])
def test_every_regime(regime, dtype):
    pins = {"regime": regime}
    with launch_options(forward=pins, backward=pins):
        Problem(Shape(T=17, B=19, I=24, H=200, dtype=dtype, options={"bidirectional": True})).check()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_batches_of_several_launches(dtype):
    pins = {"groups": 1, "rows": 8}
    with launch_options(forward=pins, backward=pins):
        Problem(Shape(T=9, B=29, I=24, H=130, dtype=dtype, options={"bidirectional": True})).check()


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_follows_torchs_setting(allowed):
    """Exact by default; with tf32 the error is that of 11 bits, and torch's own then too."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            Problem(Shape(T=33, B=16, I=64, H=256)).check(factor=2.0 if not allowed else 4.0)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.timeout(300)
def test_offsets_past_two_to_the_thirty_one():
    """T * B * 4H elements pass 2**31: the last steps are where a 32-bit offset would wrap around."""
    T, B, H = 2100, 128, 2048
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory for offsets past 2**31")
    shape = Shape(T=8, B=B, I=8, H=H, dtype=torch.bfloat16)
    problem = Problem(shape)
    x = torch.randn(T, B, 8, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y, (h_n, c_n) = problem.module(x)
        z, (h, c) = problem.torch_module(x)
    assert T * B * 4 * H > 2**31
    # Both round to 8 bits at every step; differences of single steps die out, as the forget gates are about 1/2.
    for a, b in ((y[-8:], z[-8:]), (h_n, h), (c_n, c)):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 4 * torch.finfo(torch.bfloat16).eps
