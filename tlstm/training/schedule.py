"""Learning rates: a closed form of the step where there is one, and the plateau rule."""

from __future__ import annotations

import math
from typing import Any

from tlstm.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, *, step: int, total_steps: int, epoch: int) -> float:
    """Learning rate of step `step` (from 0) of `total_steps`, in epoch `epoch` (from 0).

    Warm-up multiplies by `(step + 1) / warmup_steps` until it is complete. After it, with
    `p = (step - warmup_steps) / (total_steps - warmup_steps)` and `m = min_lr_ratio`:

        cosine    m + (1 - m) * (1 + cos(pi * p)) / 2          linear    m + (1 - m) * (1 - p)
        step      decay_factor ** max(0, epoch + 1 - decay_after)
        constant, plateau   1 (the plateau's factor comes from `Plateau`)
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    progress = min(1.0, max(0.0, progress))
    low = config.min_lr_ratio
    if config.schedule == "cosine":
        factor = low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
    elif config.schedule == "linear":
        factor = low + (1.0 - low) * (1.0 - progress)
    elif config.schedule == "step":
        factor = config.decay_factor ** max(0, epoch + 1 - config.decay_after)
    else:
        factor = 1.0
    return config.lr * warmup * factor


class Plateau:
    """Multiply the learning rate by `factor` after `patience` evaluations in a row without a new best loss."""

    def __init__(self, factor: float, patience: int, floor: float) -> None:
        self.factor, self.patience, self.floor = factor, patience, floor
        self.scale, self.best, self.bad = 1.0, math.inf, 0

    def observe(self, loss: float) -> None:
        """Take in one validation loss."""
        if loss < self.best:
            self.best, self.bad = loss, 0
            return
        self.bad += 1
        if self.bad >= self.patience:
            self.scale, self.bad = max(self.floor, self.scale * self.factor), 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "best": None if math.isinf(self.best) else self.best, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.bad = state["scale"], state["bad"]
        self.best = math.inf if state["best"] is None else state["best"]
