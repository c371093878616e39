"""What the host does for a call of a layer on the kernels, without a GPU: everything but Triton's launch and the GPU.

    PYTHONPATH=.:kernels python -m benchmarks.layer_host [--turns N] [--out FILE.csv]

The kernels are replaced by ones that do nothing and the tensors are tiny and on the CPU, so that what is left is
Python and torch: checks, plans, allocations, the call of each product, autograd. On a GPU the host is ahead as long as
that is shorter than the kernels; of short sequences it is most of a call. torch.nn.LSTM beside it is torch's own call
of the same size on the CPU, arithmetic included. Times are the process's CPU time, one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from tlstm_kernels import kernel_calls, layer_op, plan_at_hand
from tlstm_kernels.checks import check_layer
from tlstm_kernels.gpu import KNOWN_GPUS

from benchmarks.compiled_table import Row
from benchmarks.host_figures import run, times_of
from tlstm import LSTM
from tlstm.functional import dispatch

CALLS = 300  # of a turn
CASES = {"one layer": {}, "two layers": {"num_layers": 2}, "bidirectional": {"bidirectional": True}}
COLUMNS = ("layer", "mode", "us", "p20", "p80", "torch_us")


class NoKernel:
    """Takes launches, and does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *arguments, **options: SimpleNamespace(n_spills=0)


def checked_as_on_a_gpu(*arguments: Any) -> None:
    """All checks but that for a GPU."""
    check_layer(*arguments[:5], "reference", *arguments[6:])


def contestants(options: dict[str, Any], mode: str) -> dict[str, Callable[[], object]]:
    ours, theirs = LSTM(8, 16, backend="triton", **options), torch.nn.LSTM(8, 16, **options)
    x = torch.randn(2, 2, 8, requires_grad=mode == "train")

    def call(layer: torch.nn.Module) -> None:
        with torch.set_grad_enabled(mode == "train"):
            y = layer(x)[0]
            if mode == "train":
                torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))

    return {"kernels": lambda: call(ours), "torch": lambda: call(theirs)}


def microseconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - started) / CALLS * 1e6


def measure(turns: int) -> Iterator[Row]:
    with (
        patch.object(plan_at_hand, "gpu_of", lambda index: KNOWN_GPUS["H100"]),
        patch.object(kernel_calls, "persistent_forward_kernel", NoKernel()),
        patch.object(kernel_calls, "persistent_backward_kernel", NoKernel()),
        patch.object(dispatch, "why_unavailable", lambda name, device: None),
        patch.object(layer_op, "check_layer", checked_as_on_a_gpu),
    ):
        for (name, options), mode in product(CASES.items(), ("forward", "train")):
            calls = contestants(options, mode)
            taken = [{who: microseconds(call) for who, call in calls.items()} for _ in range(turns)]
            ours, theirs = (times_of([turn[who] for turn in taken], 1) for who in ("kernels", "torch"))
            yield {"layer": name, "mode": mode, **ours, "torch_us": theirs["us"]}


if __name__ == "__main__":
    run(__doc__, COLUMNS, measure)
