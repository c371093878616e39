"""What the tables of compiled plans share: rows in and out, and which source their figures are of."""

from __future__ import annotations

import ast
import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path

Row = dict[str, str]
SOURCES = Path(__file__).parents[1] / "kernels" / "tlstm_kernels"


def read(path: Path) -> list[Row]:
    """The rows of the table; none where it does not exist."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, columns: Iterable[str], rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def source_hash(*modules: str) -> str:
    """Short hash of the code of these modules, without comments: figures of another source are old."""
    code = "".join(ast.dump(ast.parse((SOURCES / f"{name}.py").read_text(encoding="utf-8"))) for name in modules)
    return hashlib.sha256(code.encode()).hexdigest()[:10]


def is_same(old: Row | None, new: Row, columns: Iterable[str]) -> bool:
    """Whether the table already has the figures of this row: of the same plan, compiler and source."""
    return old is not None and all(old[name] == new[name] for name in (*columns, "triton", "source"))
