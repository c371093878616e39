"""A run over a set: workload after workload into a table, with progress, to be interrupted and resumed."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from tlstm.benchmark.decode import decode_registry
from tlstm.benchmark.environment import commit_of, describe_machine
from tlstm.benchmark.providers import default_providers
from tlstm.benchmark.results import FAILED, OK, WRONG, Row, Table, key_of
from tlstm.benchmark.runner import lookup_for, measure
from tlstm.benchmark.sets import SETS, workloads_of
from tlstm.benchmark.workload import DTYPES, MODES, Workload

if TYPE_CHECKING:
    from tlstm.benchmark.floor import FloorMeter

ROOT = Path(__file__).parents[2]
Measure = Callable[..., list[Row]]


@dataclass(frozen=True)
class Settings:
    """What to run, and where. None means the default of the device or of the set."""

    device: str
    providers: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    modes: tuple[str, ...] | None = None
    seconds: float = 2.0  # of turns, for each workload
    full_size: bool = False  # on a CPU: sizes as they are on a GPU
    resume: bool = True
    time_limit: float = math.inf  # seconds of a set, after which no further workload begins

    def __post_init__(self) -> None:
        for what, values, known in (("mode", self.modes, MODES), ("dtype", self.dtypes, DTYPES)):
            for value in values or ():
                if value not in known:
                    raise ValueError(f"{what}: expected one of {', '.join(known)}; received {value!r}.")
        if self.seconds <= 0:
            raise ValueError(f"seconds: expected more than 0; received {self.seconds}.")

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def modes_of(self, set_name: str) -> tuple[str, ...]:
        """Raises ValueError where the set does not go with the mode asked for."""
        if SETS[set_name].decode:
            if self.modes not in (None, ("decode",)):
                raise ValueError(
                    f"mode: expected decode for the set {set_name!r}; received {', '.join(self.modes or ())}."
                )
            return ("decode",)
        if self.modes is not None and "decode" in self.modes:
            raise ValueError(f"mode: expected forward, backward or train for the set {set_name!r}; received decode.")
        return self.modes or ("forward", "train")

    def dtypes_used(self) -> tuple[str, ...]:
        return self.dtypes or (("bfloat16", "float16") if self.on_gpu else ("float32",))

    def providers_of(self, mode: str, workload: Workload) -> list[str]:
        """Raises ValueError for an unknown name."""
        if self.providers is not None:
            names = list(self.providers)
        elif mode == "decode":
            names = list(decode_registry())
        else:
            names = default_providers(self.device, mode) + (["tlstm:native"] if workload.resets else [])
        for name in names:
            lookup_for(mode)(name)
        return names


def run_set(
    set_name: str,
    settings: Settings,
    out: Path | None,
    floor: FloorMeter | None = None,
    show: Callable[[list[Row]], None] | None = None,
    measure_one: Measure = measure,
) -> Table:
    """Measure a set, or what of it is missing in `out` from a run of the same commit that was interrupted.

    Args:
        out: folder of the table `SET-COMMIT.csv`; None: nothing is written.
        show: called with the rows of each workload.

    Raises:
        ValueError: unknown set, mode or provider; told before anything is measured.
        KeyboardInterrupt: after the rows measured so far are on disk.
    """
    workloads = workloads_of(set_name, small=not settings.on_gpu and not settings.full_size)
    turns = [
        (mode, dtype, workload, settings.providers_of(mode, workload))
        for workload in workloads  # the most telling ones first, whenever the run ends
        for dtype in settings.dtypes_used()
        for mode in settings.modes_of(set_name)
    ]
    commit = commit_of(ROOT)
    machine = describe_machine(settings.device)
    about: dict[str, Any] = {
        **machine,
        "set": set_name,
        "source": SETS[set_name].source,
        "commit": commit,
        "shrunk": not settings.on_gpu and not settings.full_size and set_name != "layer",
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    path = None if out is None else out / f"{set_name}-{commit}.csv"
    table = Table(path, about, settings.resume)
    common = {name: machine.get(name, "") for name in ("device", "machine", "torch", "triton")} | {"commit": commit}
    complete = False
    end = time.monotonic() + settings.time_limit
    try:
        for mode, dtype, workload, names in tqdm(turns, desc=set_name, unit="row", disable=None):
            key = key_of({"set": set_name, "mode": mode, "dtype": dtype, **workload.to_row()})
            if table.finished(key, names):
                continue
            if time.monotonic() > end:
                return table
            rows = measure_one(workload, mode, dtype, names, settings.device, settings.seconds, floor)
            rows = [{"set": set_name, **common, **row} for row in rows]
            table.add(rows)
            if show is not None:
                show(rows)
        complete = True
    finally:
        table.close(complete=complete, parts=_floor_parts(floor), floor_errors=floor.errors if floor else [])
    return table


def _floor_parts(floor: FloorMeter | None) -> list[dict[str, Any]]:
    if floor is None:
        return []
    return [{"part": part, "us": round(us, 4), **vars(geometry)} for (part, geometry), us in floor.known.items()]


def describe_rows(rows: Sequence[Row]) -> str:
    """The rows of one workload as text: a line for its sizes, one for each provider."""
    first = rows[0]
    where = f" on the {first['device']}" if first.get("device") == "cpu" else ""
    lines = [f"{first['mode']} {first['dtype']} {Workload.from_row(first).label()}{where}"]
    for row in rows:
        if row["status"] == OK:
            text = f"{float(row['us_per_step']):10.2f} us/step"
            if row.get("baseline") and row["provider"] != row["baseline"]:
                text += f"   {float(row['speedup_p50']):.2f}x {row['baseline']}"
            if row.get("tokens_per_s"):
                text += f"   {float(row['tokens_per_s']):,.0f} tokens/s"
            if row.get("times_floor"):
                text += f"   {float(row['times_floor']):.1f} times the floor"
        elif row["status"] in (WRONG, FAILED):
            text = f"{row['status'].upper()}, no time: {row['error']}"
        else:
            text = f"not measured: {row['error']}"
        lines.append(f"  {row['provider']:<18}{text}")
    return "\n".join(lines)


def exit_code(tables: Sequence[Table]) -> int:
    """1 if any provider of ours was wrong or failed, else 0; others' errors are results."""
    own = [row for table in tables for row in table.rows if row["provider"].startswith("tlstm")]
    return int(any(row["status"] in (WRONG, FAILED) for row in own))
