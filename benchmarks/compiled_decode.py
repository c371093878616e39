"""Compile decode plans for GPUs that need not be there, and write what the compiler made of them.

    PYTHONPATH=.:kernels python benchmarks/compiled_decode.py [--gpu H100 ...]

One CSV, benchmarks/results/compiled_decode.csv: the plan, registers, spilled bytes, shared memory beside the target's
limit, matrix instructions, tiles of weights held outside the loop over tokens, the time of one token of every stream
by the cost model, which nobody measured, and the processor time of compiler and assembler on this machine. Rows are
written as they come; a row for the same kernel source, compiler and plan that is there already is kept.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import triton
from tlstm_kernels.decode_ahead_of_time import compile_decode_plan
from tlstm_kernels.decode_plan import choose_decode_plan, shared_memory_bytes
from tlstm_kernels.decode_shape import Choice, DecodePlan, DecodeShape
from tlstm_kernels.gpu import GPU, KNOWN_GPUS

from benchmarks.compiled_table import is_same, read, source_hash, write

TABLE = Path(__file__).parent / "results" / "compiled_decode.csv"
TARGETS = ("H100", "A100", "B200", "MI300X")
SAMPLING, FILTERING = Choice(True), Choice(True, True, True, True)
SHIPPED, LARGE = (448,) * 3, (1024,) * 2
# Widths of the layers, vocabulary, streams, dtype, choice.
EVERYWHERE = ((SHIPPED, 65, 1, "bfloat16", SAMPLING), (LARGE, 65, 1, "bfloat16", SAMPLING))
MORE = (
    (SHIPPED, 65, 1, "bfloat16", FILTERING),
    (LARGE, 65, 64, "bfloat16", SAMPLING),
    ((512,) * 2, 10_000, 8, "bfloat16", SAMPLING),
    ((512,) * 2, 1000, 8, "float32", FILTERING),
    ((512,) * 2, 10_000, 1, "bfloat16", FILTERING),
    (LARGE, 50_257, 8, "bfloat16", FILTERING),
)
PLAN = (
    *("programs", "rows", "groups", "units", "block_k", "block_v", "num_warps", "split_k"),
    *("keep_tile", "on_chip", "mode"),
)
FIGURES = ("registers", "spills", "shared_memory", "matrix_instructions", "weights_outside_loop")
SOURCE = (
    *("cell", "exchange", "persistent_backward"),
    *("decode", "decode_exchange", "decode_launch", "decode_layers", "decode_long_rows", "decode_sampling"),
)
COLUMNS = [
    *("gpu", "target", "widths", "vocabulary", "streams", "dtype", "choice", *PLAN),
    *(*FIGURES, "shared_estimate", "shared_limit", "model_us", "compile_seconds", "triton", "source"),
]


def cases(gpu: str) -> Iterator[tuple[tuple[int, ...], int, int, str, Choice]]:
    yield from EVERYWHERE
    if gpu == "H100":
        yield from MORE


def main() -> None:
    """Compile what is not in the table yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", nargs="+", choices=sorted(KNOWN_GPUS), default=TARGETS)
    parser.add_argument("--out", type=Path, default=TABLE)
    arguments = parser.parse_args()
    rows = {key_of(row): row for row in read(arguments.out)}
    for name in arguments.gpu:
        gpu = KNOWN_GPUS[name]
        for widths, vocabulary, streams, dtype, choice in cases(name):
            plan = choose_decode_plan(DecodeShape(widths, vocabulary, dtype), choice, streams, gpu)
            assert plan is not None, (name, widths, vocabulary, streams)
            row = describe(plan, gpu)
            if is_same(rows.get(key_of(row)), row, PLAN):
                continue
            started = sum(os.times()[:4])
            figures = asdict(compile_decode_plan(plan, gpu))
            row["compile_seconds"] = f"{sum(os.times()[:4]) - started:.1f}"
            rows[key_of(row)] = row | {name: str(figures[name]) for name in FIGURES}
            write(arguments.out, COLUMNS, rows.values())
            print(*(f"{column}={rows[key_of(row)][column]}" for column in COLUMNS[:-2]), flush=True)


def describe(plan: DecodePlan, gpu: GPU) -> dict[str, str]:
    """A row without the compiler's figures."""
    asked = [name for name, on in asdict(plan.choice).items() if on]
    about = {
        "gpu": gpu.name,
        "target": gpu.arch,
        "widths": "x".join(map(str, plan.shape.widths)),
        "vocabulary": plan.shape.vocab_size,
        "streams": plan.streams,
        "dtype": plan.shape.dtype,
        "choice": " ".join(asked) or "greedy",
        **{name: getattr(plan, name) for name in PLAN},
        "units": "x".join(map(str, plan.units)),
        "on_chip": "".join(str(int(here)) for here in plan.on_chip),
        "shared_estimate": shared_memory_bytes(plan),
        "shared_limit": gpu.shared_memory,
        "model_us": f"{plan.cost.total:.2f}",
        "triton": triton.__version__,
        "source": source_hash(*SOURCE),
    }
    return {name: str(value) for name, value in about.items()}


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("gpu", "widths", "vocabulary", "streams", "dtype", "choice"))


if __name__ == "__main__":
    main()
