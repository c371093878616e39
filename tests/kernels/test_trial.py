"""The trial of the kernels on a GPU: right kernels pass it, and what is wrong with others is said."""

from __future__ import annotations

import pytest
import torch
from tlstm_kernels import layer_op, trial

CPU, SMALL = torch.device("cpu"), (5, 3, 4, 21)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_equations_pass(dtype):
    assert trial.layer_trial(CPU, dtype, "reference", SMALL) is None


@pytest.fixture
def kernels(monkeypatch):
    """What the kernels give can be set: a function of the equations' results. Returns the list of calls."""
    calls = []

    def use(change):
        def layer(*inputs, backend):
            results = layer_op.lstm_layer(*inputs, backend="reference")
            if backend == "triton":
                calls.append(inputs)
                return change(results, len(calls))
            return results

        monkeypatch.setattr(trial, "lstm_layer", layer)
        return calls

    return use


def test_every_repeat_is_computed(kernels):
    calls = kernels(lambda results, n: results)
    assert trial.layer_trial(CPU, torch.float32, "triton", SMALL) is None
    assert len(calls) == trial.REPEATS


@pytest.mark.parametrize("n", range(1, trial.REPEATS + 1))
def test_a_stale_element_is_found_whenever_it_shows(kernels, n):
    def stale(results, call):
        y = results[0].clone()
        if call == n:
            y[3, 1, 17] = y[2, 1, 17]
        return y, *results[1:]

    kernels(stale)
    assert trial.layer_trial(CPU, torch.bfloat16, "triton", SMALL).startswith("y is off by ")


def test_a_wrong_gradient_is_found(kernels):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, d_y):
            return 2 * d_y

    kernels(lambda results, n: (Doubled.apply(results[0]), *results[1:]))
    assert "the gradient of x is off by" in trial.layer_trial(CPU, torch.float32, "triton", SMALL)


def test_nan_and_unsteady_bits_are_found(kernels):
    kernels(lambda results, n: (results[0] * torch.nan, *results[1:]))
    assert trial.layer_trial(CPU, torch.float32, "triton", SMALL).startswith("y is off by nan")
    kernels(lambda results, n: (results[0] * (1 + 1e-7 * (n % 2)), *results[1:]))
    assert trial.layer_trial(CPU, torch.float32, "triton", SMALL) == "y is not the same in every run"


def test_whatever_is_raised_is_the_reason(kernels):
    def fail(results, n):
        raise RuntimeError("no such instruction")

    kernels(fail)
    assert trial.layer_trial(CPU, torch.float32, "triton", SMALL) == "RuntimeError: no such instruction"


def test_a_trial_that_cannot_be_held_is_a_reason_too(monkeypatch):
    """The call that it was held for goes on."""

    def full(*inputs, backend):
        raise torch.OutOfMemoryError("no memory for float64")

    monkeypatch.setattr(trial, "lstm_layer", full)
    assert trial.layer_trial(CPU, torch.float32, "triton", SMALL) == "OutOfMemoryError: no memory for float64"


def test_the_kernels_themselves_pass(gpu, monkeypatch):
    """In the interpreter, through all that lies between the layer and a launch; every wait is bounded."""
    monkeypatch.setattr(layer_op, "check_layer", lambda *arguments: None)  # which asks for a GPU
    monkeypatch.setattr(trial, "REPEATS", 1)
    assert trial.layer_trial(CPU, torch.float32, "triton", (2, 3, 4, 150)) is None
    assert len(gpu) == 2
    assert all(grid[0] > 1 for grid in gpu)
