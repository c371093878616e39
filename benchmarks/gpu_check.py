"""The Python half of gpu_check.sh: what ran where, small shapes for the sanitizer, and the table of speeds.

    python benchmarks/gpu_check.py speed --out DIR [--seconds S] [--device cpu] [--H 64 ...] [--B 16 ...] [--T 512]

The table: tlstm.LSTM and torch.nn.LSTM in turns in the same process, one layer, forward and forward with backward.
Times are those of CUDA events around batches of calls, in microseconds per time step; median, 20th and 80th percentile
over the turns. `without_input` leaves out the product of the input with W_ih (measured apart, and subtracted), which is
the same for both. Rows are written as they come, the most telling shapes first, until the time is up.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlstm.layer import LSTM

WIDTHS = (64, 128, 256, 512, 650, 768, 1024, 1536, 2048)
BATCHES = (16, 1, 64, 7, 128)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# What is measured: dtype, whether tf32 is allowed.
KINDS = (("bfloat16", False), ("float16", False), ("float32", True), ("float32", False))
MODES = ("forward", "forward+backward")
FIRST = ((16, 768, 1024),)  # B, H, T of the published anchors
COLUMNS = [
    *("mode", "dtype", "tf32", "B", "H", "T", "turns"),
    *("tlstm_us_p20", "tlstm_us_p50", "tlstm_us_p80", "torch_us_p20", "torch_us_p50", "torch_us_p80"),
    *(
        "input_us",
        "tlstm_without_input_us",
        "torch_without_input_us",
        "ratio_p20",
        "ratio_p50",
        "ratio_p80",
        "plan",
        "error",
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("environment", "speed"):
        commands.add_parser(name).add_argument("--out", type=Path, required=True)
    commands.add_parser("sanitize").add_argument("--device", default="cuda")
    speed = commands.choices["speed"]
    speed.add_argument("--seconds", type=float, default=570, help="for the whole table")
    speed.add_argument("--row-seconds", type=float, default=1.2, help="at most, for each row")
    speed.add_argument("--device", default="cuda", help="cpu: a trial of this program with the reference, no figures")
    speed.add_argument("--B", nargs="+", type=int, default=BATCHES)
    speed.add_argument("--H", nargs="+", type=int, default=WIDTHS)
    speed.add_argument("--T", type=int, default=512)
    speed.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments = parser.parse_args()
    if arguments.command == "environment":
        write_json(arguments.out / "environment.json", environment())
    elif arguments.command == "sanitize":
        sanitize(arguments.device)
    else:
        measure_table(arguments)


def environment() -> dict[str, Any]:
    """Versions, GPU and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    found: dict[str, Any] = {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError as error:
        found["triton"] = f"none ({error})"
    if torch.cuda.is_available():
        props = torch.cuda.get_device_properties(0)
        found |= {"gpu": props.name, "multiprocessors": props.multi_processor_count, "cuda": torch.version.cuda}
    return found


def sanitize(device: str) -> None:
    """Forward and backward of small layers in every regime; correctness is the tests' business, this is for memory."""
    from tlstm_kernels.launch_options import launch_options

    backend = "triton" if device == "cuda" else "reference"
    for regime, H in (("single", 13), ("persistent", 40), ("streamed", 40)):
        for dtype, bidirectional in product((torch.float16, torch.float32), (False, True)):
            with launch_options({"regime": regime}, {"regime": regime}):
                module = LSTM(7, H, bidirectional=bidirectional, dtype=dtype, device=device, backend=backend)
                x = torch.randn(4, 5, 7, dtype=dtype, device=device, requires_grad=True)
                lengths = torch.tensor((4, 0, 2, 1, 3), device=device)
                for given in (None, lengths):
                    module(x, lengths=given)[0].sum().backward()
            print(f"{regime} H={H} {dtype} bidirectional={bidirectional}: done", flush=True)


def measure_table(arguments: argparse.Namespace) -> None:
    """Measure row after row until the time is up; a row that fails is a row with an error."""
    end = time.monotonic() + arguments.seconds
    about, rows, left_out = environment(), [], 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "speed.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for kind, mode, (B, H, T) in table(arguments):
            if time.monotonic() > end:
                left_out += 1
                continue
            row = {"mode": mode, "dtype": kind[0], "tf32": int(kind[1]), "B": B, "H": H, "T": T}
            try:
                row |= measure(
                    B, H, T, kind, mode, arguments.device, min(arguments.row_seconds, end - time.monotonic())
                )
            except (RuntimeError, ValueError) as error:
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            rows.append(row)
            writer.writerow(row)
            file.flush()
            print(" ".join(f"{row[name]}" for name in COLUMNS if name in row and name != "plan"), flush=True)
            write_json(arguments.out / "speed.json", about | {"rows": rows, "rows_left_out": left_out})
    write_json(arguments.out / "speed.json", about | {"rows": rows, "rows_left_out": left_out, **summary(rows)})
    print(json.dumps(summary(rows)), f"rows left out for lack of time: {left_out}")


def table(arguments: argparse.Namespace) -> Iterator[tuple[tuple[str, bool], str, tuple[int, int, int]]]:
    """The anchors, then the batch sizes one after another."""
    kinds = [kind for kind in KINDS if kind[0] in arguments.dtype]
    anchors = [(B, H, T) for B, H, T in FIRST if B in arguments.B and H in arguments.H]
    yield from product(kinds, MODES, anchors)
    for B in arguments.B:
        yield from product(kinds, MODES, [(B, H, arguments.T) for H in arguments.H])


def measure(
    B: int, H: int, T: int, kind: tuple[str, bool], mode: str, device: str, seconds: float
) -> dict[str, str | int]:
    """One row: both layers with the same weights and input, in turns."""
    dtype, tf32 = DTYPES[kind[0]], kind[1]
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(H, H, dtype=dtype, device=device)
    ours = LSTM(H, H, dtype=dtype, device=device, backend="triton" if device == "cuda" else "reference")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, H, dtype=dtype, device=device)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(allow_tf32=tf32):
            calls = [call_of(module, x, mode) for module in (ours, theirs)]
            calls.append(input_product(theirs, x, mode))
            times = in_turns(calls, device, seconds)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    us = 1e6 * times / T  # (3, turns)
    ratio, figures = us[1] / us[0], {}
    for name, values in (("tlstm_us", us[0]), ("torch_us", us[1]), ("ratio", ratio)):
        figures |= {f"{name}_p{p}": f"{np.percentile(values, p):.4f}" for p in (20, 50, 80)}
    apart = float(np.median(us[2]))
    figures |= {
        "input_us": f"{apart:.4f}",
        "tlstm_without_input_us": f"{np.median(us[0]) - apart:.4f}",
        "torch_without_input_us": f"{np.median(us[1]) - apart:.4f}",
        "plan": describe_plans(x, H) if device == "cuda" else "",
    }
    return {"turns": us.shape[1], **figures}


