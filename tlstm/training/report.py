"""What a running training tells: records in the log, lines for people, samples."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tlstm.training import export

if TYPE_CHECKING:
    from tlstm.training.trainer import Trainer

logger = logging.getLogger(__name__)


def training(trainer: Trainer, bar: tqdm[Any]) -> None:
    """Record the mean training loss and the speed since the last such record."""
    progress = trainer.progress
    loss = trainer.take_mean(0)
    norm = None if trainer.grad_norm is None else float(trainer.grad_norm)
    if norm is not None and not math.isfinite(norm):
        norm = None  # a step that float16's loss scaling skipped; JSON has no infinity
    tokens, seconds = progress.tokens - trainer.mark[0], progress.seconds - trainer.mark[1]
    trainer.mark = (progress.tokens, progress.seconds)
    speed = round(tokens / seconds, 1) if seconds > 0 else 0.0
    record(trainer, "train", train_loss=loss, lr=trainer.learning_rate, grad_norm=norm, tokens_per_second=speed)
    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)


def evaluation(trainer: Trainer) -> bool:
    """Evaluate and record; whether the loss is the best so far.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    progress = trainer.progress
    result = trainer.evaluate()
    if not math.isfinite(result.loss):
        where = f"the validation loss is {result.loss} at step {progress.step}"
        raise FloatingPointError(f"{where}; lower lr and resume from the last checkpoint")
    improved = progress.observe(result.loss, result.protocol)
    if trainer.config.schedule == "plateau":
        trainer.plateau.observe(result.loss)
    record(trainer, "valid", valid_loss=result.loss, perplexity=result.perplexity, protocol=result.protocol)
    if trainer.world.is_main:
        logger.info(
            "step %d of %d, epoch %.2f: train %s, valid %.4f nats/token (%s), %.1f min",
            progress.step,
            trainer.total_steps,
            trainer.batches.epochs_done,
            "-" if progress.train_loss is None else f"{progress.train_loss:.4f}",
            result.loss,
            result.protocol,
            progress.seconds / 60,
        )
    return improved


def sample(trainer: Trainer) -> None:
    """Record a continuation of the prompt."""
    if trainer.world.is_main:
        text = export.sample(trainer)
        record(trainer, "sample", text=text)
        logger.info("sample at step %d:\n%s", trainer.progress.step, text)


def record(trainer: Trainer, event: str, **values: Any) -> None:
    """Write a record with the run's position, and hand it to the callbacks; in process 0 only."""
    progress = trainer.progress
    entry = {
        "event": event,
        "step": progress.step,
        "epoch": round(trainer.batches.epochs_done, 4),
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 3),
    } | values
    if trainer.world.is_main:
        trainer.log.write(entry)
        for callback in trainer.callbacks:
            callback(entry)
