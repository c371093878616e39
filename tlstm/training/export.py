"""The end of a run: the model folder with its figures, samples, the loss curve."""

from __future__ import annotations

import copy
import json
import logging
import platform
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tlstm.hub.card import CURVE_NAME, FIGURES_NAME
from tlstm.training import checkpoint, plot
from tlstm.training.evaluate import Evaluation, evaluate_stream, evaluate_windows
from tlstm.version import __version__

if TYPE_CHECKING:
    from tlstm.models import LSTMForCausalLM
    from tlstm.training.trainer import Trainer

logger = logging.getLogger(__name__)

MODEL_DIR = "model"
COLD_WINDOW = 256
SAMPLE_TEMPERATURE = 0.8


def finish(trainer: Trainer) -> dict[str, Any]:
    """Write the loss curve and `out_dir/model` with its card; returns the figures in its `training.json`.

    The figures are measured, in the training's own precision without autocast, on the weights as they are stored: after
    rounding to `save_dtype`.
    """
    model, step = exported_model(trainer)
    stored = getattr(torch, trainer.config.save_dtype)
    computed = model.dtype
    model.to(stored).to(computed)
    evaluations: list[Evaluation] = []
    if trainer.data.valid is not None:
        logger.info("final evaluation of %d validation tokens, in one stream and in windows", len(trainer.data.valid))
        evaluations = [
            evaluate_stream(model, trainer.data.valid, tokenizer=trainer.tokenizer),
            evaluate_windows(model, trainer.data.valid, COLD_WINDOW, tokenizer=trainer.tokenizer),
        ]
    figures = describe(trainer, step, evaluations)
    files = {FIGURES_NAME: (json.dumps(figures, indent=2) + "\n").encode()}
    if trainer.config.plot and (curves := plot.write_loss_curve(trainer.out_dir)):
        files[CURVE_NAME] = curves[0].read_bytes()  # the picture of the model card
    model.to(stored)
    model.save_pretrained(trainer.out_dir / MODEL_DIR, tokenizer=trainer.tokenizer, extra_files=files)
    for result in evaluations:
        logger.info("valid %.4f nats/token: %s, %d tokens", result.loss, result.protocol, result.tokens)
    return figures


def exported_model(trainer: Trainer) -> tuple[LSTMForCausalLM, int]:
    """A copy of the model with the weights to export (averaged where there is an average), and their step."""
    model = copy.deepcopy(trainer.model).eval()
    tensors, step = exported_tensors(trainer)
    checkpoint.fill_parameters(model, tensors, Path(MODEL_DIR))
    return model, step


def host_copy(trainer: Trainer) -> tuple[LSTMForCausalLM, int]:
    """The same in the CPU's memory and in the stored dtype, at the cost of one transfer; draws no random numbers."""
    tensors, step = exported_tensors(trainer)
    stored = getattr(torch, trainer.config.save_dtype)
    # What `deepcopy` finds in its memo it takes for a copy it has made already.
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(tensors[name].detach().to("cpu", stored, copy=True), requires_grad=False)
        for name, parameter in trainer.model.named_parameters()
    }
    return copy.deepcopy(trainer.model, memo).eval().to("cpu"), step


def exported_tensors(trainer: Trainer) -> tuple[dict[str, Tensor], int]:
    """The weights to export by parameter name, and their step; those of the best step come from its checkpoint."""
    progress = trainer.progress
    if trainer.config.export == "best" and progress.best_step not in (None, progress.step):
        assert progress.best_step is not None
        path = checkpoint.checkpoint_path(trainer.checkpoint_dir, progress.best_step)
        tensors = checkpoint.read_checkpoint(path).tensors
        return tensors["average" if trainer.average is not None else "model"], progress.best_step
    if trainer.average is not None:
        return trainer.average.tensors, progress.step
    return dict(trainer.model.named_parameters()), progress.step


def describe(trainer: Trainer, step: int, evaluations: list[Evaluation]) -> dict[str, Any]:
    """The run in figures."""
    config, progress = trainer.config, trainer.progress
    return {
        "tlstm_version": __version__,
        "torch_version": torch.__version__,
        "command": trainer.command,
        "hardware": hardware(trainer.world.device),
        "processes": trainer.world.size,
        "threads": torch.get_num_threads(),
        "data": trainer.data.description
        | {
            "train_tokens": len(trainer.data.train),
            "valid_tokens": 0 if trainer.data.valid is None else len(trainer.data.valid),
        },
        "parameters": trainer.model.num_parameters(),
        "steps": progress.step,
        "total_steps": trainer.total_steps,
        "exported_step": step,
        "epochs": round(trainer.batches.epochs_done, 3),
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "tokens_per_second": round(progress.tokens / progress.seconds, 1) if progress.seconds else None,
        "weights": "exponential moving average" if trainer.average is not None else "as trained",
        "train": {"protocol": "mean of the last epoch while training, dropout on", "loss": progress.train_loss},
        "valid": [result.to_dict() for result in evaluations],
        "latest_valid": {
            "step": progress.valid_step,
            "loss": progress.valid_loss,
            "protocol": progress.valid_protocol,
        },
        "best_valid": {"step": progress.best_step, "loss": progress.best_loss},
        "training_config": config.to_dict(),
    }


def hardware(device: torch.device) -> str:
    """The processor or GPU in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.processor() or platform.machine()}"


def sample(trainer: Trainer) -> str:
    """A continuation of `sample_prompt`, drawn with a seed of its own: the training's random numbers are untouched."""
    config, model = trainer.config, trainer.model
    assert trainer.tokenizer is not None
    ids = torch.tensor([trainer.tokenizer.encode(config.sample_prompt)], device=trainer.world.device)
    was_training = model.training
    model.eval()
    try:
        with trainer.average.applied() if trainer.average is not None else nullcontext():
            tokens = model.generate(
                ids,
                do_sample=True,
                temperature=SAMPLE_TEMPERATURE,
                max_new_tokens=config.sample_tokens,
                seed=config.seed + trainer.progress.step,
                return_dict_in_generate=False,
            )
    finally:
        model.train(was_training)
    assert isinstance(tokens, torch.Tensor)
    return trainer.tokenizer.decode(tokens[0])
