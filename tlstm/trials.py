"""What is known of the kernels on this machine: asked before a kernel is used that nobody asked for by name.

The first call that could use a kernel on a GPU tries it there (`tlstm_kernels.trial`, `tlstm_kernels.decode_trial`),
which compiles one or two kernels: once for a model of GPU, a dtype, and the versions of torch, triton and the kernels.
What has passed is remembered in `$XDG_CACHE_HOME/tlstm/trials` (`~/.cache/tlstm/trials`), one file each, where that
can be written; delete a file to have its trial again. What has not passed is said in a warning and tried again by the
next process.

In the same place is noted which kernels were compiled before: Triton has them in its cache, and they start at once.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import threading
import uuid
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import tlstm_kernels
import torch

_TRIALS = {"layer": "trial", "decode": "decode_trial"}
_INSTEAD = {
    "layer": "torch's own LSTM is used in their place; backend='triton' uses them all the same",
    "decode": "tokens are made without them; decoder='kernel' uses them all the same",
}
_logger = logging.getLogger("tlstm")
_verdicts: dict[tuple[str, int | None, str], str | None] = {}
_lock = threading.RLock()


@torch.compiler.assume_constant_result
def trial_refusal(
    kind: str,
    index: int | None,
    dtype: str,
) -> str | None:
    """Why the kernels are not to be used unasked, or None where they have passed, at the latest now.

    Args:
        kind: "layer" or "decode".
        index: of the CUDA device; None for the current one.
        dtype: as torch names it, "bfloat16".
    """
    index = torch.cuda.current_device() if index is None else index
    key = (kind, index, dtype)
    if key not in _verdicts:
        if torch.cuda.is_current_stream_capturing():
            return "they were not tried on this GPU before a CUDA graph was recorded; call once outside of it first"
        with _lock:
            if key not in _verdicts:
                _verdicts[key] = _verdict(*key)
    return _verdicts[key]


@torch.compiler.assume_constant_result
def has_passed(kind: str, index: int | None, dtype: str) -> bool:
    """Whether this process knows that the kernels have passed, without a look at anything else."""
    return _verdicts.get((kind, index, dtype), "unknown") is None


def _verdict(kind: str, index: int, dtype: str) -> str | None:
    conditions = _conditions(kind, index, dtype)
    if _is_noted(conditions):
        return None
    gpu = conditions["gpu"]
    _logger.warning("tlstm: trying the %s kernels in %s on %s, once; they are compiled first", kind, dtype, gpu)
    reason = _tried(kind, index, dtype)
    if reason is None:
        _note(conditions)
        return None
    warnings.warn(
        f"tlstm's {kind} kernels failed their trial in {dtype} on {gpu}: {reason}. {_INSTEAD[kind]}. Please report it.",
        stacklevel=2,
    )
    return f"they failed their trial on {gpu}: {reason}"


def has_compiled(kernel: str, index: int) -> bool:
    """Whether `note_compiled` was told of this kernel on this GPU, by this process or an earlier one."""
    return _is_noted(_conditions("compiled", index, kernel))


def note_compiled(kernel: str, index: int) -> None:
    """Triton has compiled a kernel for the GPU of this index, and keeps it; `kernel` is all that it depends on."""
    conditions = _conditions("compiled", index, kernel)
    if not _is_noted(conditions):
        _note(conditions)


def _tried(kind: str, index: int, dtype: str) -> str | None:
    """The trial itself, whatever modes of torch the caller is in."""
    module: Any = importlib.import_module(f"tlstm_kernels.{_TRIALS[kind]}")
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(kind == "layer"),
        torch.autocast("cuda", enabled=False),
        torch.cuda.device(index),
    ):
        run = module.layer_trial if kind == "layer" else module.decode_trial
        return run(torch.device("cuda", index), getattr(torch, dtype))


def _conditions(kind: str, index: int, what: str) -> dict[str, Any]:
    """All that a note depends on; `what` is a dtype, or a kernel."""
    properties = torch.cuda.get_device_properties(index)
    return {
        "kind": kind,
        "what": what,
        "gpu": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.import_module("triton").__version__,  # whatever name it was installed by
        "kernels": _source_digest(),
    }


@cache
def _source_digest() -> str:
    """Of the kernels' own code."""
    digest = hashlib.sha256()
    for path in sorted(Path(tlstm_kernels.__path__[0]).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where the notes are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tlstm" / "trials"


def _path_of(conditions: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"{conditions['kind']}-{digest}.json"


def _is_noted(conditions: dict[str, Any]) -> bool:
    try:
        return json.loads(_path_of(conditions).read_bytes()) == conditions
    except (OSError, ValueError):  # not there, or not to be read
        return False


def _note(conditions: dict[str, Any]) -> None:
    path = _path_of(conditions)
    partial = path.with_suffix(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(conditions, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        _logger.info("tlstm: what is known of a kernel could not be noted in %s: %s", path.parent, error)
