"""Checkpoint folders to and from the Hugging Face Hub. Its own errors (unknown repo, gated, offline) pass unchanged."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from tlstm.checkpoint.folder_view import CheckpointNotFoundError, is_plain_name
from tlstm.checkpoint.stored_weights import index_name, weights_name
from tlstm.model_card import (
    CARD_NAME,
    FIGURES_NAME,
    card_in,
    decoded,
    encoded,
    is_own,
    renewed,
    short_card,
    with_metadata,
)
from tlstm.version import __version__

_COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", FIGURES_NAME)
_ATTEMPTS = 3
_PASSING_STATUS = (429, 500, 502, 503, 504)


class DownloadError(OSError):
    """What a repo delivered is not what it announced."""


def checkpoint_folder(
    name_or_path: str | os.PathLike[str],
    *,
    files: Sequence[str] | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The folder that holds a checkpoint: `name_or_path` itself, or the snapshot of one commit of a Hub repo.

    Of a repo, `files` are fetched; by default the weights of `variant` and everything that belongs to them.

    Raises:
        CheckpointNotFoundError: a path that is no folder. ValueError: a subfolder that leaves it.
        DownloadError (an OSError): a file whose content does not match the hash that the Hub gives for it.
        huggingface_hub's errors: the repo, revision or connection is not there.
    """
    if subfolder and not is_plain_name(subfolder):
        raise ValueError(f"subfolder: expected a relative path such as 'checkpoints/best', got {subfolder!r}")
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path / (subfolder or "")
    if path.is_file():
        raise CheckpointNotFoundError(
            errno.ENOENT, f"expected a checkpoint folder, got a file: {path}; pass the folder it lies in: {path.parent}"
        )
    if not isinstance(name_or_path, str) or _looks_like_a_path(name):
        raise CheckpointNotFoundError(
            errno.ENOENT, f"no such folder: {name!r}; check the path (a Hub repo is named like 'user/model')"
        )
    prefix = f"{subfolder}/" if subfolder else ""
    wanted = files if files is not None else checkpoint_files(variant)
    snapshot = download_snapshot(
        name,
        cache_dir=cache_dir,
        revision=revision,
        force_download=force_download,
        local_files_only=local_files_only,
        token=token,
        allow_patterns=[prefix + file for file in wanted],
    )
    return snapshot / (subfolder or "")


def checkpoint_files(variant: str | None = None) -> tuple[str, ...]:
    """Patterns of the names of a checkpoint's files: those of the variant's weights, and all that belongs to them."""
    shards = weights_name(variant).replace(".safetensors", "-*-of-*.safetensors")
    return (*_COMPANIONS, weights_name(variant), index_name(variant), shards)


def download_snapshot(repo_id: str, *, cache_dir: str | os.PathLike[str] | None = None, **options: Any) -> Path:
    """The snapshot of one commit, every newly downloaded file of which has the hash that names it.

    `options` as in `huggingface_hub.snapshot_download`, errors as in `checkpoint_folder`. The client itself checks
    sizes only, and repeats a request after some failures only; here wrong content is thrown away and fetched again, and
    so is what a busy server did not give.
    """
    cache = Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser()
    repo = cache / repo_folder_name(repo_id=repo_id, repo_type="model")
    known = _stamps(repo)
    for attempt in range(_ATTEMPTS):
        last = attempt == _ATTEMPTS - 1
        try:
            # One call: it resolves the revision to a commit once, and takes every file from that commit.
            found = snapshot_download(
                repo_id, cache_dir=str(cache), library_name="tlstm", library_version=__version__, **options
            )
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            _remove_wrong(repo, known)
            if last or not _may_pass(error):
                raise
            time.sleep(2**attempt)
            continue
        wrong = _remove_wrong(repo, known)
        if wrong:
            continue
        snapshot = Path(found)
        if not snapshot.is_dir():  # the client makes it with the first file
            wanted = ", ".join(options.get("allow_patterns") or ["any file"])
            raise CheckpointNotFoundError(
                errno.ENOENT, f"{repo_id}: no checkpoint in its commit {snapshot.name}; expected some of {wanted}"
            )
        return snapshot
    raise DownloadError(
        f"{repo_id}: the content of {', '.join(wrong)} does not match the hash that the Hub gives for it, "
        f"{_ATTEMPTS} times in a row; it was not kept. Try again, perhaps over another connection"
    )


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


