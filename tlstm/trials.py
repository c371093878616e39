"""Which kernels have passed their trial on which GPU: asked before a kernel is used that nobody asked for by name.

The first call that could use a kernel on a GPU tries it there (`tlstm_kernels.trial`, `tlstm_kernels.decode_trial`):
some seconds, once for a model of GPU, a dtype, and the versions of torch, triton and the kernels. What has passed is
remembered in `$XDG_CACHE_HOME/tlstm/trials` (`~/.cache/tlstm/trials`), where that can be written, one file each; delete
a file to have its trial again. What has not passed is said in a warning and tried again by the next process.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
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
_INSTEAD = {"layer": "torch's own LSTM is used in their place; backend='triton'", "decode": "decoder='kernel'"}
_logger = logging.getLogger("tlstm")
_verdicts: dict[tuple[str, int, str], str | None] = {}
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


def _verdict(kind: str, index: int, dtype: str) -> str | None:
    conditions = _conditions(kind, index, dtype)
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / f"{kind}-{dtype}-{digest}.json"
    if _has_passed(path, conditions):
        return None
    gpu = conditions["gpu"]
    _logger.warning("tlstm: trying the %s kernels in %s on %s; once, for some seconds", kind, dtype, gpu)
    reason = _tried(kind, index, dtype)
    if reason is None:
        _remember(path, conditions)
        return None
    warnings.warn(
        f"tlstm's {kind} kernels failed their trial in {dtype} on {gpu}: {reason}. {_INSTEAD[kind]} uses them all the "
        "same. Please report this.",
        stacklevel=2,
    )
    return f"they failed their trial on {gpu}: {reason}"


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


def _conditions(kind: str, index: int, dtype: str) -> dict[str, Any]:
    """All that a verdict depends on."""
    properties = torch.cuda.get_device_properties(index)
    return {
        "kind": kind,
        "dtype": dtype,
        "gpu": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton"),
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
    """Where passed trials are remembered."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tlstm" / "trials"


def _has_passed(path: Path, conditions: dict[str, Any]) -> bool:
    try:
        return json.loads(path.read_bytes()) == conditions
    except (OSError, ValueError):  # not there, or not to be read: the trial is held again
        return False


def _remember(path: Path, conditions: dict[str, Any]) -> None:
    partial = path.with_suffix(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(conditions, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        _logger.info("tlstm: a passed trial could not be remembered in %s: %s", path.parent, error)
