"""Training of language models: data, loop, evaluation, checkpoints."""

from tlstm.training.config import TrainingConfig
from tlstm.training.data import TrainingData
from tlstm.training.evaluate import Evaluation, evaluate_stream, evaluate_windows
from tlstm.training.progress import TrainingResult
from tlstm.training.pull import pull_run
from tlstm.training.streams import StreamBatches
from tlstm.training.trainer import Trainer

__all__ = [
    "Evaluation",
    "StreamBatches",
    "Trainer",
    "TrainingConfig",
    "TrainingData",
    "TrainingResult",
    "evaluate_stream",
    "evaluate_windows",
    "pull_run",
]
