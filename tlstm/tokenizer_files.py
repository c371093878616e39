"""The two files of a tokenizer on disk: found, read, checked and replaced. Knows no `Tokenizer`."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import tokenizers

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"


def find_folder(
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None,
    subfolder: str,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    """The local folder that holds the files: the path itself, or the snapshot of one commit of a Hub repo."""
    name = os.fspath(path_or_repo)
    path = Path(name).expanduser()
    if path.is_dir():
        return path / subfolder
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"expected a folder with {TOKENIZER_FILE}, or a Hub repo id like 'user/model', received {name!r}; "
            f"{'that is a file: pass its folder' if path.exists() else 'no such folder: check the path'}"
        )
    from huggingface_hub import snapshot_download  # slow to import, and needed only for repos

    wanted = [f"{subfolder}/{file}" if subfolder else file for file in (TOKENIZER_FILE, CONFIG_FILE)]
    snapshot = snapshot_download(  # resolves the revision once, so both files come from the same commit
        name,
        revision=revision,
        allow_patterns=wanted,
        cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        token=token,
        local_files_only=local_files_only,
    )
    return Path(snapshot) / subfolder


def read(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer and its config (empty where the folder has none)."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no {TOKENIZER_FILE} in {os.fspath(folder)!r}; save one there with Tokenizer.save_pretrained"
        )
    text = _read_text(path)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare `Exception`s for everything it cannot read
        raise ValueError(f"{_damaged(path)} ({error})") from error
    config_path = folder / CONFIG_FILE
    if not config_path.is_file():
        return backend, {}
    try:
        config = json.loads(_read_text(config_path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{_damaged(config_path)} ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{_damaged(config_path)} (expected a JSON object, received {type(config).__name__})")
    return backend, config


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Replaces each file whole: written beside it, flushed to disk, then renamed over it."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"expected a folder to save to, received the file {os.fspath(folder)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                os.fchmod(stream.fileno(), 0o666 & ~_umask())  # mkstemp's files are private
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, folder / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{os.fspath(path)!r} is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{_damaged(path)} ({error})") from error


def _damaged(path: Path) -> str:
    return f"{os.fspath(path)!r} is damaged or no tokenizer file; save or download it again"
