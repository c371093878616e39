"""Everything that tlstm.LSTM has beyond torch.nn.LSTM, on the kernels, against the equations in float64."""

from __future__ import annotations

import pytest
import torch

from tlstm.layer import LSTM

DEVICE, BACKEND = torch.device("cuda", 0), "triton"
T, B, I, H = 33, 7, 24, 130
OPTIONS = {
    "plain": {},
    "bidirectional, batch first": {"bidirectional": True, "batch_first": True},
    "heads": {"num_heads": 5},
    "heads, bidirectional, recompute": {"num_heads": 2, "bidirectional": True, "recompute": True},
    "projection": {"proj_size": 65},
    "projection, bidirectional, batch first": {"proj_size": 65, "bidirectional": True, "batch_first": True},
    "dropouts": {"dropout": 0.5, "weight_dropout": 0.5},
}


def results(module, dtype, given):
    """Outputs, cell states and gradients, for inputs drawn alike in every dtype."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    rows, P = 2 * (1 + module.bidirectional), module.proj_size or H
    x, state, anew = draw(T, B, I), (draw(rows, B, P), draw(rows, B, H)), (draw(rows, P), draw(rows, H))
    lengths = torch.randint(0, T + 1, (B,), generator=generator).to(DEVICE)
    resets = (torch.rand(T, B, generator=generator) < 0.1).to(DEVICE)
    turn = module.batch_first
    options = {"dropout_seed": 3, "return_cell_states": True}
    if given:
        options |= {"lengths": lengths, "resets": resets.T if turn else resets, "reset_state": anew}
    y, (h_n, c_n), cells = module(x.transpose(0, 1) if turn else x, state if given else None, **options)
    outputs = [y, h_n, c_n, *cells]
    outer = [torch.randn(o.shape, generator=generator).to(DEVICE, dtype) for o in outputs]
    inputs = [x, *((*state, *anew) if given else ()), *module.parameters()]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, inputs, outer))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_equations(name, dtype, given):
    """Each result at most twice as far from float64 as the equations in the same dtype, and a few roundings.

    Those are of the gates that the kernels keep in the layer's dtype for the backward pass, where the equations keep
    float32. A projection's weight is composed: its rounding adds one to that of h in every step, hence the third.
    """
    torch.manual_seed(0)
    module = LSTM(I, H, 2, device=DEVICE, dtype=dtype, backend=BACKEND, **OPTIONS[name])
    same = LSTM(I, H, 2, device=DEVICE, dtype=dtype, backend="reference", **OPTIONS[name])
    exact = LSTM(I, H, 2, device=DEVICE, dtype=torch.float64, backend="reference", **OPTIONS[name])
    for other in (same, exact):
        other.load_state_dict(module.state_dict())
    factor = 3 if module.proj_size else 2
    for a, s, e in zip(*(results(m, m.weight_ih_l0.dtype, given) for m in (module, same, exact)), strict=True):
        assert a.dtype == dtype
        floor = 16 * torch.finfo(dtype).eps * max(1.0, float(e.abs().max()))
        assert float((a.double() - e).abs().max()) <= factor * float((s.double() - e).abs().max()) + floor


@pytest.mark.parametrize("name", ["plain", "heads, bidirectional, recompute", "projection", "dropouts"])
def test_compiles_itself_into_one_graph(name):
    module = LSTM(I, H, 2, device=DEVICE, backend="triton", **OPTIONS[name])
    expected = results(module, torch.float32, True)
    module.compile(fullgraph=True)
    for a, e in zip(results(module, torch.float32, True), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
