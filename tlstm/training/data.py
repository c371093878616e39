"""Text files to memory-mapped token ids: tokenised once, cached beside the run, split into train and validation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from tlstm.tokenizer.tokenizer import Tokenizer
    from tlstm.training.config import TrainingConfig
    from tlstm.training.distributed import World

_BLOCK = 1 << 24  # ids looked at in one go


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Token ids to train and to validate on.

    Fields:
        train: (N,) integer ids, often a memory map. valid: the same, or `None`.
        description: where they come from and how they were split; goes into the exported model's `training.json`.
    """

    train: np.ndarray
    valid: np.ndarray | None
    description: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_ids(
        cls,
        train: Sequence[int] | np.ndarray | Tensor,  # (N,)
        valid: Sequence[int] | np.ndarray | Tensor | None = None,  # (M,)
    ) -> TrainingData:
        """Ids that are in memory already."""
        return cls(as_ids(train, "train"), None if valid is None else as_ids(valid, "valid"))

    @classmethod
    def from_text(
        cls,
        path: str | os.PathLike[str],
        tokenizer: Tokenizer,
        cache_dir: str | os.PathLike[str],
        *,
        valid_path: str | os.PathLike[str] | None = None,
        valid_fraction: float = 0.1,
    ) -> TrainingData:
        """Tokenise a text file, or a folder of `*.txt` files, into `cache_dir`, or take what is cached there.

        Without `valid_path` the first `int((1 - valid_fraction) * N)` of the `N` tokens train and the rest validates.

        Raises:
            FileNotFoundError: no such path. ValueError: a folder without text files, an empty text, one that is not
                UTF-8, or characters the tokenizer does not know.
        """
        ids, source = tokenize(path, tokenizer, Path(cache_dir), "train" if valid_path is not None else "text")
        if valid_path is not None:
            valid_ids, valid_source = tokenize(valid_path, tokenizer, Path(cache_dir), "valid")
            return cls(ids, valid_ids, {"train": source, "valid": valid_source})
        boundary = int((1.0 - valid_fraction) * len(ids))
        valid = ids[boundary:] if boundary < len(ids) else None
        description = {"text": source, "valid_fraction": valid_fraction, "boundary": boundary}
        return cls(ids[:boundary], valid, description)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `ValueError` when an id lies outside the model's vocabulary."""
        for name, ids in (("training", self.train), ("validation", self.valid)):
            if ids is None or not len(ids):
                continue
            low, high = _extremes(ids)
            if low < 0 or high >= vocab_size:
                raise ValueError(
                    f"the {name} data holds token ids from {low} to {high}, but the model's vocab_size is {vocab_size}"
                    "; tokenise with the model's own tokenizer, or give the model the tokenizer's vocabulary size"
                )

    def fingerprint(self) -> str:
        """SHA-256 over all ids: tells whether a resumed run sees the same data."""
        digest = hashlib.sha256()
        for ids in (self.train, self.valid):
            digest.update(b"none" if ids is None else str(len(ids)).encode())
            for start in range(0, 0 if ids is None else len(ids), _BLOCK):
                digest.update(np.ascontiguousarray(ids[start : start + _BLOCK], dtype="<u4").data)  # type: ignore[index]
        return digest.hexdigest()


def read_text(config: TrainingConfig, tokenizer: Tokenizer | None, cache_dir: Path, world: World) -> TrainingData:
    """The data that `config` names; process 0 tokenises, the others find the cache that it has written."""
    if config.data is None:
        raise ValueError("expected data to train on: set `data` in the training config, or pass token ids")
    if tokenizer is None:
        raise ValueError("tokenizer: training on text files needs one; pass it, or pass token ids as `data`")
    options: dict[str, Any] = {"valid_path": config.valid_data, "valid_fraction": config.valid_fraction}
    if world.is_main:
        TrainingData.from_text(config.data, tokenizer, cache_dir, **options)
    world.barrier()
    return TrainingData.from_text(config.data, tokenizer, cache_dir, **options)


def as_ids(ids: Sequence[int] | np.ndarray | Tensor, name: str) -> np.ndarray:
    """A one-dimensional integer array; raises `ValueError` for anything else."""
    array = ids.numpy(force=True) if isinstance(ids, Tensor) else np.asarray(ids)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name}: expected a one-dimensional sequence of token ids, got {array.dtype} of shape {array.shape}"
        )
    return array


def text_files(path: str | os.PathLike[str]) -> list[Path]:
    """The file itself, or all `*.txt` files under a folder, sorted by name."""
    root = Path(path)
    if root.is_dir():
        files = sorted(file for file in root.rglob("*.txt") if file.is_file())
        if not files:
            raise ValueError(f"{root}: expected a folder with *.txt files, found none; name a file, or rename them")
        return files
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such file or folder; expected a text file or a folder of *.txt files")
    return [root]


def tokenize(
    path: str | os.PathLike[str], tokenizer: Tokenizer, cache_dir: Path, name: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Token ids of a text, as a read-only memory map of `cache_dir/<name>.bin`, and a description of the text.

    The cache is used when the hash of the text and of the tokenizer are unchanged. Files of a folder are joined in
    order, each followed by the end-of-text id where the tokenizer has one. Cache files appear whole or not at all.
    """
    files = text_files(path)
    source = {
        "path": Path(path).name,
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": _hash_files(files),
        "tokenizer_sha256": _hash_tokenizer(tokenizer),
    }
    data, meta = cache_dir / f"{name}.bin", cache_dir / f"{name}.json"
    cached = _read_meta(meta)
    if cached is not None and data.exists() and all(cached.get(key) == value for key, value in source.items()):
        ids = np.memmap(data, dtype=cached["dtype"], mode="r")
        if len(ids) == cached["tokens"]:
            return ids, cached
    cache_dir.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    end_of_text = tokenizer.eos_token_id if len(files) > 1 else None
    characters = tokens = 0
    staged = data.with_name(f".{data.name}.staged")
    try:
        with open(staged, "wb") as out:
            for file in files:
                text = _read_text(file)
                block = tokenizer.encode_array(text).astype(dtype)
                if end_of_text is not None:
                    block = np.append(block, dtype.type(end_of_text))
                out.write(block.tobytes())
                characters += len(text)
                tokens += len(block)
            out.flush()
            os.fsync(out.fileno())
        if characters == 0:
            raise ValueError(f"{path}: expected text to train on, found none; the file is empty")
        meta.unlink(missing_ok=True)  # never new ids under an old description
        os.replace(staged, data)
    finally:
        staged.unlink(missing_ok=True)
    source |= {"characters": characters, "tokens": tokens, "dtype": dtype.str}
    staged.write_text(json.dumps(source, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(staged, meta)
    return np.memmap(data, dtype=dtype, mode="r"), source


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text, byte {error.start} is not; convert the file first") from None


def _read_meta(meta: Path) -> dict[str, Any] | None:
    """A damaged description only means that the text is tokenised again."""
    try:
        values = json.loads(meta.read_bytes())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _hash_files(files: list[Path]) -> str:
    """The SHA-256 of a single file, as sha256sum prints it; of several, that of their digests in a row."""
    digests = []
    for file in files:
        with open(file, "rb") as handle:
            digests.append(hashlib.file_digest(handle, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def _hash_tokenizer(tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256()
    for _, content in sorted(tokenizer.files().items()):
        digest.update(content)
    return digest.hexdigest()


def _extremes(ids: np.ndarray) -> tuple[int, int]:
    blocks = [ids[start : start + _BLOCK] for start in range(0, len(ids), _BLOCK)]
    return int(min(block.min() for block in blocks)), int(max(block.max() for block in blocks))
