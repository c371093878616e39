"""`tlstm bench` and `python -m benchmarks.run` on tiny shapes of a CPU, and what they say of mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import run
from tlstm.benchmark.results import read_rows
from tlstm.benchmark.sets import SETS, WorkloadSet
from tlstm.benchmark.workload import Workload
from tlstm.cli import main as tlstm

ROOT = Path(__file__).parents[2]
TINY = WorkloadSet("tiny", "sizes for tests", (Workload(T=64, B=8, H=64, I=64), Workload(T=64, B=8, H=72, I=64)))
QUICK = ["--device", "cpu", "--seconds", "0.001"]


@pytest.fixture(autouse=True)
def tiny_set(monkeypatch):
    monkeypatch.setitem(SETS, "tiny", TINY)


def test_tlstm_bench_prints_and_writes(tmp_path, capsys):
    assert tlstm(["bench", "--set", "tiny", *QUICK, "--out", str(tmp_path), "--providers", "tlstm", "torch"]) == 0
    printed = capsys.readouterr().out
    assert "forward float32 T=4 B=2 H=8 on the cpu" in printed  # shrunk, and says where
    assert "train float32 T=4 B=2 H=9 I=8 on the cpu" in printed
    assert "x torch" in printed
    (path,) = tmp_path.glob("tiny-*.csv")
    assert f"wrote {path}" in printed
    assert {row["provider"] for row in read_rows(path)} == {"tlstm", "torch"}
    assert json.loads(path.with_suffix(".json").read_text())["shrunk"] is True


def test_tlstm_bench_lists_sets_and_providers(capsys):
    assert tlstm(["bench", "--list", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in SETS)
    assert "FlashRNN, fused CUDA (not here: the package flashrnn is not installed)" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "nonsense"], "set: expected one of headline"),
        (["--mode", "both"], "mode: expected one of forward, backward, train, decode; received 'both'"),
        (["--dtype", "int8"], "dtype: expected one of float16, bfloat16, tf32, float32; received 'int8'"),
        (["--providers", "cudnn"], "received 'cudnn'"),
        (["--threads", "0"], "--threads: expected 1 or more; received 0"),
        (["--device", "cuda"], "--device: expected a device that torch can use; received 'cuda'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    if arguments == ["--device", "cuda"]:
        import torch

        if torch.cuda.is_available():
            pytest.skip("names a GPU that is missing, and this machine has one")
    for command in (lambda a: tlstm(["bench", *a]), run.main):
        assert command(arguments if "--device" in arguments else [*QUICK, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_run_records_draws_and_sums_up(tmp_path, capsys):
    arguments = ["--set", "tiny", *QUICK, "--mode", "train", "backward", "--out", str(tmp_path), "--full-size"]
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "tiny on cpu\n" in printed
    assert "geometric mean" in printed
    (path,) = tmp_path.glob("tiny-*.csv")
    assert {(row["mode"], row["H"]) for row in read_rows(path)} == {
        (m, h) for m in ("train", "backward") for h in ("64", "72")
    }
    about = json.loads(path.with_suffix(".json").read_text())
    assert {entry["provider"] for entry in about["summary"]} == {
        "tlstm",
        "tlstm:recompute",
        "tlstm:reference",
        "torch",
        "torch-loop",
    }
    assert (tmp_path / f"{path.stem}-ratios.svg").exists()
    again = path.read_bytes()
    assert run.main([*arguments, "--no-plots"]) == 0  # all is there already
    assert path.read_bytes() == again


def test_a_run_that_is_interrupted_says_so(tmp_path, capsys, monkeypatch):
    from tlstm.benchmark import session

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "run_set", stop)
    assert run.main(["--set", "tiny", *QUICK, "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_the_commands_of_the_documentation_exist():
    """In a process of its own, as from a shell in a clone."""
    modules = ["benchmarks.run", "benchmarks.readme", "benchmarks.plots", "benchmarks.tune_plans"]
    code = f"import sys, runpy\nfor name in {modules[1:]!r}: __import__(name)\n"
    code += f"sys.argv = ['run', '--help']\nrunpy.run_module({modules[0]!r}, run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--base REV" in done.stdout
