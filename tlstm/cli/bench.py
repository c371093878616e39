"""`tlstm bench`: the layer beside torch's own and other people's, on the machine at hand."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

DESCRIPTION = """Time LSTM layers beside one another: tlstm's, torch.nn.LSTM, plain loops, and other packages where they
are installed. Every provider is checked against float64 first; one that is wrong gets an error and no time. All take
turns in the same process on random data; figures are medians. On a CPU the workloads are shrunk, and say so.
"""
EPILOG = """examples:
  tlstm bench
  tlstm bench --set headline --dtype float16 --mode forward --out results
  tlstm bench --list

In a clone, `python -m benchmarks.run` does more: plots, curves, and the comparison of two commits.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", action="store_true", help="list sets and providers, and what cannot run here")
    add_run_arguments(parser, default_set="short")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write SET-COMMIT.csv and .json there")


def add_run_arguments(parser: argparse.ArgumentParser, default_set: str) -> None:
    """The arguments that `benchmarks.run` shares."""
    parser.add_argument(
        "--set", nargs="+", default=[default_set], metavar="NAME", help=f"sets of workloads (default: {default_set})"
    )
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="what to compare (default: all that can run)")
    parser.add_argument("--dtype", nargs="+", metavar="DTYPE", help="float16, bfloat16, tf32, float32")
    parser.add_argument("--mode", nargs="+", metavar="MODE", help="forward, backward, train; decode for that set")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each workload (default 2)")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="S", help="stop a set after S seconds")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: a GPU if there is one)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU (default 1)")
    parser.add_argument("--full-size", action="store_true", help="on a CPU, too, the sizes meant for a GPU")


def run(args: argparse.Namespace) -> int:
    from tlstm.benchmark.session import describe_rows, exit_code, run_set

    settings, floor = prepare(args)
    if args.list:
        print(describe_choices(settings.device))
        return 0
    tables = []
    for name in args.set:
        tables.append(
            run_set(name, settings, args.out, floor, show=lambda rows: print(describe_rows(rows), flush=True))
        )
        if args.out is not None:
            print(f"wrote {tables[-1].path}")
    return exit_code(tables)


def prepare(args: argparse.Namespace) -> tuple[Any, Any]:
    """The settings, and the meter of the floor on a GPU."""
    import torch

    from tlstm.benchmark.session import Settings

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: expected a device that torch can use; received {device!r}, and torch sees no GPU.")
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(torch.device(device))  # events and allocations without a device of their own
    if args.threads < 1:
        raise ValueError(f"--threads: expected 1 or more; received {args.threads}.")
    torch.set_num_threads(args.threads)

    def some(values: list[str] | None) -> tuple[str, ...] | None:
        return None if values is None else tuple(values)

    settings = Settings(
        device, some(args.providers), some(args.dtype), some(args.mode), args.seconds, args.full_size,
        resume=not getattr(args, "fresh", False), time_limit=args.time_limit,
    )  # fmt: skip
    for name in args.set:
        check_set(name, settings)
    floor = None
    if settings.on_gpu and torch.version.hip is None:
        from tlstm.benchmark.floor import gpu_floor

        floor = gpu_floor(device)
    return settings, floor


def check_set(name: str, settings: Any) -> None:
    """Raises ValueError before anything is measured."""
    from tlstm.benchmark.sets import workloads_of

    workload = workloads_of(name, small=False)[0]
    for mode in settings.modes_of(name):
        settings.providers_of(mode, workload)


def describe_choices(device: str) -> str:
    """Sets with their sources, providers with why they cannot run here."""
    from tlstm.benchmark.providers import registry
    from tlstm.benchmark.runner import make_problem
    from tlstm.benchmark.sets import SETS
    from tlstm.benchmark.workload import Workload

    problem = make_problem(Workload(T=2, B=8, H=64, I=64), "forward", "float32", device)
    lines = ["sets:"]
    lines += [f"  {each.name:<17} {len(each.workloads):>3} workloads. {each.source}" for each in SETS.values()]
    lines += ["", "providers:"]
    for name, each in registry().items():
        reason = each.why_not(problem)
        lines.append(f"  {name:<17} {each.summary}" + (f" (not here: {reason})" if reason else ""))
    lines += [
        "  tlstm:REGIME      single, persistent, streamed or per_step, on a GPU",
        "  tlstm:native, tlstm:reference   those backends",
        "  tlstm:recompute   gates computed again in the backward pass",
        "  tlstm[PINS]       fields of both launch plans, as in TLSTM_PLAN",
    ]
    return "\n".join(lines)
