"""The LSTM recurrence, apart from any model: its equations in plain torch and the checks of its arguments.

Needs torch only and imports nothing of `tlstm`.
"""

from __future__ import annotations

from .article import ArticleWeights, article_forward
from .checks import ArgumentError
from .layer_op import lstm_layer
from .reference import LSTMGradients, LSTMSteps, lstm_backward, lstm_forward
from .reference_function import lstm
from .zoneout import Zoneout

__all__ = [
    "ArgumentError",
    "ArticleWeights",
    "LSTMGradients",
    "LSTMSteps",
    "Zoneout",
    "article_forward",
    "lstm",
    "lstm_backward",
    "lstm_forward",
    "lstm_layer",
]
