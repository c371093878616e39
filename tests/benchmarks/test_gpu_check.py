"""`gpu_check.sh` without a GPU: a stand-in for Python says what it is called with, and fails where told."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = """#!/bin/sh
case "$*" in
    *is_available*) exit {no_gpu} ;;
    *xdist*) exit 1 ;;
esac
echo "$*" >> "{calls}"
case "$*" in *"{fails}"*) exit 5 ;; esac
echo "12 passed"
"""


def check(tmp_path: Path, *parts: str, fails: str = "nothing", no_gpu: int = 0) -> tuple[int, str, list[str]]:
    """Exit code, summary.txt and the calls."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STAND_IN.format(no_gpu=no_gpu, calls=calls, fails=fails))
    python.chmod(0o755)
    calls.touch()
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu_check.sh", tmp_path / "out", *parts],
        env=os.environ | {"PYTHON": str(python), "PART_MINUTES": "2"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, (tmp_path / "out" / "summary.txt").read_text(), calls.read_text().splitlines()


def test_without_a_gpu_it_says_so(tmp_path):
    code, summary, calls = check(tmp_path, no_gpu=1)
    assert (code, calls) == (0, [])
    assert "no CUDA GPU" in summary


@pytest.mark.parametrize(
    ("fails", "code", "expected"),
    [
        ("nothing", 0, {"tests": "ok", "speed": "ok", "decode": "ok"}),
        ("-m pytest", 1, {"tests": "FAILED", "speed": "ok", "decode": "ok"}),
        ("warm", 0, {"tests": "ok", "speed": "ok", "decode": "ok"}),  # it only saves time
        ("--set check --out", 1, {"tests": "ok", "speed": "FAILED", "decode": "ok"}),
        ("-m", 3, {"tests": "FAILED", "speed": "FAILED", "decode": "FAILED"}),
    ],
)
def test_a_part_that_fails_does_not_stop_the_others(tmp_path, fails, code, expected):
    received, summary, calls = check(tmp_path, "tests", "speed", "decode", fails=fails)
    assert received == code
    assert dict(line.split(": ") for line in summary.splitlines()) == expected
    assert [call.split()[:3] for call in calls] == [
        ["benchmarks/gpu_check.py", "environment", "--out"],
        ["-m", "pytest", "tests/gpu"],
        ["benchmarks/gpu_check.py", "warm", "--set"],
        ["-m", "benchmarks.run", "--set"],
        ["benchmarks/gpu_check.py", "warm", "--set"],
        ["-m", "benchmarks.run", "--set"],
    ]


def test_a_part_of_no_such_name_is_a_failure(tmp_path):
    code, summary, _ = check(tmp_path, "spede")
    assert (code, summary) == (1, "spede: FAILED\n")
