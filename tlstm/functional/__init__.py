"""The LSTM as a function of its weights, with several backends behind one name.

    native      torch's own implementation: oneDNN or ATen on a CPU, cuDNN on an NVIDIA GPU
    reference   the equations of `tlstm_kernels.reference`: slow, exact, any dtype up to float64
    triton      the project's own kernels
    auto        triton on a GPU where it has passed its trial (`tlstm.trials`), for layers whose recurrent weights stay
                on the chip; else native

Every backend takes the same arguments and gives the same results; `explain_backends()` says which can run here.
"""

from __future__ import annotations

from tlstm.functional.dispatch import (
    BACKENDS,
    LayerSize,
    Seed,
    available_backends,
    explain_backends,
    lstm,
    lstm_packed,
    resolve_backend,
    why_unavailable,
)
from tlstm.functional.options import BackendUnavailableError, LSTMOptions

__all__ = [
    "BACKENDS",
    "BackendUnavailableError",
    "LSTMOptions",
    "LayerSize",
    "Seed",
    "available_backends",
    "explain_backends",
    "lstm",
    "lstm_packed",
    "resolve_backend",
    "why_unavailable",
]
