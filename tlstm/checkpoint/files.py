"""Checkpoints on disk, named as on the Hugging Face Hub: the one door to writing and reading them. No model knowledge.

`save_checkpoint` puts weights and companion files into a folder as one crash-safe set (`folder_swap`). Reading goes
through `read_consistently` (`folder_view`), and `open_checkpoint` (`stored_weights`) for the weights.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from tlstm.checkpoint.folder_swap import FileContent, replace_files
from tlstm.checkpoint.folder_view import CheckpointError, CheckpointNotFoundError, FolderView, read_consistently
from tlstm.checkpoint.json_file import parse_json, read_json
from tlstm.checkpoint.stored_weights import (
    StoredWeights,
    TensorHeader,
    index_name,
    is_weights_file,
    open_checkpoint,
    weights_name,
)
from tlstm.checkpoint.tensor_file import own_memory, write_tensors

__all__ = [
    "CheckpointError",
    "CheckpointNotFoundError",
    "FolderView",
    "StoredWeights",
    "TensorHeader",
    "index_name",
    "is_weights_file",
    "open_checkpoint",
    "parse_json",
    "read_consistently",
    "read_json",
    "replace_files",
    "save_checkpoint",
    "weights_name",
]

_LAST = ("generation_config.json", "config.json")  # moved into place after the weights and their index


def save_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes] | None = None,
    *,
    variant: str | None = None,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save weights and companion files as one set; killed at any point, the folder holds the old set or the new one.

    The variant's former weights (single file, or shards and index) go with the old set. Other variants and files that
    are not in `files` are left alone.

    Args:
        folder: made if missing.
        tensors: name -> tensor of any shape, on any device. Names that share memory are stored separately.
        files: name -> content of what belongs to the checkpoint besides the weights (config, tokenizer, card).
        max_shard_size: above so many bytes the weights are split; an int, or a string such as "500MB".
        metadata: strings for the safetensors header, besides `format: pt`.

    Raises:
        ValueError: a bad variant, size or file name. OSError: the files could not be written; the message says why,
            and that the old set is unchanged.
    """
    prepared = {name: own_memory(tensor) for name, tensor in tensors.items()}
    pattern = weights_name(variant).replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(
        prepared, filename_pattern=pattern, max_shard_size=_positive_size(max_shard_size)
    )
    header = {"format": "pt", **(metadata or {})}
    contents: dict[str, FileContent] = {}
    for name, keys in (split.filename_to_tensors or {weights_name(variant): []}).items():
        contents[name] = functools.partial(write_tensors, {key: prepared[key] for key in keys}, header)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        contents[index_name(variant)] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    files = dict(files or {})
    for name in files:
        if is_weights_file(name, variant):
            raise ValueError(f"files: {name!r} is the name of a weights file; give companion files other names")
    for name in sorted(files, key=lambda name: (_LAST.index(name) + 1 if name in _LAST else 0, name)):
        contents[name] = files[name]
    replace_files(folder, contents, is_stale=functools.partial(is_weights_file, variant=variant))


def _positive_size(size: int | str) -> int | str:
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    if isinstance(size, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", size, re.IGNORECASE):
        return size
    raise ValueError(f"max_shard_size: expected a positive number of bytes or a string such as '500MB', got {size!r}")
