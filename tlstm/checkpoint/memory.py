"""Whether what a file asks for can be had at all: a few bytes may claim terabytes, and a sparse file even hold them."""

from __future__ import annotations

import os
from pathlib import Path

from tlstm.checkpoint.folder_view import CheckpointError

_MEMINFO = Path("/proc/meminfo")


def total_memory() -> int | None:
    """Bytes of memory and swap of this machine, or `None` where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return sum(int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    except (OSError, ValueError, KeyError):
        pass  # not Linux
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None  # not POSIX


def check_fits(needed: int, source: object) -> None:
    """Raise `CheckpointError`, naming `source`, if `needed` bytes are more than this machine has in all."""
    total = total_memory()
    if total is not None and needed > total:
        raise CheckpointError(
            f"{source}: its tensors need {needed / 1e9:,.1f} GB, and this machine has {total / 1e9:,.1f} GB of memory; "
            "if that is the model you want, load it on a larger machine"
        )
