"""Other people's LSTMs, measured where they are installed. Nothing of them is copied here, and none is needed.

    flashrnn, flashrnn-triton   NX-AI/flashrnn: its fused CUDA and its fused Triton kernel (Poeppel et al. 2024)
    haste                       lmnt-com/haste: float32, one direction
    xlstm                       NX-AI/xlstm: the `lstm` function of its sLSTM cell, without exponential gating
    torchrl                     pytorch/rl: LSTMModule with recurrent_backend="triton"; has resets

Each adapter says in which layout the package wants weights; verification finds out whether that is still so.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tlstm.benchmark.problem import Problem
from tlstm.benchmark.providers import Built, Provider


def _needs(package: str, dtypes: tuple[str, ...], resets: bool = False) -> Callable[[Problem], str | None]:
    def why_not(problem: Problem) -> str | None:
        w = problem.workload
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
        if problem.device.type != "cuda":
            return f"{package} is measured on a GPU"
        if problem.dtype_name not in dtypes:
            return f"{package} is measured in {', '.join(dtypes)}"
        if w.bidirectional or w.proj_size or (w.resets and not resets):
            return f"{package} has one direction, no projection" + ("" if resets else ", no resets")
        return None

    return why_not


def _stacked(problem: Problem, one_layer: Callable[[list[Tensor]], Callable[[Tensor], Tensor]]) -> Built:
    """Layers one after another, each from its W_ih, W_hh, b_ih, b_hh as leaves in torch's layout."""
    groups = [[t.requires_grad_(problem.mode != "forward") for t in group] for group in problem.weights]
    layers = [one_layer(group) for group in groups]

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    names = [name for name, _ in problem.module.named_parameters()]
    return Built(run, dict(zip(names, (t for group in groups for t in group), strict=True)))


def _flashrnn(backend: str) -> Callable[[Problem], Built]:
    def build(problem: Problem) -> Built:
        flashrnn: Any = importlib.import_module("flashrnn").flashrnn
        H, dtype = problem.workload.H, str(problem.dtype).removeprefix("torch.")

        def one_layer(group: list[Tensor]) -> Callable[[Tensor], Tensor]:
            w_ih, w_hh, b_ih, b_hh = group

            def layer(x: Tensor) -> Tensor:
                w_x = F.linear(x, w_ih).unflatten(-1, (4, 1, H)).transpose(0, 1)  # (B, T, gates, heads, H)
                bias = (b_ih + b_hh).view(4, 1, H)
                states, _ = flashrnn(w_x, w_hh.view(4, 1, H, H), bias, function="lstm", backend=backend, dtype=dtype)
                return states[0].squeeze(-2).transpose(0, 1)  # of (states, B, T, heads, H)

            return layer

        return _stacked(problem, one_layer)

    return build


def _haste(problem: Problem) -> Built:
    haste: Any = importlib.import_module("haste_pytorch")

    def columns(rows: Tensor) -> Tensor:
        """(4H, ...) in torch's order of gates as haste has them: i, g, f, o."""
        i, f, g, o = rows.chunk(4)
        return torch.cat((i, g, f, o))

    layers = []
    for (w_ih, w_hh, b_ih, b_hh), size in zip(problem.weights, problem.workload.input_sizes, strict=True):
        layer = haste.LSTM(input_size=size, hidden_size=problem.workload.H)
        with torch.no_grad():
            layer.kernel.copy_(columns(w_ih).T)
            layer.recurrent_kernel.copy_(columns(w_hh).T)
            layer.bias.copy_(columns(b_ih + b_hh))
        layers.append(layer.train(problem.mode != "forward"))

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)[0]
        return x

    parameters = {f"{n}.{name}": p for n, layer in enumerate(layers) for name, p in layer.named_parameters()}
    return Built(run, parameters, torch_layout=False)


def _xlstm(problem: Problem) -> Built:
    cells: Any = importlib.import_module("xlstm.blocks.slstm.cell")
    w, dtype = problem.workload, str(problem.dtype).removeprefix("torch.")
    layers: list[tuple[Tensor, Any]] = []
    parameters: dict[str, Tensor] = {}
    for n, (w_ih, w_hh, b_ih, b_hh) in enumerate(problem.weights):
        dtypes = {f"dtype{of}": dtype for of in ("", "_b", "_r", "_w", "_g", "_s", "_a")}
        config = cells.sLSTMCellConfig(
            hidden_size=w.H, num_heads=1, function="lstm", backend="cuda", batch_size=w.B, input_shape="SBGNH",
            output_shape="SBH", enable_automatic_mixed_precision=False, **dtypes,
        )  # fmt: skip
        cell = cells.sLSTMCell(config).to(problem.device).train(problem.mode != "forward")
        with torch.no_grad():
            recurrent = w_hh.view(4, w.H, w.H).permute(2, 0, 1).unsqueeze(0)  # (heads, from, gates, to)
            cell._recurrent_kernel_.copy_(cell._recurrent_kernel_ext2int(recurrent))
            cell._bias_.copy_(cell._bias_ext2int((b_ih + b_hh).view(1, 4, w.H)))
        w_ih.requires_grad_(problem.mode != "forward")
        layers.append((w_ih, cell))
        parameters |= {f"{n}.w_ih": w_ih} | {f"{n}.{name}": p for name, p in cell.named_parameters()}

    def run(x: Tensor) -> Tensor:
        for w_ih, cell in layers:
            x = cell(F.linear(x, w_ih))[0]
        return x

    return Built(run, parameters, torch_layout=False)


def _torchrl(problem: Problem) -> Built:
    modules, tensordict = importlib.import_module("torchrl.modules"), importlib.import_module("tensordict")
    w = problem.workload
    module = modules.LSTMModule(
        input_size=w.I, hidden_size=w.H, num_layers=w.layers, in_keys=["x", "h", "c"],
        out_keys=["y", ("next", "h"), ("next", "c")], recurrent_backend="triton", default_recurrent_mode=True,
        recurrent_compute_dtype=torch.float32, device=problem.device,
    )  # fmt: skip
    module.lstm.load_state_dict(problem.module.state_dict())
    module.train(problem.mode != "forward")
    state = torch.zeros(w.B, w.T, w.layers, w.H, device=problem.device)
    starts = torch.zeros(w.B, w.T, 1, dtype=torch.bool, device=problem.device)
    if problem.resets is not None:
        starts |= problem.resets.T.unsqueeze(-1)

    def run(x: Tensor) -> Tensor:
        data = tensordict.TensorDict({"x": x.transpose(0, 1), "h": state, "c": state, "is_init": starts}, [w.B, w.T])
        return module(data)["y"].transpose(0, 1)

    return Built(run, dict(module.lstm.named_parameters()))


_HALF = ("bfloat16", "float16")
FOREIGN = (
    Provider("flashrnn", "FlashRNN, fused CUDA", _needs("flashrnn", (*_HALF, "float32")), _flashrnn("cuda_fused")),
    Provider("flashrnn-triton", "FlashRNN, Triton", _needs("flashrnn", _HALF), _flashrnn("triton_fused")),
    Provider("haste", "haste_pytorch.LSTM", _needs("haste_pytorch", ("float32", "tf32")), _haste),
    Provider("xlstm", "xlstm's LSTM cell", _needs("xlstm", (*_HALF, "float32")), _xlstm),
    Provider("torchrl", "torchrl's Triton LSTM", _needs("torchrl", ("tf32",), resets=True), _torchrl),
)
