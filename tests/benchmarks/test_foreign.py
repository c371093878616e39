"""The adapters to other packages, against stand-ins that compute in the layouts which those packages document.

None of the packages is needed: a stand-in is the textbook loop in the layout of weights of its package, written down
independently of the adapter. An adapter that permutes a gate is found by the same verification as in a real run.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn

from tlstm.benchmark.foreign import FOREIGN
from tlstm.benchmark.problem import Problem, run_in_pieces
from tlstm.benchmark.verification import Truth, WrongResultError
from tlstm.benchmark.workload import Workload

ADAPTERS = {provider.name: provider for provider in FOREIGN}
WORKLOAD = Workload(T=5, B=3, H=7, I=4, layers=2)


def cell(i, f, g, o, c):
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def flashrnn(Wx, R, b, states=None, function="lstm", config=None, backend="cuda_fused", dtype="bfloat16"):
    """Wx (B, T, gates, heads, D), R (gates, heads, D, D of the state before), b (gates, heads, D), gates i, f, z, o."""
    assert (function, dtype) == ("lstm", "float32")
    B, T, _, N, D = Wx.shape
    y, c, outputs = torch.zeros(B, N, D), torch.zeros(B, N, D), []
    for t in range(T):
        raw = Wx[:, t] + torch.einsum("gndp,bnp->bgnd", R, y) + b
        i, f, z, o = raw.unbind(1)
        y, c = cell(i, f, z, o, c)
        outputs.append(torch.stack((y, c)))
    states = torch.stack(outputs, 2)  # (states, B, T, heads, D)
    return states, states[:, :, -1:]


class HasteLSTM(nn.Module):
    """kernel (I, 4H), recurrent_kernel (H, 4H), bias (4H); gates i, g, f, o."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(input_size, 4 * hidden_size))
        self.recurrent_kernel = nn.Parameter(torch.zeros(hidden_size, 4 * hidden_size))
        self.bias = nn.Parameter(torch.zeros(4 * hidden_size))

    def forward(self, x):
        h = c = x.new_zeros(x.shape[1], self.recurrent_kernel.shape[0])
        outputs = []
        for x_t in x:
            i, g, f, o = (x_t @ self.kernel + h @ self.recurrent_kernel + self.bias).chunk(4, -1)
            h, c = cell(i, f, g, o, c)
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])


class CellConfig:
    def __init__(self, **fields) -> None:
        assert fields["input_shape"] == "SBGNH"
        assert fields["output_shape"] == "SBH"
        assert (fields["function"], fields["num_heads"]) == ("lstm", 1)
        self.H = fields["hidden_size"]


class Cell(nn.Module):
    """The CUDA cell of xlstm: kernel (heads, D before, gates * D), bias (heads, gates, D), input (T, B, gates * D)."""

    def __init__(self, config: CellConfig) -> None:
        super().__init__()
        H = config.H
        self._recurrent_kernel_ = nn.Parameter(torch.zeros(1, H, 4 * H))
        self._bias_ = nn.Parameter(torch.zeros(1, 4, H))

    def _recurrent_kernel_ext2int(self, kernel):
        heads, before, gates, after = kernel.shape
        return kernel.reshape(heads, before, gates * after)

    def _bias_ext2int(self, bias):
        return bias

    def forward(self, x):
        H = x.shape[-1] // 4
        h = c = x.new_zeros(x.shape[1], H)
        outputs = []
        for x_t in x:
            raw = x_t.unflatten(-1, (4, H)) + (h @ self._recurrent_kernel_[0]).unflatten(-1, (4, H)) + self._bias_[0]
            h, c = cell(*raw.unbind(1), c)
            outputs.append(h)
        return torch.stack(outputs), c


