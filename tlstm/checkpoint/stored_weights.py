"""Find and open the weights in a checkpoint folder: one safetensors file, or shards with an index.

Everything that the headers tell is checked before a single tensor is read. Pickle files are never read: loading one can
run any code.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from tlstm.checkpoint.folder_view import CheckpointError, CheckpointNotFoundError, FolderView
from tlstm.checkpoint.json_file import read_json, what_came_instead
from tlstm.checkpoint.tensor_header import MAX_HEADER_BYTES, check_header, check_names

# What safetensors calls the dtypes that torch computes with; its 4- to 8-bit floats are refused by name.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)")
_SHARD = re.compile(r"[^./\\:][^/\\:]*\.safetensors")
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_CONVERT = (
    "convert it where you trust it: state = torch.load(file, weights_only=True); "
    "safetensors.torch.save_file(state, 'model.safetensors')"
)


def weights_name(variant: str | None = None) -> str:
    """`model.safetensors`, or `model.fp16.safetensors` for variant "fp16"."""
    return f"model{_suffix(variant)}.safetensors"


def index_name(variant: str | None = None) -> str:
    """`model.safetensors.index.json`, or `model.safetensors.index.fp16.json` for variant "fp16"."""
    return f"model.safetensors.index{_suffix(variant)}.json"


def is_weights_file(name: str, variant: str | None = None) -> bool:
    """Whether `name` is one that `save_checkpoint` gives to this variant's weights: single file, shard or index."""
    shard = re.compile(rf"model{re.escape(_suffix(variant))}-\d{{5,}}-of-\d{{5,}}\.safetensors")
    return name in (weights_name(variant), index_name(variant)) or shard.fullmatch(name) is not None


def _suffix(variant: str | None) -> str:
    if variant is None:
        return ""
    if not isinstance(variant, str) or not _VARIANT.fullmatch(variant):
        raise ValueError(f"variant: expected letters, digits, '-' and '_' as in 'fp16', got {variant!r}")
    return f".{variant}"


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


