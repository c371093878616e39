"""Checkpoint folders to the Hub, each in one commit. Its own errors (gated, refused, offline) pass unchanged."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
)
from huggingface_hub.errors import HfHubHTTPError

from tlstm.hub.card import (
    CARD_NAME,
    card_in,
    decoded,
    encoded,
    is_own,
    renewed,
    short_card,
    with_metadata,
)
from tlstm.hub.download import download_snapshot, limit_waiting
from tlstm.version import __version__

_ATTEMPTS = 3


def hub_api(token: str | bool | None) -> HfApi:
    """A client that says who it is and gives up a server that falls silent."""
    limit_waiting()
    return HfApi(token=token, library_name="tlstm", library_version=__version__)


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
            that tlstm made before, never that of one that somebody has written (`tlstm.hub.card` tells the rule).
            Without it a repo and folder that have no card get a short one.
        revision: branch to commit to, made if missing; `None` is the main branch.
        parent_commit: refuse with an error if the branch has moved on from this commit.
        tags, license: for the model card's metadata, whoever has written its text.

    Raises:
        huggingface_hub's errors, among them HfHubHTTPError; the repo then holds what it held before.
    """
    api = hub_api(token)
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
        snapshot = download_snapshot(
            repo_id, revision=revision, token=api.token, progress=False, allow_patterns=[CARD_NAME]
        )
        there = decoded((snapshot / CARD_NAME).read_bytes())
        card = there if card is None else renewed(card, there)
    card = with_metadata(short_card(repo_id) if card is None else card, **metadata)
    if card != there:
        operations.append(CommitOperationAdd(path_in_repo=CARD_NAME, path_or_fileobj=encoded(card)))
    stale = sorted(name for name in present - set(files) if is_stale(name))
    return operations + [CommitOperationDelete(path_in_repo=name) for name in stale]
