"""The table of a run on disk: one CSV row for each provider and workload, and a JSON file that says how it came about.

Rows are written as they come, so that an interrupted run keeps them; a run that starts again on the same commit goes on
where it stopped.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tlstm.benchmark.workload import Workload

Row = dict[str, Any]
SIZES = ("T", "B", "H", "I", "layers", "bidirectional", "proj_size", "resets", "vocab")
KEY = ("set", "mode", "dtype", *SIZES)
COLUMNS = (
    *("device", "machine", *KEY, "provider", "status", "error", "turns"),
    *("ms_p20", "ms_p50", "ms_p80", "us_per_step", "input_ms", "us_per_step_without_input"),
    # Over the baseline of the same turns, torch.nn.LSTM; above 1 is faster.
    *("speedup_p20", "speedup_p50", "speedup_p80", "speedup_without_input", "baseline"),
    *("tokens_per_s", "floor_us_per_step", "times_floor", "error_share", "error_where"),
    *("saved_bytes", "peak_bytes", "cudnn_algorithm", "plan", "clock", "clock_mhz", "commit", "torch", "triton"),
)
# Status of a row: a time; no time because wrong, because it failed, or because it cannot run this here.
OK, WRONG, FAILED, UNAVAILABLE = "ok", "wrong", "failed", "unavailable"


class Table:
    """The rows of one run, in `path` (.csv) and beside it (.json); without a path in memory only."""

    def __init__(
        self, path: Path | None, about: dict[str, Any], resume: bool = True, columns: Sequence[str] = COLUMNS
    ) -> None:
        self.path, self.about, self.columns = path, about, tuple(columns)
        self.rows: list[Row] = read_rows(path, self.columns) if path is not None and resume and path.exists() else []
        self.resumed = len(self.rows)
        self._write()

    def finished(self, key: tuple[str, ...], providers: Sequence[str]) -> bool:
        """Whether all these providers have a row of this workload already, measured or refused for good."""
        known = {row["provider"] for row in self.rows if key_of(row) == key and row["status"] != FAILED}
        return known >= set(providers)

    def add(self, rows: Iterable[Row]) -> None:
        """Replace the rows of the same workload and provider, and write the files."""
        new = [{name: _text(row.get(name, "")) for name in self.columns} for row in rows]
        keys = {(key_of(row), row["provider"]) for row in new}
        self.rows = [row for row in self.rows if (key_of(row), row["provider"]) not in keys] + new
        self._write()

    def close(self, **about: Any) -> None:
        """Add to what the JSON file says."""
        self.about |= about
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _replace(self.path, lambda file: _write_csv(file, self.rows, self.columns))
        text = json.dumps({**self.about, "rows": len(self.rows)}, indent=1, sort_keys=True) + "\n"
        _replace(self.path.with_suffix(".json"), lambda file: file.write(text))


def key_of(row: Row) -> tuple[str, ...]:
    """What identifies a workload in a table, as text."""
    return tuple(_text(row[name]) for name in KEY)


def workload_of(row: Row) -> Workload:
    return Workload.from_row(row)


def read_rows(path: Path, columns: Sequence[str] = COLUMNS) -> list[Row]:
    """The rows of a table as text.

    Raises:
        ValueError: a file with other columns.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if reader.fieldnames is None or set(reader.fieldnames) != set(columns):
        raise ValueError(f"{path}: expected the columns of this version's tables; received others. Move the file away.")
    return rows


def _write_csv(file: Any, rows: list[Row], columns: Sequence[str]) -> None:
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _replace(path: Path, write: Any) -> None:
    """All or nothing: an interrupt leaves the old file or the new one."""
    draft = path.with_name(path.name + ".part")
    with open(draft, "w", newline="", encoding="utf-8") as file:
        write(file)
    os.replace(draft, path)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