def describe_plans(x: torch.Tensor, H: int) -> str:
    from tlstm_kernels.kernel_calls import plan_for

    c_0 = x.new_empty(1, x.shape[1], H)
    return " | ".join(plan_for(kernel, x, c_0, False).describe() for kernel in ("forward", "backward"))


def call_of(module: torch.nn.LSTM, x: torch.Tensor, mode: str) -> Callable[[], Any]:
    if mode == "forward":

        def call() -> None:
            with torch.no_grad():
                module(x)

    else:
        x = x.detach().requires_grad_()
        d_y = torch.randn_like(x)

        def call() -> None:
            torch.autograd.grad(module(x)[0], [x, *module.parameters()], d_y)

    return call


def input_product(module: torch.nn.LSTM, x: torch.Tensor, mode: str) -> Callable[[], Any]:
    """x W_ih^T + b alone and, with backward, the two products of its gradient."""
    weight, bias = module.weight_ih_l0.detach(), module.bias_ih_l0.detach()
    d_gates = torch.randn(*x.shape[:2], weight.shape[0], dtype=x.dtype, device=x.device)

    def call() -> None:
        torch.nn.functional.linear(x, weight, bias)
        if mode != "forward":
            torch.matmul(d_gates, weight)
            torch.matmul(d_gates.flatten(0, 1).T, x.flatten(0, 1))

    return call


def in_turns(calls: list[Callable[[], Any]], device: str, seconds: float) -> np.ndarray:
    """Seconds per call, (calls, turns): each call follows another one, and is hit alike by what else happens."""
    for call in calls:
        for _ in range(3):
            call()
    once = max(min(timed(call, 1, device) for _ in range(3)) for call in calls)
    repeats = max(1, int(0.01 / once))
    turns: list[list[float]] = []
    end = time.monotonic() + seconds
    while len(turns) < 5 or (time.monotonic() < end and len(turns) < 50):
        turns.append([timed(call, repeats, device) for call in calls])
    return np.array(turns).T


def timed(call: Callable[[], Any], repeats: int, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    for _ in range(repeats):
        call()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3 / repeats


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean and lowest ratio of torch's time to ours, for each dtype and mode; rows that failed."""
    result: dict[str, Any] = {
        "failed": [f"{r['dtype']} B={r['B']} H={r['H']}: {r['error']}" for r in rows if "error" in r]
    }
    for (dtype, tf32), mode in product(KINDS, MODES):
        same = (dtype, int(tf32), mode)
        ratios = [
            float(r["ratio_p50"]) for r in rows if (r["dtype"], r["tf32"], r["mode"]) == same and "ratio_p50" in r
        ]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            name = f"{dtype}{' tf32' if tf32 else ''} {mode}"
            result[name] = {"geometric_mean": round(mean, 3), "lowest": min(ratios), "rows": len(ratios)}
    return result


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