def _looks_like_a_path(name: str) -> bool:
    return (
        not name
        or Path(name).is_absolute()
        or name.startswith((".", "~"))
        or name.endswith("/")
        or "\\" in name
        or name.count("/") > 1
    )


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    is_stale: Callable[[str], bool] = lambda name: False,
    make_card: Callable[[str], str] | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    parent_commit: str | None = None,
    tags: Sequence[str] | None = None,
    license: str | None = None,
) -> CommitInfo:
    """Upload every file of `folder` to `repo_id` (made if missing) in one commit, which also deletes stale files.

    Args:
        is_stale: tells for a file of the repo that is not in `folder` whether it belongs to the old model.
        make_card: given the repo's full name, the card for a folder without one. It also takes the place of a card
            that tlstm made before, never that of one that somebody has written (`tlstm.model_card` tells the rule).
            Without it a repo and folder that have no card get a short one.
        revision: branch to commit to, made if missing; `None` is the main branch.
        parent_commit: refuse with an error if the branch has moved on from this commit.
        tags, license: for the model card's metadata, whoever has written its text.

    Raises:
        huggingface_hub's errors, among them HfHubHTTPError; the repo then holds what it held before.
    """
    api = HfApi(token=token, library_name="tlstm", library_version=__version__)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    for attempt in range(_ATTEMPTS):
        # Pinned, because which files are stale depends on the commit that the new one replaces.
        parent = parent_commit or api.model_info(repo_id, revision=revision).sha
        operations = _operations(
            api, folder, repo_id, is_stale, make_card, revision=parent, tags=tags or (), license=license
        )
        try:
            return api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            )
        except HfHubHTTPError as error:
            if error.response.status_code != 412 or parent_commit is not None or attempt == _ATTEMPTS - 1:
                raise
        except RuntimeError as error:  # so the client wraps what made the upload of a large file fail
            cause = error.__cause__
            if cause is None:
                raise
            if isinstance(cause, RuntimeError):  # another upload has failed and closed the connection that they share
                cause = ConnectionError(f"lost the connection to the Hub ({cause})")
            cause.add_note(str(error))
            raise cause from None
    raise AssertionError("the last attempt returns or raises")


def push_files(files: Mapping[str, bytes], repo_id: str, **options: Any) -> CommitInfo:
    """Upload `files` (name -> content) to `repo_id` in one commit, and nothing else; options and errors of a push."""
    with tempfile.TemporaryDirectory(prefix="tlstm-push-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return push_folder(Path(folder), repo_id, **options)


def _operations(
    api: HfApi,
    folder: Path,
    repo_id: str,
    is_stale: Callable[[str], bool],
    make_card: Callable[[str], str] | None,
    *,
    revision: str | None,
    **metadata: Any,
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What turns the repo at `revision` into one that holds the files of `folder`."""
    present = set(api.list_repo_files(repo_id, revision=revision))
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items() if name != CARD_NAME
    ]
    card, there = card_in(folder), None
    if make_card is not None:
        card = renewed(make_card(repo_id), card)
    if CARD_NAME in present and (card is None or is_own(card)):  # somebody's words in the repo win over tlstm's
        there = decoded(Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision)).read_bytes())
        card = there if card is None else renewed(card, there)
    card = with_metadata(short_card(repo_id) if card is None else card, **metadata)
    if card != there:
        operations.append(CommitOperationAdd(path_in_repo=CARD_NAME, path_or_fileobj=encoded(card)))
    stale = sorted(name for name in present - set(files) if is_stale(name))
    return operations + [CommitOperationDelete(path_in_repo=name) for name in stale]
