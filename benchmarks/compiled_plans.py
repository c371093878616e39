"""Compile the plans of the benchmark table for GPUs that need not be there, and write what the compiler made of them.

    PYTHONPATH=.:kernels python benchmarks/compiled_plans.py [--gpu H100 ...] [--H 768 ...] [--B 16 ...]

One CSV for each target in benchmarks/results/compiled/: registers, spilled bytes, shared memory beside the target's
limit, matrix instructions, weights held outside the time loop, and the cost model's time of one step. Rows are written
as they come; a row that the table already has for the same kernel source, compiler and plan is kept.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import triton
from tlstm_kernels.ahead_of_time import settled_plan
from tlstm_kernels.gpu import GPU, KNOWN_GPUS
from tlstm_kernels.launch_plan import KERNELS, LaunchPlan
from tlstm_kernels.plan_choice import choose_plan

from benchmarks.compiled_table import is_same, read, source_hash, write

RESULTS = Path(__file__).parent / "results" / "compiled"
TARGETS = ("A100", "H100", "B200", "MI300X")
WIDTHS = (64, 128, 256, 512, 650, 768, 1024, 1536, 2048)
BATCHES = (16, 64)
DTYPES = ("bfloat16", "float32")
TILES = ("regime", "units", "rows", "block_k", "num_warps", "split_k", "keep_tile")
SOURCE = ("cell", "exchange", "steps", "zoneout_kernel", "persistent_forward", "persistent_backward", "kernel_calls")
COLUMNS = [
    *("gpu", "target", "kernel", "dtype", "H", "B", *TILES, "programs", "groups", "launches"),
    *("registers", "spills", "shared_memory", "shared_limit", "matrix_instructions", "weights_outside_loop"),
    *("model_us", "triton", "source"),
]


def main() -> None:
    """Compile what is not in the tables yet, and rewrite them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", nargs="+", choices=sorted(KNOWN_GPUS), default=TARGETS)
    parser.add_argument("--H", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--B", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--dtype", nargs="+", choices=("float16", "bfloat16", "float32"), default=DTYPES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    source = source_hash(*SOURCE)
    for name in arguments.gpu:
        gpu = KNOWN_GPUS[name]
        path = arguments.out / f"{gpu.arch}.csv"
        rows = {key_of(row): row for row in read(path)}
        for dtype in arguments.dtype:
            for H in arguments.H:
                for B in arguments.B:
                    for kernel in KERNELS:
                        plan = choose_plan(kernel, H, B, dtype, gpu)
                        row = describe(plan, gpu, source)
                        if is_same(rows.get(key_of(row)), row, TILES):
                            continue
                        plan, figures = settled_plan(kernel, H, B, dtype, gpu)
                        row = describe(plan, gpu, source)
                        rows[key_of(row)] = row | {name: str(value) for name, value in asdict(figures).items()}
                        write(path, COLUMNS, sorted(rows.values(), key=order_of))
                        print(*(f"{k}={rows[key_of(row)][k]}" for k in COLUMNS[:-2]), flush=True)


def describe(plan: LaunchPlan, gpu: GPU, source: str) -> dict[str, str]:
    """A row without the compiler's figures."""
    known = {
        name: getattr(plan, name) for name in (*TILES, "kernel", "dtype", "H", "B", "programs", "groups", "launches")
    }
    known |= {"gpu": gpu.name, "target": gpu.arch, "shared_limit": gpu.shared_memory, "source": source}
    known |= {"model_us": f"{plan.cost.total:.2f}" if plan.cost else "", "triton": triton.__version__}
    return {name: str(value) for name, value in known.items()}


def order_of(row: dict[str, str]) -> tuple[str, str, int, int]:
    return row["kernel"], row["dtype"], int(row["H"]), int(row["B"])


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("kernel", "dtype", "H", "B"))


if __name__ == "__main__":
    main()
