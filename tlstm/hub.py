"""Checkpoint folders to and from the Hugging Face Hub. Its own errors (unknown repo, gated, offline) pass unchanged."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    snapshot_download,
)

from tlstm.checkpoint.folder_view import CheckpointNotFoundError, is_plain_name
from tlstm.checkpoint.stored_weights import index_name, weights_name
from tlstm.version import __version__

CARD = "README.md"
_COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "training.json")


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
    shards = weights_name(variant).replace(".safetensors", "-*-of-*.safetensors")
    wanted = files if files is not None else (*_COMPANIONS, weights_name(variant), index_name(variant), shards)
    # One call: it resolves the revision to a commit once, and takes every file from that commit.
    snapshot = snapshot_download(
        name,
        revision=revision,
        cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        force_download=force_download,
        local_files_only=local_files_only,
        token=token,
        allow_patterns=[prefix + file for file in wanted],
        library_name="tlstm",
        library_version=__version__,
    )
    return Path(snapshot) / (subfolder or "")


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
    is_stale: Callable[[str], bool],
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    parent_commit: str | None = None,
    tags: Sequence[str] | None = None,
) -> CommitInfo:
    """Upload every file of `folder` to `repo_id` (made if missing) in one commit, which also deletes stale files.

    Args:
        is_stale: tells for a file at the top of the repo and not in `folder` whether it belongs to the old model.
        revision: branch to commit to, made if missing; `None` is the main branch.
        parent_commit: refuse with an error if the branch has moved on from this commit.
        tags: for the model card. A repo and folder without a card get a short one.

    Raises:
        huggingface_hub's errors, among them HfHubHTTPError; the repo then holds what it held before.
    """
    api = HfApi(token=token, library_name="tlstm", library_version=__version__)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    present = set(api.list_repo_files(repo_id, revision=revision))
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items() if name != CARD
    ]
    card_path = files.get(CARD)
    if card_path is None and CARD in present and tags:
        card_path = Path(api.hf_hub_download(repo_id, CARD, revision=revision))
    if card_path is not None or CARD not in present:
        card = _card(card_path, repo_id, tags or ())
        operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card.encode()))
    stale = sorted(name for name in present - set(files) if is_stale(name))
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        parent_commit=parent_commit,
    )


def _card(path: Path | None, repo_id: str, tags: Sequence[str]) -> str:
    """The card at `path`, or a short one, with `tags` added."""
    if path is not None and not tags:
        return path.read_text(encoding="utf-8")
    if path is not None:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    else:
        data = ModelCardData(library_name="tlstm")
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n")
    if tags:
        card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *tags]))
    return str(card)
