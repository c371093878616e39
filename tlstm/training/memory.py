"""What the C allocator does with the large blocks that a training step on a CPU allocates and frees."""

from __future__ import annotations

import ctypes
import platform

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1  # bytes: mallopt takes an int


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory in this process instead of handing it back to the kernel block by block.

    Every step of training on a CPU frees its activations and allocates them again; by default each block of more than
    a few MB comes fresh from the kernel, which clears it page by page. Kept blocks make a step take about a quarter
    less CPU time, for a few hundred MB more of resident memory (`benchmarks/LOG.md`). The setting holds for the whole
    process, so the command line makes it and the library never does; call it yourself before `Trainer.train`.

    Returns:
        Whether the allocator took the setting; on systems without glibc nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(parameter, _LARGEST) == 1 for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