class LSTMModule(nn.Module):
    """torchrl's module: a dictionary (B, T, ...) in and out; the state is zero where an episode begins."""

    def __init__(self, *, input_size, hidden_size, num_layers, in_keys, out_keys, recurrent_backend, **options) -> None:
        super().__init__()
        assert recurrent_backend == "triton"
        assert options["default_recurrent_mode"] is True
        self.in_keys, self.out_keys = in_keys, out_keys
        self.lstm = nn.LSTM(input_size, hidden_size, num_layers, batch_first=True)

    def forward(self, data):
        x, h, c = (data[key] for key in self.in_keys)
        assert h.shape == c.shape == (*x.shape[:2], self.lstm.num_layers, self.lstm.hidden_size)
        resets = data["is_init"].squeeze(-1).T
        time_first = nn.LSTM(self.lstm.input_size, self.lstm.hidden_size, self.lstm.num_layers)
        time_first._flat_weights = self.lstm._flat_weights
        return data | {self.out_keys[0]: run_in_pieces(time_first, x.transpose(0, 1), resets).transpose(0, 1)}


@pytest.fixture
def stand_ins(monkeypatch):
    def module(name: str, **contents) -> None:
        made = ModuleType(name)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)

    module("flashrnn", flashrnn=flashrnn)
    module("haste_pytorch", LSTM=HasteLSTM)
    for name in ("xlstm", "xlstm.blocks", "xlstm.blocks.slstm", "torchrl"):
        module(name)
    module("xlstm.blocks.slstm.cell", sLSTMCell=Cell, sLSTMCellConfig=CellConfig)
    module("torchrl.modules", LSTMModule=LSTMModule)
    module("tensordict", TensorDict=lambda contents, batch_size: contents)


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_hands_over_the_weights_as_the_package_wants_them(name, mode, stand_ins):
    problem = Problem(WORKLOAD, mode, "float32", "cpu")
    built = ADAPTERS[name].build(problem)
    assert Truth(problem).check(built).share <= 1
    assert all(parameter.is_leaf for parameter in built.parameters.values())
    size = sum(parameter.numel() for parameter in built.parameters.values())
    both_biases, one_bias = (sum(4 * 7 * (i + 7 + n) for i in (4, 7)) for n in (2, 1))
    assert size in (both_biases, one_bias)


def test_torchrl_has_resets(stand_ins):
    problem = Problem(replace(WORKLOAD, resets=0.4), "train", "float32", "cpu")
    assert Truth(problem).check(ADAPTERS["torchrl"].build(problem)).share <= 1


def test_a_package_that_changed_its_layout_is_found_out(stand_ins, monkeypatch):
    monkeypatch.setattr(sys.modules["flashrnn"], "flashrnn", lambda Wx, R, b, **o: flashrnn(Wx.flip(2), R, b, **o))
    problem = Problem(WORKLOAD, "forward", "float32", "cpu")
    with pytest.raises(WrongResultError, match="y: error"):
        Truth(problem).check(ADAPTERS["flashrnn"].build(problem))


class OnGpu:
    """As much of a problem as `why_not` looks at."""

    device = torch.device("cuda")

    def __init__(self, dtype: str, **options) -> None:
        self.dtype_name, self.workload = dtype, replace(WORKLOAD, **options)


def test_what_an_adapter_leaves_out(stand_ins, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for name, runs, refused in (
        ("flashrnn", OnGpu("bfloat16"), OnGpu("tf32")),
        ("flashrnn-triton", OnGpu("float16"), OnGpu("float32")),
        ("haste", OnGpu("float32"), OnGpu("bfloat16")),
        ("xlstm", OnGpu("bfloat16"), OnGpu("bfloat16", bidirectional=True)),
        ("torchrl", OnGpu("tf32", resets=0.1), OnGpu("tf32", proj_size=3)),
        ("flashrnn", OnGpu("bfloat16", layers=3), OnGpu("bfloat16", resets=0.1)),
    ):
        assert ADAPTERS[name].why_not(runs) is None
        assert ADAPTERS[name].why_not(refused)
    assert (
        ADAPTERS["haste"].why_not(Problem(WORKLOAD, "forward", "float32", "cpu"))
        == "haste_pytorch is measured on a GPU"
    )
