"""Measure launch plans on the GPU at hand and write the fastest ones down, each checked against float64 first.

    python -m benchmarks.tune_plans --set headline deepbench-train        for the shapes of sets
    python -m benchmarks.tune_plans --H 768 1024 --B 16 64 --dtype bfloat16

For every kernel, dtype, H and B: the candidates that the cost model ranks best and the plan that it chooses take turns
in one process. An entry is written where another one is faster by the margin. The file is used with
TLSTM_PLAN_TABLE=FILE; the same entries are printed as Python, for `plan_choice.MEASURED`. Ctrl-C keeps what is done,
and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tlstm_kernels.cost_model import fits_registers, step_cost
from tlstm_kernels.gpu import GPU
from tlstm_kernels.launch_plan import KERNELS, REGIMES, LaunchPlan, PlanError
from tlstm_kernels.plan_choice import BLOCK_K, KEEP_TILE, NUM_WARPS, ROWS, SPLIT_K, UNITS, choose_plan
from tlstm_kernels.plan_table import FORMAT
from tqdm import tqdm

from tlstm.benchmark.environment import commit_of, describe_machine, machine_name
from tlstm.benchmark.sets import workloads_of

FIELDS = ("regime", "units", "rows", "block_k", "num_warps", "split_k", "keep_tile")
RESULTS = Path(__file__).parent / "results"
TUNING_STEPS = 256  # T: long enough for the steps to outweigh the launch


@dataclass(frozen=True)
class Key:
    """What an entry of the table is for."""

    kernel: str
    dtype: str
    H: int
    B: int


@dataclass(frozen=True)
class Trial:
    """A candidate's median microseconds per step, or why it has none."""

    plan: LaunchPlan
    us: float | None
    error: str = ""


Try = Callable[[Key, Sequence[LaunchPlan]], list[Trial]]


def pins_of(plan: LaunchPlan) -> dict[str, int | str]:
    return {name: getattr(plan, name) for name in FIELDS}


def candidates(key: Key, gpu: GPU, most: int) -> list[LaunchPlan]:
    """The model's choice, then the plans that it ranks next; all of them run on the GPU as far as estimates say."""
    chosen = choose_plan(key.kernel, key.H, key.B, key.dtype, gpu)
    found: dict[tuple[int | str, ...], LaunchPlan] = {}
    for values in product(REGIMES[:3], UNITS, ROWS, BLOCK_K, NUM_WARPS, SPLIT_K, KEEP_TILE):
        try:
            pins = dict(zip(FIELDS, values, strict=True))
            plan = choose_plan(key.kernel, key.H, key.B, key.dtype, gpu, pinned=pins)
        except PlanError:
            continue  # not for these sizes, or more than the GPU has
        if fits_registers(plan, gpu) and pins != pins_of(chosen):
            found[values] = plan
    ranked = sorted(found.values(), key=lambda plan: step_cost(plan, gpu).total * plan.launches)
    return [chosen, *ranked[: most - 1]]


def tune(key: Key, gpu: GPU, attempt: Try, most: int, margin: float) -> dict[str, Any]:
    """What was tried for one key: the trials, and an entry of the table if one beats the model's choice by the margin.

    A candidate that is wrong or fails has no time and is never chosen.
    """
    trials = attempt(key, candidates(key, gpu, most))
    timed = [trial for trial in trials if trial.us is not None]
    chosen = trials[0]
    record: dict[str, Any] = {
        **vars(key), "arch": gpu.arch, "multiprocessors": gpu.multiprocessors, "gpu": gpu.name,
        "tried": len(trials), "refused": [f"{pins_of(t.plan)}: {t.error}" for t in trials if t.us is None],
        "model_us": chosen.us,
    }  # fmt: skip
    best = min(timed, key=lambda trial: trial.us or 0.0, default=None)
    if best is None or best.us is None:
        return record
    record["us"] = best.us
    if chosen.us is None or best.us < chosen.us * (1 - margin):
        record["plan"] = pins_of(best.plan)
    return record


def as_python(records: Iterable[dict[str, Any]]) -> str:
    """The entries as lines for `plan_choice.MEASURED`."""
    lines = []
    for r in records:
        if "plan" in r:
            key = (r["arch"], r["multiprocessors"], r["kernel"], r["dtype"], r["H"], r["B"])
            lines.append(f"    {key}: {r['plan']},  # {r['us']:.3f} us, the model's choice: {r['model_us']}")
    return "\n".join(lines)


