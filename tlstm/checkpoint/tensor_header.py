"""What the safetensors library lets pass in the header of a file."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from tlstm.checkpoint.folder_view import CheckpointError, check_is_file
from tlstm.checkpoint.json_file import parse_json

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
# An LSTM of a thousand layers has five thousand. The library takes a minute to list a million.
MAX_TENSORS = 1 << 16
MAX_NAME = 1000


def check_header(path: Path) -> None:
    """Refuse a tensor that is listed twice (the library takes one of the two), a million tensors, unprintable names.

    The rest - sizes, dtypes, offsets, overlaps - is the library's to check.

    Raises:
        CheckpointError: it names the file. OSError: there is no such file, or it cannot be read.
    """
    check_is_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(path.stat().st_size - 8, MAX_HEADER_BYTES):
            return  # no safetensors file, or a truncated one
        header = file.read(length)
    names = parse_json(header, f"{path}: header")
    check_names(names, str(path))


def check_names(names: Collection[str], source: str) -> None:
    """Refuse more tensors than any model has, and names that would upset a terminal or fill it."""
    if len(names) > MAX_TENSORS:
        raise CheckpointError(f"{source}: lists {len(names)} tensors; expected at most {MAX_TENSORS}")
    for name in names:
        if len(name) > MAX_NAME or not name.isprintable():
            raise CheckpointError(f"{source}: refused the tensor name {name[:100]!r}: expected a short, printable one")
