"""Where a run stands and how it ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Progress:
    """The counters of a run; all of it is stored in a checkpoint.

    Fields:
        step: optimiser steps taken. tokens: tokens trained on, over all processes. seconds: wall time of training,
            over all resumptions.
        valid_loss, valid_step, valid_protocol: the latest validation loss, nats per token, its step, how it was
            measured. best_loss, best_step: the lowest and its step.
        train_loss: mean training loss of the last complete epoch, measured while training (dropout on).
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float | None = None
    valid_loss: float | None = None
    valid_step: int | None = None
    valid_protocol: str | None = None
    best_loss: float | None = None
    best_step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def observe(self, valid_loss: float, protocol: str) -> bool:
        """Take in a validation loss; whether it is the best so far."""
        self.valid_loss, self.valid_step, self.valid_protocol = valid_loss, self.step, protocol
        if self.best_loss is not None and valid_loss >= self.best_loss:
            return False
        self.best_loss, self.best_step = valid_loss, self.step
        return True


@dataclass(frozen=True)
class TrainingResult:
    """What `Trainer.train` returns.

    Fields:
        status: `"finished"` or `"interrupted"`. signal: number of the signal that interrupted the run, if one did.
        step: steps taken. checkpoint: the newest checkpoint. model_dir: the exported model of a finished run.
        figures: the content of its `training.json`. hub_url: of the commit with the finished model, where the run
            pushes to the Hub and that went through.
    """

    status: str
    step: int
    signal: int | None = None
    checkpoint: Path | None = None
    model_dir: Path | None = None
    figures: dict[str, Any] | None = None
    hub_url: str | None = None

    @property
    def exit_code(self) -> int:
        """For a command line: 0, or 128 + signal as a shell reports it (130 for SIGINT, 143 for SIGTERM)."""
        return 0 if self.signal is None else 128 + self.signal
