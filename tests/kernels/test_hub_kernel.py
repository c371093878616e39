"""tlstm_kernels as a kernel of the Hub: built by the script, loaded by `kernels` beside the installed package."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tlstm_kernels
import torch

try:
    from kernels import get_local_kernel
except ImportError:  # where the package is not installed, this repository's folder of that name is what is found
    pytest.skip("needs the package `kernels`", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "kernels" / "build_hub_kernel.py"
SOURCE = ROOT / "kernels" / "tlstm_kernels"
MODULES = sorted(path.stem for path in SOURCE.glob("*.py") if path.stem != "__init__")
NEED_TRITON = {path.stem for path in SOURCE.glob("*.py") if "import triton" in path.read_text(encoding="utf-8")}


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tlstm-kernels"
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def loaded(repo):
    """The variant for this machine's torch, as `kernels` chooses it."""
    return get_local_kernel(repo)


def operators(namespace: str) -> set[str]:
    return {name for name in dir(getattr(torch.ops, namespace)) if name.startswith("lstm")}


def layer(dtype: torch.dtype = torch.float64) -> tuple[torch.nn.LSTM, list[torch.Tensor]]:
    """A layer of torch in two directions, and its input and initial states."""
    T, B, I, H = 13, 7, 5, 11
    lstm = torch.nn.LSTM(I, H, bidirectional=True, dtype=dtype)
    return lstm, [torch.randn(*shape, dtype=dtype) for shape in ((T, B, I), (2, B, H), (2, B, H))]


def outputs_and_gradients(function, lstm: torch.nn.LSTM, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    y, h_n, c_n = function(*inputs)[:3]
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    loss = (weight * y).sum() + h_n.square().sum() + c_n.sum()
    return [y, h_n, c_n, *torch.autograd.grad(loss, [*inputs, *lstm.parameters()])]


def by_torch(lstm: torch.nn.LSTM, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    def run(x, h_0, c_0):
        y, (h_n, c_n) = lstm(x, (h_0, c_0))
        return y, h_n, c_n

    return outputs_and_gradients(run, lstm, inputs)


def test_each_variant_holds_the_package_and_names_itself(repo):
    files = {path.name: path.read_bytes() for path in SOURCE.glob("*.py")}
    ids = set()
    for backend in ("cpu", "cuda", "rocm"):
        variant = repo / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert {path.name: path.read_bytes() for path in variant.iterdir() if path.name != "metadata.json"} == files
        assert metadata["backend"] == {"type": backend}
        ids.add(metadata["id"])
    assert len(ids) == 3
    assert {path.name for path in repo.iterdir()} == {"LICENSE", "README.md", "build"}


def test_imports_inside_the_package_are_relative(repo):
    """Only then do the modules of a copy find one another."""
    for path in SOURCE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] == "tlstm_kernels"], path.name


def test_a_layer_of_the_loaded_kernel_is_that_of_torch(loaded, repo):
    assert Path(loaded.__file__).is_relative_to(repo / "build" / "torch-cpu")
    assert loaded.lstm_layer is not tlstm_kernels.lstm_layer
    lstm, inputs = layer()
    weights = list(lstm.parameters())
    expected = by_torch(lstm, inputs)
    for lstm_layer in (loaded.lstm_layer, tlstm_kernels.lstm_layer):
        found = outputs_and_gradients(lambda *x, run=lstm_layer: run(*x, weights, backend="reference"), lstm, inputs)
        for tensor, right in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor, right, rtol=1e-10, atol=1e-12)


def test_operators_of_all_copies_live_side_by_side(loaded, repo):
    """What torch.compile runs of the installed package and of two loaded variants, in any order."""
    other = get_local_kernel(repo / "build" / "torch-cuda")
    copies = {"tlstm": tlstm_kernels, loaded.__name__: loaded, other.__name__: other}
    assert len(copies) == 3
    assert {frozenset(operators(namespace)) for namespace in copies} == {frozenset(operators("tlstm"))}
    assert {"lstm_layer", "lstm_layer_backward"} <= operators("tlstm")
    lstm, inputs = layer()
    weights = list(lstm.parameters())
    expected = by_torch(lstm, inputs)
    used: list[str] = []

    def watching(graph, _):
        used.extend(str(node.target).split(".")[0] for node in graph.graph.nodes if "lstm_layer" in str(node.target))
        return graph.forward

    for namespace, copy in [*copies.items(), *reversed(copies.items())]:

        def run(*x, copy=copy):
            return copy.lstm_layer(*x, weights, backend="reference")

        used.clear()
        torch.compiler.reset()
        found = outputs_and_gradients(torch.compile(run, backend=watching, fullgraph=True), lstm, inputs)
        assert used == [namespace]
        for tensor, right in zip(found, expected, strict=True):
            torch.testing.assert_close(tensor, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODULES, ids=lambda name: f"{name}.py")
def test_every_module_is_found_under_the_name_of_the_copy(loaded, repo, name):
    if name in NEED_TRITON:
        pytest.importorskip("triton", reason="needs triton")
    module = importlib.import_module(f"{loaded.__name__}.{name}")
    assert Path(module.__file__).is_relative_to(repo)
    for value in vars(module).values():
        assert not str(getattr(value, "__module__", "")).startswith("tlstm_kernels"), value


def test_the_kernels_of_a_copy_compile(loaded):
    pytest.importorskip("triton", reason="needs triton's compiler")
    ahead_of_time, gpu, plan_choice = (
        importlib.import_module(f"{loaded.__name__}.{name}") for name in ("ahead_of_time", "gpu", "plan_choice")
    )
    h100 = gpu.KNOWN_GPUS["H100"]
    figures = ahead_of_time.compile_plan(plan_choice.choose_plan("forward", 64, 7, "float16", h100), h100)
    assert figures.spills == 0


def test_the_copy_needs_nothing_that_is_installed(repo):
    """A process that finds neither tlstm nor tlstm_kernels, and no network."""
    code = (
        "import sys, pathlib, torch, kernels\n"
        "sys.modules.update(tlstm=None, tlstm_kernels=None)\n"
        f"kernel = kernels.get_local_kernel(pathlib.Path({str(repo)!r}))\n"
        "lstm, x, zero = torch.nn.LSTM(3, 7), torch.ones(5, 2, 3), torch.zeros(1, 2, 7)\n"
        "y, *_ = kernel.lstm_layer(x, zero, zero, list(lstm.parameters()), backend='reference')\n"
        "torch.testing.assert_close(y, lstm(x)[0])\n"
    )
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=repo,
        env={**kept, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_script_replaces_only_its_own_builds(tmp_path):
    own, mine = tmp_path / "own", tmp_path / "mine" / "build" / "work"
    assert build(own).returncode == 0
    stale = own / "build" / "torch-cpu" / "gone.py"
    stale.write_text("")
    assert build(own).returncode == 0
    assert not stale.exists()
    mine.mkdir(parents=True)
    done = build(tmp_path / "mine")
    assert done.returncode == 2
    assert "name another folder" in done.stderr
    assert mine.is_dir()