class StoredWeights:
    """An opened checkpoint: `headers` of all tensors, and the tensors themselves one at a time. Close it after use.

    `source` is the file that tells which tensors there are: the single one, or the index of the shards.
    """

    def __init__(
        self,
        source: Path,
        headers: dict[str, TensorHeader],
        handles: dict[Path, Any],
        stack: contextlib.ExitStack,
    ) -> None:
        self.source = source
        self.headers = headers
        self._handles = handles
        self._stack = stack

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU. It lies in the mapped file: copy what is to outlive this object."""
        return self._handles[self.headers[name].file].get_tensor(name)

    def close(self) -> None:
        """Let go of the files."""
        self._handles.clear()
        self._stack.close()

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def open_checkpoint(view: FolderView, variant: str | None = None) -> StoredWeights:
    """Open the weights that `view` shows, single file or shards, and check their headers. Reads no tensor data.

    Raises:
        CheckpointNotFoundError: no safetensors weights there (the message lists what is).
        CheckpointError: a file is empty, truncated, garbage, a git-lfs pointer; the index and its shards disagree.
    """
    single, index = view.path(weights_name(variant)), view.path(index_name(variant))
    if single is not None and index is not None:
        raise CheckpointError(
            f"{view.folder}: holds both {weights_name(variant)} and {index_name(variant)}, two sets of weights of "
            "which one is out of date; delete the one that you do not want (the index together with its shards)"
        )
    stack = contextlib.ExitStack()
    try:
        if single is not None:
            source = single
            handle, headers = _open_file(single, stack)
            handles = {single: handle}
        elif index is not None:
            source = index
            handles, headers = _open_shards(view, index, stack)
        else:
            raise _nothing_there(view, variant)
    except BaseException:
        stack.close()
        raise
    return StoredWeights(source, headers, handles, stack)


def _open_file(path: Path, stack: contextlib.ExitStack) -> tuple[Any, dict[str, TensorHeader]]:
    check_header(path)
    try:
        handle = stack.enter_context(safetensors.safe_open(path, framework="pt", device="cpu"))
        stored = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118  (the handle is no dict)
        shapes = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in stored.items()}
    except (safetensors.SafetensorError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path}: {_what_is_wrong(path, error)}") from None
    headers = {}
    for key, (shape, dtype) in shapes.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: tensor {key!r} is stored as {dtype}; expected one of {', '.join(DTYPES)}")
        headers[key] = TensorHeader(shape, DTYPES[dtype], path)
    return handle, headers


def _open_shards(
    view: FolderView, index: Path, stack: contextlib.ExitStack
) -> tuple[dict[Path, Any], dict[str, TensorHeader]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: expected a 'weight_map' of tensor names to file names; save or download it again"
        )
    check_names(weight_map, str(index))
    for name in weight_map.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name) or not name.isprintable() or len(name) > 200:
            raise CheckpointError(
                f"{index}: refused the shard name {_short(name)}: expected the name of a .safetensors file in the same "
                "folder. Do not use this checkpoint unless you know where it comes from"
            )
    handles: dict[Path, Any] = {}
    headers: dict[str, TensorHeader] = {}
    for name in sorted(set(weight_map.values())):
        path = view.path(name)
        if path is None:
            raise CheckpointNotFoundError(
                errno.ENOENT,
                f"{view.folder / name}: this shard is listed in {index.name} but missing; download it again",
            )
        handles[path], found = _open_file(path, stack)
        for key, header in found.items():
            if key in headers:
                raise CheckpointError(f"{path}: tensor {key!r} is also in {headers[key].file.name}; save it again")
            if weight_map.get(key) != name:
                raise CheckpointError(
                    f"{path}: holds tensor {key!r}, which {index.name} places in {weight_map.get(key, 'no file')}; the "
                    "files come from different checkpoints, download or save all of them again"
                )
            headers[key] = header
    absent = sorted(set(weight_map) - set(headers))
    if absent:
        raise CheckpointError(
            f"{index}: {_some(absent)} not in the shards it names; the files come from different checkpoints, download "
            "or save all of them again"
        )
    return handles, headers


def _what_is_wrong(path: Path, error: Exception) -> str:
    """A damaged file's most likely story, and what to do about it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    story = what_came_instead(start)
    if story is not None:
        return story
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return f"this is a pickle file under another name, which can run any code and is not read; {_CONVERT}"
    promised = _promised_size(path, start)
    if promised is not None and size < promised:
        return f"the file is truncated: {size} of {promised} bytes are there; download or save it again"
    reason = str(error) or type(error).__name__
    length = int.from_bytes(start[:8], "little")
    if length > size - 8:
        reason = f"it claims a header of {length} bytes in a file of {size}"
    return f"not valid safetensors ({reason}); download or save it again"


def _promised_size(path: Path, start: bytes) -> int | None:
    """How long a safetensors file should be by its own header, or at least; `None` if it does not begin like one."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9:
        return 9
    if start[8:9] != b"{" or length > MAX_HEADER_BYTES:
        return None
    with path.open("rb") as file:
        header = file.read(8 + length)[8:]
    if len(header) < length:
        return 8 + length
    try:
        ends = [int(entry["data_offsets"][1]) for key, entry in json.loads(header).items() if key != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    return 8 + length + max(ends, default=0)


def _nothing_there(view: FolderView, variant: str | None) -> CheckpointNotFoundError:
    names = view.names()
    wanted = f"{view.folder}: expected {weights_name(variant)} or {index_name(variant)}"
    pickles = [name for name in names if _PICKLES.fullmatch(name)]
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return CheckpointNotFoundError(
            errno.ENOENT, f"{wanted}, found {_some(others)}; name the one you want with `variant` (None: no suffix)"
        )
    if pickles:
        return CheckpointNotFoundError(
            errno.ENOENT, f"{wanted}, found only pickle files ({_some(pickles)}), which can run any code; {_CONVERT}"
        )
    found = _some(names) if names else "no file at all"
    return CheckpointNotFoundError(errno.ENOENT, f"{wanted}, found {found}; check the folder, or download it again")


def _short(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _some(names: list[str], limit: int = 10) -> str:
    listed = ", ".join(map(_short, names[:limit]))
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"
