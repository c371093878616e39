"""What a table says in a few figures: geometric means, the lowest ratio, the share of the floor, slopes of curves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tlstm.benchmark.results import OK, Row, Table, read_rows
from tlstm.benchmark.sets import SETS
from tlstm.benchmark.statistics import geometric_mean, slope


def summarize(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """For each mode, dtype and provider: how often it is as fast as its baseline, on average and at worst.

    `below` counts the workloads in which it is slower; `wrong` and `failed` those in which it has no time.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["dtype"], row["provider"]), []).append(row)
    found = []
    for (mode, dtype, provider), members in groups.items():
        timed = [row for row in members if row["status"] == OK]
        ratios = [float(row["speedup_p50"]) for row in timed if row["speedup_p50"]]
        floors = [float(row["times_floor"]) for row in timed if row["times_floor"]]
        entry: dict[str, Any] = {"mode": mode, "dtype": dtype, "provider": provider, "timed": len(timed)}
        entry |= {state: sum(row["status"] == state for row in members) for state in ("wrong", "failed", "unavailable")}
        if ratios:
            entry |= {"geometric_mean": round(geometric_mean(ratios), 4), "lowest": min(ratios)}
            entry |= {"highest": max(ratios), "below": sum(ratio < 1 for ratio in ratios)}
            entry["baseline"] = "+".join(sorted({row["baseline"] for row in timed if row["baseline"]}))
        if floors:
            entry["times_floor"] = {"geometric_mean": round(geometric_mean(floors), 3), "highest": max(floors)}
        found.append(entry)
    return found


def slopes(rows: Iterable[Row], size: str) -> list[dict[str, Any]]:
    """How time (microseconds) and memory (bytes) grow along one size, for each mode, dtype and provider."""
    curves: dict[tuple[str, str, str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["status"] != OK:
            continue
        for what, value in (("us", 1e3 * float(row["ms_p50"])), *_memory(row)):
            curves.setdefault((row["mode"], row["dtype"], row["provider"], what), []).append((float(row[size]), value))
    found = []
    for (mode, dtype, provider, what), points in curves.items():
        fitted = slope(*zip(*sorted(points), strict=True))
        if fitted is not None:
            entry = {"mode": mode, "dtype": dtype, "provider": provider, "of": what, "against": size}
            found.append(entry | {name: round(value, 4) for name, value in fitted._asdict().items()})
    return found


def _memory(row: Row) -> list[tuple[str, float]]:
    return [(name, float(row[name])) for name in ("saved_bytes", "peak_bytes") if row[name] not in ("", "0")]


def write_summary(table: Table) -> None:
    """Put the figures into the table's JSON file."""
    about: dict[str, Any] = {"summary": summarize(table.rows)}
    curve = SETS[table.about["set"]].curve
    if curve:
        about["slopes"] = slopes(table.rows, curve)
    table.close(**about)


def summary_text(table: Table) -> str:
    """The figures for the terminal."""
    where = f"{table.about['set']} on {table.about['machine']}" + (" (shrunk)" if table.about["shrunk"] else "")
    lines = [where]
    for entry in table.about["summary"]:
        text = f"  {entry['mode']:<9}{entry['dtype']:<9}{entry['provider']:<18}{entry['timed']:>3} timed"
        if "geometric_mean" in entry and entry["provider"] != entry["baseline"]:
            text += (
                f", geometric mean {entry['geometric_mean']:.2f}x {entry['baseline']}, lowest {entry['lowest']:.2f}x"
            )
        if "times_floor" in entry:
            text += f", {entry['times_floor']['geometric_mean']:.1f} times the floor"
        bad = [f"{entry[state]} {state}" for state in ("wrong", "failed") if entry[state]]
        lines.append(text + (", " + ", ".join(bad) if bad else ""))
    for entry in table.about.get("slopes", []):
        size, name = entry["against"], f"  {entry['mode']:<9}{entry['dtype']:<9}{entry['provider']:<18}"
        growth = f"~ {size}^{entry['exponent']:.2f}"
        lines.append(f"{name}{entry['per_unit']:.4g} {entry['of']} for one more {size}, {growth}")
    return "\n".join(lines)


def newest_tables(results: Path) -> dict[tuple[str, str], tuple[dict[str, Any], list[Row]]]:
    """(machine, set) -> what the newest complete run says of itself, and its rows; comparisons of commits left out."""
    found: dict[tuple[str, str], tuple[dict[str, Any], list[Row]]] = {}
    for path in sorted(results.glob("*/*.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(about, dict) or not about.get("complete") or "set" not in about:
            continue
        key = about["machine"], about["set"]
        if key not in found or found[key][0]["started"] < about["started"]:
            found[key] = about | {"path": path}, read_rows(path.with_suffix(".csv"))
    return found
