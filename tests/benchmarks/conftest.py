"""Tiny workloads, and providers that compute what they should not."""

from __future__ import annotations

import pytest

from tlstm.benchmark.problem import Problem
from tlstm.benchmark.providers import Built, Provider
from tlstm.benchmark.workload import Workload

TINY = Workload(T=5, B=3, H=7, I=4)


@pytest.fixture
def tiny() -> Workload:
    return TINY


def of_torch(name: str, change=lambda y: y, on_call=lambda n: None) -> Provider:
    """torch.nn.LSTM whose output is passed through `change`; `on_call` is told how often it ran."""
    calls = iter(range(10**9))

    def build(problem: Problem) -> Built:
        def run(x):
            on_call(next(calls))
            return change(problem.module(x)[0])

        return Built(run, dict(problem.module.named_parameters()))

    return Provider(name, "for tests", lambda problem: None, build)


def lookup(*providers: Provider):
    known = {provider.name: provider for provider in providers}
    return known.__getitem__
