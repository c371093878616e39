"""One safetensors file of named tensors: written whole or not at all, and read with errors that name it."""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from tlstm.checkpoint.folder_swap import replace_files
from tlstm.checkpoint.memory import check_fits
from tlstm.checkpoint.tensor_header import check_header


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` (any device, any strides) and `metadata` to `path`; killed at any point, `path` is old or new.

    Raises:
        OSError: the file could not be written; what `path` held before is unchanged.
    """
    path = Path(path)
    owned = {name: own_memory(tensor.detach().cpu()) for name, tensor in tensors.items()}
    replace_files(path.parent, {path.name: functools.partial(write_tensors, owned, dict(metadata))})


def write_tensors(tensors: Mapping[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write contiguous `tensors` to a new file at `path`, in place; for use inside a larger crash-safe save."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        shared = tensor.numel() > 0 and tensor.data_ptr() in seen
        seen.add(tensor.data_ptr())
        separate[name] = tensor.clone() if shared else tensor
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(separate, path, metadata=metadata)
    except safetensors.SafetensorError as error:
        # The writer reports disk errors in words of its own; give them back their number, and so their meaning.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    os.chmod(path, mode)  # safetensors makes files that only their owner can read; go by the umask instead


def own_memory(tensor: Tensor) -> Tensor:
    """A detached tensor that owns all of its memory and no more: sharding counts, and safetensors stores, storages."""
    tensor = tensor.detach().contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone()


def read_tensors(
    path: str | os.PathLike[str], *, expected_format: str, writer: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata of a file whose metadata state `expected_format`.

    Raises:
        FileNotFoundError: no such file. ValueError: a damaged file, or one of another format; it names the file and
            `writer`, the method that makes such files.
    """
    check_header(Path(path))
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, MemoryError) as error:
        raise ValueError(f"{path}: damaged or no safetensors file ({error}); write it again with {writer}") from None
    check_fits(sum(tensor.nbytes for tensor in tensors.values()), path)
    if metadata.get("format") != expected_format:
        raise ValueError(
            f"{path}: expected a file of format {expected_format!r}, got {metadata.get('format')!r}; "
            f"write it with {writer}"
        )
    return tensors, metadata
