"""What every test runs under: few threads, fixed seeds, uninitialised memory full of NaN, no network."""

from __future__ import annotations

import os

# Read when these libraries are imported, therefore before anything else.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import random

import hypothesis
import numpy as np
import pytest
import torch

# More threads than cores cost more than they give.
torch.set_num_threads(int(os.environ.get("TLSTM_TEST_THREADS", "1")))

# torch lists its constructors when `torch.device` first chooses a device for them; it must do so before they are
# wrapped below, or models made for the meta device take memory in tests that they do not take elsewhere.
with torch.device("meta"):
    torch.empty(0)

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)  # the same examples on every run
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long tier runs only where `-m` names it (or a test is named); GPU tests only where there is a GPU."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU; none is visible to torch")
    named = any("::" in argument for argument in config.args)
    with_slow = named or "slow" in (config.option.markexpr or "")
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        (dropped if "slow" in item.keywords and not with_slow else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """A test that draws random numbers draws the same ones on every run, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its kin return NaN (integers: the highest value), so that a read before a write shows.

    The fill that torch itself offers comes with deterministic algorithms only, which would switch the code under test.
    """
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


def _poisoned(allocate):
    def allocate_and_poison(*args, **kwargs):
        result = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or type(result) is not torch.Tensor or result.device.type == "meta":
            return result
        with torch.no_grad():
            if result.is_floating_point() or result.is_complex():
                result.fill_(float("nan"))
            elif result.dtype is not torch.bool:
                result.fill_(torch.iinfo(result.dtype).max)
        return result

    return allocate_and_poison
