"""A run's model, and where asked its whole training state, to the Hugging Face Hub.

A repo holds at its top what `model/` of a run holds, and with `hub_strategy="checkpoint"` also `training/`: a run
folder with its newest trainer checkpoint, which `pull_run` fetches to resume bit for bit elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tlstm.hub.card import FIGURES_NAME
from tlstm.training import checkpoint as files
from tlstm.training import export, snapshot
from tlstm.training.background_push import BackgroundPush, PushCommand, Snapshot
from tlstm.training.pull import CHECKPOINT_DIR, LOG_NAMES, TRAINING_DIR

if TYPE_CHECKING:
    from tlstm.training.trainer import Trainer

logger = logging.getLogger(__name__)

STAGING_DIR = "hub"  # of what is being pushed, in the run's folder
GRACE_SECONDS = 15.0  # for a push in flight when the run is interrupted; torchrun kills what is left after 30


class RunPushes:
    """The pushes of one run; in processes other than the first nothing is pushed, and every method does nothing."""

    def __init__(self, trainer: Trainer) -> None:
        config = trainer.config
        self._trainer = trainer
        self._command: PushCommand | None = None
        self._background: BackgroundPush | None = None
        if config.hub_model_id is not None and trainer.world.is_main:
            self._command = PushCommand(
                config.hub_model_id,
                private=config.hub_private,
                revision=config.hub_revision,
                token=trainer.hub_token,
            )
            self._background = BackgroundPush(self._command)
            shutil.rmtree(trainer.out_dir / STAGING_DIR, ignore_errors=True)  # of a run that was killed

    def push(self) -> None:
        """Push the model as it stands, and a trainer checkpoint of this step where that is the strategy.

        All processes take part in the checkpoint.
        """
        if self._trainer.config.hub_strategy == "checkpoint":
            snapshot.save(self._trainer)
        if self._background is not None:
            self._submit(self._background, finished=False)

    def finish(self) -> str | None:
        """Push the finished model, and wait for it; the commit's address, `None` if it did not go through.

        All processes wait together, by asking one another again and again: a barrier would give up after a while.
        """
        trainer, background = self._trainer, self._background
        if trainer.config.hub_model_id is None:
            return None
        submitted = False
        if background is not None:
            logger.info("pushing the finished model to %s", trainer.config.hub_model_id)
            submitted = self._submit(background, finished=True)
        while trainer.world.any(background is not None and not background.wait(1.0) and not trainer.asked_to_stop):
            pass
        if background is None or self._command is None:
            return None
        if submitted and background.wait(GRACE_SECONDS) and background.failure is None:
            return background.commit_url
        folder = self._folder() if self._folder().is_dir() else trainer.out_dir / export.MODEL_DIR
        by_hand = self._command.by_hand(folder)
        logger.warning("the finished model is not on the Hub; push it by hand: %s", by_hand)
        return None

    def settle(self) -> None:
        """Give what is in flight or waits a moment to end."""
        if self._background is not None:
            self._background.wait(GRACE_SECONDS)

    def close(self) -> None:
        """Abandon what has not ended by now."""
        if self._background is not None:
            self._background.close()
            staging = self._trainer.out_dir / STAGING_DIR
            for path in staging.glob("*"):  # also what a process that was killed has left
                if path != self._background.kept:
                    shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):  # the folder of a finished model that could not be pushed stays
                staging.rmdir()

    def _folder(self) -> Path:
        """Where what is pushed of this step is put together."""
        return self._trainer.out_dir / STAGING_DIR / files.checkpoint_path(Path(), self._trainer.progress.step).name

    def _submit(self, background: BackgroundPush, *, finished: bool) -> bool:
        """Hand a snapshot of this step to the background; whether there was one to hand over."""
        folder = self._folder()
        try:
            background.submit(self._snapshot(folder, finished=finished), keep=finished)
        except Exception as error:  # a full disk, or memory: a push never costs the run
            logger.warning("step %d could not be pushed: %s", self._trainer.progress.step, error)
            shutil.rmtree(folder, ignore_errors=True)
            return False
        return True

    def _snapshot(self, folder: Path, *, finished: bool) -> Snapshot:
        """Taken now, from copies in host memory and from links to files that nobody writes to again."""
        trainer = self._trainer
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if trainer.config.hub_strategy == "checkpoint":
            _stage_run(trainer, folder / TRAINING_DIR)
        step = trainer.progress.step
        if finished:
            _link_files(trainer.out_dir / export.MODEL_DIR, folder)
            return Snapshot(step, folder, lambda: None)
        model, exported_step = export.host_copy(trainer)
        figures = json.dumps(export.describe(trainer, exported_step, []), indent=2) + "\n"
        tokenizer, extra = trainer.tokenizer, {FIGURES_NAME: figures.encode()}
        return Snapshot(step, folder, lambda: model.save_pretrained(folder, tokenizer=tokenizer, extra_files=extra))


def is_due(trainer: Trainer, saved: bool) -> bool:
    """Whether a push is due at this step, where a checkpoint was `saved` or not; the same in all processes."""
    config = trainer.config
    if config.hub_model_id is None or config.hub_strategy == "end":
        return False
    return trainer.progress.step % config.hub_every_steps == 0 if config.hub_every_steps else saved


def _stage_run(trainer: Trainer, folder: Path) -> None:
    """A run folder of what is needed to resume at the step of the newest checkpoint."""
    kept = {trainer.progress.step}
    if trainer.config.export == "best" and trainer.progress.best_step is not None:
        kept.add(trainer.progress.best_step)
    for step in kept:
        source = files.checkpoint_path(trainer.checkpoint_dir, step)
        if source.is_dir():  # the best one of a run that saves seldom is the newest
            _link_files(source, folder / CHECKPOINT_DIR / source.name)
    for name in LOG_NAMES:
        shutil.copyfile(trainer.out_dir / name, folder / name)
    own = {snapshot.CONFIG_NAME: trainer.config.to_json().encode(), **trainer.model.config.files()}
    own |= trainer.tokenizer.files() if trainer.tokenizer is not None else {}
    for name, content in own.items():
        (folder / name).write_bytes(content)


def _link_files(source: Path, target: Path) -> None:
    """The files of `source` in `target` under a second name, where the disk can do that, else as copies."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if not path.name.startswith("."):
            try:
                os.link(path, target / path.name)
            except OSError:
                shutil.copyfile(path, target / path.name)
