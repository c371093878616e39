"""Whether a provider computes the LSTM: its results against float64, before it is given a time.

The error granted is twice that of plain arithmetic in the same dtype (the larger one of `torch.nn.LSTM` and of the
textbook loop, on the same numbers), and four units in the last place for where those happen to have none.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from tlstm.benchmark.problem import Problem, run_in_pieces
from tlstm.benchmark.providers import Built, plain_step, textbook_loop

FACTOR = 2.0
UNITS = 4
Results = dict[str, Tensor]


class WrongResultError(RuntimeError):
    """A provider's output is further from float64 than rounding explains; it gets no time."""


@dataclass(frozen=True)
class Verdict:
    """The largest error, as a share of what is granted, and where."""

    share: float
    where: str


class Truth:
    """Exact results of a problem's first input, and the errors granted. Made once, for all providers."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        with problem.precision():
            exact_module = copy.deepcopy(problem.module).double()
            self.exact = _results_of_module(problem, exact_module)
            yardsticks = [_results_of_module(problem, problem.module), results_of(_textbook(problem), problem)]
        eps = torch.finfo(problem.dtype).eps if problem.dtype_name != "tf32" else 2.0**-10
        self.allowed = {}
        for name, truth in self.exact.items():
            plain = max(_error(results[name], truth) for results in yardsticks)
            largest = float(truth.abs().max()) if truth.numel() else 0.0
            self.allowed[name] = FACTOR * plain + UNITS * eps * max(1.0, largest)

    def check(self, built: Built) -> Verdict:
        """Run the provider once and compare.

        Raises:
            WrongResultError: a result has another shape, is missing, or is too far off (NaN included).
        """
        with self.problem.precision():
            results = results_of(built, self.problem)
        worst = Verdict(0.0, "")
        for name, truth in self.exact.items():
            if name not in results:
                continue  # the gradient of weights that a provider keeps in a layout of its own
            if results[name].shape != truth.shape:
                raise WrongResultError(f"{name}: expected shape {tuple(truth.shape)}; got {tuple(results[name].shape)}")
            error = _error(results[name], truth)
            share = error / self.allowed[name]
            if not share <= 1:
                raise WrongResultError(f"{name}: error {error:.3g} against float64, {self.allowed[name]:.3g} granted")
            worst = max(worst, Verdict(share, name), key=lambda verdict: verdict.share)
        return worst


def results_of(built: Built, problem: Problem) -> Results:
    """The output of the first input set; unless in forward mode, the gradients of the input and the weights too."""
    x = problem.xs[0]
    if problem.mode == "forward":
        with torch.no_grad():
            return {"y": built.run(x).detach()}
    y = built.run(x)
    d_x, *d_weights = torch.autograd.grad(y, [x, *built.parameters.values()], problem.d_ys[0])
    named = zip(built.parameters, d_weights, strict=True) if built.torch_layout else ()
    return {"y": y.detach(), "d_x": d_x, **{f"d_{name}": gradient for name, gradient in named}}


def _results_of_module(problem: Problem, module: torch.nn.LSTM) -> Results:
    dtype = next(module.parameters()).dtype
    x = problem.xs[0].detach().to(dtype).requires_grad_(problem.mode != "forward")
    with torch.set_grad_enabled(problem.mode != "forward"):
        y = run_in_pieces(module, x, problem.resets)
    if problem.mode == "forward":
        return {"y": y}
    gradients = torch.autograd.grad(y, [x, *module.parameters()], problem.d_ys[0].to(dtype))
    names = ["x", *(name for name, _ in module.named_parameters())]
    return {"y": y.detach(), **{f"d_{name}": gradient for name, gradient in zip(names, gradients, strict=True)}}


def _textbook(problem: Problem) -> Built:
    return textbook_loop(problem, plain_step)


def _error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).abs().max()) if truth.numel() else 0.0
