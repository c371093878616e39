"""Downloads from the Hub that are checked, taken up again, not waited for for ever, and explained where they fail."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock, get_session, tqdm, validate_repo_id

from tlstm.checkpoint.folder_view import CheckpointNotFoundError
from tlstm.version import __version__

_ATTEMPTS = 3
_PASSING_STATUS = (429, 500, 502, 503, 504)
_PATIENCE = 60.0  # seconds of silence after which a server counts as gone
_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "the disk quota is used up; free some space there",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "that file system is read-only",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
}


class DownloadError(OSError):
    """What a repo delivered is not what it announced."""


def download_snapshot(
    repo_id: str, *, cache_dir: str | os.PathLike[str] | None = None, progress: bool = True, **options: Any
) -> Path:
    """The snapshot of one commit, every newly downloaded file of which has the hash that names it.

    `options` as in `huggingface_hub.snapshot_download`. The client itself checks sizes only, and repeats a request
    after some failures only; here wrong content is thrown away and fetched again, and so is what a busy server did not
    give.

    Raises:
        CheckpointNotFoundError: the commit has none of the files. DownloadError (an OSError): wrong content, again and
            again. OSError: the cache cannot be written, with the reason and its errno. huggingface_hub's errors: the
            repo, revision or connection is not there.
    """
    validate_repo_id(repo_id)
    cache = Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser()
    repo = cache / repo_folder_name(repo_id=repo_id, repo_type="model")
    limit_waiting()
    try:
        with contextlib.nullcontext() if options.get("local_files_only") else _one_at_a_time(repo):
            snapshot = _checked_snapshot(repo_id, repo, options, _TerminalBar if progress else _NoBar)
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None or isinstance(error, CheckpointNotFoundError):
            raise
        raise OSError(
            error.errno,
            f"cannot store {repo_id} in the cache {cache}: {error.strerror or error}; {remedy}, or choose another "
            "place with cache_dir or the environment variable HF_HUB_CACHE",
        ) from error
    if not snapshot.is_dir():  # the client makes it with the first file
        wanted = ", ".join(options.get("allow_patterns") or ["any file"])
        raise CheckpointNotFoundError(
            errno.ENOENT, f"{repo_id}: no checkpoint in its commit {snapshot.name}; expected some of {wanted}"
        )
    return snapshot


def limit_waiting() -> None:
    """Give the client's requests that have no limit one: of silence, not of the whole transfer.

    By default it waits for ever for the answer to most of them. Limits that somebody has chosen stay.
    """
    hooks = get_session().event_hooks["request"]
    if _set_limit not in hooks:
        hooks.append(_set_limit)


def _set_limit(request: Any) -> None:
    limits = request.extensions.setdefault("timeout", {})
    for phase in ("connect", "read", "write", "pool"):
        if limits.get(phase) is None:
            limits[phase] = _PATIENCE


def _checked_snapshot(repo_id: str, repo: Path, options: dict[str, Any], bar: type[tqdm]) -> Path:
    known = _stamps(repo)
    for attempt in range(_ATTEMPTS):
        last = attempt == _ATTEMPTS - 1
        try:
            # One call: it resolves the revision to a commit once, and takes every file from that commit.
            found = snapshot_download(
                repo_id,
                cache_dir=str(repo.parent),
                library_name="tlstm",
                library_version=__version__,
                tqdm_class=bar,
                **options,
            )
        except Exception as error:
            _remove_wrong(repo, known)  # whatever the fault: what stays in the cache counts as checked from now on
            if last or not (isinstance(error, (HfHubHTTPError, LocalEntryNotFoundError)) and _may_pass(error)):
                raise
            time.sleep(2**attempt)
            continue
        wrong = _remove_wrong(repo, known)
        if not wrong:
            return Path(found)
    raise DownloadError(
        f"{repo_id}: the content of {', '.join(wrong)} does not match the hash that the Hub gives for it, "
        f"{_ATTEMPTS} times in a row; it was not kept. Try again, perhaps over another connection"
    )


@contextlib.contextmanager
def _one_at_a_time(repo: Path) -> Iterator[None]:
    """Processes that want the same repo wait for each other: none trusts what another has not checked yet."""
    locks = repo.parent / ".locks" / repo.name  # where the client has its own
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock = contextlib.ExitStack()
        lock.enter_context(WeakFileLock(locks / "tlstm.lock"))
    except OSError:  # a cache that is only read, or full: nothing is stored there, or the client says so
        yield
        return
    with lock:
        yield


class _TerminalBar(tqdm):
    """The client's progress bar, on terminals only: not in logs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"disable": None, **options})


class _NoBar(tqdm):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})


def _stamps(repo: Path) -> dict[str, tuple[int, int]]:
    """The cached contents, which the Hub names by their hash, and what tells whether they were replaced."""
    blobs = repo / "blobs"
    if not blobs.is_dir():
        return {}
    entries = (entry for entry in os.scandir(blobs) if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", entry.name))
    return {entry.name: (entry.inode(), entry.stat().st_mtime_ns) for entry in entries}


def _remove_wrong(repo: Path, known: dict[str, tuple[int, int]]) -> list[str]:
    """Check what is in the cache and not `known`, remove what does not match its name, and tell its files' names."""
    wrong = []
    for name, stamp in _stamps(repo).items():
        path = repo / "blobs" / name
        if known.get(name) != stamp and not _has_hash(path, name):
            path.unlink()
            wrong.append(name)
    if not wrong:
        return []
    links = {link for link in (repo / "snapshots").rglob("*") if link.is_symlink() and link.readlink().name in wrong}
    for link in links:
        link.unlink()
    return sorted({"/".join(link.relative_to(repo / "snapshots").parts[1:]) for link in links})


def _has_hash(path: Path, name: str) -> bool:
    """Of 64 digits it is the SHA-256 of a file in LFS, of 40 the id of a git blob."""
    with path.open("rb") as file:
        digest = hashlib.sha256() if len(name) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == name


def _may_pass(error: Exception) -> bool:
    """Whether the server was busy, rather than right."""
    responses = (getattr(found, "response", None) for found in (error, error.__cause__))
    return any(response is not None and response.status_code in _PASSING_STATUS for response in responses)
