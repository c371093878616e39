"""Replace a set of files in a folder so that a reader sees the old set or the new one, whole, whenever the writer dies.

A save stages every file in `.tlstm-save-<random>/` inside the folder, forces it to disk, and then publishes one commit
record, `.tlstm-commit.json`, by an atomic rename. That rename is the commit point. Before it the folder holds the old
set and a staging folder nobody looks at; after it the new set counts, wherever its files lie: a reader takes each file
that the record lists from the staging folder while it is still there and else from its final place, and does not see
files that the record calls stale. Moving the files, deleting stale ones and removing the record only tidy up; the next
save finishes that work if this one could not. Files that are neither listed nor stale are never touched.

Readers take no lock, so they also work in read-only folders. They note which files they used and read again if any of
those, or the record, changed meanwhile (`read_consistently`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from tlstm.checkpoint.folder_view import PRIVATE_PREFIX, RECORD, STAGING, CommitRecord, is_plain_name

LOCK = ".tlstm-save.lock"
_LOCK_TIMEOUT = 600.0  # seconds: a save of a large model to a slow disk may hold the folder for minutes

FileContent = bytes | Callable[[Path], None]


def replace_files(
    folder: str | os.PathLike[str],
    files: Mapping[str, FileContent],
    *,
    is_stale: Callable[[str], bool] = lambda name: False,
) -> None:
    """Put `files` into `folder` (made if missing) as one set; a kill at any point leaves the old or the new set.

    Args:
        files: name -> its bytes, or a function that writes the file at the path it is given. Names may hold
            subfolders ("figures/loss.png"). Files are moved into place in this order, for readers that know nothing of
            commit records: weights first, the files that name them last.
        is_stale: called with each file name at the top of the folder that is not in `files`; those for which it is
            true belong to the old set and go with it.

    Raises:
        ValueError: a name that leaves the folder. OSError: nothing could be written (no space, no permission): the old
            set is unchanged, unless the message says that the new one is already committed.
    """
    folder = Path(folder)
    for name in files:
        if not is_plain_name(name):
            raise ValueError(f"file name: expected a path inside the folder {folder}, got {name!r}")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"expected a folder to save into, got a file: {folder}")
    committed = False
    try:
        _make_folder(folder)
        with _folder_lock(folder):
            _roll_forward(folder)
            _sweep(folder)
            staging = folder / f"{PRIVATE_PREFIX}save-{secrets.token_hex(8)}"
            try:
                _commit(folder, staging, files, is_stale)
                committed = True
            except BaseException:
                # Ask the disk, not the control flow: the interrupt or failing fsync may have come after the commit.
                record = CommitRecord.read(folder)
                committed = record is not None and record.staging == staging.name
                if not committed:
                    shutil.rmtree(staging, ignore_errors=True)
                raise
            _roll_forward(folder)
    except OSError as error:
        raise _explained(error, folder, committed=committed) from error


def _commit(folder: Path, staging: Path, files: Mapping[str, FileContent], is_stale: Callable[[str], bool]) -> None:
    """Stage everything and publish the record; the last rename is the commit point."""
    _check_room_for(folder, files)
    staging.mkdir()
    for name, content in files.items():
        _stage(staging / name, content)
    stale = [name for name in os.listdir(folder) if name not in files and _is_stale_file(folder / name, is_stale)]
    _stage(staging / RECORD, CommitRecord(staging.name, tuple(files), tuple(sorted(stale))).to_json())
    for parent in _folders(staging, files):
        fsync(parent)
    os.replace(staging / RECORD, folder / RECORD)
    fsync(folder)


def _check_room_for(folder: Path, names: Iterable[str]) -> None:
    """After the commit nothing may stand in the way of the files, so look before it."""
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"a folder stands where a file is to be saved: {folder / name}")
    for parent in _folders(folder, names):
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"a file stands where a folder is needed: {parent}")


def _folders(base: Path, names: Iterable[str]) -> list[Path]:
    """`base` and every folder in it that `names` pass through, outermost first."""
    inner = {parent for name in names for parent in (base / name).parents if parent.is_relative_to(base)}
    return sorted(inner | {base})


def _is_stale_file(path: Path, is_stale: Callable[[str], bool]) -> bool:
    return not path.name.startswith(PRIVATE_PREFIX) and is_stale(path.name) and not path.is_dir()


def _stage(path: Path, content: FileContent) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    fsync(path)


def _roll_forward(folder: Path) -> None:
    """Finish a committed save: move its files into place, delete the stale ones, then forget the record."""
    record = CommitRecord.read(folder)
    if record is None:
        return
    staging = folder / record.staging
    for name in record.files:
        if (staging / name).exists():  # else an earlier attempt has moved it
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, folder / name)
    for name in record.stale:
        (folder / name).unlink(missing_ok=True)
    for parent in _folders(folder, record.files):
        fsync(parent)
    (folder / RECORD).unlink()
    fsync(folder)
    shutil.rmtree(staging, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove staging folders of writers that died before their commit. Call with the lock and no record."""
    for entry in os.listdir(folder):
        if STAGING.fullmatch(entry):
            shutil.rmtree(folder / entry, ignore_errors=True)


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync(path.parent)


def fsync(path: Path) -> None:
    """Force a file or a folder's entries to disk. Windows cannot open folders, and journals renames itself."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """One writer at a time. The lock file goes afterwards: a checkpoint folder holds its checkpoint only."""
    path = folder / LOCK
    if os.name == "nt":
        import filelock

        with filelock.FileLock(path, timeout=_LOCK_TIMEOUT):
            yield
        return
    import fcntl

    deadline = time.monotonic() + _LOCK_TIMEOUT
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise TimeoutError(
                    errno.ETIMEDOUT, f"another process has been saving for {_LOCK_TIMEOUT:.0f} s"
                ) from None
            time.sleep(0.02)
            continue
        # The holder before us removes the file while it still has the lock: a lock on a removed file guards nothing.
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a lock file that stays does no harm
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _explained(error: OSError, folder: Path, *, committed: bool) -> OSError:
    """The same kind of OSError, with what became of the folder and what to do."""
    remedy = {
        errno.ENOSPC: "free some space on that disk and save again",
        errno.EDQUOT: "the disk quota is used up; free some space and save again",
        errno.EACCES: "make the folder writable or choose another one",
        errno.EPERM: "make the folder writable or choose another one",
        errno.EROFS: "that file system is read-only; choose another folder",
    }.get(error.errno or 0, "remove the cause and save again")
    state = "what the folder held before is unchanged"
    if committed:
        state = (
            "the new files are committed and tlstm reads them, but not all are in their place; the next save ends that"
        )
    message = f"cannot save into {folder}: {error.strerror or error}; {state}; {remedy}"
    return OSError(error.errno, message) if error.errno is not None else OSError(message)
