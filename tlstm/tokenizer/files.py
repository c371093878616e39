"""The two files of a tokenizer on disk: found, read, checked and replaced. Knows no `Tokenizer`."""

from __future__ import annotations

import errno
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
from tlstm.checkpoint.json_file import read_json, what_came_instead
from tlstm.validation import shown

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_GAPS = 1 << 20  # ids without a token; the library lists them all in memory when it writes the file
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


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
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise CheckpointError(f"{_damaged(path)} (it has no tokens)")
    if max(vocabulary.values()) > len(vocabulary) + _GAPS:
        raise CheckpointError(
            f"{_damaged(path)} (its {len(vocabulary)} tokens have ids up to {max(vocabulary.values())})"
        )
    path = view.folder / CONFIG_FILE
    if view.path(CONFIG_FILE) is None:
        return backend, {}
    config = read_json(path, view.read_bytes(CONFIG_FILE))
    _check_config(config, path)
    return backend, config


def _check_config(config: dict[str, Any], path: Path) -> None:
    """What this library takes from the config has the types that it relies on."""
    for role in ROLES:
        token = config.get(role)
        content = token.get("content") if isinstance(token, dict) else token
        if not (isinstance(content, str) or token is None):
            raise CheckpointError(f"{path}: {role}: expected a token, as a text or under `content`, got {shown(token)}")
    side = config.get("padding_side", "left")
    if side not in ("left", "right"):
        raise CheckpointError(f"{path}: padding_side: expected 'left' or 'right', got {shown(side)}")


def _text(path: Path, content: bytes) -> str:
    story = what_came_instead(content)
    if story is not None:
        raise CheckpointError(f"{path}: {story}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{_damaged(path)} ({error})") from error


def _damaged(path: Path) -> str:
    return f"{path}: damaged, or no tokenizer file; download or save it again"
