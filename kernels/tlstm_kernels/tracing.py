"""What torch is tracing a call for."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Whether torch.export traces this call.

    Not `torch.compiler.is_exporting`, which torch 2.11 takes to be true in every function that torch.compile traces.
    """
    return torch.compiler._is_exporting_flag
