"""The README's performance section, written from the newest recorded runs.

    python -m benchmarks.readme             rewrite what stands between the markers
    python -m benchmarks.readme --check     only say whether it is up to date (exit code 1 if not)

Figures of a CPU and of a GPU never share a table, and what has not been measured is named.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import newest_tables
from tlstm.benchmark.results import Row
from tlstm.benchmark.sets import SETS

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- performance: begin (python -m benchmarks.readme) -->", "<!-- performance: end -->"
REPORTED = [name for name in SETS if name not in ("short", "layer", "check")]
NOTHING_FROM_A_GPU = """**Not measured yet: everything on a GPU.** No figure in this repository comes from one: neither
speed, nor the distance from the floor, nor the comparison with cuDNN, FlashRNN, Haste, xLSTM and TorchRL. Whoever has a
card gets the truth about it from one command, which checks every provider against float64 before it is timed:

```
python -m benchmarks.run --all    # tables, plots, ratios, times the measured floor
tlstm bench                       # the short version, also from an installed package
```"""
LEGEND = "Times as fast as `torch.nn.LSTM` in the same run: geometric mean over the set (lowest)."
CPU_NOTE = """This says nothing about a GPU: sizes are shrunk (steps / 16, batch / 4, widths / 8; those of `layer` are
not), and on a CPU `tlstm` *is* `torch.nn.LSTM` behind argument checks, so 1.00 is what to expect, and less where calls
are tiny. `decode` compares `generate` with a plain loop."""
MODES = ("forward", "backward", "train", "decode")
Tables = dict[tuple[str, str], tuple[dict[str, Any], list[Row]]]


def section(tables: Tables, root: Path = ROOT) -> str:
    """The text between the markers."""
    gpus = sorted({machine for machine, _ in tables if machine != "cpu"})
    parts = [_gpu_part(gpu, tables, root) for gpu in gpus] or [NOTHING_FROM_A_GPU]
    if any(machine == "cpu" for machine, _ in tables):
        parts.append(_cpu_part(tables, root))
    return "\n\n".join(parts)


def _gpu_part(gpu: str, tables: Tables, root: Path) -> str:
    note = "`floors`: times the measured floor."
    lines = [f"### {gpu}", "", LEGEND, note, "", *_table(gpu, tables, root)]
    missing = [name for name in REPORTED if (gpu, name) not in tables]
    if missing:
        lines += ["", f"Not measured there yet: {', '.join(missing)}."]
    return "\n".join(lines)


def _cpu_part(tables: Tables, root: Path) -> str:
    """What says nothing about a GPU: that the harness runs, and what the layer costs over torch's own call."""
    runs = [each for (machine, _), (each, _) in tables.items() if machine == "cpu"]
    about = max(runs, key=lambda each: each["started"])
    loads = [each["load"] for each in runs if "load" in each]
    busy = f" While they ran, {min(loads):.0f} to {max(loads):.0f} processes wanted the machine." if loads else ""
    lines = [
        f"### On a CPU ({about['cpu']}, {_threads(about)}, torch {about['torch']})",
        "",
        LEGEND,
        CPU_NOTE + busy,
        "",
        *_table("cpu", tables, root, names=(*REPORTED, "layer")),
    ]
    return "\n".join(lines)


def _table(machine: str, tables: Tables, root: Path, names: tuple[str, ...] | list[str] = REPORTED) -> list[str]:
    """A row for each set and dtype: tlstm over torch.nn.LSTM, geometric mean and lowest."""
    lines = [
        "| set | dtype | " + " | ".join(MODES) + " | plot |",
        "|" + "---|" * (3 + len(MODES)),
    ]
    for name in names:
        if (machine, name) not in tables:
            continue
        about, _ = tables[machine, name]
        plot = about["path"].with_name(f"{about['path'].stem}-ratios.svg")
        link = f"[plot]({plot.relative_to(root).as_posix()})" if plot.exists() else ""
        ours = [entry for entry in about["summary"] if entry["provider"].startswith("tlstm")]
        for dtype in dict.fromkeys(entry["dtype"] for entry in ours):
            cells = [_cell([e for e in ours if (e["mode"], e["dtype"]) == (mode, dtype)]) for mode in MODES]
            lines.append(f"| {name} | {dtype} | {' | '.join(cells)} | {link} |")
    return lines


def _cell(entries: list[dict[str, Any]]) -> str:
    """What `tlstm` itself reached, and how many workloads any way of ours was wrong or failed in."""
    own = next((entry for entry in entries if entry["provider"] == "tlstm"), {})
    parts = [f"{own['geometric_mean']:.2f} ({own['lowest']:.2f})"] if "geometric_mean" in own else []
    parts += [f"{own['times_floor']['geometric_mean']:.1f} floors"] if "times_floor" in own else []
    bad = sum(entry["wrong"] + entry["failed"] for entry in entries)
    return ", ".join(parts + ([f"**{bad} wrong or failed**"] if bad else []))


def _threads(about: dict[str, Any]) -> str:
    return "one thread" if about["threads"] == 1 else f"{about['threads']} threads"


def rewritten(readme: str, text: str) -> str:
    """The README with `text` between its markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md: expected one {BEGIN!r} and after it one {END!r}.")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the section is old")
    args = made.parse_args(argv)
    path = root / "README.md"
    old = path.read_text(encoding="utf-8")
    new = rewritten(old, section(newest_tables(root / "benchmarks" / "results"), root))
    if args.check:
        print("up to date" if new == old else "README.md: the performance section is old: python -m benchmarks.readme")
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
