"""The wheel holds what the tree holds and runs on its own; the commands that the project names exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import tlstm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DEFAULT_CHECKPOINT = "shakespeare-char"


def files_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")


def installed_names() -> dict[str, Path]:
    """Name in the wheel -> file of the tree, for all that the project promises to install."""
    places = {
        "tlstm": ROOT / "tlstm",
        "tlstm_kernels": ROOT / "kernels" / "tlstm_kernels",
        f"tlstm/model_cards/{DEFAULT_CHECKPOINT}": ROOT / "model_cards" / DEFAULT_CHECKPOINT,
    }
    return {
        f"{name}/{path.relative_to(folder).as_posix()}": path
        for name, folder in places.items()
        for path in files_under(folder)
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built by pip from a copy of the tree, so that neither an earlier build nor an editable install can help."""
    source = tmp_path_factory.mktemp("source")
    for name in ("tlstm", "kernels", "model_cards"):
        (source / name).mkdir()
        for path in files_under(ROOT / name):
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "out",
        ".",
    ]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (source / "out").glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_package_list_is_that_of_the_tree():
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "tlstm").rglob("__init__.py")}
    packages |= {path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages | {"tlstm.model_cards"}
    folders_with_code = {path.parent for path in files_under(ROOT / "tlstm") if path.suffix == ".py"}
    assert all((folder / "__init__.py").exists() for folder in folders_with_code)


def test_the_wheel_holds_exactly_the_tree(wheel):
    expected = installed_names()
    assert {"tlstm/py.typed", "tlstm_kernels/py.typed", "tlstm_kernels/reference.py"} <= expected.keys()
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == set(expected)
    assert all(wheel.read(name) == path.read_bytes() for name, path in expected.items())


def test_the_wheel_declares_the_licence_the_command_and_the_version(wheel):
    (metadata_name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(metadata_name).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Version"] == tlstm.__version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    folder = metadata_name.partition("/")[0]
    assert wheel.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "tlstm = tlstm.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_an_installed_wheel_runs_outside_the_source_tree(wheel, tmp_path):
    """The kernels and the folder of the default checkpoint are found where the wheel puts them."""
    wheel.extractall(tmp_path / "site")
    checkpoint = [name.split("/", 2)[2] for name in installed_names() if name.startswith("tlstm/model_cards/")]
    code = (
        "import importlib.resources, torch, tlstm, tlstm_kernels.reference\n"
        "assert tlstm.LSTM(3, 7)(torch.ones(5, 2, 3))[0].shape == (5, 2, 7)\n"
        "print(tlstm.__file__, tlstm_kernels.__file__)\n"
        f"for name in {checkpoint!r}: print(importlib.resources.files('tlstm.model_cards') / name)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert len(found) == 2 + len(checkpoint)
    assert all(Path(path).is_file() and path.startswith(str(tmp_path / "site")) for path in found)


def test_an_installed_wheel_generates_from_the_shipped_checkpoint(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-m", "tlstm", "generate", "--prompt", "ROMEO:", "--max-new-tokens", "20", "--seed", "1"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ROMEO:")
    assert len(done.stdout) == len("ROMEO:") + 20 + len("\n")


def test_an_installed_wheel_measures_without_the_benchmarks_folder(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    command = ["bench", "--device", "cpu", "--set", "speech", "--mode", "forward", "--seconds", "0.001", "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "tlstm", *command],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "us/step" in done.stdout
    (table,) = (tmp_path / "out").glob("*.csv")
    assert table.name == f"speech-v{tlstm.__version__}.csv"  # no commit: this is no clone


def test_the_pinned_torch_is_one_that_the_project_accepts():
    (pin,) = [line for line in (ROOT / "constraints-cpu.txt").read_text().splitlines() if not line.startswith("#")]
    name, _, version = pin.partition("==")
    (requirement,) = [r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == name]
    assert requirement.specifier.contains(version)


def test_continuous_integration_runs_the_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if re.search(r"\bmake\b", line)]
    assert len(commands) == 1
    (command,) = re.findall(r"make [\w-]+", commands[0])
    assert command == "make test"
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # Whoever runs the tests through make has put its own flags into the environment.
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *arguments], cwd=folder, env=own, capture_output=True, text=True, check=False)


def test_make_installs_the_cpu_torch_only_where_there_is_no_gpu(tmp_path):
    """A dry run in a fresh folder: what would be executed, without and with an NVIDIA GPU, and with an index named."""
    for name in ("Makefile", "pyproject.toml", "constraints-cpu.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    for gpu, constrained in (("", True), ("yes", False)):
        plan = make("-n", "test", f"HAS_GPU={gpu}", "TORCH_INDEX=https://example.org/cpu", folder=tmp_path)
        assert plan.returncode == 0, plan.stderr
        installs = [line for line in plan.stdout.splitlines() if " pip " in line]
        assert len(installs) == 3
        assert all(("-c constraints-cpu.txt" in line) == constrained for line in installs)
        assert ["--index-url" in line for line in installs] == [True, False, False]
        steps = plan.stdout.splitlines()
        assert [step.split()[0].rpartition("/")[2] for step in steps[-4:]] == ["ruff", "ruff", "mypy", "python"]


def test_make_says_what_is_wrong_with_python(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints-cpu.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    missing = make("generate", "PYTHON=", folder=tmp_path)
    assert missing.returncode != 0
    assert "Python 3.11 or newer, and no python3 here is" in missing.stderr
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.20" && exit 0\nexit 1\n')
    old.chmod(0o755)
    too_old = make("generate", f"PYTHON={old}", folder=tmp_path)
    assert too_old.returncode != 0
    assert "is Python 3.8.20" in too_old.stderr
    without_venv = tmp_path / "python-without-venv"
    without_venv.write_text('#!/bin/sh\n[ "$1" = -m ] && exit 1\nexit 0\n')
    without_venv.chmod(0o755)
    failed = make("generate", f"PYTHON={without_venv}", folder=tmp_path)
    assert failed.returncode != 0
    assert "python3-venv" in failed.stderr
    assert not (tmp_path / ".venv").exists()
