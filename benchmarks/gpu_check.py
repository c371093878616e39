"""The Python half of gpu_check.sh: what ran where, kernels compiled ahead on all cores, small shapes for the sanitizer.

python benchmarks/gpu_check.py environment --out DIR
python benchmarks/gpu_check.py warm --set check --dtype bfloat16 --time-limit 200 [--device cpu]
python benchmarks/gpu_check.py sanitize [--processes 12] [--device cpu]

Speeds are `benchmarks.run`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tlstm.benchmark.environment import commit_of, describe_machine
from tlstm.benchmark.runner import measure
from tlstm.benchmark.session import Settings
from tlstm.benchmark.sets import SETS, workloads_of
from tlstm.benchmark.workload import Workload
from tlstm.layer import LSTM

# As divisible as the sets' own lengths, which is all that a compiled kernel knows of T.
WARM_STEPS = 16
MOST_PROCESSES = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("environment").add_argument("--out", type=Path, required=True)
    warm_up = commands.add_parser("warm")
    warm_up.add_argument("--set", required=True, choices=list(SETS))
    warm_up.add_argument("--dtype", nargs="+", default=["bfloat16"])
    warm_up.add_argument("--time-limit", type=float, default=200.0, help="seconds after which no further shape begins")
    sanitizer = commands.add_parser("sanitize")
    for command in (warm_up, sanitizer):
        command.add_argument("--device", default="cuda")
    warm_up.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, MOST_PROCESSES))
    sanitizer.add_argument("--processes", type=int, default=0, help="0: all in this process, for compute-sanitizer")
    arguments = parser.parse_args()
    if arguments.command == "environment":
        found = {"commit": commit_of(Path(__file__).parents[1]), **describe_machine("cuda")}
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "environment.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    elif arguments.command == "warm":
        warm(arguments.set, arguments.dtype, arguments.device, arguments.processes, arguments.time_limit)
    else:
        sanitize(arguments.device, arguments.processes)


def warm(set_name: str, dtypes: Sequence[str], device: str, processes: int, time_limit: float) -> None:
    """Compile what a set needs into Triton's cache, on all cores; the benchmarks, in one process, find it there."""
    settings = Settings(device)
    names = ("tlstm:kernel",) if SETS[set_name].decode and settings.on_gpu else ("tlstm",)
    jobs = [
        partial(measure, replace(workload, T=min(WARM_STEPS, workload.T)), mode, dtype, names, device, 1e-3)
        for workload in workloads_of(set_name, small=not settings.on_gpu)
        for dtype in dtypes
        for mode in settings.modes_of(set_name)
    ]
    done = 0
    for rows in in_processes(jobs, processes, time_limit):
        done += 1
        for row in rows:
            if row["status"] != "ok":
                print(f"{row['mode']} {row['dtype']} {Workload.from_row(row).label()}: {row['error']}", flush=True)
    print(f"compiled for {done} of {len(jobs)} workloads of {set_name}", flush=True)


def sanitize(device: str, processes: int) -> None:
    """Forward and backward of small layers in every regime; correctness is the tests' business, this is for memory."""
    regimes = (("single", 13), ("persistent", 40), ("streamed", 40))
    jobs = [
        partial(run_small, device, *regime, dtype, bidirectional)
        for regime, dtype, bidirectional in product(regimes, (torch.float16, torch.float32), (False, True))
    ]
    for name in in_processes(jobs, processes) if processes else (job() for job in jobs):
        print(f"{name}: done", flush=True)


def run_small(device: str, regime: str, H: int, dtype: torch.dtype, bidirectional: bool) -> str:
    from tlstm_kernels.launch_options import launch_options

    options = {"bidirectional": bidirectional, "dtype": dtype, "device": device}
    x = torch.randn(4, 5, 7, dtype=dtype, device=device, requires_grad=True)
    lengths = torch.tensor((4, 0, 2, 1, 3), device=device)
    resets = torch.rand(4, 5, device=device) < 0.5
    state = tuple(torch.randn(1 + bidirectional, 5, H, dtype=dtype, device=device) for _ in range(2))
    everything = {"lengths": lengths, "resets": resets, "reset_state": state}
    calls: list[tuple[tuple[float, float], dict[str, Any]]] = [
        ((0.0, 0.0), {}),
        ((0.0, 0.0), {"lengths": lengths}),
        ((0.0, 0.0), everything),
        ((0.5, 0.3), everything),
    ]
    with launch_options({"regime": regime}, {"regime": regime}):
        for zoneout, call in calls:
            backend = "triton" if device == "cuda" else "reference"
            module = LSTM(7, H, zoneout=zoneout, backend=backend, **options)
            module(x, **call)[0].sum().backward()
            module.eval()(x, **call)
    if device == "cuda":
        torch.cuda.synchronize()
    return f"{regime} H={H} {dtype} bidirectional={bidirectional}"


def in_processes(jobs: Sequence[Callable[[], Any]], processes: int, time_limit: float = float("inf")) -> Any:
    """Yields the results of the jobs as they come. A process that dies ends it early, and so does the time limit."""
    end = time.monotonic() + time_limit
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting: list[Future[Any]] = [pool.submit(job) for job in jobs]
        try:
            for future in as_completed(waiting, timeout=None if time_limit == float("inf") else time_limit):
                yield future.result()
                if time.monotonic() > end:
                    break
        except TimeoutError:
            pass  # what is running is waited for, below
        except BrokenProcessPool as error:
            print(f"a process died: {error}", flush=True)
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
