"""One workload made concrete: weights, several sets of random inputs, and what a provider may get wrong about them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tlstm.benchmark.workload import Workload

FEWEST_SETS, MOST_SETS = 2, 8


class Problem:
    """Weights as a `torch.nn.LSTM`, and input sets to take turns with, all drawn from one seed.

    There are as many sets as it takes for inputs and outputs to pass twice the L2 cache (2 to 8; 2 on a CPU), so that
    no call finds its input where the last call left it.
    """

    def __init__(
        self, workload: Workload, mode: str, dtype: str, device: str, seed: int = 0, input_sets: int | None = None
    ) -> None:
        self.workload, self.mode, self.dtype_name, self.device = workload, mode, dtype, torch.device(device)
        self.dtype = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        generator = torch.Generator().manual_seed(seed)
        w = workload
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = torch.nn.LSTM(w.I, w.H, **w.options).to(self.dtype).to(self.device)
        self.module.train(mode != "forward")  # in evaluation cuDNN saves nothing for a backward pass

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype).to(self.device)

        count = input_sets or self._enough_sets()
        self.xs = [draw(w.T, w.B, w.I).requires_grad_(mode != "forward") for _ in range(count)]
        self.d_ys = [draw(w.T, w.B, w.output_size) for _ in range(count if mode != "forward" else 0)]
        self.resets: Tensor | None = None  # (T, B) bool
        if w.resets:
            self.resets = (torch.rand(w.T, w.B, generator=generator) < w.resets).to(self.device)

    def _enough_sets(self) -> int:
        if self.device.type != "cuda":
            return FEWEST_SETS
        w = self.workload
        one = w.T * w.B * (w.I + w.output_size) * self.dtype.itemsize
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        return min(MOST_SETS, max(FEWEST_SETS, math.ceil(2 * l2 / one)))

    @property
    def weights(self) -> list[list[Tensor]]:
        """For each layer and direction W_ih, W_hh, b_ih, b_hh[, W_hr], detached copies."""
        size = 5 if self.workload.proj_size else 4
        flat = [p.detach().clone() for p in self.module.parameters()]
        return [flat[n : n + size] for n in range(0, len(flat), size)]

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Whether float32 products may be rounded to tf32, for torch's own and for ours, inside the context."""
        # Not `torch.backends.cudnn.flags(allow_tf32=...)`, which also turns cuDNN off unless told otherwise.
        switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
        before = [switch.allow_tf32 for switch in switches]
        try:
            for switch in switches:
                switch.allow_tf32 = self.dtype_name == "tf32"
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.allow_tf32 = value


def run_in_pieces(module: torch.nn.LSTM, x: Tensor, resets: Tensor | None) -> Tensor:
    """A `torch.nn.LSTM` over x (T, B, I) with resets (T, B): one call for each stretch of time without any."""
    if resets is None:
        return module(x)[0]
    T, B = resets.shape
    starts = [0, *(t for t in resets.any(1).nonzero().flatten().tolist() if t > 0), T]
    h = x.new_zeros(module.num_layers, B, module.proj_size or module.hidden_size)
    c = x.new_zeros(module.num_layers, B, module.hidden_size)
    pieces = []
    for start, stop in pairwise(starts):
        keep = ~resets[start, None, :, None]
        y, (h, c) = module(x[start:stop], (h * keep, c * keep))
        pieces.append(y)
    return torch.cat(pieces)
