"""What the commands share that measure the host's part of a call: arguments, spread, what figures are of, the CSV."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.compiled_table import Row, write
from tlstm.benchmark.environment import commit_of, cpu_name
from tlstm.benchmark.statistics import spread

ABOUT = ("turns", "cpu", "torch", "python", "commit")


def run(description: str, columns: Sequence[str], measure: Callable[[int], Iterator[Row]]) -> None:
    """Print the rows of `measure(turns)` as they come, and write them to the file of `--out`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15, help="of everything that is compared (default: 15)")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    about = (args.turns, cpu_name(), torch.__version__, platform.python_version(), commit_of(Path(__file__).parents[1]))
    found = []
    for row in measure(args.turns):
        print(*(f"{column}={row[column]}" for column in columns), flush=True)
        found.append(row | dict(zip(ABOUT, map(str, about), strict=True)))
    if args.out:
        write(args.out, (*columns, *ABOUT), found)


def times_of(values: Sequence[float], digits: int) -> Row:
    """Median, 20th and 80th percentile of some microseconds."""
    p20, p50, p80 = (f"{value:.{digits}f}" for value in spread(values))
    return {"us": p50, "p20": p20, "p80": p80}
