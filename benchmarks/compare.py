"""Two versions of the library in one run: the present tree and a commit, in two processes that take turns.

The commit is checked out beside (`git worktree`), the harness of the present tree is put into it, and each version has
a process of its own. Turn by turn one of them measures while the other waits, in random order, so that whatever the
machine does hits both alike. Nothing is compared while the tests of the measured code are red.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tlstm.benchmark.environment import commit_of
from tlstm.benchmark.results import KEY, OK, Row
from tlstm.benchmark.statistics import geometric_mean, speedup, spread
from tlstm.benchmark.timing import MAX_TURNS, MIN_TURNS
from tlstm.benchmark.workload import Workload

# What must be green before a comparison: the layer, its operator and its kernels. On a GPU the GPU tests come on top.
TESTS = ("tests/test_layer.py", "tests/test_functional.py", "tests/kernels")
GPU_TESTS = ("tests/gpu",)
COLUMNS = (
    *("device", "machine", *KEY, "provider", "status", "error", "turns", "base_ms_p50", "ms_p50"),
    *("speedup_p20", "speedup_p50", "speedup_p80", "base_commit", "commit", "torch", "triton"),
)


class RedTestsError(ValueError):
    """The tests fail: what they find is to be mended before a speed is worth anything."""


def test_command(on_gpu: bool) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-x", *TESTS, *(GPU_TESTS if on_gpu else ())]


def require_green_tests(command: Sequence[str], root: Path) -> None:
    """Run the tests and say so.

    Raises:
        RedTestsError: they failed; the end of what they printed is in the message.
    """
    print(f"first the tests: {shlex.join(command)}", flush=True)
    done = subprocess.run(command, cwd=root, env=_environment(root), capture_output=True, text=True, check=False)
    if done.returncode:
        end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise RedTestsError(
            f"--base: expected green tests before a comparison; received exit code {done.returncode}:\n{end}"
        )
    print(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "green", flush=True)


@contextlib.contextmanager
def checked_out(revision: str, root: Path) -> Iterator[tuple[Path, str]]:
    """The tree of a commit in a folder of its own, with the present harness, and its short hash.

    Raises:
        ValueError: no such commit.
    """
    found = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode:
        raise ValueError(f"--base: expected a commit of this repository; received {revision!r}.")
    commit = found.stdout.strip()
    with tempfile.TemporaryDirectory(prefix="tlstm-base-") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(root), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(tree), commit], check=True)
        try:
            shutil.rmtree(tree / "tlstm" / "benchmark", ignore_errors=True)
            ours = Path(__file__).parents[1] / "tlstm" / "benchmark"
            shutil.copytree(ours, tree / "tlstm" / "benchmark", ignore=shutil.ignore_patterns("__pycache__"))
            yield tree, commit[:10]
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


class Side:
    """A version's process."""

    def __init__(self, tree: Path) -> None:
        command = [sys.executable, "-m", "tlstm.benchmark.worker"]
        self.process = subprocess.Popen(
            command, cwd=tree, env=_environment(tree), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"a measuring process ended with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@contextlib.contextmanager
def two_sides(base: Path, root: Path) -> Iterator[dict[str, Side]]:
    """A process for each version, ended with the context."""
    sides: dict[str, Side] = {}
    try:
        for name, tree in (("base", base), ("here", root)):
            sides[name] = Side(tree)
        yield sides
    finally:
        for side in sides.values():
            side.close()


def compare(
    sides: dict[str, Side],
    workload: Workload,
    mode: str,
    dtype: str,
    provider: str,
    device: str,
    seconds: float,
    threads: int = 1,
    seed: int = 0,
) -> Row:
    """One row: both times, and how many times as fast the present version is. A wrong version gets no time."""
    row: Row = {"mode": mode, "dtype": dtype, **workload.to_row(), "provider": provider}
    message = {"do": "prepare", "workload": workload.to_row(), "mode": mode, "dtype": dtype, "provider": provider}
    ready = {name: side.ask(message | {"device": device, "threads": threads}) for name, side in sides.items()}
    for name, answer in ready.items():
        if answer["status"] != OK:
            return row | {"status": answer["status"], "error": f"{name}: {answer['error']}"[:300]}
    slowest, sets = max(answer["seconds"] for answer in ready.values()), ready["here"]["input_sets"]
    repeats = max(1, int(0.01 / max(slowest, 1e-9)))
    if mode == "backward":
        repeats = min(repeats, sets)
    times: dict[str, list[float]] = {name: [] for name in sides}
    rng, order, turn = random.Random(seed), list(sides), 0
    end = time.monotonic() + seconds
    while turn < MIN_TURNS or (turn < MAX_TURNS and time.monotonic() < end):
        rng.shuffle(order)
        for name in order:
            inputs = [(turn + n) % sets for n in range(repeats)]
            times[name].append(sides[name].ask({"do": "time", "inputs": inputs})["seconds"])
        turn += 1
    base, here = (np.array(times[name]) for name in ("base", "here"))
    ratio = speedup(base, here)
    return row | {
        "status": OK, "turns": turn, "base_ms_p50": 1e3 * spread(base).p50, "ms_p50": 1e3 * spread(here).p50,
        "speedup_p20": ratio.p20, "speedup_p50": ratio.p50, "speedup_p80": ratio.p80,
    }  # fmt: skip


def describe(row: Row) -> str:
    label = f"{row['mode']} {row['dtype']} {Workload.from_row(row).label()} {row['provider']}"
    if row["status"] != OK:
        return f"{label}: {row['status']}, {row['error']}"
    times = f"{float(row['base_ms_p50']):.3f} -> {float(row['ms_p50']):.3f} ms"
    spans = f"{float(row['speedup_p20']):.3f} to {float(row['speedup_p80']):.3f}"
    return f"{label}: {times}, {float(row['speedup_p50']):.3f}x ({spans})"


def verdict(rows: Sequence[Row], tolerance: float) -> tuple[str, int]:
    """A sentence, and the exit code: 1 if a workload is slower beyond the tolerance in 80 % of its turns, or failed."""
    timed = [row for row in rows if row["status"] == OK]
    slower = [row for row in timed if float(row["speedup_p80"]) < 1 - tolerance]
    failed = [row for row in rows if row["status"] not in (OK, "unavailable")]
    mean = geometric_mean([float(row["speedup_p50"]) for row in timed])
    text = f"{len(timed)} workloads, geometric mean {mean:.3f}x the base; "
    text += f"{len(slower)} slower by more than {tolerance:.0%}"
    return (text + (f"; {len(failed)} failed" if failed else "")), int(bool(slower or failed or not timed))


def present_commit(root: Path) -> str:
    return commit_of(root)


def _environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels")])}
