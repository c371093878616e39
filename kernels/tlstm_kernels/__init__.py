"""The LSTM recurrence, apart from any model: its equations in plain torch and the checks of its arguments.

Needs torch only and imports nothing of `tlstm`.
"""

from __future__ import annotations

from .checks import ArgumentError
from .reference import LSTMGradients, LSTMSteps, lstm, lstm_backward, lstm_forward

__all__ = ["ArgumentError", "LSTMGradients", "LSTMSteps", "lstm", "lstm_backward", "lstm_forward"]
