"""Two commits of a tiny repository in one run: turns, wrong versions, red tests, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare, run
from tlstm.benchmark.results import read_rows
from tlstm.benchmark.sets import SETS, WorkloadSet
from tlstm.benchmark.workload import Workload

ROOT = Path(__file__).parents[2]
LAYER = """
import torch
from torch import Tensor

class LSTM(torch.nn.LSTM):
    def __init__(self, *sizes, backend="auto", **options):
        super().__init__(*sizes, **options)

    def forward(self, x):
        y, state = super().forward(x)
        return BODY, state
"""
GREEN = f"{sys.executable} -c pass"


def git(repo: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(repo), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Path:
    """Commits `before` (the same, written otherwise), `wrong` (half the output) and `plain`, where the tree stands."""
    root = tmp_path_factory.mktemp("repo")
    git(root, "init", "-q")
    (root / "tlstm").mkdir()
    (root / "tlstm" / "__init__.py").write_text("")
    (root / "tlstm" / "version.py").write_text('__version__ = "0"\n')
    for name, body in (
        ("before", "(y + y) / 2"),
        ("wrong", "y * 0.5"),
        ("plain", "y"),
    ):
        (root / "tlstm" / "layer.py").write_text(LAYER.replace("BODY", body))
        git(root, "add", ".")
        git(root, "commit", "-qm", name)
        git(root, "tag", name)
    # The present tree has a harness; the commits have none.
    shutil.copytree(ROOT / "tlstm" / "benchmark", root / "tlstm" / "benchmark")
    return root


@pytest.fixture(autouse=True)
def tiny_set(monkeypatch):
    workload = Workload(T=64, B=4, H=64, I=64)
    monkeypatch.setitem(SETS, "tiny", WorkloadSet("tiny", "sizes for tests", (workload,)))


def compared(repo: Path, out: Path, base: str, *more: str) -> int:
    arguments = ["--set", "tiny", "--mode", "forward", "--device", "cpu", "--full-size", "--seconds", "0.2"]
    return run.main([*arguments, "--out", str(out), "--base", base, "--tests", GREEN, *more], root=repo)


def nothing_is_left(repo: Path) -> bool:
    return len(git(repo, "worktree", "list").splitlines()) == 1


def test_two_commits_in_one_run(repo, tmp_path, capsys):
    assert compared(repo, tmp_path, "before") == 0
    (path,) = tmp_path.glob("compare-*.csv")
    (row,) = read_rows(path, compare.COLUMNS)
    assert row["status"] == "ok"
    assert row["base_commit"] == git(repo, "rev-parse", "before")[:10]
    assert row["commit"] == git(repo, "rev-parse", "--short=10", "plain")
    assert all(float(row[name]) > 0 for name in ("base_ms_p50", "ms_p50", "speedup_p20", "speedup_p80"))
    assert int(row["turns"]) >= 5
    about = json.loads(path.with_suffix(".json").read_text())
    assert "geometric mean" in about["verdict"]
    assert about["tests"].endswith("-c pass")
    assert "first the tests" in capsys.readouterr().out
    assert nothing_is_left(repo)


def test_a_wrong_commit_gets_no_time(repo, tmp_path):
    assert compared(repo, tmp_path, "wrong") == 1
    (path,) = tmp_path.glob("compare-*.csv")
    (row,) = read_rows(path, compare.COLUMNS)
    assert row["status"] == "wrong"
    assert row["error"].startswith("base: y: error")
    assert row["ms_p50"] == row["speedup_p50"] == ""
    assert nothing_is_left(repo)


def test_red_tests_refuse_the_comparison(repo, tmp_path, capsys):
    red = f"{sys.executable} -c \"print('the layer is off'); raise SystemExit(3)\""
    assert compared(repo, tmp_path, "before", "--tests", red) == 2
    message = capsys.readouterr().err
    assert "expected green tests before a comparison; received exit code 3" in message
    assert "the layer is off" in message
    assert not list(tmp_path.iterdir())
    assert nothing_is_left(repo)


def test_an_unknown_revision_is_told(repo, tmp_path, capsys):
    assert compared(repo, tmp_path, "no-such-tag") == 2
    assert "expected a commit of this repository; received 'no-such-tag'" in capsys.readouterr().err


class FakeSide:
    """A process whose calls take what it is told; writes down who was asked."""

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def ask(self, message: dict) -> dict:
        if message["do"] == "prepare":
            return {"status": "ok", "seconds": self.seconds, "input_sets": 2}
        self.log.append(self.name)
        return {"seconds": self.seconds}


def test_both_versions_take_turns_and_the_faster_one_is_above_one():
    log: list[str] = []
    sides = {"base": FakeSide("base", 0.04, log), "here": FakeSide("here", 0.01, log)}
    row = compare.compare(sides, Workload(T=2, B=1, H=3, I=3), "forward", "float32", "tlstm", "cpu", seconds=1e9)
    assert row["speedup_p20"] == row["speedup_p50"] == row["speedup_p80"] == 4.0
    assert (row["base_ms_p50"], row["ms_p50"]) == (40.0, 10.0)
    rounds = [tuple(log[n : n + 2]) for n in range(0, len(log), 2)]
    assert set(rounds) == {("base", "here"), ("here", "base")}


def test_a_process_that_ends_is_an_error(repo):
    side = compare.Side(repo)
    side.process.kill()
    with pytest.raises(RuntimeError, match="a measuring process ended with exit code -9"):
        side.ask({"do": "prepare"})
    side.close()


def test_the_verdict_counts_what_is_slower_in_most_turns():
    row = {"status": "ok", "speedup_p50": "0.95", "speedup_p80": "0.96"}
    assert compare.verdict([row], tolerance=0.03)[1] == 1
    assert compare.verdict([row], tolerance=0.05) == (
        "1 workloads, geometric mean 0.950x the base; 0 slower by more than 5%", 0,
    )  # fmt: skip
    noisy = row | {"speedup_p80": "1.01"}  # slower in the median, but not in 80 % of the turns
    assert compare.verdict([noisy], tolerance=0.03)[1] == 0
    assert compare.verdict([noisy, {"status": "failed"}], tolerance=0.03)[1] == 1
    assert compare.verdict([{"status": "unavailable"}], tolerance=0.03)[1] == 1


def test_the_default_tests_exist():
    for on_gpu in (False, True):
        paths = [word for word in compare.test_command(on_gpu) if word.startswith("tests/")]
        assert all((ROOT / path).exists() for path in paths)
        assert ("tests/gpu" in paths) == on_gpu
