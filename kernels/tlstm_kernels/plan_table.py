"""Measured launch plans of a user's own, from the file that TLSTM_PLAN_TABLE names; pure Python.

`benchmarks/tune_plans.py` writes such files. They overrule the cost model, and the library's own table, for the GPU
that they were measured on: `plan_choice` asks for the entries of one GPU, and the file is read once for each.

    {"format": "tlstm-plans-1",
     "entries": [{"arch": "sm_90", "multiprocessors": 132, "kernel": "forward", "dtype": "bfloat16", "H": 768, "B": 16,
                  "plan": {"regime": "persistent", "units": 16, "rows": 16, "block_k": 128, "num_warps": 4}}]}

What else an entry holds (times, versions) is for readers. B is the largest batch that the entry is for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from .checks import ArgumentError

VARIABLE = "TLSTM_PLAN_TABLE"
FORMAT = "tlstm-plans-1"
Choices = Mapping[str, int | str]
Key = tuple[str, int, str, str, int, int]  # arch, multiprocessors, kernel, dtype, H, largest B
_KEY = {"arch": str, "multiprocessors": int, "kernel": str, "dtype": str, "H": int, "B": int}
_PLAN = {"regime": str, "units": int, "rows": int, "block_k": int, "num_warps": int, "split_k": int, "keep_tile": int}
_PLAN_OPTIONAL = {"groups": int}


@cache
def plans_of_gpu(arch: str, multiprocessors: int) -> Mapping[Key, Choices]:
    """The user's entries for this GPU; none without TLSTM_PLAN_TABLE, which is looked at once.

    Raises:
        ArgumentError: no such file, or one that is no table of plans; the message says what is wrong with it.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return {}
    return {key: plan for key, plan in read_plan_table(Path(path)).items() if key[:2] == (arch, multiprocessors)}


def read_plan_table(path: Path) -> dict[Key, Choices]:
    """All entries of a file.

    Raises:
        ArgumentError: as in `plans_of_gpu`.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(
            f"{VARIABLE}: expected a readable file; received {str(path)!r}: {error.strerror}."
        ) from error
    except ValueError as error:
        raise ArgumentError(f"{VARIABLE}: expected JSON in {str(path)!r}; received {error}.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("entries"), list):
        raise ArgumentError(f"{VARIABLE}: expected an object of format {FORMAT!r} with entries in {str(path)!r}.")
    table: dict[Key, Choices] = {}
    for number, entry in enumerate(found["entries"]):
        where = f"{VARIABLE}: {str(path)!r}, entry {number}"
        _check(where, entry, _KEY, {"plan"})
        _check(f"{where}, plan", entry["plan"], {}, set(), optional=_PLAN | _PLAN_OPTIONAL)
        key = (entry["arch"], entry["multiprocessors"], entry["kernel"], entry["dtype"], entry["H"], entry["B"])
        if key in table:
            raise ArgumentError(f"{where}: expected one entry for {key}; received a second one.")
        table[key] = entry["plan"]
    return table


def _check(
    where: str, value: Any, fields: Mapping[str, type], more: set[str], optional: Mapping[str, type] | None = None
) -> None:
    if not isinstance(value, dict):
        raise ArgumentError(f"{where}: expected an object; received {value!r}.")
    missing = [name for name in (*fields, *more) if name not in value]
    if missing:
        raise ArgumentError(f"{where}: expected {', '.join(missing)}; received {sorted(value)}.")
    if optional is not None and (unknown := sorted(value.keys() - optional.keys())):
        raise ArgumentError(f"{where}: expected fields among {', '.join(optional)}; received {', '.join(unknown)}.")
    for name, kind in {**fields, **(optional or {})}.items():
        if name in value and (type(value[name]) is not kind):
            expected = "a string" if kind is str else "a whole number"
            raise ArgumentError(f"{where}: expected {name} to be {expected}; received {value[name]!r}.")