def write_table(path: Path, records: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """The file for TLSTM_PLAN_TABLE; what was tried without gain is kept beside the entries, for a resumed run."""
    table = {
        "format": FORMAT,
        "about": about,
        "entries": [record for record in records if "plan" in record],
        "without_gain": [record for record in records if "plan" not in record],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def run(
    keys: Sequence[Key], gpu: GPU, attempt: Try, path: Path, about: dict[str, Any], most: int, margin: float
) -> list[dict[str, Any]]:
    """Tune every key that `path` does not have yet; the file is complete after each."""
    records: list[dict[str, Any]] = []
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        records = [*known["entries"], *known["without_gain"]]
    done = {Key(r["kernel"], r["dtype"], r["H"], r["B"]) for r in records}
    for key in tqdm([key for key in keys if key not in done], desc="plans", disable=None):
        records.append(tune(key, gpu, attempt, most, margin))
        write_table(path, records, about)
    return records


def gpu_attempt(device: str, seconds: float) -> Try:
    """Trials on the GPU: verified, then in turns."""
    from tlstm.benchmark.problem import Problem
    from tlstm.benchmark.providers import Built, provider
    from tlstm.benchmark.runner import bounded_waits, call_of
    from tlstm.benchmark.statistics import spread
    from tlstm.benchmark.timing import Clock, interleave
    from tlstm.benchmark.verification import Truth
    from tlstm.benchmark.workload import Workload

    def attempt(key: Key, plans: Sequence[LaunchPlan]) -> list[Trial]:
        workload = Workload(T=TUNING_STEPS, B=key.B, H=key.H, I=key.H)
        problem = Problem(workload, key.kernel, key.dtype, device)
        truth, built, errors = Truth(problem), dict[int, Built](), dict[int, str]()
        for n, plan in enumerate(plans):
            pins = " ".join(f"{name}={value}" for name, value in pins_of(plan).items())
            try:
                candidate = provider(f"tlstm[{key.kernel}: {pins}]").build(problem)
                with bounded_waits(problem):
                    truth.check(candidate)
                built[n] = candidate
            except Exception as error:  # a plan that the compiler or the GPU refuses is a result
                errors[n] = f"{type(error).__name__}: {error}"[:200]
        calls = {str(n): call_of(each, problem) for n, each in built.items()}
        with problem.precision():
            times = interleave(calls, Clock(device), seconds, len(problem.xs))
        us = {int(n): 1e6 * spread(values).p50 / workload.T for n, values in times.items()}
        return [Trial(plan, us.get(n), errors.get(n, "")) for n, plan in enumerate(plans)]

    return attempt


def keys_of(args: argparse.Namespace) -> list[Key]:
    shapes = list(product(args.H or (), args.B or ()))
    for name in args.set or ():
        shapes += [(w.H, w.B) for w in workloads_of(name, small=False)]
    if not shapes:
        raise SystemExit("tune_plans: expected --set, or --H and --B")
    return [Key(kernel, dtype, H, B) for dtype in args.dtype for H, B in dict.fromkeys(shapes) for kernel in KERNELS]


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--set", nargs="+", metavar="NAME", help="tune for the shapes of these sets")
    made.add_argument("--H", nargs="+", type=int)
    made.add_argument("--B", nargs="+", type=int)
    made.add_argument("--dtype", nargs="+", choices=("float16", "bfloat16", "float32"), default=["bfloat16", "float16"])
    made.add_argument("--device", default="cuda")
    made.add_argument("--candidates", type=int, default=24, help="plans to measure for each shape (default 24)")
    made.add_argument("--seconds", type=float, default=4.0, help="turns of each shape (default 4)")
    made.add_argument("--margin", type=float, default=0.02, help="gain that an entry must have (default 0.02)")
    made.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>/plans-COMMIT.json")
    args = made.parse_args(argv)
    keys = keys_of(args)
    import torch

    if not torch.cuda.is_available():
        print("tune_plans: expected a CUDA GPU; torch sees none. Nothing was measured.", file=sys.stderr)
        return 2
    from tlstm_kernels.plan_at_hand import gpu_of

    commit = commit_of(Path(__file__).parents[1])
    path = args.out or RESULTS / machine_name(args.device) / f"plans-{commit}.json"
    about = describe_machine(args.device) | {"commit": commit}
    gpu = gpu_of(torch.device(args.device).index or 0)
    records = run(keys, gpu, gpu_attempt(args.device, args.seconds), path, about, args.candidates, args.margin)
    print(as_python(records), f"wrote {path}; use it with TLSTM_PLAN_TABLE={path}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
