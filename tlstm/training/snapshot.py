"""A trainer's whole state to a checkpoint and back: what makes a resumed run equal an uninterrupted one."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tlstm.state import LSTMState
from tlstm.training import checkpoint as files
from tlstm.training.progress import Progress
from tlstm.validation import check_int, check_number, shown

if TYPE_CHECKING:
    from tlstm.training.trainer import Trainer

logger = logging.getLogger(__name__)

CONFIG_NAME = "training_config.json"
# These decide what is reported and kept, not what is computed, so they may change when a run is resumed. `data` and
# `valid_data` are paths: what counts is the content, which is compared by its hash.
_FREE = {
    "data", "valid_data", "keep_last", "save_every", "sample_every", "sample_prompt", "sample_tokens", "log_every",
    "save_dtype", "export", "tensorboard", "plot", "threads", "hub_model_id", "hub_strategy", "hub_every_steps",
    "hub_private", "hub_revision",
}  # fmt: skip
# Where the learning rate does not depend on the length of the run, a run may be lengthened.
_LENGTH = {"epochs", "max_steps"}
_OPEN_ENDED = ("constant", "step", "plateau")


def begin(trainer: Trainer, resume: bool | str | os.PathLike[str]) -> None:
    """Start a new run in `out_dir`, or put the trainer where a checkpoint left off."""
    folder = trainer.checkpoint_dir
    existing = files.list_checkpoints(folder)
    trainer.world.barrier()  # every process has looked before one of them writes
    if resume is False:
        if existing:
            raise ValueError(
                f"{trainer.out_dir}: holds a run already, up to {existing[-1].name}; resume it (resume=True, or "
                "--resume), or choose another output folder"
            )
        files.seed_everything(trainer.config.seed + trainer.world.rank)
        if trainer.world.is_main:
            trainer.log.start()
    else:
        if resume is True and not existing:
            raise FileNotFoundError(f"{folder}: no checkpoint to resume from; start without resume")
        path = existing[-1] if resume is True else Path(resume)
        if existing and path.resolve() not in [other.resolve() for other in existing]:
            raise ValueError(
                f"{path}: not one of the checkpoints in {folder}, which holds another run's; resume one of those, or "
                "choose another output folder"
            )
        restore(trainer, path)
        if trainer.world.is_main:
            for later in existing:  # what came after is no longer this run's history; the log is cut there, too
                if files.step_of(later) > trainer.progress.step:
                    files.remove_checkpoint(later)
        logger.info("resumed from %s at step %d", path, trainer.progress.step)
    if trainer.world.is_main:
        (trainer.out_dir / CONFIG_NAME).write_text(trainer.config.to_json(), encoding="utf-8")


def save(trainer: Trainer) -> Path:
    """Write a checkpoint of the current step; all processes take part, process 0 writes. Does nothing the second time.

    Returns:
        The checkpoint's folder.
    """
    folder, step = trainer.checkpoint_dir, trainer.progress.step
    path = files.checkpoint_path(folder, step)
    if trainer.saved_step == step:
        return path
    own = files.random_state(trainer.world)
    for part, state in enumerate(trainer.states):
        own |= {f"state.{part}.{name}": tensor for name, tensor in state.tensors().items()}
    own["sums"] = trainer.sums
    per_process = trainer.world.gather(own)
    trainer.saved_step = step
    if not trainer.world.is_main:
        return path
    groups: dict[str, dict[str, Tensor]] = {
        "model": dict(trainer.model.named_parameters()),
        "optimizer": files.optimizer_tensors(trainer.optimizer),
        "processes": per_process,
    }
    if trainer.average is not None:
        groups["average"] = trainer.average.tensors
    values = {
        "command": trainer.command,
        "config": trainer.config.to_dict(),
        "model_config": trainer.model.config.to_dict(),
        "data": trainer.fingerprint,
        "world_size": trainer.world.size,
        "total_steps": trainer.total_steps,
        "progress": trainer.progress.to_dict(),
        "batches": trainer.batches.state_dict(),
        "parts": len(trainer.states),
        "plateau": trainer.plateau.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "log": trainer.log.position(),
    }
    files.write_checkpoint(folder, step, files.Checkpoint(groups, values))
    keep = set() if trainer.progress.best_step is None else {trainer.progress.best_step}
    files.prune(folder, trainer.config.keep_last, keep)
    return path


def restore(trainer: Trainer, path: Path) -> None:
    """Put the trainer exactly where the checkpoint at `path` was written.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, a damaged one, or one of another configuration, model, data set
            or number of processes; the message lists what differs.
    """
    checkpoint = files.read_checkpoint(path)
    try:
        _restore(trainer, checkpoint.values, checkpoint.tensors, path)
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ValueError) as error:
        if str(path) in str(error):
            raise
        what = f"{type(error).__name__}: {str(error)[:300]}"
        raise ValueError(f"{path}: damaged, or written by something else ({what}); resume from another one") from error


def _restore(trainer: Trainer, values: dict[str, Any], tensors: dict[str, dict[str, Tensor]], path: Path) -> None:
    _check_same_run(trainer, values, path)
    _check_counters(values)
    files.fill_parameters(trainer.model, tensors["model"], path)
    # The scaler leaves out steps whose gradients overflow, the first ones among them.
    stepped = values["progress"]["step"] > 0 and not trainer.scaler.is_enabled()
    files.load_optimizer_tensors(trainer.optimizer, tensors["optimizer"], stepped)
    if trainer.average is not None:
        for name, average in trainer.average.tensors.items():
            average.copy_(tensors["average"][name])
    # Cloned, because a generator takes its state from the start of the storage, whatever row the view shows.
    own = {name: stacked[trainer.world.rank].clone() for name, stacked in tensors["processes"].items()}
    trainer.states = [_state(own, part, trainer.world.device) for part in range(values["parts"])]
    for state in trainer.states:
        state.check_widths(trainer.model.config.output_sizes, trainer.model.config.widths)
    trainer.sums.copy_(own["sums"])
    trainer.progress = Progress(**values["progress"])
    trainer.command = values["command"]
    trainer.batches.load_state_dict(values["batches"])
    trainer.plateau.load_state_dict(values["plateau"])
    trainer.scaler.load_state_dict(values["scaler"])
    trainer.saved_step = trainer.progress.step
    files.set_random_state(own, trainer.world)
    if trainer.world.is_main:
        trainer.log.start(values["log"], step=trainer.progress.step)


def _check_counters(values: dict[str, Any]) -> None:
    """What would otherwise fail later, in the middle of the run."""
    progress, plateau = Progress(**values["progress"]), values["plateau"]
    for name in ("step", "tokens"):
        check_int(name, getattr(progress, name), 0)
    if progress.step != values["step"]:
        raise ValueError(f"the progress is that of step {progress.step}, the checkpoint that of {values['step']}")
    for name in ("best_step", "valid_step"):
        check_int(name, getattr(progress, name), 0, optional=True)
    for name, value in (("seconds", progress.seconds), ("scale", plateau["scale"])):
        check_number(name, value, "[0, inf)")
    for name, kind in (("train_loss", float), ("valid_loss", float), ("best_loss", float), ("valid_protocol", str)):
        value = getattr(progress, name)
        if not isinstance(value, kind | None):  # a loss may be NaN or infinite
            raise ValueError(f"{name}: expected a {kind.__name__} or null, got {shown(value)}")
    check_number("best", plateau["best"], "(-inf, inf)", optional=True)
    check_int("bad", plateau["bad"], 0)
    check_int("parts", values["parts"], 0)
    for name, size in values["log"].items():
        check_int(name, size, 0)


def _state(own: dict[str, Tensor], part: int, device: torch.device) -> LSTMState:
    prefix = f"state.{part}."
    named = {name.removeprefix(prefix): tensor for name, tensor in own.items() if name.startswith(prefix)}
    return LSTMState.from_tensors(named).to(device)


def _check_same_run(trainer: Trainer, values: dict[str, Any], path: Path) -> None:
    now, then = trainer.config.to_dict(), values["config"]
    free = _FREE | (_LENGTH if trainer.config.schedule in _OPEN_ENDED else set())
    different = [
        f"{key}: {then.get(key)!r} -> {now[key]!r}" for key in now if key not in free and now[key] != then.get(key)
    ]
    if different:
        raise ValueError(
            f"{path}: the run to resume had other settings ({'; '.join(different)}); resume with the old ones, or "
            "start a new run in another output folder"
        )
    model_now, model_then = trainer.model.config.to_dict(), values["model_config"]
    keys = sorted((set(model_now) | set(model_then)) - {"tlstm_version", "architectures", "dtype"})
    changed = [key for key in keys if model_now.get(key) != model_then.get(key)]
    if changed:
        raise ValueError(f"{path}: the run to resume trains a model with other settings: {', '.join(changed)} differ")
    if values["world_size"] != trainer.world.size:
        raise ValueError(
            f"{path}: the run was saved by {values['world_size']} process(es), this one has {trainer.world.size}; "
            "start as many, so that every process finds its hidden state and random generators"
        )
    if values["data"] != trainer.fingerprint:
        raise ValueError(f"{path}: the training or validation tokens are not those of the run to resume")
