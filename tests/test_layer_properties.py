"""tlstm.LSTM against torch.nn.LSTM over random shapes and options: outputs, states and every gradient.

The tolerance is torch's own error: in float32 each result may be at most twice as far from the float64 truth as
torch.nn.LSTM is. Torch's error can be next to nothing by luck, in a tensor of one element, say, so that a floor of
FLOOR units in the last place is added, of the result's largest entry or of 1, the size of gates and states, whichever
is larger. In float64 there is no better truth than torch, so there the error that torch has in float32 is scaled by the
ratio of the two machine epsilons: twice that for us and once for torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tlstm.functional import available_backends
from tlstm.layer import LSTM

FLOOR = 4
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@dataclass(frozen=True)
class Case:
    options: dict
    T: int
    B: int
    form: str  # dense, unbatched, lengths, packed
    lengths: tuple[int, ...]
    with_state: bool
    seed: int


@st.composite
def layer_options(draw) -> dict:
    """Arguments of torch.nn.LSTM."""
    H = draw(st.integers(1, 13))
    return {
        "input_size": draw(st.integers(1, 9)),
        "hidden_size": H,
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "proj_size": draw(st.integers(0, H - 1)) if draw(st.booleans()) else 0,
    }


@st.composite
def cases(draw) -> Case:
    options = draw(layer_options())
    form = draw(st.sampled_from(["dense", "unbatched", "lengths", "packed"]))
    T = draw(st.integers(1, 11))
    B = 1 if form == "unbatched" else draw(st.integers(1, 7))
    lengths = tuple(draw(st.lists(st.integers(1, T), min_size=B, max_size=B)))
    return Case(options, T, B, form, lengths, draw(st.booleans()), draw(st.integers(0, 2**32 - 1)))


def run(module: torch.nn.LSTM, case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Outputs, states and gradients of a loss with random weights; the same draw for every module and dtype."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    batch_first = case.options["batch_first"]
    directions = 1 + case.options["bidirectional"]
    H, P = case.options["hidden_size"], case.options["proj_size"] or case.options["hidden_size"]
    leading = (case.B, case.T) if batch_first else (case.T, case.B)
    rows = case.options["num_layers"] * directions
    if case.form == "unbatched":
        x, h_0, c_0 = draw((case.T, case.options["input_size"])), draw((rows, P)), draw((rows, H))
    else:
        x, h_0, c_0 = draw((*leading, case.options["input_size"])), draw((rows, case.B, P)), draw((rows, case.B, H))
    inputs = [x] + ([h_0, c_0] if case.with_state else [])
    for tensor in inputs:
        tensor.requires_grad_()
    hx = (h_0, c_0) if case.with_state else None

    lengths = torch.tensor(case.lengths)
    if case.form == "lengths" and isinstance(module, LSTM):
        y, (h_n, c_n) = module(x, hx, lengths=lengths)
    elif case.form in ("lengths", "packed"):
        packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
        packed_y, (h_n, c_n) = module(packed, hx)
        assert isinstance(packed_y, PackedSequence)
        assert torch.equal(packed_y.batch_sizes, packed.batch_sizes)
        y, _ = pad_packed_sequence(packed_y, batch_first, total_length=case.T)
    else:
        y, (h_n, c_n) = module(x, hx)

    loss = sum((output * draw(output.shape)).sum() for output in (y, h_n, c_n))
    names = ["input", "h_0", "c_0"][: len(inputs)] + [name for name, _ in module.named_parameters()]
    gradients = torch.autograd.grad(loss, [*inputs, *module.parameters()])
    results = {"output": y, "h_n": h_n, "c_n": c_n} | {f"d_{n}": g for n, g in zip(names, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in results.items()}


def error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return (actual.double() - truth).abs().max().item()


@pytest.mark.parametrize("backend", available_backends())
@given(case=cases())
@settings(max_examples=100)
def test_equals_torch(backend: str, case: Case):
    torch.manual_seed(case.seed)
    single = torch.nn.LSTM(**case.options)
    double = torch.nn.LSTM(**case.options, dtype=torch.float64)
    double.load_state_dict(single.state_dict())
    truth = run(double, case, torch.float64)
    torch_single = run(single, case, torch.float32)
    eps = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}

    for dtype, allowed in ((torch.float32, 2.0), (torch.float64, 3.0)):
        module = LSTM(**case.options, dtype=dtype, backend=backend)
        module.load_state_dict(single.state_dict())
        results = run(module, case, dtype)
        assert list(results) == list(truth)
        for name, exact in truth.items():
            assert results[name].dtype == dtype
            assert results[name].shape == torch_single[name].shape
            torch_error = error(torch_single[name], exact) * eps[dtype] / eps[torch.float32]
            floor = FLOOR * eps[dtype] * max(1.0, exact.abs().max().item())
            assert error(results[name], exact) <= allowed * torch_error + floor, (name, dtype)
