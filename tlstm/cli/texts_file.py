"""`tlstm generate --out`: finished texts as JSON lines in a file, kept through Ctrl-C and a kill, completed later."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import IO, Any

from tlstm.checkpoint.folder_swap import replace_files
from tlstm.cli.errors import UsageError


class TextsFile:
    """A file of records, one JSON object a line, that is written as texts end and sorted when all have.

    Each record has `index` (its place in the output), `prompt`, `text`, `tokens`, `finish_reason`, `seed`, and `run`, a
    fingerprint of model and settings: records of another run are not mixed with those of this one.

    Args:
        prompts: of every record to be, in order of their index.
        resume: go on with the file that is there; without it, there must be none.

    Raises:
        UsageError: a file is there, or there is none, against `resume`; or it holds other prompts or another run.
    """

    def __init__(self, path: str, prompts: list[str], run: dict[str, Any], *, resume: bool) -> None:
        self.path, self._prompts = Path(path), prompts
        self.run = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:12]
        self.records: dict[int, dict[str, Any]] = {}
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"--out {path}: its folder does not exist; make it first")
        if self.path.exists():
            if not resume:
                raise UsageError(f"--out {path}: the file exists; add --resume to complete it, or choose another name")
            self._read()
        elif resume:
            raise UsageError(f"--resume: there is no {path} to go on with; leave it out to start")
        self._file: IO[bytes] | None = None

    def _read(self) -> None:
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):  # a last one without its end was cut off by a kill
            try:
                record = json.loads(line)
                index, prompt, run = record["index"], record["prompt"], record["run"]
            except (ValueError, KeyError, TypeError):
                raise UsageError(f"{self.path}, line {number}: not a record of tlstm generate --out") from None
            if not isinstance(index, int) or not 0 <= index < len(self._prompts) or prompt != self._prompts[index]:
                raise UsageError(
                    f"{self.path}, line {number}: it holds another prompt than this command gives; resume with the "
                    "same prompts, in the same order"
                )
            if run != self.run:
                raise UsageError(
                    f"{self.path}, line {number}: it was made with another model or other settings; resume with the "
                    "same ones, or choose another --out"
                )
            self.records[index] = record

    @property
    def seeds(self) -> set[int | None]:
        """The seeds of the records that are there."""
        return {record.get("seed") for record in self.records.values()}

    def open(self) -> None:
        """Begin to write. What is there is written anew first, without a line that was cut off."""
        self._replace()
        self._file = self.path.open("ab")

    def add(self, index: int, record: dict[str, Any]) -> None:
        """Write a record, at once."""
        assert self._file is not None
        self.records[index] = {"index": index, **record, "run": self.run}
        self._file.write(_line(self.records[index]))
        self._file.flush()

    def close(self) -> None:
        """Put the records in order; the file is replaced as a whole."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._replace()

    def _replace(self) -> None:
        content = b"".join(_line(self.records[index]) for index in sorted(self.records))
        replace_files(self.path.parent, {self.path.name: content})


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
