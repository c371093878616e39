"""Benchmarks for sceptics: every provider verified, timed in turns, recorded and drawn, in one command.

    python -m benchmarks.run --set headline deepbench-train         on the GPU, or shrunk on a CPU
    python -m benchmarks.run --set lm --base HEAD~3                 two commits in one run; refused while tests are red
    python -m benchmarks.run --list                                 sets with their sources, providers

Results go to benchmarks/results/<gpu or cpu>/SET-COMMIT.{csv,json} with plots beside them, row by row: Ctrl-C keeps
what is measured, and the same command goes on from there. `python -m benchmarks.readme` then renews the README.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import compare
from benchmarks.report import summary_text, write_summary
from tlstm.benchmark.environment import describe_machine, machine_name
from tlstm.benchmark.results import Row, Table
from tlstm.benchmark.sets import SETS, workloads_of
from tlstm.cli import bench

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EXIT_INTERRUPTED = 130


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Run one command and return its exit code: 0; 1 where a provider of ours is wrong, failed or slower than the base;
    2 for a mistake in the arguments or red tests; 130 for Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        return run(args, root)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted; the rows measured so far are kept, the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench.add_run_arguments(made, default_set="headline")
    made.add_argument("--all", action="store_true", help="every set")
    made.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<gpu or cpu>")
    made.add_argument("--fresh", action="store_true", help="measure again what an earlier run of this commit measured")
    made.add_argument("--no-plots", action="store_true", help="tables only")
    made.add_argument("--list", action="store_true", help="list sets and providers, and what cannot run here")
    made.add_argument("--base", metavar="REV", help="compare the present tree with this commit")
    made.add_argument(
        "--tests", metavar="COMMAND", help="with --base: what must be green first (default: the layer's tests)"
    )
    made.add_argument("--tolerance", type=float, default=0.03, help="with --base: what counts as slower (default 0.03)")
    return made


def run(args: argparse.Namespace, root: Path) -> int:
    if args.all:
        args.set = list(SETS)
    settings, floor = bench.prepare(args)
    if args.list:
        print(bench.describe_choices(settings.device))
        return 0
    out = args.out or RESULTS / machine_name(settings.device)
    if args.base is not None:
        return run_comparison(args, settings, out, root)
    from tlstm.benchmark.session import describe_rows, exit_code, run_set

    def show(rows: list[Row]) -> None:
        tqdm.write(describe_rows(rows))

    tables = []
    for name in args.set:
        table = run_set(name, settings, out, floor, show)
        tables.append(table)
        assert table.path is not None
        write_summary(table)
        print(summary_text(table), f"wrote {table.path}", sep="\n", flush=True)
        if not args.no_plots:
            from benchmarks.plots import draw

            print(*(f"drew {path}" for path in draw(table.path)), sep="\n", flush=True)
    return exit_code(tables)


def run_comparison(args: argparse.Namespace, settings: Any, out: Path, root: Path) -> int:
    """`--base`: tests, then both versions in turns."""
    command = shlex.split(args.tests) if args.tests else compare.test_command(settings.on_gpu)
    with compare.checked_out(args.base, root) as (tree, base_commit):
        compare.require_green_tests(command, root)
        commit = compare.present_commit(root)
        machine = describe_machine(settings.device)
        common = {name: machine.get(name, "") for name in ("device", "machine", "torch", "triton")}
        common |= {"commit": commit, "base_commit": base_commit}
        about = machine | {
            "commit": commit, "base_commit": base_commit, "tests": shlex.join(command), "sets": args.set,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        path = out / f"compare-{base_commit}-{commit}.csv"
        table = Table(path, about, resume=False, columns=compare.COLUMNS)
        turns = [
            (name, mode, dtype, workload, provider)
            for name in args.set
            for mode in settings.modes_of(name)
            for dtype in settings.dtypes_used()
            for workload in workloads_of(name, small=not settings.on_gpu and not settings.full_size)
            for provider in (settings.providers or ("tlstm",))
        ]
        with compare.two_sides(tree, root) as sides:
            for name, mode, dtype, workload, provider in tqdm(turns, desc=f"against {base_commit}", disable=None):
                row = compare.compare(
                    sides, workload, mode, dtype, provider, settings.device, settings.seconds, args.threads
                )
                table.add([{"set": name, **common, **row}])
                tqdm.write(compare.describe(row))
    text, code = compare.verdict(table.rows, args.tolerance)
    table.close(verdict=text)
    print(text, f"wrote {path}", sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
