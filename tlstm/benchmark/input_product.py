"""The products of the input with W_ih: timed in the same turns, and taken off to compare the recurrence alone."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tlstm.benchmark.problem import Problem
from tlstm.benchmark.timing import Call


def input_product(problem: Problem) -> Call:
    """x W_ih^T + b of every layer, both directions in one product; with gradients, those of x and of W_ih too."""
    w, mode = problem.workload, problem.mode
    layers = []
    for n, size in enumerate(w.input_sizes):
        own = problem.weights[n * w.directions : (n + 1) * w.directions]
        weight, bias = torch.cat([group[0] for group in own]), torch.cat([group[2] + group[3] for group in own])
        inputs = [x.detach() for x in problem.xs] if n == 0 else [_random(problem, size)]
        d_gates = None if mode == "forward" else _random(problem, weight.shape[0])
        layers.append((weight, bias, inputs, d_gates))

    @torch.no_grad()
    def run(n: int) -> None:
        for weight, bias, inputs, d_gates in layers:
            x = inputs[n % len(inputs)]
            if mode != "backward":
                F.linear(x, weight, bias)
            if d_gates is not None:
                torch.matmul(d_gates, weight)
                torch.matmul(d_gates.flatten(0, 1).T, x.flatten(0, 1))

    return Call(run)


def _random(problem: Problem, width: int) -> torch.Tensor:
    w = problem.workload
    return torch.randn(w.T, w.B, width, dtype=problem.dtype, device=problem.device)
