"""Read a folder of files that may be replaced meanwhile, or whose replacement was killed half-way.

The other half of `folder_swap`, whose docstring tells the protocol. Nothing here writes: read-only folders load.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

RECORD = ".tlstm-commit.json"
PRIVATE_PREFIX = ".tlstm-"
STAGING = re.compile(r"\.tlstm-save-[0-9a-f]{16}")
MAX_BYTES = 1 << 28  # of a file that is read as a whole: JSON and text; weights are mapped
_READ_ATTEMPTS = 200

Result = TypeVar("Result")
Signature = tuple[str, int, int, int, int] | None


class CheckpointError(ValueError):
    """A checkpoint's files are damaged, contradict each other or are of a kind that is not read."""


class CheckpointNotFoundError(FileNotFoundError, CheckpointError):
    """A folder, or a file that a checkpoint needs, does not exist. Made of `errno.ENOENT` and the message."""

    def __str__(self) -> str:
        return str(self.args[-1])


@dataclass(frozen=True)
class CommitRecord:
    """What a published `.tlstm-commit.json` says: names are relative to the folder, in the order they are moved."""

    staging: str
    files: tuple[str, ...]
    stale: tuple[str, ...]

    def to_json(self) -> bytes:
        fields = {"staging": self.staging, "files": list(self.files), "stale": list(self.stale)}
        return json.dumps(fields, indent=1).encode()

    @classmethod
    def read(cls, folder: Path) -> CommitRecord | None:
        """The record in `folder`, or `None`. Raises `CheckpointError` for one that no save can have written."""
        path = folder / RECORD
        try:
            text = read_whole(path)
        except FileNotFoundError:
            return None
        try:
            fields = json.loads(text)
            record = cls(fields["staging"], tuple(fields["files"]), tuple(fields["stale"]))
            sound = STAGING.fullmatch(record.staging) and not (folder / record.staging).is_symlink()
            if not sound or not all(is_plain_name(name) for name in record.files + record.stale):
                raise ValueError("it names files outside the folder")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: not a commit record of tlstm ({error}). If nothing is being saved there, delete it "
                "and any .tlstm-save-* folder beside it, then save or download the checkpoint again"
            ) from None
        return record


def is_plain_name(name: object) -> bool:
    """Whether `name` is a relative path that stays inside its folder and is not one of this module's own files."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name or ":" in name or name.endswith("/"):
        return False
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not parts[0].startswith(PRIVATE_PREFIX)


def check_is_file(path: Path) -> None:
    """`CheckpointError` for a folder, and for a pipe or device, from which one might read for ever.

    A missing file passes: that is told by whoever opens it.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or device"
        raise CheckpointError(f"{path}: expected a file, found {kind}; remove it, or download the checkpoint again")


def read_whole(path: Path) -> bytes:
    """The content of a file that is no weights file, and therefore of bounded size. Raises as `check_is_file`."""
    check_is_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_BYTES >> 20} MiB, which no such file is")
    return path.read_bytes()


class FolderView:
    """A folder's files as a committed save left them, together with a note of every file that was looked at."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._record = CommitRecord.read(self.folder)
        self._touched: dict[str, Signature] = {}
        self._listed: list[str] | None = None

    def path(self, name: str) -> Path | None:
        """Where `name` lies now, or `None` if the folder does not have it.

        Raises:
            CheckpointError: a folder has that name, or a pipe or device, from which one would read for ever.
        """
        path, signature = self._locate(name)
        self._touched.setdefault(name, signature)
        if path is not None:
            check_is_file(path)
        return path

    def read_bytes(self, name: str) -> bytes:
        """The content of `name`.

        Raises:
            CheckpointNotFoundError: the folder does not have it. CheckpointError: it is no file, or a huge one.
        """
        path = self.path(name)
        if path is None:
            raise CheckpointNotFoundError(errno.ENOENT, f"{self.folder / name}: no such file in the checkpoint")
        return read_whole(path)

    def names(self) -> list[str]:
        """Sorted names of the files at the top of the folder, without stale and private ones."""
        self._listed = self._list()
        return self._listed

    def changed(self) -> bool:
        """Whether the record or any file looked at so far is another one now."""
        if CommitRecord.read(self.folder) != self._record:
            return True
        if any(self._locate(name)[1] != signature for name, signature in self._touched.items()):
            return True
        return self._listed is not None and self._list() != self._listed

    def _locate(self, name: str) -> tuple[Path | None, Signature]:
        candidates = [self.folder / name]
        if self._record is not None:
            if name in self._record.stale:
                return None, None
            if name in self._record.files:
                candidates.insert(0, self.folder / self._record.staging / name)
        for path in candidates:
            try:
                stat = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            return path, (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        return None, None

    def _list(self) -> list[str]:
        names = {entry.name for entry in os.scandir(self.folder) if not entry.is_dir()}
        if self._record is not None:
            names |= {name for name in self._record.files if PurePosixPath(name).name == name}
            names -= set(self._record.stale)
        return sorted(name for name in names if not name.startswith(PRIVATE_PREFIX))


def read_consistently(folder: str | os.PathLike[str], read: Callable[[FolderView], Result]) -> Result:
    """`read(view)`, repeated until no file that it looked at changed while it ran: the old set or the new, whole.

    `read` must go through `view` for every file. What it opens may be used after it returns: a file that is replaced
    keeps its content for those that have it open.

    Raises:
        CheckpointNotFoundError: no such folder. Whatever `read` raises, if the files did not change under it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "nothing"
        raise CheckpointNotFoundError(errno.ENOENT, f"expected a checkpoint folder, found {kind} there: {folder}")
    for attempt in range(_READ_ATTEMPTS):
        view = FolderView(folder)
        try:
            result = read(view)
        except (OSError, ValueError):
            if not view.changed():
                raise
        else:
            if not view.changed():
                return result
        time.sleep(min(0.001 * attempt, 0.05))
    raise CheckpointError(
        f"{folder}: its files kept changing through {_READ_ATTEMPTS} attempts to read them; stop whatever is writing "
        "there, or read a copy"
    )
