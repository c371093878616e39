"""Time tlstm.LSTM beside torch.nn.LSTM on a CPU: forward, and forward with backward.

    PYTHONPATH=.:kernels python benchmarks/layer_cpu.py [--threads N] [--seconds S] [--out FILE.csv]

The two layers share their weights and strictly take turns, one call each (several where a call is short): each always
follows the other, finds the same caches, and is hit alike by whatever else the machine does. On one thread the clock is
the process's CPU time, which leaves out the time for which other programs had the core; on several it is the wall
clock. The figure is the median over the turns of the ratio of their times, with the 20th and 80th percentile; 1.00 is
torch's time, below it is faster.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlstm.layer import LSTM

# name, (B, T, I, H, layers), options
SHAPES = [
    ("decode one token", (1, 1, 512, 512, 2), {}),
    ("smallest call", (1, 1, 8, 8, 1), {}),
    ("odd sizes", (7, 35, 65, 65, 2), {}),
    ("character model", (32, 64, 256, 256, 2), {"dropout": 0.4}),
    ("batch first", (16, 32, 128, 128, 1), {"batch_first": True}),
    ("bidirectional", (16, 32, 128, 128, 1), {"bidirectional": True}),
    ("projection", (16, 32, 128, 128, 1), {"proj_size": 64}),
]
COLUMNS = [
    *("name", "mode", "B", "T", "I", "H", "layers", "options", "turns"),
    *("torch_ms_p50", "tlstm_ms_p50", "ratio_p20", "ratio_p50", "ratio_p80"),
    *("clock", "threads", "load", "cpu", "torch", "python", "commit"),
]


def main() -> None:
    """Run every shape in both modes, print a table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each row (default 4)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "layer.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""  # other work on the machine, in processes
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    versions = [cpu_name(), torch.__version__, platform.python_version(), git_commit()]
    machine = [clock.__name__, arguments.threads, load, *versions]
    rows = []
    for name, shape, options in SHAPES:
        for mode in ("forward", "forward+backward"):
            torch_times, tlstm_times = measure(shape, options, mode, arguments.seconds, clock)
            p20, p50, p80 = np.percentile(tlstm_times / torch_times, (20, 50, 80))
            torch_ms, tlstm_ms = 1e3 * np.median(torch_times), 1e3 * np.median(tlstm_times)
            print(f"{name:18} {mode:17} torch {torch_ms:8.3f} ms  ratio {p50:.3f} (p20 {p20:.3f}, p80 {p80:.3f})")
            chosen = " ".join(f"{key}={value}" for key, value in options.items())
            figures = [f"{figure:.4f}" for figure in (torch_ms, tlstm_ms, p20, p50, p80)]
            rows.append([name, mode, *shape, chosen, len(torch_times), *figures, *machine])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with open(arguments.out, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    print(f"wrote {arguments.out}")


def measure(
    shape: tuple[int, int, int, int, int],
    options: dict[str, Any],
    mode: str,
    seconds: float,
    clock: Callable[[], float],
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds per call of torch.nn.LSTM and of tlstm.LSTM, one entry per turn."""
    B, T, I, H, layers = shape
    first = torch.nn.LSTM(I, H, layers, **options)
    second = LSTM(I, H, layers, **options)
    second.load_state_dict(first.state_dict())
    x = torch.randn((B, T, I) if options.get("batch_first") else (T, B, I))
    calls = [prepare(module, x, mode) for module in (first, second)]
    for call in calls:
        call()
    once = min(timed(call, 1, clock) for call in calls)
    repeats = max(1, int(2e-3 / once))  # a turn of about 2 ms at least, well above the timer's resolution
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 20:
        for which in (0, 1):
            times[which].append(timed(calls[which], repeats, clock))
    return np.array(times[0]), np.array(times[1])


def prepare(module: torch.nn.LSTM, x: torch.Tensor, mode: str) -> Callable[[], None]:
    """A call without arguments: inference, or a training step's forward and backward."""
    if mode == "forward":
        module.eval()

        def call() -> None:
            with torch.no_grad():
                module(x)

    else:
        x = x.clone().requires_grad_()

        def call() -> None:
            module.zero_grad()
            module(x)[0].sum().backward()

    return call


def timed(call: Callable[[], None], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str:
    answer = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
