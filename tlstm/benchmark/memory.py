"""What a training step holds on to: bytes saved for the backward pass, and the peak on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from tlstm.benchmark.problem import Problem
from tlstm.benchmark.providers import Built


def memory_of(built: Built, problem: Problem) -> dict[str, int]:
    """Columns of memory in train mode, none in the others.

    `saved_bytes` counts each storage that autograd keeps once, without the input and the parameters: the same on every
    device. `peak_bytes` is what the GPU's allocator held at most in one step, beyond what it held before.
    """
    if problem.mode != "train":
        return {}
    x, leaves = problem.xs[0], list(built.parameters.values())
    known = {_storage(tensor) for tensor in (x, *leaves)}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    on_gpu = problem.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(problem.device)
        before = torch.cuda.memory_allocated(problem.device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = built.run(x)
    torch.autograd.grad(y, [x, *leaves], problem.d_ys[0])
    measured = {"saved_bytes": sum(saved.values())}
    if on_gpu:
        measured["peak_bytes"] = torch.cuda.max_memory_allocated(problem.device) - before
    return measured


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
