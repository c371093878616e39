"""Where a checkpoint lies: a folder, or the snapshot of one commit of a Hub repo."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from tlstm.checkpoint.folder_view import CheckpointNotFoundError, is_plain_name
from tlstm.checkpoint.stored_weights import index_name, weights_name
from tlstm.hub.card_text import FIGURES_NAME
from tlstm.hub.download import download_snapshot

_COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", FIGURES_NAME)


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
    progress: bool = True,
) -> Path:
    """The folder that holds a checkpoint: `name_or_path` itself, or the snapshot of one commit of a Hub repo.

    Of a repo, `files` are fetched; by default the weights of `variant` and everything that belongs to them. `progress`
    shows bars meanwhile, where stderr is a terminal.

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
        progress=progress,
        allow_patterns=[prefix + file for file in wanted],
    )
    return snapshot / (subfolder or "")


def checkpoint_files(variant: str | None = None) -> tuple[str, ...]:
    """Patterns of the names of a checkpoint's files: those of the variant's weights, and all that belongs to them."""
    shards = weights_name(variant).replace(".safetensors", "-*-of-*.safetensors")
    return (*_COMPANIONS, weights_name(variant), index_name(variant), shards)


def _looks_like_a_path(name: str) -> bool:
    return (
        not name
        or Path(name).is_absolute()
        or name.startswith((".", "~"))
        or name.endswith("/")
        or "\\" in name
        or name.count("/") > 1
    )
