"""Plots of recorded tables: ratios of a set as a heat map, curves for each hidden size, distance from the floor.

python -m benchmarks.plots benchmarks/results/cpu/headline-*.csv
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from tlstm.benchmark.results import OK, Row, read_rows, workload_of
from tlstm.benchmark.sets import SETS

# Text stays text, and the same table gives the same file.
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "tlstm", "font.size": 8}
UNLIKE_A_GPU = "CPU figures: they say nothing about a GPU"


def draw(table: Path) -> list[Path]:
    """Write the plots of a table beside it and return their paths; those that have nothing to show are left out."""
    rows = [row for row in read_rows(table) if row["status"] == OK]
    about = json.loads(table.with_suffix(".json").read_text(encoding="utf-8"))
    written = []
    for name, figure in (
        ("ratios", ratio_map(rows, about)),
        ("curves", curves(rows, about)),
        ("floor", floor_chart(rows, about)),
    ):
        if figure is None:
            continue
        path = table.with_name(f"{table.stem}-{name}.svg")
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
        written.append(path)
    return written


def ratio_map(rows: list[Row], about: dict[str, Any]) -> Any:
    """Speed over the baseline, a row for each workload, a column for each provider."""
    rows = [row for row in rows if row["speedup_p50"]]
    columns = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != row["baseline"]))
    lines = list(dict.fromkeys(_line_of(row) for row in rows))
    if not columns:
        return None
    ratios = {(_line_of(row), row["provider"]): float(row["speedup_p50"]) for row in rows}
    figure, axes = plt.subplots(figsize=(3.5 + 1.1 * len(columns), 1 + 0.24 * len(lines)))
    grid = [[math.log2(ratios.get((line, column), math.nan)) for column in columns] for line in lines]
    axes.imshow(grid, aspect="auto", cmap="RdYlGn", vmin=-2, vmax=2)
    for y, line in enumerate(lines):
        for x, column in enumerate(columns):
            if (line, column) in ratios:
                dark = abs(grid[y][x]) > 1.4  # towards the ends of the colours
                color = "white" if dark else "black"
                axes.text(x, y, f"{ratios[line, column]:.2f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(lines)), lines)
    baseline = " or ".join(sorted({row["baseline"] for row in rows}))
    axes.set_title(_title(about, f"times as fast as {baseline}"))
    return figure


def curves(rows: list[Row], about: dict[str, Any]) -> Any:
    """Microseconds per step over the size that varies most, a line for each hidden size of ours and of the baseline;
    where the set is a curve, for every provider, and memory beside it."""
    size = SETS[about["set"]].curve or _varied(rows)
    if size is None:
        return None
    with_memory = bool(SETS[about["set"]].curve) and any(row["saved_bytes"] not in ("", "0") for row in rows)
    figure, panels = plt.subplots(
        1, 2 if with_memory else 1, figsize=(11 if with_memory else 6, 4), squeeze=False, layout="constrained"
    )
    quantities = [("us_per_step", "microseconds per time step"), ("saved_bytes", "bytes saved for backward")]
    for (name, label), axes in zip(quantities, panels[0], strict=False):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row[name] in ("", "0") or not (
                SETS[about["set"]].curve or row["provider"] in ("tlstm", row["baseline"])
            ):
                continue
            fixed = "" if size == "H" else f" H={row['H']}"
            lines.setdefault(f"{row['provider']} {row['mode']} {row['dtype']}{fixed}", []).append(
                (float(row[size]), float(row[name]))
            )
        for text, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, linewidth=1, label=text)
        axes.set(xscale="log", yscale="log", xlabel=size, ylabel=label)
        axes.grid(alpha=0.3, linewidth=0.4)
        axes.legend(fontsize=5, ncols=1 + len(lines) // 20).set_in_layout(False)
    figure.suptitle(_title(about, f"against {size}"))
    return figure


def floor_chart(rows: list[Row], about: dict[str, Any]) -> Any:
    """How many times the measured floor each provider takes; nothing where no floor was measured."""
    rows = [row for row in rows if row["times_floor"]]
    if not rows:
        return None
    lines = list(dict.fromkeys(_line_of(row) for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    figure, axes = plt.subplots(figsize=(8, 1 + 0.12 * len(lines) * (len(providers) + 1)))
    height = 0.85 / len(providers)
    for n, provider in enumerate(providers):
        own = {_line_of(row): float(row["times_floor"]) for row in rows if row["provider"] == provider}
        places = [y + n * height for y, line in enumerate(lines) if line in own]
        axes.barh(places, [own[line] for line in lines if line in own], height, label=provider)
    axes.set_yticks([y + 0.4 for y in range(len(lines))], lines)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="times the floor: exchange and matrix chain alone, measured")
    axes.invert_yaxis()
    axes.legend()
    axes.set_title(_title(about, "distance from the floor"))
    return figure


def _line_of(row: Row) -> str:
    return f"{row['mode']} {row['dtype']} {workload_of(row).label()}"


def _varied(rows: list[Row]) -> str | None:
    """The size with the most different values, H apart; None if none has three."""
    counts = {size: len({row[size] for row in rows}) for size in ("B", "T", "layers")}
    best = max(counts, key=lambda size: counts[size])
    return best if counts[best] >= 3 else None


def _title(about: dict[str, Any], what: str) -> str:
    shrunk = ", sizes shrunk" if about["shrunk"] else ""
    title = f"{about['set']}{shrunk}: {what}\n{about['machine']}, {about['commit']}, torch {about['torch']}"
    return f"{title}\n{UNLIKE_A_GPU}" if about["device"] == "cpu" else title


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path, help="CSV files of `benchmarks.run`")
    for table in parser.parse_args().tables:
        print(*draw(table), sep="\n")


if __name__ == "__main__":
    main()
