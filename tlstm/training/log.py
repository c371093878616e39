"""The run's log: every record as a JSON line, the numbers as CSV, TensorBoard where asked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

COLUMNS = (
    "step", "epoch", "tokens", "lr", "train_loss", "valid_loss", "grad_norm", "tokens_per_second", "seconds",
)  # fmt: skip
JSONL_NAME, CSV_NAME = "log.jsonl", "log.csv"


class RunLog:
    """Append-only `log.jsonl` and `log.csv` in `out_dir`.

    A checkpoint remembers `position()`; `rewind(position)` cuts both files back to it, so that a resumed run never
    holds a record twice. An empty `CSV` field means that the record has no such figure.

    Raises:
        ImportError: `tensorboard` was asked for and is not installed.
    """

    def __init__(self, out_dir: Path, *, tensorboard: bool = False) -> None:
        self.jsonl, self.csv = out_dir / JSONL_NAME, out_dir / CSV_NAME
        self.tensorboard_dir = out_dir / "tensorboard"
        self._events: Any = None
        self._with_events = tensorboard
        if tensorboard:
            _summary_writer()  # fail before the training, not at its first record

    def start(self, position: dict[str, int] | None = None, step: int = 0) -> None:
        """Begin new files, or continue those of a run at `position`."""
        self.jsonl.parent.mkdir(parents=True, exist_ok=True)
        for path, head in ((self.jsonl, ""), (self.csv, ",".join(COLUMNS) + "\n")):
            if position is None or not path.exists():
                path.write_text(head, encoding="utf-8")
            elif path.stat().st_size > position[path.name]:
                os.truncate(path, position[path.name])
        if self._with_events:
            self._events = _summary_writer()(str(self.tensorboard_dir), purge_step=step + 1 if step else None)

    def position(self) -> dict[str, int]:
        """Length of both files in bytes."""
        return {path.name: path.stat().st_size for path in (self.jsonl, self.csv)}

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it must hold `event` and `step`."""
        with open(self.jsonl, "a", encoding="utf-8") as out:
            out.write(json.dumps(record, sort_keys=True) + "\n")
        if record["event"] in ("train", "valid"):
            with open(self.csv, "a", encoding="utf-8") as out:
                out.write(",".join("" if record.get(name) is None else str(record[name]) for name in COLUMNS) + "\n")
        if self._events is not None:
            if record["event"] == "sample":
                self._events.add_text("sample", record["text"], record["step"])
            for name in COLUMNS[3:]:
                if isinstance(record.get(name), float):
                    self._events.add_scalar(name, record[name], record["step"])

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


def read_log(out_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a run, oldest first."""
    with open(Path(out_dir) / JSONL_NAME, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "tensorboard=True needs the `tensorboard` package; install it with `pip install tlstm[train]`, or leave it "
            "out: the same figures are in log.csv and log.jsonl"
        ) from None
    return SummaryWriter
