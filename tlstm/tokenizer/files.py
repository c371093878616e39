"""The two files of a tokenizer on disk: found, read, checked and replaced. Knows no `Tokenizer`."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import tokenizers

from tlstm.checkpoint.folder_swap import replace_files
from tlstm.checkpoint.folder_view import (
    CheckpointError,
    CheckpointNotFoundError,
    FolderView,
    read_consistently,
)

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"


def read(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer and its config (empty where the folder has none), both of the same save."""
    return read_consistently(folder, _read)


def write(folder: str | os.PathLike[str], files: dict[str, bytes]) -> None:
    """Replaces the files as one set; whoever reads meanwhile, or after a crash, finds the old set or the new one."""
    replace_files(folder, files)


def _read(view: FolderView) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    path = view.folder / TOKENIZER_FILE
    if view.path(TOKENIZER_FILE) is None:
        message = f"no {TOKENIZER_FILE} in {os.fspath(view.folder)!r}; save one there with Tokenizer.save_pretrained"
        raise CheckpointNotFoundError(errno.ENOENT, message)
    text = _text(path, view.read_bytes(TOKENIZER_FILE))
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare `Exception`s for everything it cannot read
        raise CheckpointError(f"{_damaged(path)} ({error})") from error
    path = view.folder / CONFIG_FILE
    if view.path(CONFIG_FILE) is None:
        return backend, {}
    try:
        config = json.loads(_text(path, view.read_bytes(CONFIG_FILE)))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{_damaged(path)} ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{_damaged(path)} (expected a JSON object, received {type(config).__name__})")
    return backend, config


def _text(path: Path, content: bytes) -> str:
    if content.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{os.fspath(path)!r} is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{_damaged(path)} ({error})") from error


def _damaged(path: Path) -> str:
    return f"{os.fspath(path)!r} is damaged or no tokenizer file; save or download it again"
