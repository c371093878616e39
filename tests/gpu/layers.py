"""The same layer three times: tlstm.LSTM in a dtype, torch.nn.LSTM in that dtype, and torch.nn.LSTM in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tlstm.layer import LSTM

# Units in the last place, of 1 or the result's largest entry, that are granted where torch's own error is nothing.
FLOOR = 4


@dataclass(frozen=True)
class Shape:
    """Sizes and options of a layer and its input."""

    T: int
    B: int
    I: int
    H: int
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None

    @property
    def directions(self) -> int:
        return 2 if self.options.get("bidirectional") else 1


class Problem:
    """Modules with the same weights, one input and one gradient for each output, drawn from a seed."""

    def __init__(self, shape: Shape, seed: int = 0, device: str = "cuda", backend: str = "triton") -> None:
        torch.manual_seed(seed)
        self.shape, self.device = shape, device
        dtype = shape.dtype
        with torch.no_grad():
            self.torch_module = torch.nn.LSTM(shape.I, shape.H, **shape.options).to(dtype).to(device)
            self.exact_module = torch.nn.LSTM(shape.I, shape.H, **shape.options, dtype=torch.float64).to(device)
            self.module = LSTM(shape.I, shape.H, **shape.options, backend=backend, dtype=dtype, device=device)
            for module in (self.exact_module, self.module):
                module.load_state_dict(self.torch_module.state_dict())
        rows = shape.options.get("num_layers", 1) * shape.directions
        width = shape.options.get("proj_size", 0) or shape.H
        self.x = self._draw(shape.T, shape.B, shape.I)
        self.state = self._draw(rows, shape.B, width), self._draw(rows, shape.B, shape.H)
        self.outer = [
            self._draw(shape.T, shape.B, shape.directions * width),
            *(self._draw(*s.shape) for s in self.state),
        ]
        self.lengths = None if shape.lengths is None else torch.tensor(shape.lengths, device=device)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.shape.dtype).to(self.device)

    def results(self, module: torch.nn.LSTM) -> dict[str, Tensor]:
        """Outputs, states and every gradient, in the module's dtype."""
        dtype = next(module.parameters()).dtype
        x, h_0, c_0 = (t.detach().to(dtype).requires_grad_() for t in (self.x, *self.state))
        if self.lengths is None:
            y, (h_n, c_n) = module(x, (h_0, c_0))
        elif isinstance(module, LSTM):
            y, (h_n, c_n) = module(x, (h_0, c_0), lengths=self.lengths)
        else:
            packed = pack_padded_sequence(x, self.lengths.cpu(), enforce_sorted=False)
            packed_y, (h_n, c_n) = module(packed, (h_0, c_0))
            y, _ = pad_packed_sequence(packed_y, total_length=x.shape[0])
        inputs = [x, h_0, c_0, *module.parameters()]
        names = ["d_x", "d_h_0", "d_c_0", *(f"d_{name}" for name, _ in module.named_parameters())]
        gradients = torch.autograd.grad((y, h_n, c_n), inputs, [d.to(dtype) for d in self.outer])
        return {"y": y, "h_n": h_n, "c_n": c_n, **dict(zip(names, gradients, strict=True))}

    def check(self, factor: float = 2.0) -> None:
        """Assert that every result is at most `factor` times as far from float64 as torch.nn.LSTM's is."""
        exact = self.results(self.exact_module)
        theirs, ours = self.results(self.torch_module), self.results(self.module)
        eps = torch.finfo(self.shape.dtype).eps
        wrong = []
        for name, truth in exact.items():
            assert ours[name].shape == theirs[name].shape, name
            assert ours[name].dtype == theirs[name].dtype, name
            if not truth.numel():
                continue
            error, torch_error = (float((r[name].double() - truth).abs().max()) for r in (ours, theirs))
            allowed = factor * torch_error + FLOOR * eps * max(1.0, float(truth.abs().max()))
            if not error <= allowed:  # also for NaN
                wrong.append(f"{name}: error {error:.3g}, torch's {torch_error:.3g}, allowed {allowed:.3g}")
        assert not wrong, f"{self.shape}: " + "; ".join(wrong)


def on_gpu(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to("cuda") for tensor in tensors]
